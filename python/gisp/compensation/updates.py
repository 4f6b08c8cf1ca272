"""What a fit says of one block."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

OnBlock = Callable[["BlockUpdate"], None]


@dataclass(frozen=True)
class BlockUpdate:
    """New weights of one output projection.

    Attributes:
        name: of the block's group, ``layers.{i}.heads`` or ``layers.{i}.channels``.
        columns: original input columns of the projection that stay, int64 [K].
        weight: [D, K] for these columns, in the dtype of the model; None = as it was.
        bias: the whole bias [D] in the dtype of the model; None = as it was.
        before, after: what the block's output lacked to its target over the calibration tokens, as a fraction of the
            target's sum of squares, without and with the update (of ``kfac``: with the least squares it starts from).
        damping: what the solver needed.
    """

    name: str
    columns: torch.Tensor
    weight: torch.Tensor | None
    bias: torch.Tensor | None
    before: float
    after: float
    damping: float
