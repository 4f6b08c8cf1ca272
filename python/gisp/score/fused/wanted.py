"""Where the scores of one block go, and of which kind they are."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from gisp.score.fused.batch import PassBatch
from gisp_kernels import gate_grads


@dataclass(frozen=True)
class Wanted:
    """What a block's backward pass is to leave behind; one of the two.

    Attributes:
        elements: float32 [structures], ``sum |W * G|`` is added.
        gates: float32 [sequences, structures], overwritten by the gradients of gates on the structures.
    """

    elements: torch.Tensor | None = None
    gates: torch.Tensor | None = None

    def take_gates(self, input: torch.Tensor, grad_input: torch.Tensor, block: int, batch: PassBatch) -> None:
        """Gate gradients from what the output projection reads and its gradient, [T, columns] each."""
        gate_grads(batch.by_sequence(input), batch.by_sequence(grad_input), block=block, out=self.gates)
