"""Gate gradients: plain torch and Triton's interpreter against float64, and what they predict against real removal."""

from __future__ import annotations

import pytest
import torch
from interpreter import shuffled_grid

from gisp_kernels import gate_grads, gate_sums, predicted_loss_change
from gisp_kernels.testing import assert_error_budget, gate_truth

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Sequences, tokens, columns, block.
SHAPES = (
    (2, 5, 12, 1),
    (3, 33, 70, 1),
    (1, 64, 128, 64),
    (2, 40, 96, 24),
    (4, 1, 300, 150),
    (2, 65, 130, 1),
    (1, 1, 1, 1),
    # Few programs and long sequences, which come in parts.
    (1, 800, 70, 1),
    (2, 530, 96, 24),
    (1, 515, 200, 100),
)
BACKENDS = ("reference", "triton")


@pytest.mark.parametrize("backend", BACKENDS)
def test_values_by_hand(backend: str) -> None:
    x = torch.tensor([[[1.0, 2.0], [3.0, -1.0]], [[0.5, 0.0], [2.0, 4.0]]])
    grad = torch.tensor([[[1.0, -1.0], [2.0, 1.0]], [[4.0, 9.0], [-1.0, 0.25]]])
    assert gate_grads(x, grad, backend=backend).tolist() == [[7.0, -3.0], [0.0, 1.0]]
    assert gate_grads(x, grad, block=2, backend=backend).tolist() == [[4.0], [1.0]]


@pytest.mark.parametrize("grad_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_only_float32_rounding_is_added(backend: str, dtype: torch.dtype, grad_dtype: torch.dtype) -> None:
    for sequences, tokens, columns, block in SHAPES:
        x = torch.randn(sequences, tokens, columns).to(dtype)
        grad = torch.randn(sequences, tokens, columns).to(grad_dtype)
        truth = gate_truth(x, grad, block)
        found = gate_grads(x, grad, block=block, backend=backend)
        assert found.shape == (sequences, columns // block)
        assert_error_budget(found.flatten(), truth.scores.float(), truth)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("block", [1, 4])
def test_strides_poison_and_a_slice_of_a_larger_result(backend: str, block: int) -> None:
    base = torch.full((2, 9, 40), float("nan"))
    x, grad = base[:, :7, 8:32], base.clone()[:, 2:, 3:27]
    x.copy_(torch.randn(x.shape))
    grad.copy_(torch.randn(grad.shape))
    expected = (x * grad).sum(1).view(2, -1, block).sum(2)
    out = torch.full((2, 60), float("nan"))
    gate_grads(x, grad, block=block, out=out[:, 5 : 5 + 24 // block], backend=backend)
    torch.testing.assert_close(out[:, 5 : 5 + 24 // block], expected)
    assert out.isnan().sum() == out.numel() - 2 * 24 // block
    turned = gate_grads(x.transpose(1, 2).contiguous().transpose(1, 2), grad, block=block, backend=backend)
    torch.testing.assert_close(turned, expected)


@pytest.mark.parametrize("block", [1, 4])
def test_parts_of_sequences_go_to_a_slice_of_a_larger_result(block: int) -> None:
    x, grad = torch.randn(2, 600, 24), torch.randn(2, 600, 24)
    out = torch.full((2, 60), float("nan"))
    gate_grads(x, grad, block=block, out=out[:, 5 : 5 + 24 // block], backend="triton")
    truth = gate_truth(x, grad, block)
    assert_error_budget(out[:, 5 : 5 + 24 // block].flatten(), truth.scores.float(), truth)
    assert out.isnan().sum() == out.numel() - 2 * 24 // block


def test_parts_follow_from_shapes_alone() -> None:
    from gisp_kernels.triton import gate_grads as kernel

    def parts(sequences: int, length: int, count: int, block: int) -> int:
        return kernel.choose(sequences, length, count, block)[1]

    # Sequences of 256 tokens are never split, nor where there are programs enough.
    assert parts(1, 256, 1, 128) == parts(8, 511, 40, 128) == parts(32, 8192, 40, 128) == 1
    assert parts(1, 2048, 32, 128) == 8
    assert parts(1, 2048, 7440, 1) == 1
    assert parts(1, 8192, 64, 1) == 32


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(0, 4, 8), (2, 0, 8), (2, 4, 0)])
def test_nothing_to_sum(backend: str, shape: tuple[int, int, int]) -> None:
    out = torch.full((shape[0], shape[2] // 2), float("nan"))
    found = gate_grads(torch.randn(shape), torch.randn(shape), block=2, out=out, backend=backend)
    assert found is out
    assert torch.equal(found, torch.zeros_like(found))


def test_order_of_programs_changes_no_bit() -> None:
    for block, length in ((1, 50), (10, 50), (1, 600), (10, 600)):
        x, grad = torch.randn(3, length, 150), torch.randn(3, length, 150)
        expected = gate_grads(x, grad, block=block, backend="triton")
        with shuffled_grid(1):
            assert torch.equal(gate_grads(x, grad, block=block, backend="triton"), expected)


@pytest.mark.parametrize(
    ("x", "grad", "options", "message"),
    [
        (torch.ones(2, 3), torch.ones(2, 3), {}, "input must have 3 dimensions"),
        (torch.ones(1, 2, 3), torch.ones(1, 2, 4), {}, r"grad_input must have shape \(1, 2, 3\)"),
        (torch.ones(1, 2, 3), torch.ones(1, 2, 3), {"block": 2}, "block must divide the 3 columns of the input, got 2"),
        (torch.ones(1, 2, 3), torch.ones(1, 2, 3), {"block": 0}, "got 0"),
        (torch.ones(1, 2, 3), torch.ones(1, 2, 3), {"out": torch.zeros(1, 2)}, "out must have shape"),
    ],
)
def test_shapes_that_do_not_fit(x: torch.Tensor, grad: torch.Tensor, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        gate_grads(x, grad, **options)


def test_dtypes_that_do_not_fit() -> None:
    with pytest.raises(TypeError, match="input must have one of the dtypes"):
        gate_grads(torch.ones(1, 2, 3, dtype=torch.float64), torch.ones(1, 2, 3))
    with pytest.raises(TypeError, match="out must be float32"):
        gate_grads(torch.ones(1, 2, 3), torch.ones(1, 2, 3), out=torch.zeros(1, 3, dtype=torch.float16))


def test_prediction_by_hand() -> None:
    grads = torch.tensor([[1.0, -2.0], [0.5, 1.0]])
    found = predicted_loss_change(grads, torch.tensor([2.0, 4.0]))
    # -(1 + 0.5) + (2 * 1 + 4 * 0.25) / 2 and -(-2 + 1) + (2 * 4 + 4 * 1) / 2
    assert found.tolist() == pytest.approx([0.0, 7.0], abs=1e-6)


def test_small_gradients_are_not_lost() -> None:
    grads = torch.full((2, 1), 1e-24)
    found = predicted_loss_change(grads, torch.full((2,), 1e30))
    assert found.item() == pytest.approx(-2e-24 + 1e-18, rel=1e-6)


def test_it_predicts_the_loss_of_a_logistic_model_to_second_order() -> None:
    """At the generating weights the empirical Fisher information is the curvature."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(6, generator=generator, dtype=torch.float64) * 0.15
    x = torch.randn(200_000, 1, 6, generator=generator, dtype=torch.float64)
    labels = torch.bernoulli(torch.sigmoid(x @ weight), generator=generator)

    def losses(w: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.binary_cross_entropy_with_logits(x @ w, labels, reduction="none")

    contributions = (x * weight).requires_grad_()
    logits = contributions.sum(-1)
    loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, labels)
    (grad,) = torch.autograd.grad(loss, contributions)
    found = predicted_loss_change(
        gate_grads(contributions.detach().float(), grad.float()), torch.full((len(x),), float(len(x)))
    )
    for i in range(6):
        closed = weight.clone()
        closed[i] = 0
        change = float((losses(closed) - losses(weight)).mean())
        assert float(found[i]) == pytest.approx(change, rel=0.05, abs=2e-5)


def test_sequences_of_one_sample_are_added_before_squaring() -> None:
    grads = torch.randn(5, 7)
    samples, curvature = torch.tensor([2, 0, 2, 1, 0]), torch.tensor([0.5, 3.0, 2.0])
    together = torch.stack([grads[1] + grads[4], grads[3], grads[0] + grads[2]]).double()
    found = gate_sums(grads, curvature, samples)
    expected = torch.stack([together.sum(0), (curvature[:, None] * together.square()).sum(0), together.square().sum(0)])
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    alone = gate_sums(grads, torch.arange(1.0, 6.0), torch.arange(5))
    assert torch.equal(alone, gate_sums(grads, torch.arange(1.0, 6.0)))
    for wrong, message in (
        (torch.tensor([0, 1, 2]), r"samples must have shape \(5,\)"),
        (torch.tensor([0, 1, 2, 3, 0]), "samples must be from 0 to 2"),
        (torch.tensor([0, 1, 2, -1, 0]), "samples must be from 0 to 2"),
    ):
        with pytest.raises(ValueError, match=message):
            gate_sums(grads, curvature, wrong)
