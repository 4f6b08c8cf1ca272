"""Elementwise ops of a decoder layer on a GPU, at real sizes, and bit for bit the same in every run."""

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

from gisp_kernels.ops import decoder

pytestmark = pytest.mark.gpu

CASES = [
    *norm_cases(8192, 5120),
    *norm_cases(33, 4096),
    *norm_cases(7, 77),
    *norm_cases(640, 128),
    rotary_case(8192, 40, 128, 256),
    rotary_case(1024, 37, 128, 512),
    rotary_case(96, 3, 64, 32),
    rotary_case(15, 1, 20, 5),
    *swiglu_cases(8192, 13824),
    *swiglu_cases(64, 13808),
    *swiglu_cases(64, 13817),
    *swiglu_cases(33, 1037),
    cross_entropy_case(4096, 32000),
    cross_entropy_case(512, 128256),
    cross_entropy_case(64, 256000),
    cross_entropy_case(9, 5003),
    expand_case(8192, 32, 8, 128),
    expand_case(33, 7, 4, 20),
    unrotate_case(8192, 32, 8, 128, 256),
    unrotate_case(8192, 40, 40, 128, 256, shared=False),
    unrotate_case(33, 7, 4, 20, 11),
]
# Rounding of one operation in the dtype, times the few that are chained.
EPSILON = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


@pytest.mark.parametrize("dtype", EPSILON, ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_kernels_add_no_error_to_the_reference(case, dtype):
    for kernel, reference in added_error(case, "cuda", dtype, "triton"):
        assert reference <= EPSILON[dtype]
        assert kernel <= 1.5 * reference + EPSILON[dtype] / 10


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_equal_inputs_give_equal_bits(case):
    one, other = (case.run(case.make("cuda", torch.bfloat16), "triton") for _ in range(2))
    for a, b in zip(one, other, strict=True):
        assert torch.equal(a.nan_to_num(), b.nan_to_num())


FAR_ROWS = 17
FAR_STRIDE = 2**27
FAR_CASES = [
    *norm_cases(FAR_ROWS, 1040),
    rotary_case(FAR_ROWS, 3, 64, 1),
    *swiglu_cases(FAR_ROWS, 1037),
    cross_entropy_case(FAR_ROWS, 5003),
    expand_case(FAR_ROWS, 7, 4, 32),
    unrotate_case(FAR_ROWS, 7, 4, 32, FAR_ROWS),
]


def far(tensor: torch.Tensor) -> torch.Tensor:
    """The same values, the last row more than 2**31 elements behind the first."""
    if tensor.dim() == 1 or tensor.shape[0] != FAR_ROWS:
        return tensor
    base = torch.empty((FAR_ROWS - 1) * FAR_STRIDE + tensor[0].numel(), dtype=tensor.dtype, device=tensor.device)
    inner = torch.empty(tensor.shape[1:], device="meta").stride()
    return base.as_strided(tensor.shape, (FAR_STRIDE, *inner)).copy_(tensor)


@pytest.mark.parametrize("case", FAR_CASES, ids=lambda case: case.name)
def test_offsets_beyond_32_bits(case):
    expected = case.run(case.make("cuda", torch.bfloat16), "triton")
    found = case.run(tuple(far(t) for t in case.make("cuda", torch.bfloat16)), "triton")
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)


def test_nothing_recompiles_while_a_model_shrinks():
    from gisp_kernels.triton.decoder import kv_heads, rms_norm, rotary, swiglu

    kernels = (
        swiglu._gates_kernel,
        rms_norm._add_norm_kernel,
        rms_norm._apply_kernel,
        rms_norm._backward_kernel,
        rotary._rotary_kernel,
        swiglu._forward_kernel,
        swiglu._backward_kernel,
        kv_heads._expand_kernel,
        rotary._unrotate_kernel,
    )

    def run(tokens: int, channels: int, heads: int, kv: int) -> None:
        gate, up = torch.randn(tokens, 2 * channels, device="cuda").bfloat16().split(channels, dim=1)
        decoder.swiglu_backward_(gate, up, decoder.swiglu(gate, up))
        decoder.swiglu_backward_gates_(gate, up, decoder.swiglu(gate, up), tokens)
        qkv = torch.randn(tokens, (heads + 2 * kv) * 128, device="cuda").bfloat16()
        query, key, _ = (part.unflatten(1, (-1, 128)) for part in qkv.split([heads * 128, kv * 128, kv * 128], dim=1))
        table = torch.ones(tokens, 128, device="cuda", dtype=torch.bfloat16)
        for part in (query, key):
            decoder.rotary(part, table, table, out=part)
        index = torch.arange(heads, device="cuda") % kv
        spread = decoder.expand_kv(key, index).transpose(0, 1)[None]
        for asked, count in ((index, kv), (None, heads)):
            decoder.unrotate_qkv((spread, spread, spread), table, table, asked, count)
        x, delta, weight = (
            torch.ones(*shape, device="cuda").bfloat16() for shape in ((tokens, 512), (tokens, 512), (512,))
        )
        total, normed, rstd = decoder.add_rms_norm(x, delta, weight, 1e-6, total=delta)
        decoder.rms_norm_apply(total, rstd, weight)
        decoder.rms_norm_backward_(x, normed, total, rstd, weight)

    def variants() -> int:
        return sum(len(caches[0]) for kernel in kernels for caches in kernel.device_caches.values())

    # Widths of 16-byte loads of both kinds, widths without: what can be told apart, once each.
    for tokens, channels, heads, kv in ((64, 1024, 8, 4), (64, 1032, 8, 4), (63, 1023, 7, 1), (1, 1, 1, 1)):
        run(tokens, channels, heads, kv)
    compiled = variants()
    assert compiled > 0
    for shape in ((65, 1008, 6, 3), (512, 976, 5, 5), (33, 968, 16, 2), (2, 777, 3, 2), (16, 16, 16, 16), (7, 2, 2, 1)):
        run(*shape)
    assert variants() == compiled


@pytest.mark.parametrize("size", [64, 128, 20, 256])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_attention_has_the_bits_of_autograd(dtype, size):
    operands, grad = attention_operands(size, dtype, "cuda")
    torch.use_deterministic_algorithms(True)
    try:
        output, backward = decoder.attention(*operands, scale=0.3)
        found, expected = [output, *backward(grad)], attention_by_autograd(operands, grad, 0.3)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
