"""``gisp export --nested --compensate``: each size as its own export, and one line where it cannot be."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from run_cases import EXACT_OPTIONS
from safetensors.torch import save_file
from tiny import tiny_model, tiny_tokens

import gisp
from gisp.cli import main
from gisp.compensation import acceptance, make_request
from gisp.errors import GispError
from gisp.export.nested.files import NestedFiles
from gisp.export.run import export_nested_run, export_run

POINTS = (0.2, 0.4)
METHODS: dict[str, dict[str, Any]] = {
    "lsq": {},
    "affine": {},
    "bias": {},
    "gates": {"steps": 4, "batch_tokens": 64},
    "distil": {"steps": 4, "batch_tokens": 64, "learning_rate": 1e-3},
}


def make_run(root: Path, family: str = "llama-gqa", dtype: torch.dtype = torch.float32) -> Path:
    model = tiny_model(family, num_attention_heads=8, num_key_value_heads=4, head_dim=8)
    model.to(dtype).save_pretrained(root / "model")
    save_file({"input_ids": tiny_tokens(32, 16)}, root / "tokens.safetensors")
    gisp.prune(root / "model", root / "tokens.safetensors", out=root / "run", **EXACT_OPTIONS)
    return root / "run"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("run"))


def data_of(run: Path) -> str:
    return str(run.parent / "tokens.safetensors")


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(tiny_tokens(3, 12, seed=4)).logits.float()
    return found


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    return float((a - b).abs().max()) <= 1e-5 * float(b.abs().max())


def channels(model: Any, files: NestedFiles | None, layer: int, step: int) -> torch.Tensor:
    """Weight of a down_proj with its channels in their own order."""
    weight: torch.Tensor = model.model.layers[layer].mlp.down_proj.weight
    if files is None:
        return weight
    return weight[:, files.nesting.layers[layer].channels[: weight.shape[1]].argsort()]


@pytest.fixture(scope="module")
def narrow_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("narrow"), dtype=torch.bfloat16)


# Of what is stored in bfloat16: weights, factors and biases.
@pytest.mark.usefixtures("accept_all")
@pytest.mark.parametrize(
    ("method", "kind"), [(method, "run") for method in METHODS] + [(m, "narrow_run") for m in ("lsq", "gates", "bias")]
)
def test_a_size_is_its_own_export(tmp_path: Path, method: str, kind: str, request: pytest.FixtureRequest) -> None:
    run: Path = request.getfixturevalue(kind)
    chosen = make_request(method, data_of(run), **METHODS[method])
    nested = tmp_path / "nested"
    report = export_nested_run(run, nested, compensation=chosen, sparsities=POINTS, device="cpu")
    files = NestedFiles.open(nested, verify=True)
    for place, (sparsity, item) in enumerate(zip(POINTS, report.milestones, strict=True)):
        out = tmp_path / f"out-{place}"
        single = export_run(run, sparsity, out, compensation=chosen, device="cpu")
        assert (item.sparsity, item.compensation) == (single.spec.sparsity, single.spec.compensation)
        own, other = gisp.load(nested, sparsity=sparsity), gisp.load(out)
        step = files.step_for(sparsity)
        for layer in range(4):
            assert torch.equal(channels(own, files, layer, step), channels(other, None, layer, step))
        assert own.config.gisp["compensation"] == other.config.gisp["compensation"]
        assert close(logits(own.float()), logits(other.float()))
        share = {"gates": 0.1, "bias": 0.05}.get(method, 1.0)
        assert 0 < item.bytes < share * single.report.bytes
    plain = tmp_path / "plain"
    export_run(run, 0.3, plain, device="cpu")
    assert close(logits(gisp.load(nested, sparsity=0.3).float()), logits(gisp.load(plain).float()))


def test_what_is_dropped_says_so_and_stores_nothing(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(acceptance.Difference, "falls", False)
    nested = tmp_path / "nested"
    chosen = ["--compensate", "lsq", "--calibration", data_of(run), "--sparsities", "0.2"]
    assert main(["export", str(run), "--nested", str(nested), "--device", "cpu", *chosen]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"\n  sparsity 0\.\d+: 0 bytes beside the shared weights, lsq \(.*; nothing is kept", printed)
    assert not list(nested.glob("nested-milestone-*"))
    assert "nothing is kept" in (nested / "README.md").read_text()
    assert main(["inspect", str(nested)]) == 0
    assert "nothing is kept" in capsys.readouterr().out
    export_nested_run(run, tmp_path / "plain", device="cpu")
    assert torch.equal(logits(gisp.load(nested, sparsity=0.2)), logits(gisp.load(tmp_path / "plain", sparsity=0.2)))


@pytest.mark.usefixtures("accept_all")
def test_commands_tell_and_measure_the_sizes(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    nested, points = tmp_path / "nested", tmp_path / "points.json"
    data = data_of(run)
    chosen = ["--compensate", "lsq", "--calibration", data]
    arguments = ["export", str(run), "--nested", str(nested), *chosen, "--sparsities", "0.4,0.2", "--device", "cpu"]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    told = re.findall(r"\n  sparsity (0\.\d+): ([\d,]+) bytes beside the shared weights, (lsq \(.*)", printed)
    assert len(told) == 2 and told[0][0] < told[1][0]
    assert main(["inspect", str(nested)]) == 0
    shown = capsys.readouterr().out
    common = ["--data", data, "--window", "8", "--device", "cpu"]
    for sparsity, size, text in told:
        assert f"sparsity {sparsity}, compensation: {text}\n" in shown
        row = next(line for line in shown.splitlines() if re.match(rf"\W+{sparsity} ", line))
        assert size in row
        found = []
        for target, extra in ((run, chosen), (nested, [])):
            assert main(["eval", str(target), *common, *extra, "--sparsity", sparsity, "--json"]) == 0
            found.append(json.loads(capsys.readouterr().out))
        assert found[0]["compensation"] == found[1]["compensation"] == text
        assert found[0]["perplexity"] == pytest.approx(found[1]["perplexity"], rel=1e-5)
    assert main(["eval", str(nested), *common, "--sparsities", "0.2,0.3,0.4", "--out", str(points)]) == 0
    measured = json.loads(points.read_text())["points"]
    assert ["compensation" in point for point in measured] == [False, True, False, True]
    assert measured[3]["perplexity"] == pytest.approx(found[1]["perplexity"], rel=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--sparsities", "0.2"],
            "--sparsities 0.2 with --nested is for --compensate METHOD: give both or leave it out",
        ),
        (["LSQ"], "--compensate lsq with --nested needs --sparsities, as 0.2,0.3,0.5"),
        (["LSQ", "--sparsities", "0.2,x"], "--sparsities is '0.2,x': give numbers with commas between them"),
        (["LSQ", "--sparsities", "0.2,0.9"], "--sparsities holds 0.9, the run ends at 0.5"),
        (["LSQ", "--sparsities", "0.2,0.21"], "--sparsities holds 0.2 and 0.21, which are both nearest to step 2 (0."),
        (["LSQ", "--sparsities", "0.2,0.2"], "--sparsities holds 0.2 and 0.2, which are both nearest to step 2 (0."),
        (["LSQ", "--sparsities", "0.01"], "--sparsities holds 0.01, which is nearest to the dense model"),
        (["LSQ", "--sparsities", "1.2"], "--sparsities holds 1.2: give a value in [0, 1)"),
        (["--compensate", "lsq", "--sparsities", "0.2"], "--compensate lsq needs --calibration DATA"),
        (["LSQ", "--sparsities", "0.2", "--format", "masked"], "leave --format masked out"),
        (["LSQ", "--sparsities", "0.2", "--data", "DATA"], "leave --data"),
        (["--compensate", "lsq", "--calibration", "none.txt", "--sparsities", "0.2"], "none.txt does not exist"),
    ],
)
def test_bad_requests_end_in_one_line(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    chosen = ["--compensate", "lsq", "--calibration", data_of(run)]
    flat = [part for argument in arguments for part in (chosen if argument == "LSQ" else [argument])]
    out = tmp_path / "out"
    assert main(["export", str(run), "--nested", str(out), "--device", "cpu", *flat]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not out.exists()


def test_sizes_of_an_export_of_one_size_are_refused(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["export", str(run), "--sparsity", "0.2", "--sparsities", "0.2", "--out", str(tmp_path / "out")]
    assert main(arguments) == 2
    assert "--sparsities 0.2 is for --nested DIR: give --sparsity S for one size" in capsys.readouterr().err


def test_python_refuses_the_same(run: Path, tmp_path: Path) -> None:
    request = make_request("lsq", data_of(run))
    with pytest.raises(GispError, match="with --nested needs --sparsities"):
        export_nested_run(run, tmp_path / "out", compensation=request, device="cpu")
    with pytest.raises(GispError, match="is for --compensate METHOD"):
        export_nested_run(run, tmp_path / "out", sparsities=[0.2], device="cpu")
    with pytest.raises(GispError, match="both nearest to step"):
        export_nested_run(run, tmp_path / "out", compensation=request, sparsities=[0.2, 0.21], device="cpu")
    assert not (tmp_path / "out").exists()
