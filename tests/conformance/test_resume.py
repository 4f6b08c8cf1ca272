"""Same run, same bytes: repeated, killed, interrupted and resumed."""

from __future__ import annotations

import json
import random
import signal
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from . import models
from .cli import Launcher, prune_arguments, run_cli, snapshot

STEPS = 12
# A quarter of the tokens per step, so that the data order is part of what a resumed run has to restore.
OPTIONS = ("--preset", "fast", "--steps", STEPS, "--align", 4, "--sparsity", 0.4, "--seed", 3, "--batch-tokens", 512)
TRAJECTORY = "trajectory.safetensors"


@dataclass(frozen=True)
class Case:
    """A model, its tokens and an undisturbed run of them."""

    model: Path
    data: Path
    run: Path

    def arguments(self, out: Path, *more: object) -> tuple[object, ...]:
        return prune_arguments(self.model, self.data, out, *OPTIONS, *more)

    @property
    def step_seconds(self) -> float:
        """Duration of the fastest step: a delay below it stays within a step or two of where it began."""
        steps = json.loads((self.run / "trajectory.json").read_text())["steps"]
        return min(float(step["seconds"]) for step in steps)


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory, launcher: Launcher) -> Case:
    folder = tmp_path_factory.mktemp("resume")
    model = models.llama_gqa(folder / "model")
    data = models.save_tokens(folder / "data.safetensors", models.token_ids(rows=64))
    case = Case(model, data, folder / "undisturbed")
    assert launcher.run(*case.arguments(case.run)) == 0, launcher.output()
    return case


def recorded_steps(run: Path) -> int:
    path = run / "metrics.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0


def timeless(run: Path) -> list[dict[str, object]]:
    """The recorded steps without what depends on the clock or the machine's memory."""
    steps = json.loads((run / "trajectory.json").read_text())["steps"]
    keys = ("step", "sparsity", "loss")
    return [{key: step.get(key) for key in keys} for step in steps]


def assert_identical(run: Path, case: Case) -> None:
    assert (run / TRAJECTORY).read_bytes() == (case.run / TRAJECTORY).read_bytes()
    assert timeless(run) == timeless(case.run)
    lines = (run / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, STEPS + 1))


def test_two_runs_are_byte_identical(case: Case, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "again"
    assert run_cli(capfd, *case.arguments(out)).code == 0
    assert_identical(out, case)
    removed = {t for tensor in load_file(out / TRAJECTORY).values() for t in tensor.tolist()}
    assert len(removed) > STEPS // 2, "the runs would agree by removing next to nothing"


def test_the_seed_matters(case: Case, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "other-seed"
    assert run_cli(capfd, *case.arguments(out, "--seed", 4)).code == 0
    other, own = load_file(out / TRAJECTORY), load_file(case.run / TRAJECTORY)
    assert any(not torch.equal(other[name], own[name]) for name in own)


def test_resume_after_a_kill_before_the_first_step(case: Case, launcher: Launcher, tmp_path: Path) -> None:
    out = tmp_path / "run"
    code = launcher.interrupt(out.exists, 0.0, signal.SIGKILL, *case.arguments(out))
    assert code == -signal.SIGKILL
    assert launcher.run(*case.arguments(out, "--resume")) == 0, launcher.output()
    assert_identical(out, case)


@pytest.mark.parametrize("seed", range(3))
def test_resume_after_kill(seed: int, case: Case, launcher: Launcher, tmp_path: Path) -> None:
    """Killed once after a random step, at a random moment within the next one."""
    out, generator = tmp_path / "run", random.Random(seed)
    goal, delay = generator.randint(1, 8), generator.uniform(0.0, case.step_seconds)
    code = launcher.interrupt(lambda: recorded_steps(out) >= goal, delay, signal.SIGKILL, *case.arguments(out))
    assert code == -signal.SIGKILL, "the run ended before it was killed"
    assert launcher.run(*case.arguments(out, "--resume")) == 0, launcher.output()
    assert_identical(out, case)


@pytest.mark.parametrize("number", range(1, 9))
def test_resume_after_a_kill_between_two_files(number: int, case: Case, launcher: Launcher, tmp_path: Path) -> None:
    """Killed with a file written but not yet in place: some files are of this step, some of the one before."""
    out = tmp_path / "run"
    code = launcher.run(*case.arguments(out), die_at_rename=number)
    assert code == -signal.SIGKILL, f"fewer than {number} files were put in place by renaming"
    before = len(launcher.output())
    assert launcher.run(*case.arguments(out, "--resume")) == 0, launcher.output()[before:]
    assert_identical(out, case)
    assert not [path for path in out.rglob("*") if ".tmp" in path.name]


def test_resume_after_many_kills(case: Case, launcher: Launcher, tmp_path: Path) -> None:
    """Killed, resumed and killed again, each time a step or two later."""
    out, generator, seen = tmp_path / "run", random.Random(10), [0]
    arguments: tuple[object, ...] = case.arguments(out)
    while seen[-1] <= 7:
        goal = seen[-1] + generator.randint(1, 2)

        def reached(goal: int = goal) -> bool:
            return recorded_steps(out) >= goal

        code = launcher.interrupt(
            reached,
            generator.uniform(0.0, case.step_seconds),
            signal.SIGKILL,
            *arguments,
        )
        assert code == -signal.SIGKILL, "the run ended before it was killed"
        assert recorded_steps(out) > seen[-1], "a resumed run lost recorded steps"
        seen.append(recorded_steps(out))
        arguments = case.arguments(out, "--resume")
    assert launcher.run(*arguments) == 0, launcher.output()
    assert_identical(out, case)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP], ids=lambda number: number.name)
def test_resume_after_interrupt(number: signal.Signals, case: Case, launcher: Launcher, tmp_path: Path) -> None:
    """A signal stops with its code and without a traceback, nothing unfinished stays, and the run can be continued."""
    out, before = tmp_path / "run", len(launcher.output())
    code = launcher.interrupt(lambda: recorded_steps(out) >= 4, 0.0, number, *case.arguments(out))
    assert code == 128 + number
    assert "Traceback" not in launcher.output()[before:]
    assert f"continue with gisp prune --resume {out}" in launcher.output()[before:]
    assert not [path for path in out.rglob("*") if path.name.startswith(".")]
    assert 4 <= recorded_steps(out) < STEPS
    assert launcher.run("prune", "--resume", out) == 0, launcher.output()
    assert_identical(out, case)


def test_resume_of_a_finished_run_changes_nothing(case: Case, capfd: pytest.CaptureFixture[str]) -> None:
    before = snapshot(case.run)
    assert run_cli(capfd, *case.arguments(case.run, "--resume")).code == 0
    assert snapshot(case.run) == before


def test_exact_preset_resumes_too(launcher: Launcher, case: Case, tmp_path: Path) -> None:
    options = ("--preset", "paper", "--steps", 8, "--sparsity", 0.4)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert launcher.run(*prune_arguments(case.model, case.data, whole, *options)) == 0
    arguments = prune_arguments(case.model, case.data, broken, *options)
    code = launcher.interrupt(lambda: recorded_steps(broken) >= 3, 0.01, signal.SIGKILL, *arguments)
    assert code == -signal.SIGKILL
    assert launcher.run(*arguments, "--resume") == 0, launcher.output()
    assert (broken / TRAJECTORY).read_bytes() == (whole / TRAJECTORY).read_bytes()


@pytest.fixture(scope="module")
def unfinished(case: Case, launcher: Launcher, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("unfinished") / "run"
    code = launcher.interrupt(lambda: recorded_steps(out) >= 5, 0.0, signal.SIGKILL, *case.arguments(out))
    assert code == -signal.SIGKILL
    return out


@pytest.mark.parametrize("state", ["finished", "unfinished"])
@pytest.mark.parametrize(
    "change",
    [
        ("--seed", 5), ("--sparsity", 0.3), ("--align", 8), ("--steps", 13), ("--ema", 0.5),
        ("--preset", "paper"), ("--data", "other"), ("--model", "other"),
    ],
    ids=lambda change: f"{change[0][2:]}={change[1]}",
)  # fmt: skip
def test_resume_with_something_else_is_refused(
    change: tuple[str, object],
    state: str,
    case: Case,
    unfinished: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    run = case.run if state == "finished" else unfinished
    arguments = list(case.arguments(run, "--resume"))
    if change[0] == "--model":
        arguments[1] = models.llama_gqa(tmp_path / "other-model", seed=99)
    elif change[0] == "--data":
        other = models.save_tokens(tmp_path / "other.safetensors", models.token_ids(64, seed=77))
        arguments[arguments.index("--data") + 1] = other
    else:
        arguments += change
    before = snapshot(run)
    done = run_cli(capfd, *arguments)
    assert done.code == 2, done.text
    assert len(done.lines) == 1, done.text
    assert done.lines[0].startswith("error:")
    assert snapshot(run) == before


@pytest.mark.parametrize("state", ["finished", "unfinished"])
def test_an_occupied_folder_is_refused(
    state: str, case: Case, unfinished: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run = case.run if state == "finished" else unfinished
    before = snapshot(run)
    done = run_cli(capfd, *case.arguments(run))
    assert done.code == 2, done.text
    assert len(done.lines) == 1, done.text
    assert done.lines[0].startswith("error:")
    assert str(run) in done.lines[0]
    assert snapshot(run) == before
