"""The search for the size of a change, by what it makes of held-out text.

Every measurement costs a forward pass over that text. So those made say where to look next. A parabola through three
divergences has its vertex there (successive parabolic interpolation; Brent, Algorithms for Minimization without
Derivatives, 1973, chapter 5). Near a limit it is where a line or a parabola through excesses meets it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from gisp.compensation.acceptance import Measured

_TRIALS = 12
# A size shrinks until it helps, to an eighth of its half at a time where a limit or a parabola says so.
_SHRINKING, _FASTEST = 0.5, 0.125
# Without a parabola it then grows a little; a parabola may take it further, yet not far beyond what was tried: a size
# that is too large loses all.
_GROWTH, _FURTHEST = 1.5, 3.0
# The search ends where a parabola promises less than this part of the fall so far, or within this factor of a bound.
_GAIN, _NEAR = 0.01, 1.15
# Values, size 0 among them, after which a parabola that rises from size 0 on is believed.
_TRUSTED = 8
# What a size has to be of the first one.
_LEAST = 1e-3


def search(
    measure: Callable[[float], Measured], first: float, start: Measured, most: float = math.inf, share: float = 1.0
) -> tuple[float, Measured]:
    """The size with the lowest divergence of those tried, and what it makes; (0, ``start``) where none has a lower one.

    Args:
        measure: what a size makes of held-out text.
        first: the size tried first.
        start: what size 0 makes.
        most: the largest size.
        share: part of what every limit leaves at the start that this change may take; the rest is for later ones.
    """
    rooms = [(1 - share) * max(0.0, -excess) for excess in start.excess]
    made, found = {0.0: start}, {0.0: start.leaving(rooms)}
    size: float | None = first
    while size is not None and size >= _LEAST * first and size not in found and len(found) <= _TRIALS:
        made[size] = measure(size)
        found[size] = made[size].leaving(rooms)
        size = _next_size(found, most)
    best = min(found, key=lambda tried: found[tried].total)
    return best, made[best]


def _next_size(found: dict[float, Measured], most: float) -> float | None:
    """The size to try next, None at the end of the search."""
    sums = {size: measured.total for size, measured in found.items()}
    sizes, best = sorted(sums), min(sums, key=sums.__getitem__)
    if not best:
        return _smaller(found, sums, sizes)
    place = sizes.index(best)
    above = sizes[place + 1] if best < sizes[-1] else None
    if above is not None and sums[above] < math.inf:
        around, bound = sizes[place - 1 : place + 2], above
    else:
        # What lies on the other side does not count, or nothing was tried there.
        around = sizes[max(place - 2, 0) : place + 1]
        bound = most if above is None else _edge(found, best, above)
    bound = min(bound, best * _FURTHEST)
    if len(around) < 3:
        further = min(best * _GROWTH, bound)
        return further if further >= best * _NEAR else best / _GROWTH
    wanted, lowest = _vertex([(size, sums[size]) for size in around])
    if wanted > bound:
        return bound if bound >= best * _NEAR else None
    if sums[best] - lowest >= _GAIN * (sums[0.0] - sums[best]):
        return _rounded(wanted)
    # The first parabola is no evidence of what lies between size 0 and the best.
    return best / _GROWTH if len(sums) == 3 and place == 1 else None


def _smaller(found: dict[float, Measured], sums: dict[float, float], sizes: Sequence[float]) -> float | None:
    """The size to try next where none helped yet, None where a parabola says that none does."""
    halved = sizes[1] * _SHRINKING
    if not sums[sizes[1]] < math.inf:
        wanted = _edge(found, 0.0, sizes[1])
    elif len(sizes) < 3 or not sums[sizes[2]] < math.inf:
        return halved
    else:
        wanted = _rounded(_vertex([(size, sums[size]) for size in sizes[:3]])[0])
    if wanted > 0:
        return min(halved, max(wanted, halved * _FASTEST))
    return halved if len(sizes) < _TRUSTED else None


def _edge(found: dict[float, Measured], inside: float, outside: float) -> float:
    """Where a limit is met between a size that counts and one that does not; in their middle where no limit tells."""
    roots = []
    for start, low, high in zip(found[0.0].excess, found[inside].excess, found[outside].excess, strict=True):
        # A line from size 0 says nothing of a loss that has no room there: it may fall first.
        if low <= 0 < high < math.inf and (low < 0 or inside):
            roots.append(_root(start, (inside, low), (outside, high)))
    if not roots:
        return math.sqrt(inside * outside) if inside else outside * _SHRINKING
    return max(inside, _rounded(min(roots)))


def _root(start: float, inside: tuple[float, float], outside: tuple[float, float]) -> float:
    """Where what is below 0 inside and above it outside is 0: by the parabola through ``start`` at 0 where that opens
    upwards, else by a line."""
    (a, low), (b, high) = inside, outside
    slope = (high - low) / (b - a)
    if a and start < 0:
        from_start = (low - start) / a
        curvature = (slope - from_start) / b
        linear = from_start - curvature * a
        if curvature > 0:
            return (math.sqrt(linear * linear - 4 * curvature * start) - linear) / (2 * curvature)
    return a - low / slope


def _rounded(size: float) -> float:
    """Down to two digits: other batches, whose sums differ in their last bits, shall lead to the same size."""
    if not 0 < size < math.inf:
        return size
    digit = 10.0 ** (math.floor(math.log10(size)) - 1)
    return float(f"{math.floor(size / digit * (1 + 1e-9)) * digit:.2g}")


def _vertex(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Where the parabola through three points is lowest and its value there; infinitely far if it has no minimum."""
    (a, at_a), (b, at_b), (c, at_c) = points
    slope = (at_b - at_a) / (b - a)
    curvature = ((at_c - at_b) / (c - b) - slope) / (c - a)
    if not curvature > 0:
        return math.inf, -math.inf
    x = (a + b) / 2 - slope / (2 * curvature)
    return x, at_a + slope * (x - a) + curvature * (x - a) * (x - b)
