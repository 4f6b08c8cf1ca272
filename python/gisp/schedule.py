"""How much is removed by the end of each step."""

from __future__ import annotations


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
