"""Elementwise ops of a decoder layer on a GPU, at real sizes, and bit for bit the same in every run."""

from __future__ import annotations

import pytest
import torch
from decoder_cases import added_error, cross_entropy_case, expand_case, kv_case, norm_cases, rotary_cases, swiglu_cases

pytestmark = pytest.mark.gpu

CASES = [
    *norm_cases(2048, 5120),
    *norm_cases(33, 4096),
    *norm_cases(7, 77),
    *norm_cases(640, 128),
    *rotary_cases(1024, 40, 128, 256),
    *rotary_cases(96, 3, 64, 32),
    *rotary_cases(15, 1, 20, 5),
    *swiglu_cases(1024, 13824),
    *swiglu_cases(64, 13808),
    *swiglu_cases(33, 1037),
    cross_entropy_case(256, 32000),
    cross_entropy_case(64, 128256),
    cross_entropy_case(9, 5003),
    expand_case(1024, 32, 8, 128),
    expand_case(33, 7, 4, 20),
    kv_case(1024, 32, 8, 128),
    kv_case(33, 7, 4, 20),
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
