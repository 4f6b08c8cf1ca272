"""The registry of criteria: what each one is called, how it is built, and which options it is published with.

Option checking reads it, so nothing here imports torch: a built-in criterion names its code as text.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

ALLOCATORS = {"global": "by their scores", "uniform": "the same part of each", "owl": "less of layers with outliers"}
# 1,200 steps of the default batch are 10M tokens, where the accuracy of the method saturates as published.
GATE_DEFAULTS = {"gate_steps": 1200, "gate_rate": 0.02}
# What is summed of the gradient of the loss.
GradientKind = Literal["absolute", "signed", "second-order"]


@dataclass(frozen=True)
class Criterion:
    """Where the scores of a step come from.

    Attributes:
        score: a function of a group, or a class built from a :class:`gisp.score.context.Context`, or ``module:name`` of
            one of the two, imported on first use. See :func:`gisp.register_criterion`.
        options: options that the criterion sets where they are not given.
        sees_loss: whether scores depend on the objective.
        gradient: what :class:`gisp.score.gradient.GradientScorer` sums.
        standardises: ``norm`` "zscore" is the criterion's own affair.
        whole_layers: whether a layer goes whole or not at all.
        trains: whether scores are trained to the sparsity of their step.
        adds_up: whether scores are made of sums that parts of a step can be summed to apart from one another.
    """

    score: str | Callable[..., Any]
    options: Mapping[str, Any] = field(default_factory=dict)
    sees_loss: bool = False
    gradient: GradientKind | None = None
    standardises: bool = False
    whole_layers: bool = False
    trains: bool = False
    adds_up: bool = False

    @property
    def defaults(self) -> dict[str, Any]:
        """Options of a run where they are not given; the preset has the rest."""
        # Of a layer that goes whole no width is left to align and no minimum to keep.
        whole = {"norm": "none", "align": 1, "keep_minimum": False} if self.whole_layers else {}
        return {"allocator": "global", **whole, **self.options}

    @property
    def fp8(self) -> bool:
        """Whether there are 8-bit products: the fused pass alone has them."""
        return self.gradient in ("absolute", "second-order")


def _gradient(kind: GradientKind, **options: Any) -> Criterion:
    adds_up = kind == "second-order"
    return Criterion("gisp.score.gradient:GradientScorer", options, sees_loss=True, gradient=kind, adds_up=adds_up)


CRITERIA: dict[str, Criterion] = {
    "gisp": _gradient("absolute"),
    "second-order": _gradient("second-order", first_order="shrunk"),
    "magnitude": Criterion("gisp.score.criteria.simple:magnitude"),
    # Divided by parameters every head would go before any channel.
    "random": Criterion("gisp.score.criteria.simple:Random", {"norm": "none"}),
    "taylor-local": _gradient("absolute", allocator="uniform"),
    "signed": _gradient("signed"),
    "wanda-sp": Criterion("gisp.score.criteria.activation:WandaSP", {"allocator": "uniform"}, adds_up=True),
    "flap": Criterion("gisp.score.criteria.activation:FLAP", {"norm": "zscore"}, standardises=True, adds_up=True),
    # A run is one training; its scores are zero where a gate closes, whatever the structure's size.
    "learned-gates": Criterion(
        "gisp.score.criteria.learned_gates.scorer:LearnedGates",
        {"norm": "none", "schedule": "parameters", "engine": "stream", "steps": 1, "ema": 0.0, **GATE_DEFAULTS},
        trains=True,
    ),
    "block-influence": Criterion("gisp.score.criteria.block_influence:BlockInfluence", whole_layers=True),
}


def names_with(attribute: str) -> str:
    """Names of the criteria that have an attribute, for messages."""
    return ", ".join(name for name, criterion in CRITERIA.items() if getattr(criterion, attribute))
