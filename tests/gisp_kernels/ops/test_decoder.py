"""Elementwise ops of a decoder layer: references against float64 autograd, kernels in the interpreter beside them."""

from __future__ import annotations

import pytest
import torch
from decoder_cases import (
    added_error,
    attention_by_autograd,
    attention_operands,
    cross_entropy_case,
    expand_case,
    norm_cases,
    rotary_case,
    swiglu_cases,
    unrotate_case,
)
from torch.nn import functional
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

from gisp_kernels.ops import decoder

CASES = [
    *norm_cases(5, 32),
    *norm_cases(3, 77),
    rotary_case(12, 3, 16, 4),
    rotary_case(9, 1, 10, 3),
    *swiglu_cases(4, 48),
    *swiglu_cases(3, 1029),
    cross_entropy_case(6, 96),
    cross_entropy_case(4, 4099),
    expand_case(17, 6, 3, 16),
    expand_case(5, 4, 4, 10),
    unrotate_case(18, 6, 3, 16, 9),
    unrotate_case(5, 4, 4, 10, 5),
    unrotate_case(21, 3, 3, 8, 7, shared=False),
]
EPSILON = {torch.float32: 2e-6, torch.float16: 2e-3}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_kernels_and_references_are_close_to_the_truth(case, dtype):
    for kernel, reference in added_error(case, "cpu", dtype, "triton"):
        assert reference <= EPSILON[dtype]
        assert kernel <= 1.5 * reference + EPSILON[dtype] / 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_the_norm_has_the_bits_of_the_transformers_module(dtype):
    module = LlamaRMSNorm(77, eps=1e-5).to(dtype)
    module.weight.data += 0.1 * torch.randn(77).to(dtype)
    x, delta = torch.randn(9, 77).to(dtype), torch.randn(9, 77).to(dtype)
    weight = module.weight.detach()
    total, normed, rstd = decoder.add_rms_norm(x, delta, weight, module.variance_epsilon)
    assert torch.equal(total, x + delta)
    assert torch.equal(normed, module(x + delta))
    assert torch.equal(decoder.rms_norm_apply(total, rstd, weight, out=total), normed)


def test_the_rotation_is_that_of_transformers():
    x, (cos, sin) = torch.randn(12, 3, 8), torch.randn(2, 4, 8)
    batched = x.view(3, 4, 3, 8).transpose(1, 2)
    expected = apply_rotary_pos_emb(batched, batched, cos[None], sin[None])[0].transpose(1, 2).reshape(12, 3, 8)
    for backend in ("reference", "triton"):
        torch.testing.assert_close(decoder.rotary(x, cos, sin, backend=backend), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_silu_is_rounded_before_the_product(dtype):
    gate, up = (3 * torch.randn(64, 80).to(dtype) for _ in range(2))
    expected = functional.silu(gate) * up
    # The sigmoid's last float32 bit may turn a rounding of silu, which is rare and moves one step of the dtype.
    found = decoder.swiglu(gate, up)
    torch.testing.assert_close(found, expected, rtol=2 * torch.finfo(dtype).eps, atol=torch.finfo(dtype).tiny)
    assert (found != expected).float().mean() < 0.01
    assert torch.equal(decoder.swiglu(gate, up, out=gate), found)


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_targets_outside_the_vocabulary_give_nan(backend):
    logits, weights = torch.randn(5, 33), torch.ones(5)
    targets = torch.tensor([0, 33, -1, 32, -100])
    alone = decoder.token_nll(logits, targets, backend=backend)
    nll = decoder.token_nll_grad_(logits, targets, weights, backend=backend)
    wrong = torch.tensor([False, True, True, False, False])
    for rows in (alone, nll, logits.sum(1)):
        assert torch.equal(rows.isnan(), wrong)
    assert nll[4] == 0
    assert not logits[4].any()


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_inputs_of_any_strides_are_read(backend):
    x, delta, weight = torch.randn(6, 4), torch.randn(6, 4), torch.randn(8)[::2]
    heads, index = torch.randn(4, 8, 6), torch.tensor([1, 9, 3, 9, 0, 9])[::2]
    cos, sin = torch.randn(8, 6).t().split(3)
    targets, weights = torch.tensor([1, 9, 2, 9, 0, 9, 3, 9])[::2], torch.randn(8)[::2]
    rstd = torch.rand(12)[::2]

    def runs(change):
        a, b, w, r = change(x), change(delta), change(weight), change(rstd)
        kv, tables, scored = change(heads.mT), (change(cos), change(sin)), (change(targets), change(weights))
        yield from decoder.add_rms_norm(a, b, w, 1e-5, backend=backend)
        yield decoder.rms_norm_apply(a, r, w, backend=backend)
        yield decoder.rms_norm_backward_(x.clone(), b, a, r, w, backend=backend)
        yield decoder.swiglu(a, b, backend=backend)
        yield decoder.expand_kv(kv, change(index), backend=backend)
        yield decoder.rotary(kv[:3], *tables, backend=backend)
        grad = change(heads.mT[:3, :3])[None].transpose(1, 2)
        yield decoder.unrotate_qkv((grad, 2 * grad, grad), *tables, change(index), 4, backend=backend)
        yield decoder.token_nll(b[:4], scored[0], backend=backend)
        yield decoder.token_nll_grad_(x[:4].clone(), *scored, backend=backend)

    def swapped(tensor):
        return tensor.mT.contiguous().mT if tensor.dim() > 1 else tensor

    for found, expected in zip(runs(swapped), runs(torch.Tensor.contiguous), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize(
    "call",
    [
        lambda x, y: decoder.add_rms_norm(x, x, x[0], 1e-5, total=y, backend="triton"),
        lambda x, y: decoder.add_rms_norm(x, x, x[0], 1e-5, out=y, backend="triton"),
        lambda x, y: decoder.rms_norm_apply(x, x[:, 0], x[0], out=y, backend="triton"),
        lambda x, y: decoder.rms_norm_backward_(y, x, x, x[:, 0], x[0], backend="triton"),
        lambda x, y: decoder.rms_norm_backward_(None, y, x, x[:, 0], x[0], backend="triton"),
        lambda x, y: decoder.rotary(x[:, None], x, x, out=y[:, None], backend="triton"),
        lambda x, y: decoder.swiglu(x, x, out=y, backend="triton"),
        lambda x, y: decoder.swiglu_backward_(x, x, y, backend="triton"),
        lambda x, y: decoder.swiglu_backward_(y, x, x, backend="triton"),
        lambda x, y: decoder.token_nll_grad_(y, torch.zeros(4, dtype=torch.long), x[:, 0], backend="triton"),
        lambda x, y: decoder.expand_kv(x[:, None], torch.tensor([0]), out=y[:, None], backend="triton"),
    ],
)
def test_results_a_kernel_cannot_write_are_refused_untouched(call):
    x, y = torch.randn(4, 6), torch.randn(6, 4).t()
    before = x.clone(), y.clone()
    with pytest.raises(ValueError, match="contiguous rows"):
        call(x, y)
    assert torch.equal(x, before[0])
    assert torch.equal(y, before[1])


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_nothing_to_do_is_done(backend):
    for rows, width in ((0, 4), (3, 0)):
        empty, weight = torch.empty(rows, width), torch.ones(width)
        swiglu = decoder.swiglu(empty, empty, backend=backend)
        decoder.swiglu_backward_(empty, empty.clone(), empty.clone(), backend=backend)
        total, normed, rstd = decoder.add_rms_norm(empty, empty, weight, 1e-5, backend=backend)
        assert [t.shape for t in (swiglu, total, normed, rstd)] == [(rows, width)] * 3 + [(rows,)]
    tables, index = torch.ones(3, 4), torch.empty(0, dtype=torch.long)
    assert decoder.rotary(torch.ones(3, 0, 4), tables, tables, backend=backend).shape == (3, 0, 4)
    assert decoder.expand_kv(torch.ones(3, 2, 4), index, backend=backend).shape == (3, 0, 4)
    headless = torch.ones(1, 0, 3, 4)
    assert not decoder.unrotate_qkv((headless, headless, headless), tables, tables, index, 2, backend=backend).any()
    assert decoder.token_nll(torch.ones(0, 4), index, backend=backend).shape == (0,)


def test_expanded_heads_are_the_indexed_ones():
    kv = torch.randn(5, 3, 4)
    index = torch.tensor([0, 2, 2, 1])
    assert torch.equal(decoder.expand_kv(kv, index), kv[:, index])


def test_the_sum_is_the_transpose_of_the_expansion():
    kv, index = torch.randn(5, 3, 4, dtype=torch.float64).float(), torch.tensor([0, 2, 2, 0])
    grad = torch.randn(5, 4, 4)
    one = (decoder.expand_kv(kv, index) * grad).sum()
    by_head, tables = grad.transpose(0, 1)[None], (torch.zeros(5, 4), torch.zeros(5, 4))
    summed = decoder.unrotate_qkv((by_head, by_head, by_head), *tables, index, 3)[:, 28:].view(5, 3, 4)
    torch.testing.assert_close(one, (kv * summed).sum())


def _thrice(grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return grad, grad, grad


# Sizes with flash attention, and those that it does not take.
@pytest.mark.parametrize("size", [8, 64, 128, 20, 200])
def test_attention_has_the_bits_of_autograd(size):
    operands, grad = attention_operands(size, torch.float32, "cpu")
    output, backward = decoder.attention(*operands, scale=0.3)
    for found, expected in zip([output, *backward(grad)], attention_by_autograd(operands, grad, 0.3), strict=True):
        assert not found.requires_grad
        assert torch.equal(found, expected)


def test_flash_attention_takes_no_graph(monkeypatch):
    monkeypatch.setattr(torch.autograd, "grad", lambda *_: pytest.fail("a graph was run"))
    operands, grad = attention_operands(64, torch.float32, "cpu")
    decoder.attention(*operands, scale=0.125)[1](grad)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: decoder.add_rms_norm(x, None, x[0, :3], 1e-5), "weight"),
        (lambda x: decoder.add_rms_norm(x, x.half(), x[0], 1e-5), "float16"),
        (lambda x: decoder.add_rms_norm(x, x, x[0], 1e-5, total=x[:3]), "total must be"),
        (lambda x: decoder.rms_norm_apply(x, x[:3, 0], x[0]), "rstd must be"),
        (lambda x: decoder.rms_norm_backward_(x, x, x, x[:, 0].double(), x[0]), "rstd must be"),
        (lambda x: decoder.rotary(x[None], x, x), "do not fit"),
        (lambda x: decoder.rotary(x[:, None], x[:0], x[:0]), "do not fit"),
        (lambda x: decoder.rotary(x[:, None, :5], x[:, :5], x[:, :5]), "even, got 5"),
        (lambda x: decoder.swiglu(x, x, out=x.half()), "out must be"),
        (lambda x: decoder.token_nll(x, torch.zeros(3, dtype=torch.long)), "do not fit"),
        (lambda x: decoder.expand_kv(x[None], torch.tensor([0]), out=x[None]), "out must be"),
        (lambda x: decoder.swiglu(x, x[:1]), "alike"),
        (lambda x: decoder.token_nll_grad_(x, torch.zeros(3, dtype=torch.long), x[:, 0]), "do not fit"),
        (
            lambda x: decoder.unrotate_qkv(_thrice(x[None, None]), x, x, torch.zeros(7, dtype=torch.long), 2),
            "do not fit",
        ),
        (lambda x: decoder.unrotate_qkv(_thrice(x[None, None]), x, x, None, 2), "has its own"),
        (lambda x: decoder.unrotate_qkv(_thrice(x[None, None]), x[:3], x[:3], None, 1), "tables"),
        (lambda x: decoder.unrotate_qkv(_thrice(x[None]), x, x, None, 1), "do not fit"),
    ],
)
def test_operands_that_do_not_fit_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.randn(4, 6))
