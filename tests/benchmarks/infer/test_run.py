"""A tiny measurement that really happens, and the sizes of a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from export_models import dense
from nested_cases import trajectory_of

from benchmarks.infer.run import run_sizes, show
from benchmarks.infer.shapes import decoder_parameters
from benchmarks.studies.gqa_modes import stored
from gisp.cli import main
from gisp.export.formats.hf import export_hf
from gisp.export.spec import PrunedSpec
from gisp.model.structures import map_model


def test_a_tiny_run_writes_its_result(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--model", "tiny", "--device", "cpu", "--prompt", "8", "--context", "4", "--repetitions", "1"]
    out = tmp_path / "r.json"
    assert main(["bench", "infer", *options, "--batches", "1,2", "--sparsities", "0.3,0.5", "--out", str(out)]) == 0
    (item,) = json.loads(out.read_text())["models"]
    rows = item["rows"]
    assert [row["asked"] for row in rows] == [0.0, 0.3, 0.5] and rows[0]["sparsity"] == 0
    for key in ("weight_bytes", "kv_bytes_per_token", "parameters"):
        assert rows[0][key] > rows[1][key] >= rows[2][key]
    assert all(set(row["decode_ms"]) == {"1", "2"} and row["prefill_ms"] > 0 for row in rows)
    assert all(row["captured_prefill_ms"] is None for row in rows)
    printed = capsys.readouterr().out
    assert main(["bench", "infer", "--from", str(out), "--goals"]) == 0
    again = capsys.readouterr().out
    assert again.splitlines()[0] in printed and "not measured" in again


def test_a_captured_prefill_is_shown_beside_the_eager_one() -> None:
    def row(sparsity: float, milliseconds: float, **more: float) -> dict[str, Any]:
        times = {"prefill_ms": milliseconds, "first_token_ms": milliseconds, "decode_ms": {"1": milliseconds}}
        return {"sparsity": sparsity, "weight_bytes": 1, "kv_bytes_per_token": 1024, **times, **more}

    shown = show(
        [{"model": "m", "rows": [row(0, 40, captured_prefill_ms=30.0), row(0.5, 39, captured_prefill_ms=15.0)]}]
    )
    assert "39.00 (1.03x)" in shown and "15.00 (2.00x)" in shown
    # Results from before there was one.
    assert " - " in show([{"model": "m", "rows": [row(0, 40), row(0.5, 20)]}])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "huge"], "unknown model 'huge'"),
        (["--sparsities", "0.2,x"], "--sparsities is '0.2,x'"),
        (["--sparsities", "1.5"], "give numbers between 0 and 1"),
        (["--batches", "0"], "--batches is '0'"),
        (["--run", "no-such-run"], "no-such-run is not a folder"),
    ],
)
def test_bad_options(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "infer", *arguments]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("family", ["llama-mha", "llama-gqa"])
def test_sizes_and_stored_shares_of_a_run_are_those_of_its_exports(family: str, tmp_path: Path) -> None:
    base = dense(family)
    model_map = map_model(base)
    trajectory = trajectory_of(base)
    # The files hold totals of what is gone, which a made-up run leaves out.
    for number, record in enumerate(trajectory.steps, start=1):
        gone = {k: sum(int(((at > 0) & (at <= number)).sum()) for n, at in trajectory.removed_at.items() if k in n)
                for k in ("heads", "channels")}  # fmt: skip
        object.__setattr__(record, "heads_removed", gone["heads"])
        object.__setattr__(record, "channels_removed", gone["channels"])
    trajectory.save(tmp_path / "run")
    sparsity = trajectory.sparsity_at(3)
    report = export_hf(base, PrunedSpec.at(trajectory, 3), tmp_path / "hf")
    _, model, sizes = run_sizes(tmp_path / "run", [sparsity])
    layers = sizes[sparsity]
    assert [(item.heads, item.kv_heads, item.channels) for item in layers] == [
        (item.query_heads, item.kv_heads, item.channels) for item in report.sizes
    ]
    share = stored(trajectory, model_map, 3)
    assert share["kv_stored"] == report.kv_bytes_per_token / report.kv_bytes_per_token_dense
    assert share["decoder_stored"] == decoder_parameters(model, layers) / model_map.decoder_parameters
    assert share["kv_kept"] <= share["kv_stored"] + 1e-9
