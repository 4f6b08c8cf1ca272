"""Whole runs with layers in host memory: the same files, resumed either way; what cannot be is one line."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from run_cases import OPTIONS, cut_after, logits, run_into
from tiny import tiny_model, tiny_tokens

import gisp
from gisp.cli import main
from gisp.config.options import make_config
from gisp.data import Sequences
from gisp.errors import GispError
from gisp.model.structures import map_model
from gisp.offload.plan import Plan
from gisp.offload.stream import LayerStream
from gisp.run import prune as prune_module
from gisp.run.resources import placement
from gisp.run.trajectory import Trajectory

ALWAYS: dict[str, Any] = {"offload": "always"}
RUNS: dict[str, dict[str, Any]] = {
    "fast": {},
    "in batches": {"batch_size": 1},
    "in slices": {"slices": 2},
    "query heads": {"gqa": "query", "align": 1, "sparsity": 0.6},
    "paper": {"preset": "paper", "align": 1, "batch_tokens": None, "batch_size": 3},
    "official": {"preset": "official", "align": 1, "batch_tokens": None, "sparsity": None},
    "local": {"criterion": "taylor-local"},
    "signed": {"criterion": "signed"},
}


def some_layers(*of: Any) -> Plan:
    return Plan(placement.demand(map_model(of[0]), *of[1:]), (1, 2), True, None, ends_on_host=True)


def files_of(run: Path) -> dict[str, Any]:
    """What a run decided and what it needs to go on; neither times nor the options of the place."""
    record = json.loads((run / "trajectory.json").read_text())
    steps = [{k: v for k, v in step.items() if k != "seconds"} for step in record["steps"]]
    return {
        "trajectory": (run / "trajectory.safetensors").read_bytes(),
        "state": record["state_sha256"],
        "steps": steps,
        "base": record["base_model"],
    }


@pytest.mark.parametrize("name", RUNS)
def test_a_run_writes_the_same_files(
    name: str, model_folder: Path, token_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_into(tmp_path / "here", model_folder, token_file, **RUNS[name])
    expected = files_of(tmp_path / "here")
    for number in range(2):
        if number:
            # As of a device with room for two layers and their work.
            monkeypatch.setattr(prune_module, "plan_of", some_layers)
        out = tmp_path / f"there{number}"
        trajectory = run_into(out, model_folder, token_file, **RUNS[name], **ALWAYS)
        assert files_of(out) == expected
        stream = LayerStream.of(trajectory.model)
        assert stream is not None and stream.traffic.bytes > 0
        assert trajectory.model is not None
        assert stream.holds(trajectory.model.get_parameter("lm_head.weight")) == bool(number)
        for parameter in trajectory.model.parameters():
            assert parameter.device.type == "cpu" and parameter.isfinite().all()


def test_the_pruned_model_computes_as_the_resident_one(model_folder: Path, token_file: Path, tmp_path: Path) -> None:
    here = run_into(tmp_path / "here", model_folder, token_file)
    there = run_into(tmp_path / "there", model_folder, token_file, **ALWAYS)
    assert torch.equal(logits(there.model), logits(here.model))
    with pytest.raises(GispError, match=r"give no gradients|without gradients alone: call it under torch.no_grad"):
        there.at()(tiny_tokens(1))
    with pytest.raises(GispError, match="steps cannot be undone"):
        there.at(0)
    with pytest.raises(GispError, match=r"lie in host memory \(--offload\), export_model needs the whole model"):
        gisp.export_model(there.model, tmp_path / "export")
    with pytest.raises(GispError, match="steps cannot be undone"):
        gisp.compensate(there.at(), tiny_tokens(16, 16), method="lsq")


@pytest.mark.parametrize("begun", [{}, ALWAYS], ids=["resident", "offloaded"])
def test_a_cut_run_goes_on_either_way(
    begun: dict[str, str], model_folder: Path, token_file: Path, tmp_path: Path
) -> None:
    whole, out = tmp_path / "whole", tmp_path / "cut"
    run_into(whole, model_folder, token_file)
    with pytest.raises(KeyboardInterrupt):
        run_into(out, model_folder, token_file, **begun, on_step=cut_after(2))
    assert len(Trajectory.load(out).steps) == 2
    run_into(out, model_folder, token_file, **({} if begun else ALWAYS), resume=True)
    assert files_of(out) == files_of(whole)


def test_a_model_in_memory_moves_its_layers(tmp_path: Path) -> None:
    tokens = tiny_tokens(16, 16)
    expected = gisp.prune(tiny_model(), tokens, **OPTIONS)
    model = tiny_model()
    found = gisp.prune(model, tokens, **OPTIONS, **ALWAYS)
    assert LayerStream.of(model) is not None
    assert all(torch.equal(found.removed_at[name], at) for name, at in expected.removed_at.items())


def test_less_crosses_as_the_model_shrinks() -> None:
    model = tiny_model()
    layers = sum(p.numel() * 4 for p in model.model.layers.parameters())
    crossed = [0]

    def take(record: Any, steps: int) -> None:
        stream = LayerStream.of(model)
        assert stream is not None
        crossed.append(stream.traffic.bytes)

    options = {**OPTIONS, "sparsity": 0.6, "steps": 6, "align": 1, "gqa": "query", "protect_first": 0.0}
    gisp.prune(model, tiny_tokens(16, 16), **options, **ALWAYS, on_step=take)
    steps = [after - before for before, after in pairwise(crossed)]
    # Both ways, but for the two layers that are still there at the turn.
    assert 1.2 * layers < steps[1] <= 1.5 * layers
    assert steps[-1] < 0.6 * steps[1]


def test_layers_on_the_device_keep_their_strides(monkeypatch: pytest.MonkeyPatch) -> None:
    options = {**OPTIONS, "sparsity": 0.6, "steps": 6, "align": 1, "gqa": "query", "protect_first": 0.0}
    monkeypatch.setattr(prune_module, "plan_of", some_layers)
    model, resident = tiny_model(), tiny_model()
    gisp.prune(model, tiny_tokens(16, 16), **options, **ALWAYS)
    gisp.prune(resident, tiny_tokens(16, 16), **options)
    pairs = [
        [[(p.shape, p.stride()) for p in of.model.layers[i].mlp.parameters()] for of in (model, resident)]
        for i in range(4)
    ]
    # Those in host memory have no gaps: less crosses the bus.
    assert [found == expected for found, expected in pairs] == [True, False, False, True]


def test_what_does_not_go_is_refused_before_anything_is_loaded(
    model_folder: Path, token_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("loaded")

    monkeypatch.setattr(prune_module, "load_dense", never)
    out = tmp_path / "run"

    def refused(*given: str) -> str:
        command = ["prune", str(model_folder), "--data", str(token_file), "--out", str(out), "--device", "cpu", *given]
        assert main(command) == 2
        assert not list(out.glob("trajectory*"))
        return str(capsys.readouterr().err).strip()

    assert "--offload needs" in refused("--offload", "--gpu-memory", "0.02MB")
    assert "0.0 MB may be used: give a smaller --batch-tokens" in refused("--offload=auto", "--gpu-memory", "0.02MB")
    monkeypatch.setattr(placement, "available_bytes", lambda: 1000)
    assert "of host memory, 0.0 MB are free: free some" in refused("--offload")
    assert refused("--offload", "--criterion", "wanda-sp").startswith("error: --offload always goes with --criterion")
    assert "--allocator owl" in refused("--offload", "--allocator", "owl")
    assert "--regrow 2" in refused("--offload", "--regrow", "2")
    assert "--gpu-memory 3GB belongs to --offload" in refused("--gpu-memory", "3GB")
    assert "give an amount as 24GB" in refused("--offload", "--gpu-memory", "much")
    assert "unknown offload 'sometimes'" in refused("--offload=sometimes")


def test_the_plan_knows_a_model_before_it_is_loaded(model_folder: Path) -> None:
    config = make_config(device="cpu", dtype="bfloat16", sparsity=0.5)
    data = Sequences.plain([(row, row) for row in tiny_tokens(16, 16)])
    outline, loaded = placement.skeleton_of(str(model_folder), config), tiny_model().bfloat16()
    found, expected = (placement.demand(map_model(of), data, config) for of in (outline, loaded))
    # Beside what its files take in another dtype.
    assert replace(found, loading=0) == expected


def test_a_loss_of_ones_own_is_refused() -> None:
    with pytest.raises(GispError, match=r"--offload always computes the loss in its own way: objective .*<lambda>"):
        gisp.prune(tiny_model(), tiny_tokens(16, 16), **OPTIONS, **ALWAYS, objective=lambda *_: torch.zeros(1))


def test_everything_stays_where_it_fits(model_folder: Path, token_file: Path, tmp_path: Path) -> None:
    trajectory = run_into(tmp_path / "run", model_folder, token_file, offload="auto", gpu_memory="24GB")
    assert LayerStream.of(trajectory.model) is None
    assert trajectory.config["offload"] == "auto"


def test_the_flag_stands_alone(model_folder: Path, token_file: Path, tmp_path: Path, capsys: Any) -> None:
    given = ["--sparsity=0.3", "--steps=2", "--align=4", "--device=cpu", "--dtype=float32"]
    for number, flags in enumerate((["--offload"], ["--offload", "auto"], ["--offload=never"])):
        out = tmp_path / str(number)
        command = ["prune", "--data", str(token_file), "--out", str(out), *given, *flags, "--", str(model_folder)]
        assert main(command) == 0
        expected = ("always", "auto", "never")[number]
        evaluating, exporting = capsys.readouterr().err.splitlines()[-2:]
        # What was in host memory is too large for the GPU in the next commands too.
        assert evaluating.endswith(" --offload") == exporting.endswith(" --offload") == (expected == "always")
        assert json.loads((out / "trajectory.json").read_text())["config"]["offload"] == expected
