"""What an export is asked for: one description, which planning, measuring and writing read."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gisp.compensation import CompensationRequest
from gisp.compensation.options import CompensationOptions
from gisp.export.formats.uniform import uniform_spec
from gisp.export.sizes.options import FORMATS, SizeOptions
from gisp.export.sizes.rounding import round_mlp
from gisp.export.spec import PrunedSpec
from gisp.model.structures import ModelMap, map_model
from gisp.replicas.group import Replicas
from gisp.replicas.sharing import alone
from gisp.run.resources.base import BasePlace

Together = Callable[[], AbstractContextManager[Replicas | None]]
"""Brings processes together for a while; ``None`` for one on its own."""


@dataclass(frozen=True)
class Wanted:
    """What is exported of a run, what of it is measured and fitted, where and by which processes.

    Attributes:
        run: its folder.
        sparsity: the nearest step is exported; ``None``: the last one.
        format: a name of :data:`gisp.export.sizes.options.FORMATS`.
        place: where the base model lies meanwhile.
        sizes: what sizes are rounded to.
        data, window: evaluation data, ``None`` to measure nothing, and the longest input in tokens.
        compensation: of what is exported, fitted in the dtype of the run; ``None`` for none.
        together: the processes that measure and fit.
    """

    run: Path
    sparsity: float | None
    format: str
    place: BasePlace
    sizes: SizeOptions = field(default_factory=SizeOptions)
    data: str | None = None
    window: int | None = None
    compensation: CompensationRequest | None = None
    together: Together = alone

    def rounded(self, base: Any, spec: PrunedSpec) -> PrunedSpec:
        """What is exported of a point of the dense base model."""
        if self.format == "uniform":
            return uniform_spec(base, spec, self.sizes)
        return spec if self.sizes.round_mlp is None else round_mlp(map_model(base), spec, self.sizes.round_mlp)

    def compensation_options(self, request: CompensationRequest, model_map: ModelMap) -> CompensationOptions:
        """Options of the compensation as far as the format can hold what they fit.

        Raises:
            GispError: it cannot.
        """
        return request.for_format(self.format, model_map, adds_biases=FORMATS[self.format].adds_biases)
