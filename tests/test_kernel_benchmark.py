"""The parts of the kernel benchmark that need no GPU: shapes, the gate and the table."""

from __future__ import annotations

import pytest
import torch

from benchmarks import kernels
from benchmarks.registry import Case, all_cases, cases, quick_cases
from gisp_kernels.testing import reduce_truth, wgrad_truth

SMALL = Case("small", "down", 24, 32, "column", 4, 1.0)


def test_registry_shapes() -> None:
    shapes = {(c.projection, c.rows, c.width) for c in cases("llama-2-13b")}
    assert shapes == {("qkv", 5120, 5120), ("o", 5120, 5120), ("gate/up", 13824, 5120), ("down", 5120, 13824)}
    assert {c.projection for c in cases("llama-3-8b")} == {"q", "o", "gate/up", "down"}
    assert set(quick_cases()) <= set(all_cases())
    for case in all_cases():
        extent = case.rows if case.axis == "row" else case.width
        assert extent % case.block == 0
        assert case.rows % 16 == 0 and case.width % 16 == 0
    assert cases("llama-2-13b", 0.52)[2].rows < 0.53 * 13824


def test_gate_accepts_right_and_refuses_wrong_implementations() -> None:
    weight, grad = torch.randn(24, 32), torch.randn(24, 32)
    truth = reduce_truth(weight, grad, "column", 4)
    right = {name: run for name, run in kernels.reductions(SMALL).items() if name != "compiled"}
    kernels.gate(right, (weight, grad), truth.scores.float(), truth)
    wrong = {"half": lambda w, g: kernels.reduce_eager(w, g, "column", 4) / 2}
    with pytest.raises(SystemExit, match="half is wrong and will not be timed"):
        kernels.gate(wrong, (weight, grad), truth.scores.float(), truth)


def test_wgrad_implementations_agree() -> None:
    dy, x, weight = torch.randn(20, 24), torch.randn(20, 32), torch.randn(24, 32)
    truth = wgrad_truth(dy, x, weight, "column", 4)
    runs = {name: run for name, run in kernels.wgrad_implementations(SMALL).items() if "compiled" not in name}
    assert {"fused triton", "cublas + triton", "cublas + eager"} == set(runs)
    kernels.gate(runs, (dy, x, weight), truth.scores.float(), truth)


def test_table_line_names_what_was_measured() -> None:
    timing = {"median_ms": 0.5, "extra_bytes": 2**20}
    shape = {"model": "small", "projection": "down", "rows": 24, "width": 32}
    line = kernels.describe(
        {**shape, **timing, "tokens": 64, "implementation": "fused triton", "tflops": 3.0, "percent_of_matmul": 50.0}
    )
    assert "fused triton" in line and "0.5000 ms" in line and "50.0 % of matmul" in line and "1.0 MiB" in line
    assert "skipped: too big" in kernels.describe({**shape, "tokens": 64, "config": {"a": 1}, "skipped": "too big"})


def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: object) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="needs a CUDA device"):
        kernels.main(["--out", f"{tmp_path}/result.json"])
