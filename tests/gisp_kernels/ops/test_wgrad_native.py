"""What can be said of the compiled Hopper kernel without a Hopper GPU: refusals, and who is asked."""

from __future__ import annotations

import pytest
import torch

from gisp_kernels import _ext, wgrad_importance
from gisp_kernels.alignment import descriptor_aligned
from gisp_kernels.ops import wgrad
from gisp_kernels.ops.importance import StackedLinear, stacked_wgrad_importance


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


def test_operands_a_descriptor_cannot_address() -> None:
    matrix = torch.zeros(8, 64, dtype=torch.bfloat16)
    assert descriptor_aligned(matrix) and descriptor_aligned(matrix[:, :13]) and descriptor_aligned(matrix[:, 8:])
    assert not descriptor_aligned(matrix[:, 1:])
    assert not descriptor_aligned(matrix.t())
    assert not descriptor_aligned(torch.zeros(8, 60, dtype=torch.bfloat16))


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


@pytest.mark.skipif(not _ext.has_sm90(), reason="the core has no Hopper kernel")
@pytest.mark.parametrize(("layers", "programs", "message"), [
    ([], 1, "score 0 layers"), ([(0, 16, 8, 0)] * 5, 1, "score 5 layers"), ([(0, 16, 8, 0)], 0, "0 thread")
])  # fmt: skip
def test_core_refuses(layers: list[tuple[int, ...]], programs: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _ext.core().wgrad_sums_sm90((0, 16, 8), (0, 16, 8), 1, layers, False, True, 0, programs, 0, 0)


def test_build_info_tells() -> None:
    assert _ext.build_info()["sm90"] == _ext.has_sm90()
