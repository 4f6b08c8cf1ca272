"""Rounds that bring structures back: nested points, exact resumes, and rounds that do not count."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from run_cases import OPTIONS, cut_after, logits, run_into
from tiny import tiny_model, tiny_tokens

import gisp
from gisp.cli import main
from gisp.errors import GispError
from gisp.files import write_atomic
from gisp.run import regrow, trajectory
from gisp.run.regrow import Regrowth
from gisp.score.worth import Worth, structure_worth

ROUNDS: dict[str, Any] = {"regrow": 3}


@pytest.fixture
def exchanging(monkeypatch):
    """Every round brings much back, at random, and all but the second count: what judges them says so."""
    monkeypatch.setattr(regrow, "LARGEST", 0.3)
    monkeypatch.setattr(regrow, "structure_worth", random_worth)
    judge = Regrowth._judge

    def judged(self: Regrowth) -> tuple[float, int]:
        _, tokens = judge(self)
        done = int(max(at.max() for at in self._trajectory.removed_at.values()))
        return (100.0 if done == OPTIONS["steps"] + 2 else 50.0 - done), tokens

    monkeypatch.setattr(Regrowth, "_judge", judged)


def random_worth(scorer: Any, steps: range, *args: Any) -> Worth:
    found = structure_worth(scorer, steps, *args)
    generator = torch.Generator().manual_seed(steps.start)
    values = {name: torch.rand(len(old), generator=generator) for name, old in found.values.items()}
    return Worth({n: v * (256 if "heads" in n else 96) for n, v in values.items()}, found.loss, found.tokens)


def returned(out: Path) -> list[int]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [line["returned"] for line in lines if "returned" in line]


def files(out: Path) -> dict[str, bytes]:
    """What a run leaves, without what depends on the clock."""
    record = json.loads((out / "trajectory.json").read_text())
    for step in record["steps"]:
        del step["seconds"]
    left = {str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*.safetensors")}
    return left | {"trajectory.json": json.dumps(record).encode()}


@pytest.mark.usefixtures("exchanging")
@pytest.mark.parametrize(("gqa", "align"), [("query", 4), ("group", 8)])
def test_points_are_nested_aligned_and_of_the_recorded_size(tmp_path, model_folder, token_file, gqa, align):
    run = run_into(tmp_path / "r", model_folder, token_file, **ROUNDS, gqa=gqa, align=align)
    plain = run_into(tmp_path / "plain", model_folder, token_file, gqa=gqa, align=align)
    counts = returned(tmp_path / "r")
    assert counts[0] > 0
    assert counts[1] == 0
    assert len(run.steps) == OPTIONS["steps"] + 3
    assert run.complete
    gone_before = {(n, int(i)) for n, at in plain.removed_at.items() for i in torch.nonzero(at)}
    gone = {(n, int(i)) for n, at in run.removed_at.items() for i in torch.nonzero(at)}
    assert gone_before - gone
    assert gone - gone_before
    model: Any = run.model
    sparsities = [step.sparsity for step in run.steps]
    assert sparsities == sorted(sparsities)
    assert sparsities[-1] <= OPTIONS["sparsity"]
    dense = sum(p.numel() for p in tiny_model().model.layers.parameters())
    for step, record in enumerate(run.steps, start=1):
        keep = run.keep(step)
        assert all(len(channels) % align == 0 or len(channels) == 24 for channels in keep.channels)
        assert record.heads_removed == sum(4 - len(heads) for heads in keep.heads)
        assert record.channels_removed == sum(24 - len(channels) for channels in keep.channels)
        if gqa == "group":
            run.at(record.sparsity, model)
            held = sum(p.numel() for p in model.model.layers.parameters())
            assert record.removed_parameters == dense - held
    loaded = gisp.Trajectory.load(tmp_path / "r")
    assert loaded.steps == run.steps
    assert all(torch.equal(loaded.removed_at[name], at) for name, at in run.removed_at.items())


@pytest.mark.usefixtures("exchanging", "light_looks")
def test_what_reads_a_run_folder_reads_one_whose_sizes_rounds_corrected(tmp_path, model_folder, token_file):
    out = tmp_path / "r"
    run = run_into(out, model_folder, token_file, **ROUNDS)
    measured = [json.loads(line)["sparsity"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert measured != [step.sparsity for step in run.steps]
    assert main(["eval", str(out), "--sparsities", "0.2,0.3", "--data", str(token_file), "--device", "cpu"]) == 0
    assert main(["inspect", str(out)]) == 0
    assert main(["report", str(out)]) == 0
    assert main(["export", str(out), "--nested", str(tmp_path / "nested"), "--device", "cpu"]) == 0
    assert main(["export", str(out), "--sparsity", "0.2", "--out", str(tmp_path / "hf"), "--device", "cpu"]) == 0


@pytest.mark.usefixtures("exchanging")
def test_a_run_cut_in_its_rounds_goes_on_as_if_it_had_not_been(tmp_path, model_folder, token_file):
    whole = run_into(tmp_path / "whole", model_folder, token_file, **ROUNDS)
    expected, steps = files(tmp_path / "whole"), OPTIONS["steps"]
    for step in (steps, steps + 1, steps + 2):
        out = tmp_path / str(step)
        with pytest.raises(KeyboardInterrupt):
            run_into(out, model_folder, token_file, **ROUNDS, on_step=cut_after(step))
        again = run_into(out, model_folder, token_file, **ROUNDS, resume=True)
        assert files(out) == expected
        assert torch.equal(logits(again.model), logits(whole.model))


@pytest.mark.usefixtures("exchanging")
def test_a_round_cut_between_its_files_is_not_there(tmp_path, model_folder, token_file, monkeypatch):
    run_into(tmp_path / "whole", model_folder, token_file, **ROUNDS)
    first = OPTIONS["steps"] + 1
    out = tmp_path / "cut"
    with pytest.raises(KeyboardInterrupt):
        run_into(out, model_folder, token_file, **ROUNDS, on_step=cut_after(first - 1))
    before = gisp.Trajectory.load(out)

    def write(path: Path, content: bytes) -> None:
        if path.name == "trajectory.json":
            raise KeyboardInterrupt
        write_atomic(path, content)

    # Twice, since a resumed run reads what the first cut left.
    for _ in range(2):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(trajectory, "write_atomic", write)
            run_into(out, model_folder, token_file, **ROUNDS, resume=True)
        left = gisp.Trajectory.load(out)
        assert left.steps == before.steps
        assert all(torch.equal(left.removed_at[name], at) for name, at in before.removed_at.items())
    run_into(out, model_folder, token_file, **ROUNDS, resume=True)
    assert files(out) == files(tmp_path / "whole")


def test_rounds_that_do_not_count_change_nothing(tmp_path, model_folder, token_file, monkeypatch):
    monkeypatch.setattr(regrow, "LARGEST", 0.3)
    monkeypatch.setattr(regrow, "structure_worth", random_worth)
    monkeypatch.setattr(Regrowth, "_judge", lambda self: (1.0, 0))
    run = run_into(tmp_path / "r", model_folder, token_file, **ROUNDS)
    plain = run_into(tmp_path / "plain", model_folder, token_file)
    assert all(torch.equal(run.removed_at[name], at) for name, at in plain.removed_at.items())
    assert torch.equal(logits(run.model), logits(plain.model))
    assert [step.sparsity for step in run.steps[-4:]] == [plain.steps[-1].sparsity] * 4


def test_a_counted_round_lowers_the_judged_loss(tmp_path, model_folder, token_file, monkeypatch):
    monkeypatch.setattr(regrow, "LARGEST", 0.3)
    monkeypatch.setattr(regrow, "structure_worth", random_worth)
    run_into(tmp_path / "r", model_folder, token_file, regrow=6)
    lines = [json.loads(line) for line in (tmp_path / "r" / "metrics.jsonl").read_text().splitlines()]
    judged = [line for line in lines if line.get("judged")]
    assert len(judged) == 6
    for line in judged:
        before, after = line["judged"]
        assert (after < before) == (line["returned"] > 0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"criterion": "gisp"}, "--regrow 3 belongs to --criterion second-order, not gisp"),
        ({"engine": "exact"}, "--regrow 3 belongs to --engine stream, not exact"),
        ({"gqa": "balanced"}, "--regrow 3 belongs to --gqa query or group, not balanced"),
        ({"objective": "margin"}, "--regrow 3 belongs to --objective lm or completion, not margin"),
        ({"allocator": "uniform"}, "--regrow 3 belongs to --allocator global, not uniform"),
        ({"one_shot": True, "engine": "stream"}, "--regrow 3 follows many steps: leave --one-shot out"),
    ],
)
def test_what_rounds_do_not_go_with_is_refused(options, message):
    with pytest.raises(GispError) as caught:
        gisp.prune(tiny_model(), tiny_tokens(), **{"device": "cpu", **ROUNDS, **options})
    assert str(caught.value) == message
