"""How much is removed by the end of each step, and which step a sparsity names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from gisp.errors import GispError, quoted


def parameter_target(sparsity: float, step: int, steps: int, decoder_parameters: int) -> float:
    """Removed decoder parameters allowed after ``step`` (1-based) of ``steps`` equal steps."""
    return sparsity * decoder_parameters * step / steps


def structure_ratio(ratio: float, step: int, steps: int) -> float:
    """Fraction of all structures removed at ``step``: paper Eq. 7, ``(k-1)/(n-1) * rho``, ``rho`` if n = 1."""
    return ratio if steps == 1 else ratio * (step - 1) / (steps - 1)


def threshold_rank(structures: int, ratio: float) -> int:
    """1-based rank ``k`` of the structure whose score is the threshold, as the released code takes it.

    The arithmetic is kept in this order on purpose: it decides the rank when ``structures * (1 - ratio)`` is a
    whole number up to rounding.
    """
    return min(structures - int(structures * (1 - ratio)) + 1, structures)


def goal_of(config: Mapping[str, Any], steps: int) -> float | None:
    """The sparsity that a run asked for, once all its steps are done; ``None`` before, or where it asked for a ratio.

    Args:
        config: as a run records it.
        steps: done.
    """
    goal, planned = config.get("sparsity"), (config.get("steps") or 0, config.get("regrow") or 0)
    # Nested checkpoints carry the config of their run unchecked.
    sound = type(goal) is float and all(type(number) is int for number in planned)
    return goal if sound and steps >= sum(planned) else None


def check_several(sparsities: object) -> None:
    """Refuse what is no list of sparsities, such as one number.

    Raises:
        GispError: names the value.
    """
    if isinstance(sparsities, str) or not isinstance(sparsities, Sequence):
        raise GispError(f"sparsities is {quoted(sparsities)}: give a list of numbers, as [0.2, 0.3]")


def nearest_step(points: Sequence[float], sparsity: Any, given: str = "sparsity is", goal: float | None = None) -> int:
    """Number of the step whose sparsity is nearest to a given one, the smaller of two equally near.

    Whatever picks a point of a run by its sparsity picks it here.

    Args:
        points: sparsity after every step, ascending; the first is the dense model's 0.
        given: begins the error, which goes on with the sparsity.
        goal: of :func:`goal_of`. Whole heads and aligned widths may end a run short of it by more than half a step; it
            names the end all the same.

    Raises:
        GispError: no number in [0, 1), or one beyond the end by more than half the last step that removed anything.
    """
    try:
        inside = bool(0 <= sparsity < 1)
    except TypeError:
        inside = False
    if not inside:
        raise GispError(f"{given} {quoted(sparsity)}: give a value in [0, 1)")
    end = points[-1]
    last = end - max((point for point in points if point < end), default=end)
    # Sparsities are quotients: a sum of two of them may be off in its last bits.
    if sparsity > end + last / 2 + 1e-9 and not (goal is not None and abs(sparsity - goal) < 1e-9):
        raise GispError(
            f"{given} {sparsity}, the run ends at {end:.4f}: "
            f"give at most that, or prune again with --sparsity {sparsity}"
        )
    return min(range(len(points)), key=lambda step: (abs(points[step] - sparsity), points[step]))
