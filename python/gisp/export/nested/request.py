"""Which sizes of a nested checkpoint are to carry a compensation of their own: checked before anything is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from gisp.compensation.request import CompensationRequest
from gisp.errors import GispError
from gisp.select.schedule import check_several, nearest_step

_GIVEN = "--sparsities holds"


def check_request(request: CompensationRequest | None, sparsities: Sequence[Any]) -> None:
    """Refuse a compensation without sizes, and sizes without a compensation.

    Raises:
        GispError: names what is missing.
    """
    check_several(sparsities)
    if request is None and sparsities:
        given = ",".join(map(str, sparsities))
        raise GispError(
            f"--sparsities {given} with --nested is for --compensate METHOD: give both or leave it out, all sizes of "
            "the run are in a nested checkpoint"
        )
    if request is not None and not sparsities:
        raise GispError(
            f"--compensate {request.options.method} with --nested needs --sparsities, as 0.2,0.3,0.5: the sizes that "
            "carry a compensation of their own"
        )


def milestone_steps(points: Sequence[float], sparsities: Sequence[Any], goal: float | None = None) -> list[int]:
    """Steps of a run that are nearest to some sparsities, ascending.

    Args:
        points: sparsity after every step, the dense model's 0 first.
        goal: of :func:`gisp.select.schedule.goal_of`.

    Raises:
        GispError: a sparsity beyond the run, one of the dense model, or two of the same step.
    """
    found: dict[int, Any] = {}
    for sparsity in sparsities:
        step = nearest_step(points, sparsity, _GIVEN, goal)
        if step == 0:
            raise GispError(
                f"{_GIVEN} {sparsity}, which is nearest to the dense model: nothing is lost there, leave it out"
            )
        if step in found:
            raise GispError(
                f"{_GIVEN} {found[step]} and {sparsity}, which are both nearest to step {step} ({points[step]:.4f}): "
                "leave one of them out"
            )
        found[step] = sparsity
    return sorted(found)
