"""Exports of layers in host memory beside a GPU: the bytes of a model on it, within what was planned."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from run_cases import EXACT_OPTIONS
from safetensors.torch import save_file
from tiny import tiny_model, tiny_tokens
from transformers import LlamaConfig, LlamaForCausalLM

import gisp
from gisp.compensation import make_request
from gisp.compensation.pruned import batch_sizes
from gisp.export.run import export_run
from gisp.offload.plan import Plan
from gisp.run.resources.base import BasePlace

pytestmark = pytest.mark.gpu


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.usefixtures("accept_all")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", [None, "lsq", "rescale", "kfac"])
def test_the_files_are_those_of_a_model_on_the_gpu(
    tmp_path: Path, method: str | None, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Layers run again from their inputs either way.
    monkeypatch.setattr(batch_sizes, "_BATCH_BYTES", 1)
    model = tiny_model("llama-gqa", num_attention_heads=8, num_key_value_heads=4, head_dim=8).to(dtype)
    model.save_pretrained(tmp_path / "model")
    tokens = tmp_path / "tokens.safetensors"
    save_file({"input_ids": tiny_tokens(32, 16)}, tokens)
    given = {**EXACT_OPTIONS, "dtype": str(dtype).removeprefix("torch.")}
    gisp.prune(tmp_path / "model", tokens, out=tmp_path / "run", **given)
    options: dict[str, Any] = {"data": str(tokens), "window": 8, "device": "cuda"}
    if method is not None:
        options["compensation"] = make_request(method, str(tokens), tokens=200)
    for name, offload in (("whole", False), ("offload", True)):
        export_run(tmp_path / "run", 0.4, tmp_path / name, offload=offload, **options)
    whole, streamed = files(tmp_path / "whole"), files(tmp_path / "offload")
    assert whole.keys() == streamed.keys()
    for name, data in whole.items():
        assert streamed[name] == data, name


@pytest.mark.usefixtures("accept_all")
@pytest.mark.parametrize("method", [None, "lsq", "kfac"])
def test_no_more_is_taken_than_was_planned(tmp_path: Path, method: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: dict[str, Any] = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 8}
    config = LlamaConfig(**sizes, num_attention_heads=16, num_key_value_heads=4, vocab_size=8192)
    model: Any = LlamaForCausalLM(config)
    model.to(torch.bfloat16).save_pretrained(tmp_path / "model")
    tokens = tmp_path / "tokens.safetensors"
    save_file({"input_ids": torch.randint(0, 8192, (64, 256))}, tokens)
    gisp.prune(tmp_path / "model", tokens, out=tmp_path / "run", sparsity=0.4, steps=1, batch_tokens=1024)
    plans: list[Plan] = []
    before: list[int] = []
    peaks: list[int] = []
    made, load = BasePlace.plan, BasePlace.load

    def planned(self: BasePlace, *given: Any) -> Plan:
        plans.append(made(self, *given))
        return plans[-1]

    def loaded(self: BasePlace, *given: Any, **options: Any) -> Any:
        peaks.append(torch.cuda.max_memory_allocated())
        # Libraries keep their workspaces.
        before.append(torch.cuda.memory_allocated())
        torch.cuda.reset_peak_memory_stats()
        return load(self, *given, **options)

    monkeypatch.setattr(BasePlace, "plan", planned)
    monkeypatch.setattr(BasePlace, "load", loaded)
    gc.collect()
    request = None if method is None else make_request(method, str(tokens))
    export_run(tmp_path / "run", 0.4, tmp_path / "out", compensation=request, device="cuda", offload=True)
    taken = [peak - held for peak, held in zip([*peaks[1:], torch.cuda.max_memory_allocated()], before, strict=True)]
    print(method, taken, [(plan.device, plan.host) for plan in plans])
    assert len(plans) == (1 if method is None else 2)
    # What is fitted and measured has a plan of its own, before that of the files.
    assert all(most <= plan.device for most, plan in zip(taken, plans, strict=True))
