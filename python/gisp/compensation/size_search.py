"""The search for the size of a change, by what it makes of held-out text.

Every value costs a forward pass over that text. So the values found so far say where to look next: at the vertex of the
parabola through three of them (successive parabolic interpolation; Brent, Algorithms for Minimization without
Derivatives, 1973, chapter 5).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch

_TRIALS = 12
# A size shrinks until it helps. Without a parabola it then grows a little; a parabola may take it further, yet not far
# beyond what was tried: a size that is too large loses all.
_SHRINKING, _GROWTH, _FURTHEST = 0.5, 1.5, 3.0
# The search ends where a parabola promises less than this part of the fall so far, or within this factor of a bound.
_GAIN, _NEAR = 0.01, 1.15
# Values, size 0 among them, after which a parabola that rises from size 0 on is believed.
_TRUSTED = 8


def search(
    value: Callable[[float], torch.Tensor], first: float, start: torch.Tensor, most: float = math.inf
) -> tuple[float, torch.Tensor]:
    """The size with the lowest sum of those tried, and its values [U]; (0, ``start``) where none has a lower one.

    Args:
        value: sums over texts [U] with a size; sizes whose sum is infinite or not a number do not count.
        first: the size tried first.
        start: values of size 0.
        most: the largest size.
    """
    values, sums = {0.0: start}, {0.0: float(start.sum())}
    size: float | None = first
    while size is not None and size not in values and len(values) <= _TRIALS:
        values[size] = value(size)
        found = float(values[size].sum())
        sums[size] = found if math.isfinite(found) else math.inf
        size = _next_size(sums, most)
    best = min(sums, key=sums.__getitem__)
    return best, values[best]


def _next_size(sums: dict[float, float], most: float) -> float | None:
    """The size to try next, None at the end of the search."""
    sizes, best = sorted(sums), min(sums, key=sums.__getitem__)
    if not best:
        return _smaller(sums, sizes)
    place = sizes.index(best)
    above = sizes[place + 1] if best < sizes[-1] else math.inf
    if above < math.inf and sums[above] < math.inf:
        around, bound = sizes[place - 1 : place + 2], above
    else:
        # Nothing on the other side has a value: between the best and what does not count, or beyond all that was tried.
        around, bound = sizes[max(place - 2, 0) : place + 1], min(most, math.sqrt(best * above))
    if len(around) < 3:
        further = min(best * _GROWTH, bound)
        return further if further >= best * _NEAR else best / _GROWTH
    wanted, lowest = _vertex([(size, sums[size]) for size in around])
    bound = min(bound, best * _FURTHEST)
    if wanted > bound:
        return bound if bound >= best * _NEAR else None
    if sums[best] - lowest >= _GAIN * (sums[0.0] - sums[best]):
        return min(_rounded(wanted), bound)
    # The first parabola is no evidence of what lies between size 0 and the best.
    return best / _GROWTH if len(sums) == 3 and place == 1 else None


def _smaller(sums: dict[float, float], sizes: Sequence[float]) -> float | None:
    """The size to try next where none helped yet, None where a parabola says that none does."""
    halved = sizes[1] * _SHRINKING
    if len(sizes) < 3 or not sums[sizes[2]] < math.inf:
        return halved
    wanted, _ = _vertex([(size, sums[size]) for size in sizes[:3]])
    if wanted > 0:
        return min(halved, max(_rounded(wanted), halved / _FURTHEST))
    return halved if len(sizes) < _TRUSTED else None


def _rounded(size: float) -> float:
    """To two digits: other batches, whose sums differ in their last bits, shall lead to the same size."""
    return float(f"{size:.2g}")


def _vertex(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Where the parabola through three points is lowest and its value there; infinitely far if it has no minimum."""
    (a, at_a), (b, at_b), (c, at_c) = points
    slope = (at_b - at_a) / (b - a)
    curvature = ((at_c - at_b) / (c - b) - slope) / (c - a)
    if not curvature > 0:
        return math.inf, -math.inf
    x = (a + b) / 2 - slope / (2 * curvature)
    return x, at_a + slope * (x - a) + curvature * (x - a) * (x - b)
