"""Criteria of a user's own: a function of a group and a class, through whole runs, and what is refused."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from tiny import tiny_model, tiny_tokens

import gisp
from gisp.config.criteria import CRITERIA
from gisp.config.options import make_config
from gisp.data import Sequences
from gisp.errors import GispError
from gisp.run.one_shot import one_shot
from gisp.run.trajectory import Trajectory
from gisp.score.base import StepScores

OPTIONS = {"preset": "paper", "sparsity": 0.3, "steps": 3, "device": "cpu"}


@pytest.fixture(autouse=True)
def no_traces() -> Iterator[None]:
    before = dict(CRITERIA)
    yield
    CRITERIA.clear()
    CRITERIA.update(before)


def l1(group: Any) -> torch.Tensor:
    """As the built-in magnitude, in another dtype."""
    total = torch.zeros(group.count, dtype=torch.float64)
    for projection in group.projections:
        lines = projection.linear.weight.abs().sum(1 if projection.axis == "row" else 0)
        total += lines.view(group.count, -1).sum(1)
    return total


class Leaving:
    """How much leaves a structure: its weights by the loss, to have read data."""

    def __init__(self, context: Any) -> None:
        self.context = context

    def score(self, step: int, groups: list[Any]) -> StepScores:
        loss, tokens = self.context.forward_pass(step)
        return StepScores.of({group.name: loss.float() * l1(group) for group in groups}, loss, tokens)


def run(criterion: str, **options: Any) -> Trajectory:
    return gisp.prune(tiny_model(), tiny_tokens(6, 16), criterion=criterion, **{**OPTIONS, **options})


def same(one: Trajectory, other: Trajectory) -> bool:
    return all(torch.equal(at, other.removed_at[name]) for name, at in one.removed_at.items())


@pytest.mark.parametrize("score", [l1, Leaving])
@pytest.mark.parametrize("norm", ["params", "zscore"])
def test_a_run_by_an_own_criterion_is_the_built_in_one(score: Any, norm: str) -> None:
    gisp.register_criterion("mine", score)
    mine, magnitude = run("mine", norm=norm), run("magnitude", norm=norm)
    assert same(mine, magnitude) and any(bool(at.any()) for at in mine.removed_at.values())
    assert [step.loss for step in mine.steps] == [step.loss for step in magnitude.steps]
    assert mine.config["criterion"] == "mine" and make_config(criterion="mine").allocator == "global"


def test_its_options_hold_where_others_are_not_given() -> None:
    gisp.register_criterion("mine", l1, options={"allocator": "uniform", "norm": "none"})
    config = make_config(criterion="mine")
    assert (config.allocator, config.norm) == ("uniform", "none")
    assert make_config(criterion="mine", allocator="owl").allocator == "owl"
    assert same(run("mine"), run("magnitude", allocator="uniform", norm="none"))


def test_whole_layers_go_by_it() -> None:
    gisp.register_criterion("layers", l1, whole_layers=True)
    found = run("layers", protect_first=0.0, protect_last=0)
    steps = [{*found.removed_at[f"layers.{i}.heads"].tolist()} for i in range(4)]
    assert all(len(at) == 1 for at in steps) and steps.count({0}) == 3


def test_one_shot_takes_it() -> None:
    gisp.register_criterion("mine", l1)
    sequences = Sequences.plain([(row, row) for row in tiny_tokens(6, 16)])
    config = make_config(criterion="mine", one_shot=True, align=1, gqa="query")
    found = list(one_shot(tiny_model(), sequences, [0.2, 0.3], config))
    assert [round(reached, 1) for reached, _ in found] == [0.2, 0.3]


def test_a_run_is_resumed_and_read_without_its_function(tmp_path: Any) -> None:
    def cut(record: Any, steps: int) -> None:
        raise KeyboardInterrupt

    gisp.register_criterion("mine", l1)
    whole = run("mine")
    with pytest.raises(KeyboardInterrupt):
        run("mine", out=tmp_path / "run", on_step=cut)
    assert same(run("mine", out=tmp_path / "run", resume=True), whole)
    del CRITERIA["mine"]
    assert same(gisp.Trajectory.load(tmp_path / "run"), whole)
    with pytest.raises(GispError, match="unknown criterion 'mine': choose one of gisp, second-order"):
        run("mine", out=tmp_path / "run", resume=True)


def test_it_sees_a_loss_only_where_it_says_so() -> None:
    gisp.register_criterion("blind", l1)
    gisp.register_criterion("seeing", Leaving, sees_loss=True)
    with pytest.raises(GispError, match=r"--criterion blind sees no loss: .* needs one of gisp.*seeing"):
        make_config(criterion="blind", objective="choice")
    assert make_config(criterion="seeing", objective="choice").objective == "choice"
    for option in ({"fp8": True}, {"first_order": "shrunk"}):
        with pytest.raises(GispError, match=r"goes with --criterion|belongs to --criterion"):
            make_config(criterion="seeing", **option)


@pytest.mark.parametrize(
    ("score", "message"),
    [
        (lambda group: torch.zeros(group.count, 2), r"returns torch.float32 \[4, 2\] for .*heads: give .* here \[4\]"),
        (lambda group: torch.zeros(group.count, dtype=torch.int64), r"returns torch.int64 \[4\]"),
        (lambda group: [0.0] * group.count, "returns list for"),
        (lambda group: torch.full((group.count,), math.nan), "scores of layers.0.heads that are not finite"),
        (lambda group: torch.full((group.count,), 1e300, dtype=torch.float64), "not finite in float32"),
    ],
)
def test_wrong_scores_are_one_line(score: Any, message: str) -> None:
    gisp.register_criterion("wrong", score)
    with pytest.raises(GispError, match=message) as caught:
        run("wrong")
    assert "\n" not in str(caught.value) and "criterion wrong returns" in str(caught.value)


def test_wrong_results_of_a_class_are_one_line() -> None:
    class Nothing(Leaving):
        def score(self, step: int, groups: list[Any]) -> Any:
            return {}

    class Some(Leaving):
        def score(self, step: int, groups: list[Any]) -> StepScores:
            return super().score(step, groups[1:])

    for score, message in ((Nothing, "returns dict: give"), (Some, "returns NoneType for layers.0.heads")):
        gisp.register_criterion(score.__name__, score)
        with pytest.raises(GispError, match=message):
            run(score.__name__)


@pytest.mark.parametrize(
    ("name", "score", "options", "message"),
    [
        ("gisp", l1, {}, "criterion 'gisp' is built in: give another name"),
        ("", l1, {}, "cannot be named ''"),
        (" ", l1, {}, "cannot be named ' '"),
        (3, l1, {}, "cannot be named 3"),
        ("mine", "l1", {}, "criterion mine is 'l1': give a function"),
        ("mine", l1, {"normalise": "none"}, "criterion mine sets what no run takes: unknown option 'normalise'"),
        ("mine", l1, {"norm": "most"}, "criterion mine sets what no run takes: unknown norm 'most'"),
    ],
)
def test_what_cannot_be_registered(name: Any, score: Any, options: dict[str, Any], message: str) -> None:
    before = dict(CRITERIA)
    with pytest.raises(GispError, match=message):
        gisp.register_criterion(name, score, options=options)
    assert before == CRITERIA


def test_a_later_one_of_the_name_counts_unless_it_is_refused() -> None:
    gisp.register_criterion("mine", lambda group: -l1(group))
    gisp.register_criterion("mine", l1)
    with pytest.raises(GispError, match="criterion mine sets what no run takes"):
        gisp.register_criterion("mine", Leaving, options={"allocator": "none"})
    assert same(run("mine"), run("magnitude"))


def test_options_are_checked_without_torch() -> None:
    code = "import sys, gisp.config.options as o; o.make_config(criterion='flap'); print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "gisp.config.criteria" in loaded and not {"torch", "transformers"} & {*loaded}
