"""Exports whose base model has its layers in host memory: the bytes of a model on the device, planned and told."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from peak import Peak
from run_cases import EXACT_OPTIONS
from safetensors.torch import save_file
from tiny import tiny_model, tiny_tokens
from transformers import LlamaConfig, LlamaForCausalLM

import gisp
from gisp.cli import main
from gisp.compensation import make_request
from gisp.errors import GispError
from gisp.export import check
from gisp.export.quality.plans import make_plans
from gisp.export.quality.wanted import Wanted
from gisp.export.run import export_run
from gisp.export.sizes.options import SizeOptions
from gisp.export.spec import PrunedSpec
from gisp.offload.plan import Plan
from gisp.offload.stream import LayerStream
from gisp.replicas import launch
from gisp.run.resources import placement
from gisp.run.resources.base import BasePlace

METHODS: dict[str, dict[str, Any]] = {"lsq": {"target": "dense"}, "rescale": {}, "kfac": {"steps": 2, "tokens": 200}}
FAMILIES = ("llama-gqa", "qwen2", "llama-bias")


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of every kind of model, one of them tied, and tokens."""
    root = tmp_path_factory.mktemp("offload")
    save_file({"input_ids": tiny_tokens(32, 16)}, root / "tokens.safetensors")
    for family in FAMILIES:
        model = tiny_model(family, num_attention_heads=8, num_key_value_heads=4, head_dim=8)
        model.to(torch.bfloat16 if family == "llama-bias" else torch.float32).save_pretrained(root / f"{family}-model")
        gisp.prune(root / f"{family}-model", root / "tokens.safetensors", out=root / family, **EXACT_OPTIONS)
    return root


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def assert_same(run: Path, out: Path, **options: Any) -> None:
    """An export with and one without layers in host memory hold the same bytes."""
    for name, offload in (("whole", False), ("offload", True)):
        done = export_run(run, 0.4, out / name, device="cpu", offload=offload, **options)
        assert done.report.path == out / name
    whole, streamed = files(out / "whole"), files(out / "offload")
    assert whole.keys() == streamed.keys() and len(whole) >= 2
    for name, data in whole.items():
        assert streamed[name] == data, name


@pytest.mark.usefixtures("accept_all")
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", [None, *METHODS])
def test_the_files_are_those_of_a_model_on_the_device(
    places: Path, tmp_path: Path, family: str, method: str | None
) -> None:
    tokens = str(places / "tokens.safetensors")
    request = None if method is None else make_request(method, tokens, **METHODS[method])
    assert_same(places / family, tmp_path, compensation=request, data=tokens, window=8)


@pytest.mark.usefixtures("accept_all")
@pytest.mark.parametrize("format", ["masked", "uniform", "gguf"])
@pytest.mark.parametrize("method", [None, "lsq"])
def test_every_format_is_written(places: Path, tmp_path: Path, format: str, method: str | None) -> None:
    if format == "gguf":
        pytest.importorskip("gguf")
    request = make_request(method, str(places / "tokens.safetensors") if method else None)
    sizes = SizeOptions(round_mlp=4) if format == "uniform" else None
    assert_same(places / "llama-gqa", tmp_path, format=format, compensation=request, sizes=sizes)


def test_a_model_that_cannot_be_mapped_is_counted(places: Path, tmp_path: Path) -> None:
    model = tiny_model("llama-gqa", num_attention_heads=8, num_key_value_heads=4, head_dim=8)
    model.config.save_pretrained(tmp_path / "model")
    torch.save(model.state_dict(), tmp_path / "model" / "pytorch_model.bin")
    gisp.prune(tmp_path / "model", places / "tokens.safetensors", out=tmp_path / "run", **EXACT_OPTIONS)
    planned = [plan_of(run).host for run in (tmp_path / "run", places / "llama-gqa")]
    layers = sum(p.numel() * p.element_size() for p in model.model.layers.parameters())
    assert planned[0] == planned[1] + layers
    assert_same(tmp_path / "run", tmp_path)


def plan_of(run: Path) -> Plan:
    """For writing a point of a run."""
    trajectory = gisp.Trajectory.load(run)
    wanted = Wanted(run, None, "hf", BasePlace("cpu", offload=True))
    plans = make_plans(trajectory, wanted, PrunedSpec.at(trajectory, 1))
    assert plans.writing is not None
    return plans.writing


def test_layers_stay_in_host_memory_or_in_their_files(places: Path, tmp_path: Path, monkeypatch: Any) -> None:
    found: list[tuple[LayerStream | None, dict[str, Any]]] = []
    load = BasePlace.load

    def watched(self: BasePlace, *given: Any, **options: Any) -> Any:
        model = load(self, *given, **options)
        found.append((LayerStream.of(model), options["plan"].places))
        return model

    monkeypatch.setattr(BasePlace, "load", watched)
    request = make_request("kfac", str(places / "tokens.safetensors"), steps=1, tokens=100)
    export_run(places / "llama-gqa", 0.4, tmp_path / "out", compensation=request, device="cpu", offload=True)
    assert [options["mapped"] for _, options in found] == [False, True]
    # Fitted to, checked once, and measured on held-out text again and again.
    assert all(stream is not None and stream.traffic.bytes > 0 for stream, _ in found)


@pytest.mark.parametrize("exact", [False, True])
def test_the_check_of_an_export_is_planned(tmp_path: Path, exact: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two models visit the device while it runs, and compare in float64 where float32 is not near enough."""
    sizes: dict[str, Any] = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 2}
    config = LlamaConfig(**sizes, num_attention_heads=8, num_key_value_heads=2, vocab_size=4096)
    model: Any = LlamaForCausalLM(config)
    model.to(torch.bfloat16).save_pretrained(tmp_path / "model")
    tokens = tmp_path / "tokens.safetensors"
    save_file({"input_ids": torch.randint(0, 4096, (2, 16))}, tokens)
    kind: dict[str, Any] = {"device": "cpu", "dtype": "bfloat16"}
    gisp.prune(tmp_path / "model", tokens, out=tmp_path / "run", sparsity=0.2, steps=1, batch_tokens=32, **kind)
    taken: list[int] = []
    compared, place_of = check.checked_report, LayerStream.__init__
    slots: list[int] = []

    def placed(self: LayerStream, *given: Any, **options: Any) -> None:
        place_of(self, *given, **options)
        slots.append(sum(slot.memory.nbytes for slot in self._slots) + self._beside.nbytes)

    def measured(base: Any, *given: Any) -> Any:
        ends = {id(p): p.nbytes for end in (base.get_input_embeddings(), base.lm_head) for p in end.parameters()}
        with Peak() as peak:
            found = compared(base, *given)
        # A CPU has them where they were read to.
        taken.append(slots[0] + 2 * sum(ends.values()) + peak.most)
        return found

    monkeypatch.setattr(LayerStream, "__init__", placed)
    monkeypatch.setattr(check, "checked_report", measured)
    if exact:
        monkeypatch.setattr(check, "TOLERANCE", 0.0)
        monkeypatch.setattr(check, "ROUNDING", 1e6)
    export_run(tmp_path / "run", 0.2, tmp_path / "out", device="cpu", offload=True)
    planned = plan_of(tmp_path / "run").device
    assert len(slots) == 2 and 0.6 * planned < taken[0] <= planned


@pytest.mark.parametrize("offload", [False, True])
def test_a_measured_model_is_gone_before_the_next_is_there(
    places: Path, tmp_path: Path, offload: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[weakref.ref[Any]] = []
    load = BasePlace.load

    def watched(self: BasePlace, *given: Any, **options: Any) -> Any:
        assert all(model() is None for model in loaded)
        model = load(self, *given, **options)
        loaded.append(weakref.ref(model))
        return model

    monkeypatch.setattr(BasePlace, "load", watched)
    tokens = str(places / "tokens.safetensors")
    request = make_request("lsq", tokens, tokens=200)
    given: dict[str, Any] = {"data": tokens, "window": 8, "device": "cpu", "offload": offload}
    gc.disable()
    try:
        export_run(places / "llama-gqa", 0.4, tmp_path / "out", compensation=request, **given)
    finally:
        gc.enable()
    assert len(loaded) == 2


def test_plans_are_told(places: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokens = str(places / "tokens.safetensors")
    given = ["export", str(places / "llama-gqa"), "--sparsity", "0.4", "--device", "cpu", "--offload"]
    kfac = ["--compensate", "kfac", "--compensation-steps", "1", "--calibration", tokens]
    assert main([*given, *kfac, "--out", str(tmp_path / "one"), "--gpu-memory", "1GB"]) == 0
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith(("offload:", "  "))]
    layers = len(gisp.Trajectory.load(places / "llama-gqa").keep(0).heads)
    assert lines[0].startswith(f"offload: {layers} of {layers} layers in host memory (")
    assert lines[1].startswith("  inputs of layers on the device (")
    assert lines[3].startswith(f"offload: {layers} of {layers} layers read from their files (")
    assert all(line.startswith("  device peak ") and " of 1.0 GB, host " in line for line in (lines[2], lines[4]))
    assert main([*given, "--out", str(tmp_path / "two")]) == 0
    assert "in host memory" not in capsys.readouterr().err


def test_what_cannot_be_is_one_line(
    places: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def never(*_: Any, **__: Any) -> Any:
        raise AssertionError("begun")

    monkeypatch.setattr(launch, "launch", never)
    monkeypatch.setattr(gisp.Trajectory, "load_base", never)
    tokens, out = str(places / "tokens.safetensors"), tmp_path / "out"
    lsq = ["--compensate", "lsq", "--calibration", tokens]
    refused: list[tuple[list[str], str]] = [
        (["--offload", *lsq, "--gpu-memory", "50MB"], "may be used: give fewer --calibration-tokens, or more"),
        (["--offload", "--gpu-memory", "50MB"], "may be used: give more --gpu-memory, or --device cpu"),
        (["--gpu-memory", "24GB"], "--gpu-memory 24GB belongs to --offload: give both, or leave it out"),
        (["--offload", "--gpu-memory", "much"], "--gpu-memory is 'much': give an amount as 24GB or 24GiB"),
        (["--offload", "--compensate", "gates", "--calibration", tokens], "--compensate gates trains layers that"),
        (["--offload", "--compensate", "bias", "--calibration", tokens], "--compensate bias adds biases to layers"),
        (["--offload", *lsq, "--gpus", "2"], "--offload always is for one GPU, 2 processes share this run"),
        (["--offload", "--stages", "2"], "--stages 2 writes the point of the run as hf: leave --offload out"),
        (["--stages", "2", *lsq], "--compensate lsq needs all of it: give --offload in place of --stages"),
        (
            ["--stages", "2", "--compensate", "lsq+gates", "--calibration", tokens],
            "--stages 2 splits the model, --compensate lsq+gates needs all of it: leave --stages out, on a GPU that",
        ),
    ]
    for given, words in refused:
        point = ["export", str(places / "llama-gqa"), "--sparsity", "0.4", "--out", str(out), "--device", "cpu"]
        assert main([*point, *given]) == 2
        error = capsys.readouterr().err
        assert words in error and error.count("\n") == 1, given
        assert not out.exists()
    given = ["export", str(places / "llama-gqa"), "--nested", str(out), "--offload", "--device", "cpu"]
    assert main(given) == 2
    assert "--nested has its own form of a size: leave --offload out" in capsys.readouterr().err
    monkeypatch.setattr(placement, "available_bytes", lambda: 10**5)
    request = make_request("kfac", tokens)
    with pytest.raises(GispError, match=r"of host memory, 0.1 MB are free: free some, or give --compensate lsq"):
        export_run(places / "llama-gqa", 0.4, out, compensation=request, device="cpu", offload=True)
    with pytest.raises(GispError, match=r"of host memory, 0.1 MB are free: free some$"):
        export_run(places / "llama-gqa", 0.4, out, device="cpu", offload=True)
    assert not out.exists()
