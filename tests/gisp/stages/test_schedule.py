"""Schedules and borders: every pass once and in order, lines that never wait for one another, less waiting."""

from __future__ import annotations

import random
from collections import deque

import pytest

from gisp.stages.placement import LayerCosts, Placement, place, replaced, schedule_of
from gisp.stages.schedule import BACKWARD, FORWARD, Action, Loads, Schedule, follower, make_schedule


def played(loads: Loads, schedule: Schedule) -> int:
    """Play a schedule: a line hands on what was sent first, a stage waits for what it needs; the actions done."""
    stages, last = loads.stages, len(loads.forward) - 1
    left = [deque(actions) for actions in schedule.actions]
    lines = {
        (source, stage): deque(names) for stage in range(stages) for source, names in schedule.arrivals(stage).items()
    }
    sent: dict[tuple[int, int], deque[Action]] = {line: deque() for line in lines}
    got: set[Action] = set()
    done: set[Action] = set()
    moving = True
    while moving:
        moving = False
        for stage, own in enumerate(left):
            while own:
                action = own[0]
                if action.kind == BACKWARD and action.chunk == last:
                    source = Action(FORWARD, last, action.batch)
                else:
                    by = -1 if action.kind == FORWARD else 1
                    source = Action(action.kind, action.chunk + by, action.batch)
                begins = action.kind == FORWARD and action.chunk == 0
                other = source.chunk % stages
                if not begins and other != stage:
                    line = other, stage
                    while action not in got and sent[line]:
                        # Receipts are begun in the order in which the schedule says that things come.
                        name = sent[line].popleft()
                        assert name == lines[line].popleft()
                        got.add(name)
                    if action not in got:
                        break
                elif not begins and source not in done:
                    break
                assert action.kind == FORWARD or Action(FORWARD, action.chunk, action.batch) in done
                own.popleft()
                done.add(action)
                moving = True
                needs = follower(action)
                target = needs.chunk % stages
                if (stage, target) in lines and needs in schedule.actions[target] and target != stage:
                    sent[stage, target].append(needs)
    assert all(not names for names in lines.values())
    return len(done)


@pytest.mark.parametrize("seed", range(12))
def test_every_pass_is_done_once_and_nobody_waits_for_ever(seed: int) -> None:
    chance = random.Random(seed)
    stages, per_stage, batches = chance.randint(2, 5), chance.randint(1, 4), chance.randint(1, 11)
    chunks = stages * per_stage
    without = chance.randint(0, chunks - 1)
    loads = Loads(
        stages,
        tuple(chance.choice((1.0, 1.0, 2.5)) for _ in range(chunks)),
        tuple(0.0 if chunk < without else chance.choice((1.0, 0.5)) for chunk in range(chunks)),
        tuple(chance.choice((16, 16, 7)) for _ in range(batches)),
    )
    schedule = make_schedule(loads)
    assert played(loads, schedule) == batches * (2 * chunks - without)
    assert [
        action for own in schedule.actions for action in own if action.chunk % stages != schedule.actions.index(own)
    ] == []
    assert make_schedule(loads) == schedule


@pytest.mark.parametrize(("stages", "batches"), [(2, 8), (4, 8), (4, 16), (8, 8)])
def test_one_chunk_a_stage_waits_as_1f1b(stages: int, batches: int) -> None:
    schedule = make_schedule(Loads(stages, (1.0,) * stages, (1.0,) * stages, (1,) * batches))
    assert schedule.seconds == 2 * (batches + stages - 1)
    assert schedule.idle == pytest.approx((stages - 1) / (batches + stages - 1))
    # What the first stage keeps at a time does not grow with the batches.
    assert [schedule.most_held(stage)[stage] for stage in range(stages)] == [
        min(batches, stages - stage) for stage in range(stages)
    ]


def test_more_chunks_a_stage_wait_less() -> None:
    idle = [make_schedule(Loads(4, (1.0,) * 4 * v, (1.0,) * 4 * v, (1,) * 8)).idle for v in (1, 2, 4)]
    assert idle[0] > 1.5 * idle[1] > 2 * idle[2]


def test_borders_follow_costs() -> None:
    costs = LayerCosts((1.0,) * 12, (0.0,) * 4 + (1.0,) * 8)
    found = place(costs, 2, [1] * 4)
    assert found.bounds[0] == 0 and found.bounds[-1] == 12 and all(found.chunks)
    shares = [sum(costs.forward[i] + costs.backward[i] for i in found.held(stage)) for stage in range(2)]
    assert abs(shares[0] - shares[1]) <= 2
    assert sorted([*found.held(0), *found.held(1)]) == list(range(12))
    # Messages that cost more than waiting leave one chunk a stage.
    assert len(place(LayerCosts((1.0,) * 12, (1.0,) * 12, message=3.0), 2, [1] * 4).chunks) == 2


def test_borders_move_where_that_is_worth_it() -> None:
    now = Placement(2, (0, 4, 8))
    even = LayerCosts((1.0,) * 8, (1.0,) * 8)
    assert replaced(even, now, [1] * 8) is now
    uneven = LayerCosts((1.0,) * 4 + (0.3,) * 4, (1.0,) * 4 + (0.3,) * 4)
    moved = replaced(uneven, now, [1] * 8)
    assert moved.bounds[1] < 4
    assert schedule_of(uneven, moved, [1] * 8).seconds < schedule_of(uneven, now, [1] * 8).seconds
