"""In which order stages pass the sequences of a step: one forward, one backward, over chunks dealt in turn.

Every stage is simulated: up to a number of passes that it has begun it takes the next forward pass, else a backward
pass, which frees what the forward kept. With one chunk a stage that is the schedule known as 1F1B, with several
interleaved 1F1B (Narayanan et al., 2021, arXiv 2104.04473). Of a step stages wait about ``(S - 1) / (V M + S - 1)``,
with S stages of V chunks and M passes.

All processes simulate alike, so each knows what the others send and in which order.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

FORWARD, BACKWARD = "forward", "backward"


@dataclass(frozen=True, order=True)
class Action:
    """A pass of one batch through one chunk, ``kind`` FORWARD or BACKWARD."""

    kind: str
    chunk: int
    batch: int


@dataclass(frozen=True)
class Loads:
    """What a step is made of.

    Attributes:
        stages: that share the step.
        forward, backward: cost of every chunk a token; a backward of 0 is none.
        tokens: of every batch.
    """

    stages: int
    forward: tuple[float, ...]
    backward: tuple[float, ...]
    tokens: tuple[int, ...]

    def cost(self, action: Action) -> float:
        """Of an action, in the unit of the costs."""
        costs = self.forward if action.kind == FORWARD else self.backward
        return costs[action.chunk] * self.tokens[action.batch]


@dataclass
class Schedule:
    """Who does what in which order.

    Attributes:
        actions: of every stage.
        seconds: when the last one ends, in the unit of the costs.
        idle: share of all stages' time that they wait.
    """

    actions: list[list[Action]]
    seconds: float
    idle: float
    stages: int = 1

    def arrivals(self, stage: int) -> dict[int, list[Action]]:
        """By sending stage what a stage is sent, in the order in which it is sent: the action that needs it."""
        own = {*self.actions[stage]}
        found: dict[int, list[Action]] = {}
        for source, actions in enumerate(self.actions):
            needed = [follower(action) for action in actions if source != stage]
            sent = [action for action in needed if action in own]
            if sent:
                found[source] = sent
        return found

    def most_held(self, stage: int) -> dict[int, int]:
        """By chunk of a stage how many batches it holds between forward and backward at most."""
        held: dict[int, int] = {}
        most: dict[int, int] = {}
        for action in self.actions[stage]:
            held[action.chunk] = held.get(action.chunk, 0) + (1 if action.kind == FORWARD else -1)
            most[action.chunk] = max(most.get(action.chunk, 0), held[action.chunk])
        return most


def make_schedule(loads: Loads) -> Schedule:
    """The order in which a step is passed."""
    run = _Simulation(loads)
    while run.left:
        run.advance()
    busy = sum(loads.cost(action) for own in run.actions for action in own)
    idle = 1 - busy / (run.end * loads.stages) if run.end else 0.0
    return Schedule(run.actions, run.end, idle, loads.stages)


class _Simulation:
    """Stages that work through a step."""

    def __init__(self, loads: Loads) -> None:
        self.loads, self.stages = loads, loads.stages
        self.actions: list[list[Action]] = [[] for _ in range(self.stages)]
        self.end = 0.0
        chunks, batches = len(loads.forward), len(loads.tokens)
        self._last = chunks - 1
        self._free = [0.0] * self.stages
        self._in_flight = [0] * self.stages
        # When what an action needs is there; forwards of the first chunk need nothing.
        self._ready = {Action(FORWARD, 0, batch): 0.0 for batch in range(batches)}
        # Times that differ by rounding alone are one.
        self._unit = max(loads.forward, default=1.0) * max(loads.tokens, default=1)
        # Forwards in the order in which a stage takes them.
        self._forwards = [
            sorted(
                (
                    Action(FORWARD, chunk, batch)
                    for chunk in range(stage, chunks, self.stages)
                    for batch in range(batches)
                ),
                key=self._turn,
                reverse=True,
            )
            for stage in range(self.stages)
        ]
        per_stage = -(-chunks // self.stages)
        ahead = (self.stages - 1) if per_stage == 1 else 2 * (self.stages - 1) + (per_stage - 1) * self.stages
        # Passes a stage begins before the first of them comes back.
        self._limit = [ahead - stage * (1 if per_stage == 1 else 2) + 1 for stage in range(self.stages)]
        self.left = batches * sum(1 + (cost > 0) for cost in loads.backward)

    def advance(self) -> None:
        """Let the stage begin that can do so first."""
        starts = [
            (round(max(self._free[stage], self._ready[action]) / self._unit, 6), action.kind, stage, action)
            for stage in range(self.stages)
            for action in self._possible(stage)
        ]
        if not starts:
            # A stage at its limit waits for another one at its own: uneven batches or chunks without a backward.
            self._limit = [limit + 1 for limit in self._limit]
            return
        # Of those that can begin at one time a forward: others wait for what it leaves.
        _, _, stage, action = min(starts, key=lambda item: (item[0], item[1] != FORWARD, item[2]))
        self._do(stage, action)

    def _possible(self, stage: int) -> Iterator[Action]:
        """What a stage may take next: the backward that is there first, and the next forward."""
        backward = [a for a in self._ready if a.kind == BACKWARD and a.chunk % self.stages == stage]
        if backward:
            yield min(backward, key=lambda a: (max(self._free[stage], self._ready[a]), *self._turn(a)))
        forward = self._forwards[stage][-1] if self._forwards[stage] else None
        if forward in self._ready and self._in_flight[stage] < self._limit[stage]:
            assert forward is not None
            yield forward

    def _turn(self, action: Action) -> tuple[int, int, int]:
        """In rounds of as many batches as stages, chunk after chunk."""
        along = action.chunk if action.kind == FORWARD else -action.chunk
        return action.batch // self.stages, along, action.batch

    def _do(self, stage: int, action: Action) -> None:
        end = max(self._free[stage], self._ready[action]) + self.loads.cost(action)
        self._free[stage], self.end = end, max(self.end, end)
        self.actions[stage].append(action)
        del self._ready[action]
        self.left -= 1
        if action.kind == FORWARD:
            self._forwards[stage].pop()
        held = self.loads.backward[action.chunk] > 0
        self._in_flight[stage] += held * (1 if action.kind == FORWARD else -1)
        needs = follower(action)
        if needs.chunk > self._last:
            # The end of the forward passes is the beginning of the backward ones, where there are any.
            needs = Action(BACKWARD, self._last, action.batch)
        if needs.chunk >= 0 and (needs.kind == FORWARD or self.loads.backward[needs.chunk] > 0):
            self._ready[needs] = end


def follower(action: Action) -> Action:
    """The action that takes what an action leaves, where there is one."""
    return Action(action.kind, action.chunk + (1 if action.kind == FORWARD else -1), action.batch)
