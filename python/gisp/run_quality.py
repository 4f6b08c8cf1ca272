"""What rounding a pruned point to other sizes costs in perplexity."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from gisp.evaluation import EvalOptions, Perplexity
from gisp.evaluation.data import prepare
from gisp.export import PrunedSpec
from gisp.shrink import ShrinkableModel
from gisp.structures import channels_name, heads_name, map_model
from gisp.trajectory import Trajectory


@dataclass(frozen=True)
class Quality:
    """Perplexity of the exact pruned point and of what is exported, on the same tokens.

    Attributes:
        data: name of the evaluation data.
        dtype: of the weights while it was measured.
    """

    point: Perplexity
    exported: Perplexity
    data: str
    dtype: str

    def notes(self) -> tuple[tuple[str, str], ...]:
        """Lines of the model card and the command line."""
        how = f"{self.exported.tokens:,} tokens of {self.data}, window {self.exported.window}, {self.dtype}"
        rows = [("perplexity", f"{self.exported.perplexity:.4f} ({how})")]
        if self.exported is not self.point:
            rows.append(("perplexity of the exact pruned point, same tokens", f"{self.point.perplexity:.4f}"))
        return tuple(rows)


def measure_quality(
    trajectory: Trajectory,
    point: PrunedSpec,
    rounded: Callable[[torch.nn.Module, PrunedSpec], PrunedSpec],
    data: str,
    *,
    window: int | None,
    device: str,
) -> Quality:
    """Perplexity of a point of a run and of what rounding makes of it, as ``gisp eval RUN`` measures it.

    Args:
        rounded: the exported spec, from the dense base model and the point.
        data: evaluation data, as for ``gisp eval``.

    Raises:
        GispError: the data cannot be read, or a loss is NaN.
    """
    model = trajectory.load_base(device=device)
    model_map = map_model(model)
    measure = prepare(data, EvalOptions(window=window), model, str(trajectory.base_model["path"]))
    exported = rounded(model, point)
    shrinkable = ShrinkableModel(model_map)

    def result(spec: PrunedSpec) -> Perplexity:
        shrinkable.remove(_removal(spec, model_map.num_heads, model_map.intermediate_size))
        found = measure(model)
        shrinkable.rollback()
        return Perplexity(found["perplexity"], found["tokens"], found["window"])

    exact = result(point)
    return Quality(
        point=exact,
        exported=exact if exported.layers == point.layers else result(exported),
        data=Path(data).name if Path(data).exists() else data,
        dtype=str(model.dtype).removeprefix("torch."),
    )


def _removal(spec: PrunedSpec, heads: int, channels: int) -> dict[str, torch.Tensor]:
    """Everything the spec does not keep, by group."""
    gone = {}
    for layer, keep in enumerate(spec.layers):
        for name, count, kept in (
            (heads_name(layer), heads, keep.heads),
            (channels_name(layer), channels, keep.channels),
        ):
            index = sorted(set(range(count)) - set(kept))
            if index:
                gone[name] = torch.tensor(index)
    return gone
