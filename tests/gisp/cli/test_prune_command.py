"""Options of a run from flags and stored files: what is repeated, what gives way, what is ignored."""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from huggingface_hub import constants
from run_cases import cut_after
from safetensors.torch import load_file, save_file
from tiny import tiny_model, tiny_tokens

import gisp
from gisp.cli import main
from gisp.config.options import OPTIONS
from gisp.data import Sequences
from gisp.data.batches import StepBatches
from gisp.evaluate import perplexity
from gisp.evaluate.unseen import measure_unseen
from gisp.score.objectives import sequence_nll


def test_a_stored_config_repeats_its_run(tmp_path, model_folder, token_file):
    given = ["--preset", "official", "--steps", "12", "--sparsity", "0.3", "--dtype", "float32", "--device", "cpu"]
    assert main(["prune", str(model_folder), "--data", str(token_file), "--out", str(tmp_path / "a"), *given]) == 0
    again = ["--config", str(tmp_path / "a" / "config.yaml")]
    assert main(["prune", *again, "--out", str(tmp_path / "b")]) == 0
    files = [(tmp_path / name / "trajectory.safetensors").read_bytes() for name in ("a", "b")]
    assert files[0] == files[1]
    assert gisp.Trajectory.load(tmp_path / "a").steps[-1].sparsity >= 0.3
    assert main(["prune", *again, "--out", str(tmp_path / "a"), "--resume"]) == 0


def test_a_stored_config_goes_with_another_criterion(tmp_path, model_folder, token_file, capsys):
    given = ["--steps", "2", "--sparsity", "0.3", "--dtype", "float32", "--device", "cpu", "--batch-tokens", "64"]
    assert main(["prune", str(model_folder), "--data", str(token_file), "--out", str(tmp_path / "a"), *given]) == 0
    again = ["prune", "--config", str(tmp_path / "a" / "config.yaml"), "--criterion"]
    assert main([*again, "gisp", "--out", str(tmp_path / "b")]) == 0
    assert gisp.Trajectory.load(tmp_path / "b").config["first_order"] == "plain"
    assert main([*again, "second-order", "--out", str(tmp_path / "c")]) == 0
    assert gisp.Trajectory.load(tmp_path / "c").config["first_order"] == "shrunk"
    capsys.readouterr()
    assert main([*again, "gisp", "--first-order", "shrunk", "--out", str(tmp_path / "d")]) == 2
    assert "--first-order shrunk belongs to --criterion second-order" in capsys.readouterr().err
    (tmp_path / "c.yaml").write_text("first_order: plain\n")
    own = ["prune", str(model_folder), "--data", str(token_file), "--config", str(tmp_path / "c.yaml"), *given]
    assert main([*own, "--criterion", "second-order", "--out", str(tmp_path / "e")]) == 0
    assert gisp.Trajectory.load(tmp_path / "e").config["first_order"] == "plain"


def test_a_stored_config_is_used_from_another_folder(tmp_path, model_folder, token_file, monkeypatch):
    monkeypatch.chdir(token_file.parent)
    given = ["--preset", "paper", "--steps", "2", "--sparsity", "0.3", "--dtype", "float32", "--device", "cpu"]
    assert main(["prune", str(model_folder), "--data", token_file.name, "--out", str(tmp_path / "a"), *given]) == 0
    monkeypatch.chdir(tmp_path)
    assert main(["prune", "--config", "a/config.yaml", "--out", "b"]) == 0
    files = [(tmp_path / name / "trajectory.safetensors").read_bytes() for name in ("a", "b")]
    assert files[0] == files[1]


BAD = [
    {"preset": "slow"},
    {"sparsity": 1.5},
    {"sparsity": "half"},
    {"steps": "2.5"},
    {"steps": "abc"},
    {"samples": 0},
    {"seq_len": 1},
    {"batch_size": "many"},
    {"batch_size": -2},
    {"align": 10**20},
    {"ema": 1.0},
    {"ema": "nan"},
    {"protect_first": -0.1},
    {"protect_last": -1},
    {"seed": -1},
    {"objective": "accuracy"},
    {"dtype": "int8"},
    {"device": "toaster"},
    {"ratio": 0.3},
    {"ratio": 0.3, "preset": "paper"},
    {"batch_tokens": 4096, "engine": "exact"},
    {"batch_tokens": 4096, "preset": "paper"},
    {"batch_tokens": 4096, "one_shot": True},
    {"ema": 0.5, "one_shot": True},
    {"steps": 5, "one_shot": True},
    {"first_order": "shrunk", "criterion": "gisp"},
    {"first_order": "shrunk", "preset": "paper"},
    {"fp8": True, "preset": "paper"},
    {"fp8": True, "criterion": "signed"},
    {"objective": "margin", "criterion": "magnitude"},
    {"norm": "params", "criterion": "block-influence"},
    {"keep_minimum": True, "criterion": "block-influence"},
    {"sparsity": 0.99},
]


@pytest.mark.parametrize("options", BAD, ids=str)
def test_python_and_the_command_line_refuse_the_same_with_the_same_line(
    options, tmp_path, model_folder, token_file, capsys
):
    flags = []
    for name, value in options.items():
        flags.append(OPTIONS[name].flag if value is True else f"{OPTIONS[name].flag}={value}")
    out = tmp_path / "run"
    assert main(["prune", str(model_folder), "--data", str(token_file), "--out", str(out), *flags]) == 2
    printed = capsys.readouterr().err
    if options.get("ema") == "nan":
        options = {"ema": float("nan")}
    with pytest.raises(gisp.GispError) as refused:
        gisp.prune(model_folder, str(token_file), out=out, **options)
    assert printed == f"error: {refused.value}\n"
    assert not out.exists()


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("resume: true\n", "resume"),
        ("on_step: x\n", "on_step"),
        ("batch_size: .inf\n", "inf"),
        ("batch_size: 4.7\n", "4.7"),
        ("batch_size: true\n", "True"),
        ("seed: 1125899906842624\n", "1125899906842624"),
    ],
)
def test_bad_config_files_are_one_line(tmp_path, model_folder, token_file, text, word, capsys):
    (tmp_path / "c.yaml").write_text(text)
    arguments = ["--data", str(token_file), "--out", str(tmp_path / "r"), "--config", str(tmp_path / "c.yaml")]
    assert main(["prune", str(model_folder), *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert word in error
    assert not (tmp_path / "r").exists()


def test_a_config_file_without_options_changes_nothing(tmp_path, model_folder, token_file):
    (tmp_path / "c.yaml").write_text("# steps: 3\n")
    arguments = ["--data", str(token_file), "--out", str(tmp_path / "r"), "--config", str(tmp_path / "c.yaml")]
    assert main(["prune", str(model_folder), *arguments, "--preset", "paper", "--steps", "2", "-q"]) == 0
    assert len(gisp.Trajectory.load(tmp_path / "r").steps) == 2


def test_what_a_command_ignores_or_cannot_do_is_said(tmp_path, model_folder, token_file, capsys):
    given = ["prune", str(model_folder), "--data", str(token_file)]
    official = ["--preset", "official", "--ratio", "0.3", "--sparsity", "0.2", "--steps", "2"]
    assert main([*given, "--out", str(tmp_path / "o"), *official]) == 0
    assert "--sparsity is ignored beside --ratio" in "".join(capsys.readouterr())
    assert main([*given, "--out", str(tmp_path / "n"), "--sparsity", "1e-6", "--steps", "2"]) == 0
    assert "nothing was removed: 1e-06 of the decoder" in "".join(capsys.readouterr())
    layers = ["--criterion", "block-influence", "--preset", "official", "--ratio", "0.01", "--steps", "2"]
    assert main([*given, "--out", str(tmp_path / "l"), *layers]) == 0
    assert "nothing was removed: --ratio 0.01 is less" in "".join(capsys.readouterr())


def test_a_run_that_ends_short_of_what_was_asked_says_so(tmp_path, model_folder, token_file, capsys):
    given = ["prune", str(model_folder), "--data", str(token_file), "--device", "cpu", "--protect-first", "0"]
    layers = [*given, "--criterion", "block-influence", "--steps", "4", "--sparsity", "0.45"]
    assert main([*layers, "--out", str(tmp_path / "short")]) == 0
    reached = gisp.Trajectory.load(tmp_path / "short").steps[-1].sparsity
    assert f"the run ended at {reached:.4f}, short of 0.45: what would go next" in capsys.readouterr().err
    channels = [*given, "--criterion", "magnitude", "--steps", "4", "--sparsity", "0.45", "--align", "1"]
    assert main([*channels, "--out", str(tmp_path / "near")]) == 0
    assert "short of" not in capsys.readouterr().err


def begun(run, model, data):
    """A run of five steps cut after the second, by the command line's options."""
    with pytest.raises(KeyboardInterrupt):
        gisp.prune(
            model,
            data,
            out=run,
            on_step=cut_after(2),
            sparsity=0.3,
            steps=5,
            batch_tokens=64,
            align=4,
            seed=7,
            device="cpu",
        )


def test_a_run_folder_is_all_that_resuming_takes(tmp_path, model_folder, token_file, monkeypatch):
    monkeypatch.chdir(token_file.parent)
    for name in ("a", "b", "c"):
        begun(tmp_path / name, model_folder, token_file.name)
    gisp.prune(model_folder, token_file, out=tmp_path / "a", resume=True, **gisp.Trajectory.load(tmp_path / "a").config)
    monkeypatch.chdir(tmp_path)
    assert main(["prune", "--resume", "b"]) == 0
    assert main(["prune", str(model_folder), "--out", "c", "--resume", "--seed", "7"]) == 0
    files = [(tmp_path / name / "trajectory.safetensors").read_bytes() for name in ("a", "b", "c")]
    assert files[0] == files[1] == files[2]
    assert gisp.Trajectory.load(tmp_path / "b").complete


def move_model(run: Path, to: str) -> None:
    """Correct a record as docs/files.md tells who moved a base model."""
    record = json.loads((run / "trajectory.json").read_text())
    record["base_model"]["path"] = to
    (run / "trajectory.json").write_text(json.dumps(record))


@pytest.mark.parametrize("again", ["corrected", "given"])
def test_a_run_goes_on_with_a_model_that_was_moved(tmp_path, model_folder, token_file, again):
    shutil.copytree(model_folder, tmp_path / "old")
    begun(tmp_path / "r", tmp_path / "old", token_file)
    (tmp_path / "old").rename(tmp_path / "new")
    assert main(["prune", "--resume", str(tmp_path / "r")]) == 2
    if again == "corrected":
        move_model(tmp_path / "r", str(tmp_path / "new"))
        assert main(["prune", "--resume", str(tmp_path / "r")]) == 0
    else:
        assert main(["prune", str(tmp_path / "new"), "--out", str(tmp_path / "r"), "--resume"]) == 0
    assert main(["prune", "--resume", str(tmp_path / "r")]) == 0
    assert main(["prune", "--config", str(tmp_path / "r" / "config.yaml"), "--out", str(tmp_path / "again")]) == 0
    assert gisp.Trajectory.load(tmp_path / "r").base_path == str(tmp_path / "new")


def test_a_run_that_goes_on_in_memory_still_says_where_its_model_and_data_lie(tmp_path, model_folder, token_file):
    begun(tmp_path / "r", model_folder, token_file)
    cut = gisp.Trajectory.load(tmp_path / "r")
    tokens = load_file(token_file)["input_ids"]
    gisp.prune(cut.load_base(device="cpu"), tokens, out=tmp_path / "r", resume=True, **cut.config)
    assert gisp.Trajectory.load(tmp_path / "r").base_path == str(model_folder.resolve())
    assert main(["prune", "--config", str(tmp_path / "r" / "config.yaml"), "--out", str(tmp_path / "again")]) == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--resume", "r", "--steps", "6"], "made with steps 5, not 6"),
        (["--resume", "r", "--preset", "paper"], "--batch-tokens 64 belongs to --engine stream"),
        (["--resume", "absent"], "absent holds no run to resume"),
        (["--resume"], "MODEL is missing"),
        (["--resume", "memory"], "does not say where its model lies"),
        (["--resume", "moved"], "gone/model"),
        (["--resume", "changed"], "was made with another data"),
    ],
)
def test_what_cannot_be_resumed_is_one_line(tmp_path, model_folder, token_file, monkeypatch, capsys, arguments, words):
    monkeypatch.chdir(tmp_path)
    begun(tmp_path / "r", model_folder, token_file)
    begun(tmp_path / "memory", tiny_model(), token_file)
    begun(tmp_path / "moved", model_folder, token_file)
    move_model(tmp_path / "moved", "gone/model")
    begun(tmp_path / "changed", model_folder, token_file)
    config = tmp_path / "changed" / "config.yaml"
    config.write_text(yaml.safe_dump({**yaml.safe_load(config.read_text()), "data": str(tmp_path / "t.safetensors")}))
    save_file({"input_ids": tiny_tokens(16, 16, seed=5)}, tmp_path / "t.safetensors")
    # The environment was read when the library was imported.
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert main(["prune", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    assert words in error


def test_ctrl_c_prints_the_command_that_goes_on(tmp_path, model_folder, token_file, monkeypatch, capsys):
    from gisp.run import prune

    begun(tmp_path / "my run", model_folder, token_file)
    (tmp_path / "my run").rename(tmp_path / "held back")

    def cut(*places, on_step, **options):
        (tmp_path / "held back").rename(tmp_path / "my run")
        raise KeyboardInterrupt

    monkeypatch.setattr(prune, "prune", cut)
    out = str(tmp_path / "my run")
    assert main(["prune", str(model_folder), "--data", str(token_file), "--out", out]) == 130
    line = capsys.readouterr().err.splitlines()[-1]
    assert line == f"interrupted: finished steps are kept, continue with gisp prune --resume '{out}'"
    monkeypatch.undo()
    assert main(shlex.split(line.partition("continue with gisp ")[2])) == 0


def test_the_end_says_quality_and_what_comes_next(tmp_path, model_folder, token_file, capsys):
    given = ["prune", str(model_folder), "--data", str(token_file), "--preset", "paper", "--steps", "3"]
    given += ["--sparsity", "0.4", "--dtype", "float32", "--device", "cpu"]
    out = tmp_path / "run"
    assert main([*given, "--out", str(out), "--samples", "3"]) == 0
    printed = capsys.readouterr().err
    (line,) = [line for line in printed.splitlines() if line.startswith("perplexity ")]
    before, after = (float(line.split()[i]) for i in (1, 3))
    trajectory = gisp.Trajectory.load(out)
    rows = load_file(token_file)["input_ids"][3:]
    for sparsity, value in ((0.0, before), (None, after)):
        model = trajectory.at(sparsity)
        found = perplexity(model, Sequences.plain([(row, row) for row in rows.long()]), rows.shape[1])
        assert value == pytest.approx(found.perplexity, abs=1e-4)
    last = f"{trajectory.steps[-1].sparsity:.4f}"
    assert f"next: gisp eval {out} --sparsity {last} --data TEXT" in printed
    assert main(["eval", str(out), "--sparsity", last, "--data", str(token_file), "--device", "cpu"]) == 0
    (command,) = [line for line in printed.splitlines() if "gisp export" in line]
    assert main([*command.split()[1:], "--device", "cpu"]) == 0
    capsys.readouterr()
    assert main([*given, "--out", str(tmp_path / "all")]) == 0
    assert f"quality not measured: the run has seen all of {token_file}" in capsys.readouterr().err


def test_the_next_export_lies_beside_a_run_in_the_working_folder(
    tmp_path, model_folder, token_file, monkeypatch, capsys
):
    (tmp_path / "run").mkdir()
    monkeypatch.chdir(tmp_path / "run")
    given = ["--preset", "paper", "--steps", "1", "--sparsity", "0.4", "--device", "cpu"]
    assert main(["prune", str(model_folder), "--data", str(token_file), "--out", ".", *given]) == 0
    (command,) = [line for line in capsys.readouterr().err.splitlines() if "gisp export" in line]
    assert main([*command.split()[1:], "--device", "cpu"]) == 0
    assert len(list(tmp_path.glob("run-0.*"))) == 1


def test_sequences_no_step_has_drawn_are_unseen(model_folder, token_file):
    options: dict[str, Any] = {"steps": 2, "sparsity": 0.2, "batch_tokens": 32, "device": "cpu", "dtype": "float32"}
    trajectory = gisp.prune(model_folder, token_file, **options)
    assert trajectory.unseen is not None
    rows = load_file(token_file)["input_ids"].tolist()
    drawn = len(rows) - len(trajectory.unseen.rows)
    assert 0 < drawn == sum(step.tokens for step in trajectory.steps) // len(rows[0])
    assert all(ids.tolist() in rows for ids, _ in trajectory.unseen.rows)
    assert len(repr(trajectory)) < 120 and "2 steps to sparsity" in repr(trajectory)


@pytest.mark.parametrize("own", [{"regrow": 1}, {"criterion": "learned-gates", "gate_steps": 5}])
def test_batches_that_are_not_of_a_step_are_seen_too(model_folder, monkeypatch, own):
    drawn: set[int] = set()
    numbers = StepBatches.numbers

    def noted(self: StepBatches, step: int) -> list[int]:
        drawn.update(found := numbers(self, step))
        return found

    monkeypatch.setattr(StepBatches, "numbers", noted)
    tokens = tiny_tokens(40, 16)
    options: dict[str, Any] = {"steps": 2, "sparsity": 0.2, "batch_tokens": 16, "align": 4, "device": "cpu", **own}
    trajectory = gisp.prune(model_folder, tokens, dtype="float32", **options)
    assert trajectory.unseen is not None
    left = [ids.tolist() for ids, _ in trajectory.unseen.rows]
    assert left == [row for number, row in enumerate(tokens.tolist()) if number not in drawn]


def test_questions_are_told_by_their_accuracy():
    model = tiny_model("llama-gqa")
    rows = [(row, torch.where(torch.arange(16) < 12, -100, row)) for row in tiny_tokens(6, 16)]
    data = Sequences.grouped([rows[:3], rows[3:]], [1, -1, -1] * 2)
    name, value = measure_unseen(model, data)
    nll = [float(sequence_nll(model, ids[None], labels[None]).detach()) for ids, labels in rows]
    assert (name, value) == ("accuracy", sum(min(part) == part[0] for part in (nll[:3], nll[3:])) / 2)
