"""The choice of a kernel for a weight gradient, and what can be said of the compiled one without a Hopper GPU."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from gisp_kernels import _ext, wgrad_importance
from gisp_kernels.ops import wgrad
from gisp_kernels.ops.importance import StackedLinear, stacked_wgrad_importance
from gisp_kernels.ops.wgrad import FUSED_MAX_TOKENS, fused_kernel, prefer_fused


def operands() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return torch.randn(4, 16).bfloat16(), torch.randn(4, 24).bfloat16(), torch.randn(16, 24).bfloat16()


def test_explicit_choice_is_refused_with_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    dy, x, weight = operands()
    with pytest.raises(RuntimeError, match="backend 'native' cannot run here: the operands are on cpu"):
        wgrad_importance(dy, x, weight, backend="native")
    layers = [StackedLinear(start, weight[start : start + 8], 1, torch.zeros(8)) for start in (0, 8)]
    monkeypatch.setenv("GISP_BACKEND", "native")
    with pytest.raises(RuntimeError, match="backend 'native' cannot run here: the operands are on cpu"):
        stacked_wgrad_importance(dy, x, layers)
    assert wgrad_importance(dy, x, weight, backend="reference").shape == (16,)


@pytest.mark.parametrize(("kernel", "reason", "chosen"), [
    ("tma", None, "native"), ("tma", "not a Hopper GPU", "tma"), ("triton", None, "triton")
])  # fmt: skip
def test_automatic_choice_prefers_it_where_the_tma_kernel_would_run(
    monkeypatch: pytest.MonkeyPatch, kernel: str, reason: str | None, chosen: str
) -> None:
    dy, x, weight = operands()
    monkeypatch.setattr(wgrad, "fused_kernel", lambda *args: (kernel, 0))
    monkeypatch.setattr(wgrad, "native_why_not", lambda *args: reason)
    assert wgrad.plan(dy, x, [weight], "row") == chosen


@pytest.mark.parametrize(("kernel", "layers", "chosen"), [
    ("tma", 3, "tma"), ("tma", 4, "apart"), ("triton", 2, "apart")
])  # fmt: skip
def test_layers_that_no_kernel_takes_together_are_planned_apart(
    monkeypatch: pytest.MonkeyPatch, kernel: str, layers: int, chosen: str
) -> None:
    dy, x, weight = operands()
    monkeypatch.setattr(wgrad, "fused_kernel", lambda *args: (kernel, 0))
    assert wgrad.plan(dy, x, [weight] * layers, "row") == chosen


@pytest.mark.parametrize(("name", "major", "shared", "runs"), [
    ("A100", 8, 166912, False), ("H100", 9, 232448, True), ("B200", 10, 232448, True), ("RTX 5090", 12, 101376, False)
])  # fmt: skip
def test_tma_needs_the_accelerator_and_the_memory(name: str, major: int, shared: int, runs: bool) -> None:
    gpu = SimpleNamespace(major=major, shared_memory_per_block_optin=shared)
    assert wgrad.runs_descriptors(gpu) == runs, name


@pytest.mark.skipif(not _ext.has_sm90(), reason="the core has no Hopper kernel")
@pytest.mark.parametrize(("layers", "programs", "message"), [
    ([], 1, "score 0 layers"), ([(0, 16, 8, 0)] * 5, 1, "score 5 layers"), ([(0, 16, 8, 0)], 0, "0 thread")
])  # fmt: skip
def test_core_refuses(layers: list[tuple[int, ...]], programs: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _ext.core().wgrad_sums_sm90((0, 16, 8), (0, 16, 8), 1, layers, False, True, 0, programs, 0, 0)


def test_build_info_tells() -> None:
    assert _ext.build_info()["sm90"] == _ext.has_sm90()


def test_operands_without_a_gpu_take_no_tma() -> None:
    x = torch.randn(64, 4096).half()
    assert fused_kernel(x, x, [torch.randn(4096, 4096).half()], "row") == ("triton", 0)


@pytest.mark.parametrize(
    ("tokens", "tiles", "fused"),
    [
        (FUSED_MAX_TOKENS + 1, 0, False),
        (8192, 132, True),
        (8192, 133, False),
        (8192, 800, False),
        (8192, 2160, True),
        (32768, 2160, False),
    ],
)
def test_many_tokens_fuse_when_the_last_wave_is_full(tokens: int, tiles: int, fused: bool) -> None:
    assert prefer_fused(tokens, torch.bfloat16, tiles=tiles, multiprocessors=132) == fused
    assert not prefer_fused(tokens, torch.float32, tiles=tiles, multiprocessors=132)


def test_fusion_rule() -> None:
    assert prefer_fused(512, torch.bfloat16)
    assert prefer_fused(FUSED_MAX_TOKENS, torch.float16)
    assert not prefer_fused(FUSED_MAX_TOKENS + 1, torch.bfloat16)
    assert not prefer_fused(512, torch.float32)
