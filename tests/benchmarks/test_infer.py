"""The inference benchmark: shapes of a sparsity, decoding at the right place, a tiny run that really happens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from export_models import dense
from nested_cases import trajectory_of

from benchmarks.common.goals import infer_goals
from benchmarks.common.registry import MODELS, REAL
from benchmarks.infer.measure_inference import Setting, decode_step
from benchmarks.infer.pruned_shapes import LayerShape, build_pruned, decoder_parameters, pruned_layers
from benchmarks.infer.run import run_sizes
from benchmarks.studies.gqa_modes import stored
from gisp.cli import main
from gisp.export.hf import export_hf
from gisp.export.point import pruned_spec
from gisp.model.structures import map_model

CPU = torch.device("cpu")
TINY = MODELS["tiny"]


@pytest.mark.parametrize("name", REAL)
@pytest.mark.parametrize("sparsity", [0.0, 0.2, 0.3, 0.4, 0.5])
def test_sizes_have_the_sparsity_they_are_made_for(name: str, sparsity: float) -> None:
    model = MODELS[name]
    layers = pruned_layers(model, sparsity)
    dense = decoder_parameters(model, pruned_layers(model, 0.0))
    assert 1 - decoder_parameters(model, layers) / dense == pytest.approx(sparsity, abs=0.005)
    assert all(item.channels % 16 == 0 and item.heads % item.kv_heads == 0 for item in layers)
    assert layers[0] == layers[-1] == LayerShape(model.heads, model.kv_heads, model.channels)
    assert (len(set(layers)) > 3) == (sparsity > 0)


def test_parameters_are_those_of_the_model() -> None:
    layers = pruned_layers(TINY, 0.4)
    built = build_pruned(TINY, layers, CPU, torch.float32)
    assert sum(p.numel() for p in built.model.layers.parameters()) == decoder_parameters(TINY, layers)


def test_a_decoded_token_follows_its_context() -> None:
    model = build_pruned(TINY, pruned_layers(TINY, 0.4), CPU, torch.float32)
    seen: list[torch.Tensor] = []
    model.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs["input_ids"]), with_kwargs=True)
    step = decode_step(model, 3, Setting(prompt=4, context=9, batches=(3,), repetitions=1, graph=True))
    with torch.no_grad():
        first = step()
        # Every call decodes the same place of the cache.
        torch.testing.assert_close(step(), first)
        whole = model(input_ids=torch.cat((seen[0], torch.zeros(3, 1, dtype=torch.int64)), dim=1)).logits
    torch.testing.assert_close(first[:, 0], whole[:, -1])


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
    printed = capsys.readouterr().out
    assert main(["bench", "infer", "--from", str(out), "--goals"]) == 0
    again = capsys.readouterr().out
    assert again.splitlines()[0] in printed and "not measured" in again


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


def test_goals_are_about_one_half() -> None:
    def row(asked: float, milliseconds: float, size: int) -> dict[str, Any]:
        return {"asked": asked, "prefill_ms": milliseconds, "decode_ms": {"1": milliseconds}, "weight_bytes": size}

    goals = infer_goals([{"model": "llama-2-13b", "rows": [row(0.0, 10, 100), row(0.5, 6, 52)]}])
    assert [goal.met for goal in goals] == [False, True, True]
    assert [goal.met for goal in infer_goals([])] == [None] * 3


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
    report = export_hf(base, pruned_spec(trajectory, 3), tmp_path / "hf")
    _, model, sizes = run_sizes(tmp_path / "run", [sparsity])
    layers = sizes[sparsity]
    assert [(item.heads, item.kv_heads, item.channels) for item in layers] == [
        (item.query_heads, item.kv_heads, item.channels) for item in report.layout
    ]
    share = stored(trajectory, model_map, 3)
    assert share["kv_stored"] == report.kv_bytes_per_token / report.kv_bytes_per_token_dense
    assert share["decoder_stored"] == decoder_parameters(model, layers) / model_map.decoder_parameters
    assert share["kv_kept"] <= share["kv_stored"] + 1e-9
