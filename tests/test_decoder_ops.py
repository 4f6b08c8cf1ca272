"""Elementwise ops of a decoder layer: references against float64 autograd, kernels in the interpreter beside them."""

from __future__ import annotations

import pytest
import torch
from decoder_cases import added_error, cross_entropy_case, expand_case, kv_case, norm_cases, rotary_cases, swiglu_cases

from gisp_kernels import decoder

CASES = [
    *norm_cases(5, 32),
    *norm_cases(3, 77),
    *rotary_cases(12, 3, 16, 4),
    *rotary_cases(9, 1, 10, 3),
    *swiglu_cases(4, 48),
    *swiglu_cases(3, 1029),
    cross_entropy_case(6, 96),
    cross_entropy_case(4, 4099),
    expand_case(17, 6, 3, 16),
    expand_case(5, 4, 4, 10),
    kv_case(17, 6, 3, 16),
    kv_case(5, 4, 4, 10),
]
EPSILON = {torch.float32: 2e-6, torch.float16: 2e-3}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_kernels_and_references_are_close_to_the_truth(case, dtype):
    for kernel, reference in added_error(case, "cpu", dtype, "triton"):
        assert reference <= EPSILON[dtype]
        assert kernel <= 1.5 * reference + EPSILON[dtype] / 4


def test_expanded_heads_are_the_indexed_ones():
    kv = torch.randn(5, 3, 4)
    index = torch.tensor([0, 2, 2, 1])
    assert torch.equal(decoder.expand_kv(kv, index), kv[:, index])


def test_the_sum_is_the_transpose_of_the_expansion():
    kv, index = torch.randn(5, 3, 4, dtype=torch.float64).float(), torch.tensor([0, 2, 2, 0])
    grad = torch.randn(5, 4, 4)
    one = (decoder.expand_kv(kv, index) * grad).sum()
    torch.testing.assert_close(one, (kv * decoder.sum_kv(grad, index, 3)).sum())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: decoder.add_rms_norm(x, None, x[0, :3], 1e-5), "weight"),
        (lambda x: decoder.add_rms_norm(x, x.half(), x[0], 1e-5), "float16"),
        (lambda x: decoder.rotary(x[None], x, x), "do not fit"),
        (lambda x: decoder.swiglu(x, x[:1]), "alike"),
        (lambda x: decoder.token_nll_grad_(x, torch.zeros(3, dtype=torch.long), x[:, 0]), "do not fit"),
        (lambda x: decoder.sum_kv(x[None], torch.zeros(7, dtype=torch.long), 2), "do not fit"),
    ],
)
def test_operands_that_do_not_fit_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.randn(4, 6))
