"""What is read off a run, and which run the goals are about."""

from __future__ import annotations

import torch

from benchmarks.common.command import Budget
from benchmarks.common.registry import MODELS
from benchmarks.common.synthetic import build_model, random_tokens
from benchmarks.prune.measure import Setting, phase_totals, summary, timed_run

CPU = torch.device("cpu")
TINY = MODELS["tiny"]


def test_a_spent_budget_ends_a_run_after_a_step() -> None:
    setting = Setting.make(CPU, 0.5, 5, 512)
    assert Setting.make(CPU, 0.5, 5, 512, criterion="gisp").criterion == "gisp"
    model = build_model(TINY, CPU, torch.float32)
    run = timed_run(TINY, model, random_tokens(TINY, 8, 256), setting, None, Budget(1e-9))
    assert run["criterion"] == "second-order"
    assert run["stopped_by_budget"] and run["steps"] == 1 and len(run["step_rows"]) == 1
    assert 0 < run["sparsity"] < 0.2


def test_first_step_does_not_stand_for_the_dense_model() -> None:
    rows = [{"tokens_per_second": float(v), "tflops": float(v), "percent_of_matmul": None} for v in (1, *range(10, 22))]
    found = summary(rows)
    assert found["tokens_per_second_dense"] == 12 and found["tokens_per_second_end"] == 19
    assert found["percent_of_matmul_end"] is None
    assert summary(rows[:1])["tflops_dense"] == 1
    assert phase_totals([{"seconds": {"a": 1.0, "b": 2.0}}, {"seconds": {"a": 0.5}}]) == {"a": 1.5, "b": 2.0}


def test_full_means_the_run_of_the_goals() -> None:
    assert Setting.make(torch.device("cuda"), 0.5, None, None).full
    assert not Setting.make(torch.device("cuda"), 0.5, 100, None).full
    assert not Setting.make(CPU, 0.5, None, None).full


def test_a_run_in_8_bits_is_not_the_run_of_the_goals() -> None:
    on_gpu = torch.device("cuda")
    assert Setting.make(on_gpu, 0.5, None, None).full
    assert not Setting.make(on_gpu, 0.5, None, None, fp8=True).full
