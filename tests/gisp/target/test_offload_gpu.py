"""Evaluations of layers in host memory beside a GPU: the figures of a model on it, within what was planned."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from eval_cases import byte_tokenizer, write_rows
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

import gisp
from gisp.compensation import make_request
from gisp.config.evaluation import EvalOptions
from gisp.offload.plan import Plan
from gisp.run.resources.base import BasePlace
from gisp.target import evaluate_along, evaluate_target
from gisp.target import plan as target_plan

pytestmark = pytest.mark.gpu

WORDS = "a cab is a big bag of it "


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of some size in bfloat16, its run, and data."""
    root = tmp_path_factory.mktemp("offload")
    sizes: dict[str, Any] = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 8}
    sizes |= {"num_attention_heads": 16, "num_key_value_heads": 4, "max_position_embeddings": 32768}
    config = LlamaConfig(**sizes, vocab_size=8192)
    model: Any = LlamaForCausalLM(config)
    model.to(torch.bfloat16).save_pretrained(root / "model")
    byte_tokenizer().save_pretrained(root / "model")
    save_file({"input_ids": torch.randint(0, 8192, (64, 256))}, root / "tokens.safetensors")
    save_file({"input_ids": torch.randint(0, 8192, (2, 20000))}, root / "long.safetensors")
    rows = [{"prompt": WORDS * n, "completion": " bag"} for n in (1, 30, 20, 25, 5)]
    write_rows(root / "completions.jsonl", rows * 8)
    gisp.prune(root / "model", root / "tokens.safetensors", out=root / "run", sparsity=0.4, steps=2, batch_tokens=1024)
    return root


class Watched:
    """The plan of an evaluation and what it took of the GPU beside what was there before."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.plans: list[Plan] = []
        made = BasePlace.plan

        def planned(place: BasePlace, *given: Any) -> Plan:
            self.plans.append(made(place, *given))
            # Libraries keep their workspaces.
            self._before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            return self.plans[-1]

        monkeypatch.setattr(target_plan.BasePlace, "plan", planned)

    @property
    def taken(self) -> int:
        return torch.cuda.max_memory_allocated() - self._before


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "tokens": ("tokens.safetensors", {"options": EvalOptions(window=256)}),
    # One window is more than a batch.
    "long": ("long.safetensors", {"options": EvalOptions(window=20000)}),
    "likelihood": ("completions.jsonl", {}),
    "generation": ("completions.jsonl", {"options": EvalOptions(generate=True, max_new_tokens=64)}),
}


@pytest.mark.parametrize("case", CASES)
def test_no_more_is_taken_than_was_planned(places: Path, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    data, options = CASES[case]
    model, spec = str(places / "model"), str(places / data)
    wanted = evaluate_target(model, spec, device="cuda", **options)
    gc.collect()
    watched = Watched(monkeypatch)
    # A model that fits is held within the limit all the same.
    found = evaluate_target(model, spec, device="cuda", **options, offload=True, gpu_memory="6GB")
    print(case, watched.taken, watched.plans[0].device, watched.plans[0].limit)
    assert found == wanted
    assert 0.3 * watched.plans[0].device < watched.taken <= watched.plans[0].device <= 6 * 10**9


@pytest.mark.usefixtures("accept_all")
@pytest.mark.parametrize("method", [None, "lsq", "kfac"])
def test_a_run_takes_no_more_than_was_planned(
    places: Path, method: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = str(places / "tokens.safetensors")
    request = None if method is None else make_request(method, tokens)
    given: dict[str, Any] = {"sparsities": [0.2, 0.4], "window": 256, "device": "cuda", "compensation": request}
    gc.collect()
    watched = Watched(monkeypatch)
    evaluate_along(str(places / "run"), tokens, **given, offload=True)
    print(method, watched.taken, watched.plans[0].device, watched.plans[0].host)
    assert len(watched.plans) == 1 and watched.taken <= watched.plans[0].device


@pytest.fixture(autouse=True)
def all_of_the_gpu() -> Any:
    """A limit stays for the process."""
    yield
    torch.cuda.set_per_process_memory_fraction(1.0)
