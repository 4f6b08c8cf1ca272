"""Which layers lie in which stage."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from gisp.stages.schedule import Loads, Schedule, make_schedule

# More chunks a stage wait less for one another and send more; beyond this the gain is small.
MOST_CHUNKS = 5
# Share of the time of a step below which other borders are not worth a move.
WORTH_MOVING = 0.02


@dataclass(frozen=True)
class Placement:
    """Chunks of consecutive layers, dealt to stages in turn.

    Attributes:
        stages: how many there are.
        bounds: first layer of every chunk, and the number of layers.
    """

    stages: int
    bounds: tuple[int, ...]

    @property
    def chunks(self) -> list[range]:
        """The layers of every chunk."""
        return [range(start, stop) for start, stop in pairwise(self.bounds)]

    def stage_of(self, chunk: int) -> int:
        """The stage that holds a chunk."""
        return chunk % self.stages

    def held(self, stage: int) -> Iterator[int]:
        """The layers of a stage."""
        for chunk, layers in enumerate(self.chunks):
            if self.stage_of(chunk) == stage:
                yield from layers

    def owners(self) -> list[int]:
        """The stage of every layer."""
        return [self.stage_of(chunk) for chunk, layers in enumerate(self.chunks) for _ in layers]


@dataclass(frozen=True)
class LayerCosts:
    """Products of every layer's pass over a token, in any unit; those of the end belong to the last layer.

    Attributes:
        backward: 0 where a layer needs none.
        message: what it costs to hand a token on to the next chunk.
    """

    forward: tuple[float, ...]
    backward: tuple[float, ...]
    message: float = 0.0

    def loads(self, placement: Placement, tokens: Sequence[int]) -> Loads:
        """What passes of so many tokens cost in every chunk of a placement."""
        forward, backward = (
            [sum(costs[layer] for layer in chunk) for chunk in placement.chunks]
            for costs in (self.forward, self.backward)
        )
        forward = [cost + self.message for cost in forward]
        backward = [cost + self.message if cost else 0.0 for cost in backward]
        return Loads(placement.stages, tuple(forward), tuple(backward), tuple(tokens))


def place(costs: LayerCosts, stages: int, tokens: Sequence[int]) -> Placement:
    """The placement whose step ends first.

    Args:
        tokens: of every pass of a step.
    """
    layers = len(costs.forward)
    found = [
        _best_borders(costs, Placement(stages, _balanced(costs, stages * chunks)), tokens)
        for chunks in range(1, min(MOST_CHUNKS, layers // stages) + 1)
    ]
    return min(found, key=lambda placement: schedule_of(costs, placement, tokens).seconds)


def replaced(costs: LayerCosts, now: Placement, tokens: Sequence[int]) -> Placement:
    """A placement for costs that have changed, of as many chunks; ``now`` itself where little would be gained."""
    # All stages wait for this: it does not try as many borders as the start does.
    balanced = Placement(now.stages, _balanced(costs, len(now.bounds) - 1))
    then, seconds = (schedule_of(costs, placement, tokens).seconds for placement in (balanced, now))
    return balanced if then < (1 - WORTH_MOVING) * seconds else now


def schedule_of(costs: LayerCosts, placement: Placement, tokens: Sequence[int]) -> Schedule:
    """In which order the stages of a placement pass a step."""
    return make_schedule(costs.loads(placement, tokens))


def _balanced(costs: LayerCosts, parts: int) -> tuple[int, ...]:
    """Borders of so many parts whose greatest cost is least; no part is empty."""
    totals = [forward + backward for forward, backward in zip(costs.forward, costs.backward, strict=True)]
    layers = len(totals)
    ahead = [0.0]
    for total in totals:
        ahead.append(ahead[-1] + total)
    # By number of parts and of layers: the least greatest cost, and where the last part begins.
    least = [[0.0] + [float("inf")] * layers]
    starts: list[list[int]] = []
    for part in range(1, parts + 1):
        row, begin = [float("inf")] * (layers + 1), [0] * (layers + 1)
        for stop in range(part, layers + 1):
            for start in range(part - 1, stop):
                worst = max(least[-1][start], ahead[stop] - ahead[start])
                if worst < row[stop]:
                    row[stop], begin[stop] = worst, start
        least.append(row)
        starts.append(begin)
    bounds = [layers]
    for begin in reversed(starts):
        bounds.append(begin[bounds[-1]])
    return tuple(reversed(bounds))


def _best_borders(costs: LayerCosts, placement: Placement, tokens: Sequence[int]) -> Placement:
    """The placement with borders moved by a layer as long as that lets its step end earlier."""
    best, seconds = placement, schedule_of(costs, placement, tokens).seconds
    improved = True
    while improved:
        improved = False
        for border in range(1, len(best.bounds) - 1):
            for by in (-1, 1):
                bounds = (*best.bounds[:border], best.bounds[border] + by, *best.bounds[border + 1 :])
                if not bounds[border - 1] < bounds[border] < bounds[border + 1]:
                    continue
                moved = Placement(best.stages, bounds)
                found = schedule_of(costs, moved, tokens).seconds
                if found < seconds:
                    best, seconds, improved = moved, found, True
    return best
