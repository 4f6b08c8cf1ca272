"""``gisp export`` and ``gisp eval`` with ``--compensate``: one model everywhere, and one line where it cannot be."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tiny import tiny_model, tiny_tokens
from transformers import AutoModelForCausalLM

import gisp
from gisp.cli import main
from gisp.compensation import make_request
from gisp.export.run import export_run
from gisp.run.trajectory import move_to
from gisp.target import evaluate_target

# The tiny models here are random: what held-out text says of a compensation is not the subject.
pytestmark = pytest.mark.usefixtures("accept_all")

FEW: dict[str, dict[str, Any]] = {
    "gates": {"steps": 4, "batch_tokens": 64},
    "distil": {"steps": 4, "batch_tokens": 64, "learning_rate": 1e-3},
    "gates+affine": {"steps": 4, "batch_tokens": 64},
}
METHODS = ("kfac", "lsq", "rescale", "affine", "bias", *FEW)
FAMILIES = ("llama-mha", "llama-bias", "mistral", "qwen2", "qwen3")
# Every method, and every family with what changes weights and with what adds biases, which one of them has already.
FITTED = sorted(
    {("llama-mha", method) for method in METHODS}
    | {(family, method) for family in FAMILIES for method in ("lsq", "affine")}
    | {("llama-bias", method) for method in ("bias", "gates+affine")}
)
OPTIONS = {"preset": "paper", "steps": 6, "sparsity": 0.6, "device": "cpu", "dtype": "float32", "protect_last": 0}


def make_run(root: Path, family: str, dtype: torch.dtype = torch.float32, **options: Any) -> Path:
    tiny_model(family, num_attention_heads=8, num_key_value_heads=4, head_dim=8).to(dtype).save_pretrained(
        root / "model"
    )
    save_file({"input_ids": tiny_tokens(32, 16)}, root / "tokens.safetensors")
    gisp.prune(root / "model", root / "tokens.safetensors", out=root / "run", **{**OPTIONS, **options})
    return root / "run"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("llama"), "llama-gqa")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Runs of every family, only read."""
    return {family: make_run(tmp_path_factory.mktemp(family), family) for family in FAMILIES}


def data_of(run: Path) -> str:
    return str(run.parent / "tokens.safetensors")


def compensated(run: Path, sparsity: float, **options: Any) -> Any:
    """The run's model at a sparsity, compensated in place."""
    trajectory = gisp.Trajectory.load(run)
    model = trajectory.load_base(device="cpu", dtype="float32")
    move_to(trajectory.shrinkable(model), trajectory, trajectory.step_for(sparsity))
    gisp.compensate(model, data_of(run), **options)
    return model


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(tiny_tokens(3, 12, seed=4)).logits.float()


def close(a: torch.Tensor, b: torch.Tensor, tolerance: float = 1e-5) -> bool:
    return float((a - b).abs().max()) <= tolerance * float(b.abs().max())


@pytest.mark.parametrize(("family", "method"), FITTED)
def test_hf_exports_hold_what_was_fitted(tmp_path: Path, runs: dict[str, Path], family: str, method: str) -> None:
    run = runs[family]
    few = FEW.get(method, {})
    wanted = compensated(run, 0.4, method=method, **few)
    request = make_request(method, data_of(run), **few)
    done = export_run(run, 0.4, tmp_path / "out", compensation=request, device="cpu")
    assert close(logits(gisp.load(tmp_path / "out")), logits(wanted))
    other = {"tokens": 64} if method not in FEW else {**few, "steps": 2}
    assert not close(logits(gisp.load(tmp_path / "out")), logits(compensated(run, 0.4, method=method, **other)), 1e-3)
    assert done.spec.compensation.startswith({"kfac": "lsq", "gates+affine": "gates"}.get(method, method) + " (")
    assert done.spec.compensation.endswith(" held-out tokens of 6 texts; calibration tokens.safetensors")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["gisp"]["compensation"] == done.spec.compensation
    assert bool(config.get("output_bias")) == (method in ("affine", "bias", "gates+affine") and family != "llama-bias")
    assert f"| compensation | {done.spec.compensation} |" in (tmp_path / "out" / "README.md").read_text()


def test_output_biases_load_without_this_package(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    export_run(run, 0.4, out, compensation=make_request("affine", data_of(run)), device="cpu")
    code = (
        "import sys, torch; from transformers import AutoModelForCausalLM as A;"
        f"m = A.from_pretrained({str(out)!r}, trust_remote_code=True); assert 'gisp' not in sys.modules;"
        f"torch.save(m(torch.tensor({tiny_tokens(3, 12, seed=4).tolist()})).logits, {str(tmp_path / 'l.pt')!r})"
    )
    subprocess.run(
        [sys.executable, "-c", code],
        check=True,
        env={"PATH": "/usr/bin", "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"},
    )
    assert close(torch.load(tmp_path / "l.pt"), logits(compensated(run, 0.4, method="affine")))


@pytest.mark.parametrize(
    ("format", "method"),
    [("masked", method) for method in METHODS if method != "bias"]
    + [(format, method) for format in ("uniform", "gguf") for method in ("lsq", "gates+affine")],
)
def test_formats_without_output_biases(run: Path, tmp_path: Path, format: str, method: str) -> None:
    if format == "gguf":
        pytest.importorskip("gguf")
    few = FEW.get(method, {})
    request = make_request(method, data_of(run), **few)
    done = export_run(run, 0.4, tmp_path / "out", format=format, compensation=request, device="cpu")
    assert (", without biases" in done.spec.compensation) == ("affine" in method)
    if format == "masked":
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
        assert close(logits(model), logits(compensated(run, 0.4, method=method, intercept=False, **few)))
        assert not [name for name in model.state_dict() if name.endswith("bias")]


def test_biases_go_where_the_model_has_them(tmp_path: Path) -> None:
    run = make_run(tmp_path, "llama-bias")
    done = export_run(
        run, 0.4, tmp_path / "out", format="masked", compensation=make_request("bias", data_of(run)), device="cpu"
    )
    assert done.spec.compensation.startswith("bias (target local, size 1 in ")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert close(logits(model), logits(compensated(run, 0.4, method="bias")))


def test_bfloat16_checkpoints(tmp_path: Path) -> None:
    run = make_run(tmp_path, "llama-gqa", torch.bfloat16)
    export_run(run, 0.4, tmp_path / "out", compensation=make_request("lsq", data_of(run)), device="cpu")
    model = gisp.load(tmp_path / "out")
    assert model.dtype == torch.bfloat16
    # The weights are those fitted in float32, rounded once.
    assert close(logits(model.float()), logits(compensated(run, 0.4)), 0.02)


def test_the_command_line_measures_what_it_exports(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, out = data_of(run), tmp_path / "out"
    common = ["--sparsity", "0.4", "--data", data, "--window", "8", "--device", "cpu"]
    chosen = ["--compensate", "lsq", "--calibration", data, "--calibration-tokens", "300", "--damping", "0.2"]
    assert main(["export", str(run), *common, *chosen, "--target", "local", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    line = re.search(r"  compensation: (.*)\n", printed)
    assert line and re.match(r"lsq \(target local, damping 0.2, size 1 in \d+ of \d+ blocks, 300 calibr", line[1])
    assert main(["eval", str(run), *common, *chosen, "--target", "local", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["compensation"] == line[1]
    assert main(["eval", str(run), *common, *chosen, "--target", "dense"]) == 0
    assert "  compensation: lsq (target dense, damping 0.2, size " in capsys.readouterr().out
    here = evaluate_target(str(out), data, window=8, device="cpu")
    plain = evaluate_target(str(run), data, sparsity=0.4, window=8, device="cpu")
    assert here["perplexity"] == pytest.approx(found["perplexity"], rel=1e-5)
    assert found["perplexity"] != pytest.approx(plain["perplexity"], rel=1e-3)
    assert "compensation" not in plain
    measured = [float(value) for value in re.findall(r"perplexity.*: ([\d.]+)", printed)]
    assert measured == pytest.approx([found["perplexity"], plain["perplexity"]], rel=1e-4)
    assert "perplexity of the exact pruned point without compensation, same tokens" in (out / "README.md").read_text()


def test_kfac_on_the_command_line(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, out, points = data_of(run), tmp_path / "out", tmp_path / "points.json"
    common = ["--data", data, "--window", "8", "--device", "cpu"]
    chosen = ["--compensate", "kfac", "--calibration", data, "--calibration-tokens", "160", "--compensation-steps", "2"]
    assert main(["export", str(run), *common, *chosen, "--sparsity", "0.4", "--out", str(out)]) == 0
    capsys.readouterr()
    assert main(["eval", str(run), *common, *chosen, "--sparsity", "0.4", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert re.match(
        r"lsq \(target local, .*, 160 calibration tokens\); kfac \(damping 0.5, [012] of 2 steps taken, 320 ",
        found["compensation"],
    )
    assert evaluate_target(str(out), data, window=8, device="cpu")["perplexity"] == pytest.approx(
        found["perplexity"], rel=1e-5
    )
    assert main(["eval", str(run), *common, *chosen, "--sparsities", "0.2,0.4", "--out", str(points)]) == 0
    dense, _, last = json.loads(points.read_text())["points"]
    assert last["compensation"] == found["compensation"] and "compensation" not in dense
    assert last["perplexity"] == pytest.approx(found["perplexity"], rel=1e-5)


@pytest.mark.parametrize("options", [["--format", "uniform"], ["--round-mlp", "8"]])
def test_kfac_at_rounded_sizes(run: Path, tmp_path: Path, options: list[str]) -> None:
    out, plain = tmp_path / "out", tmp_path / "plain"
    common = ["export", str(run), "--sparsity", "0.4", "--device", "cpu", *options]
    assert main([*common, "--out", str(plain)]) == 0
    assert main([*common, "--out", str(out), "--compensate", "kfac", "--calibration", data_of(run)]) == 0
    load = gisp.load if "--round-mlp" in options else AutoModelForCausalLM.from_pretrained
    found, bare = load(out), load(plain)
    sizes = [{name: p.shape for name, p in model.named_parameters()} for model in (found, bare)]
    assert sizes[0] == sizes[1]
    assert not close(logits(found), logits(bare), 1e-3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--compensate", "lsq"], "--compensate lsq needs --calibration DATA"),
        (
            ["--compensate", "ridge", "--calibration", "DATA"],
            "--compensate is 'ridge': choose one of bias, affine, rescale, lsq",
        ),
        (["--compensate", "lsq", "--calibration", "none.safetensors"], "none.safetensors does not exist"),
        (["--calibration", "x.txt"], "--calibration x.txt is for --compensate METHOD"),
        (["--calibration-tokens", "5"], "--calibration-tokens 5 is for --compensate METHOD"),
        (["--compensation-steps", "5"], "--compensation-steps 5 is for --compensate METHOD"),
        (["--compensate", "kfac", "--calibration", "DATA", "--compensation-steps", "0"], "--compensation-steps is 0"),
        (
            ["--compensate", "lsq", "--calibration", "DATA", "--compensation-steps", "2"],
            "--compensation-steps 2 changes nothing in --compensate lsq",
        ),
        (
            ["--compensate", "gates", "--calibration", "DATA", "--calibration-tokens", "9"],
            "--calibration-tokens 9 changes nothing in --compensate gates",
        ),
        (["--learning-rate", "0.1"], "--learning-rate 0.1 is for --compensate METHOD"),
        (["--target", "local"], "--target local is for --compensate METHOD"),
        (["--compensate", "bias", "--calibration", "DATA", "--damping", "1"], "--damping 1.0 changes nothing"),
        (
            ["--compensate", "rescale", "--calibration", "DATA", "--damping", "1"],
            "--damping 1.0 changes nothing in --compensate rescale",
        ),
        (["--compensate", "lsq", "--calibration", "DATA", "--damping", "-1"], "--damping is -1.0"),
        (["--compensate", "lsq", "--calibration", "DATA", "--target", "both"], "--target is 'both'"),
        (
            ["--compensate", "bias", "--calibration", "DATA", "--format", "masked"],
            "--compensate bias needs output biases, which format masked of this model has not",
        ),
    ],
)
def test_bad_requests_end_in_one_line(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    arguments = [data_of(run) if argument == "DATA" else argument for argument in arguments]
    out = tmp_path / "out"
    assert main(["export", str(run), "--sparsity", "0.4", "--out", str(out), "--device", "cpu", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not out.exists()


def test_only_a_run_is_compensated(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chosen = ["--compensate", "lsq", "--calibration", data_of(run)]
    assert main(["eval", str(run.parent / "model"), "--data", data_of(run), "--device", "cpu", *chosen]) == 2
    assert "--compensate lsq needs a run folder" in capsys.readouterr().err
