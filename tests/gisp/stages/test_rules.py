"""The table of what processes, stages, slices and host memory cannot be together: every rule, alone and in one line."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from tiny import tiny_model, tiny_tokens

import gisp
from gisp.config.options import make_config
from gisp.errors import GispError
from gisp.stages.rules import RULES, Sharing, check_sharing
from gisp.target import evaluate_along, evaluate_target

SOUND = Sharing(4, 2, layers=8, model_type="llama", slices=8)
# What breaks each rule and no other one.
BROKEN = (
    (Sharing(1, 2), "--stages 2 needs as many processes: add --gpus 2,"),
    (replace(SOUND, processes=3), "does not divide 3 processes evenly: give --gpus 2 or 4"),
    (replace(SOUND, layers=1), "--stages 2 is more than the 1 layers of this model"),
    (replace(SOUND, model_type="gpt2"), "model type 'gpt2' was never tried in stages"),
    (replace(SOUND, criterion="flap"), "goes with --criterion second-order, not flap"),
    (replace(SOUND, own_loss="mine.loss"), "an objective of your own needs all of it"),
    (replace(SOUND, objective="choice"), "--objective choice passes data through all of it"),
    (replace(SOUND, allocator="owl"), "--allocator owl passes data through all of it"),
    (replace(SOUND, regrow=3), "--regrow 3 passes data through all of it"),
    (replace(SOUND, offload="auto"), "--offload auto leaves layers in host memory"),
    (Sharing(2, slices=8, offload="always"), "--offload always is for one GPU, 2 processes share this run"),
    (Sharing(1, offload="auto", own_loss="mine.loss"), "objective mine.loss needs the whole model"),
    (replace(SOUND, slices=1), "--slices 1 is less than the 2 replicas of 4 processes: give --slices 2 or more"),
)


@pytest.mark.parametrize("number", range(len(RULES)))
def test_every_rule_has_a_line(number: int) -> None:
    asked, words = BROKEN[number]
    assert RULES[number][0](asked), "the table and its tests are in one order"
    with pytest.raises(GispError) as caught:
        check_sharing(asked)
    assert words in str(caught.value) and "{" not in str(caught.value)


def test_numbers_that_go_together_are_taken() -> None:
    assert len(BROKEN) == len(RULES)
    taken = set()
    for processes, stages, slices in product(range(1, 10), range(1, 10), (1, 2, 8)):
        try:
            check_sharing(Sharing(processes, stages, layers=4, slices=slices))
        except GispError:
            continue
        taken.add((processes, stages, slices))
    possible = {(p, s, n) for p, s, n in product(range(1, 10), range(1, 5), (1, 2, 8)) if p % s == 0 and p // s <= n}
    assert taken == possible


@pytest.mark.parametrize("stages", [0, -1, 2.0, "2", True, None])
def test_what_is_no_number_of_stages(tmp_path: Path, stages: Any) -> None:
    calls: list[Callable[[], Any]] = [
        lambda: gisp.prune(tiny_model(), tiny_tokens(), sparsity=0.3, stages=stages),
        lambda: evaluate_target(str(tmp_path), "text.txt", stages=stages),
        lambda: evaluate_along(str(tmp_path), "text.txt", sparsities=[0.5], stages=stages),
    ]
    for call in calls:
        with pytest.raises(GispError, match=f"stages is {stages!r}: give a whole number of at least 1"):
            call()


def test_a_run_says_what_it_asks() -> None:
    asked = Sharing.of(make_config(preset="fast", slices=4, regrow=1), 2, 1, own_loss="mine.loss")
    assert (asked.slices, asked.regrow, asked.own_loss, asked.replicas) == (4, 1, "mine.loss", 2)
    check_sharing(asked)
    assert Sharing.of(make_config(preset="fast"), 1, 1).slices == 1
