"""What a run will take: memory by a formula that holds on tiny models, and what is said of both."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from peak import Peak
from tiny import tiny_model, tiny_tokens

import gisp
from gisp.config.options import make_config
from gisp.data import load_sequences
from gisp.model.structures import map_model
from gisp.progress import Progress, reporting
from gisp.run.resources.estimate import estimate, lines, memory


@pytest.mark.parametrize(
    "options",
    [
        {"batch_tokens": 512},
        {"batch_tokens": 512, "criterion": "gisp"},
        {"engine": "exact", "criterion": "gisp"},
        {"engine": "exact", "criterion": "gisp", "batch_size": 2},
        {"batch_tokens": 2048},
    ],
    ids=str,
)
def test_the_memory_of_a_run_is_about_what_is_told(options: dict[str, Any]) -> None:
    model = tiny_model("llama-gqa", layers=4, hidden_size=64, intermediate_size=192, num_attention_heads=8)
    tokens = tiny_tokens(64, 32)
    model_map = map_model(model)
    data = load_sequences(tokens, vocab_size=model_map.vocab_size, seq_len=None)
    config = make_config(steps=1, sparsity=0.1, dtype="float32", device="cpu", **options)
    told = memory(model_map, data, config)
    weights = sum(p.untyped_storage().nbytes() for p in model.parameters())
    with Peak() as peak:
        gisp.prune(model, tokens, steps=1, sparsity=0.1, device="cpu", dtype="float32", **options)
    assert 0.5 < told / (peak.most + weights) < 2


def test_fewer_tokens_and_forward_passes_take_less() -> None:
    model_map = map_model(tiny_model("llama-gqa"))
    data = load_sequences(tiny_tokens(64, 32), vocab_size=model_map.vocab_size, seq_len=None)
    found = [
        memory(model_map, data, make_config(**options))
        for options in ({"criterion": "flap", "batch_tokens": 256}, {"batch_tokens": 256}, {"batch_tokens": 1024})
    ]
    assert found == sorted(found) and len(set(found)) == 3
    assert estimate(model_map, data, make_config()).seconds > 0


def test_a_long_run_a_full_device_and_a_busy_machine_are_told_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, gb = torch.device("cpu"), 10**9
    monkeypatch.setattr("torch.get_num_threads", lambda: 2)
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    (short,) = lines(90, gb, cpu, 8 * gb, 0.2)
    assert short == "estimate: 1 min 30 s and 1.0 GB on cpu, 2 threads"
    assert "give less of one, or run on a GPU" in lines(7200, gb, cpu, 8 * gb, 0)[1]
    assert "1.0 GB are free: give a smaller --batch-size" in lines(90, 2 * gb, cpu, gb, 0)[1]
    assert "OMP_NUM_THREADS=1 may be faster" in lines(90, gb, cpu, None, 1.6)[1]
    assert lines(7200, gb, torch.device("cuda"), None, 8.0) == ["estimate: 2 h 0 min and 1.0 GB on cuda"]


def test_a_run_is_announced_to_those_who_see_lines_only() -> None:
    class Lines:
        def __init__(self) -> None:
            self.said: list[str] = []

        def __call__(self, _: Progress) -> None: ...

        def say(self, message: str) -> None:
            self.said.append(message)

    hears = Lines()
    with reporting(hears):
        gisp.prune(tiny_model(), tiny_tokens(), preset="paper", steps=2, sparsity=0.2)
    assert re.match(r"estimate: \d+ s and ", hears.said[0])
