"""Options of a run from flags and stored files: what is repeated, what gives way, what is ignored."""

from __future__ import annotations

import pytest

import gisp
from gisp.cli import main
from gisp.config.options import OPTIONS


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
