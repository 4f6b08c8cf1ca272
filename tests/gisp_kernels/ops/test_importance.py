"""The importance ops on the CPU: plain torch against float64, Triton's interpreter against both."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from interpreter import shuffled_grid
from selection_oracle import assert_same_selection

from gisp_kernels import abs_weighted_reduce, wgrad_importance
from gisp_kernels.ops.importance import StackedLinear, stacked_wgrad_importance, wgrad_importance_op
from gisp_kernels.testing import (
    Truth,
    assert_error_budget,
    reduce_truth,
    wgrad_truth,
)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Rows, columns, tokens, block: aligned, ragged on all three axes, several tiles and strips each way, a row longer than
# a step, structures of more lines than a program adds at once, a single element. Each just passes a limit.
SHAPES = (
    (32, 48, 16, 8),
    (33, 70, 17, 1),
    (130, 266, 65, 2),
    (12, 1100, 5, 4),
    (258, 40, 2, 129),
    (1, 1, 1, 1),
)
BACKENDS = ("reference", "triton")


def block_for(shape: tuple[int, int, int, int], axis: str) -> int:
    extent = shape[0 if axis == "row" else 1]
    return shape[3] if extent % shape[3] == 0 else 1


def operands(rows: int, width: int, tokens: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    return tuple(torch.randn(shape).to(dtype) for shape in ((tokens, rows), (tokens, width), (rows, width)))


def loops(weight: torch.Tensor, grad: torch.Tensor, axis: str, block: int) -> list[float]:
    """The definition, element by element in Python floats."""
    lines = list(zip(weight.tolist(), grad.tolist(), strict=True))
    if axis == "column":
        lines = list(zip(weight.t().tolist(), grad.t().tolist(), strict=True))
    sums = [sum(abs(w * g) for w, g in zip(ws, gs, strict=True)) for ws, gs in lines]
    return [sum(sums[start : start + block]) for start in range(0, len(sums), block)]


@pytest.mark.parametrize("axis", ["row", "column"])
def test_truth_is_the_definition(axis: str) -> None:
    weight, grad = torch.randn(6, 4), torch.randn(6, 4)
    truth = reduce_truth(weight, grad, axis, 2)
    torch.testing.assert_close(truth.scores, torch.tensor(loops(weight, grad, axis, 2), dtype=torch.float64))


@pytest.mark.parametrize("backend", BACKENDS)
def test_values_by_hand(backend: str) -> None:
    weight = torch.tensor([[1.0, -2.0], [3.0, 0.5], [0.0, 1.0], [-1.0, 4.0]])
    grad = torch.tensor([[2.0, 1.0], [-1.0, 2.0], [5.0, -3.0], [1.0, 0.25]])
    assert abs_weighted_reduce(weight, grad, backend=backend).tolist() == [4.0, 4.0, 3.0, 2.0]
    assert abs_weighted_reduce(weight, grad, block=2, backend=backend).tolist() == [8.0, 5.0]
    assert abs_weighted_reduce(weight, grad, axis="column", backend=backend).tolist() == [6.0, 7.0]
    dy, x = torch.tensor([[1.0, 0.0], [0.0, -1.0]]), torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    product = torch.tensor([[1.0, 2.0], [-3.0, -4.0]])
    weight = torch.tensor([[1.0, -1.0], [2.0, 0.5]])
    expected = (weight * product).abs()
    assert wgrad_importance(dy, x, weight, backend=backend).tolist() == expected.sum(1).tolist()
    columns = wgrad_importance(dy, x, weight, axis="column", backend=backend)
    assert columns.tolist() == expected.sum(0).tolist()


@pytest.mark.parametrize("grad_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("axis", ["row", "column"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_reduce_adds_only_float32_rounding(
    backend: str, axis: str, dtype: torch.dtype, grad_dtype: torch.dtype
) -> None:
    # How a value is read has nothing to do with where it lies: mixed dtypes take an aligned and a ragged shape.
    for shape in SHAPES if dtype == grad_dtype else SHAPES[:2]:
        rows, width, _, _ = shape
        block = block_for(shape, axis)
        weight, grad = torch.randn(rows, width).to(dtype), torch.randn(rows, width).to(grad_dtype)
        truth = reduce_truth(weight, grad, axis, block)
        scores = abs_weighted_reduce(weight, grad, axis=axis, block=block, backend=backend)
        assert_error_budget(scores, truth.scores.float(), truth)


@pytest.mark.parametrize("axis", ["row", "column"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_second_power(backend: str, axis: str) -> None:
    for shape in SHAPES:
        dy, x, weight = operands(*shape[:3], torch.float32)
        block = block_for(shape, axis)
        grad = dy.T @ x
        truth = reduce_truth(weight, grad, axis, block, power=2)
        scores = abs_weighted_reduce(weight, grad, axis=axis, block=block, power=2, backend=backend)
        # A square rounds twice what it is made of.
        assert_error_budget(scores, truth.scores.float(), truth)
        fused = wgrad_importance(dy, x, weight, axis=axis, block=block, power=2, backend=backend)
        torch.testing.assert_close(fused, scores, rtol=1e-5, atol=0.0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("axis", ["row", "column"])
def test_wgrad_reference_rounds_the_gradient_once(axis: str, dtype: torch.dtype) -> None:
    for shape in SHAPES:
        dy, x, weight = operands(*shape[:3], dtype)
        block = block_for(shape, axis)
        truth = wgrad_truth(dy, x, weight, axis, block)
        rounded = (dy.double().T @ x.double()).to(dtype)
        expected = reduce_truth(weight, rounded, axis, block).scores
        scores = wgrad_importance(dy, x, weight, axis=axis, block=block)
        assert scores.dtype == torch.float32
        # The product may round the other way, so two roundings of the gradient bound the difference.
        bound = (2 * torch.finfo(dtype).eps + truth.step) * truth.magnitude
        assert ((scores.double() - expected).abs() <= bound).all()


# The interpreter multiplies the raw bits of bfloat16 in tl.dot (see test_interpreter_canary).
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("axis", ["row", "column"])
def test_wgrad_triton_adds_only_float32_rounding(axis: str, dtype: torch.dtype) -> None:
    for shape in SHAPES:
        dy, x, weight = operands(*shape[:3], dtype)
        block = block_for(shape, axis)
        truth = wgrad_truth(dy, x, weight, axis, block)
        scores = wgrad_importance(dy, x, weight, axis=axis, block=block, backend="triton")
        assert_error_budget(scores, truth.scores.float(), truth)
        if scores.numel() > 3:
            assert_same_selection(scores, truth, scores.numel() // 2)


@pytest.mark.parametrize("axis", ["row", "column"])
def test_cublas_route_pads_and_crops(axis: str) -> None:
    for shape in SHAPES:
        dy, x, weight = operands(*shape[:3], torch.float16)
        block = block_for(shape, axis)
        truth = wgrad_truth(dy, x, weight, axis, block)
        reference = wgrad_importance(dy, x, weight, axis=axis, block=block, backend="reference")
        scores = torch.zeros_like(reference)
        wgrad_importance_op([scores], dy, x, [weight], [0], [block], axis, "matmul")
        assert_error_budget(scores, reference, truth)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("axis", ["row", "column"])
def test_strided_views(backend: str, axis: str) -> None:
    storage = torch.randn(3, 70, 90)
    views = {
        "columns of a wider storage": lambda s: s[:33, :21],
        "every other column": lambda s: s[:33, 0:42:2],
        "transposed": lambda s: s[:21, :33].t(),
        "offset rows": lambda s: s[2:35, 1:22],
    }
    for name, view in views.items():
        weight, grad = view(storage[0]), view(storage[1])
        contiguous = abs_weighted_reduce(weight.contiguous(), grad.contiguous(), axis=axis, backend="reference")
        for other in (grad, grad.contiguous()):
            scores = abs_weighted_reduce(weight, other, axis=axis, backend=backend)
            torch.testing.assert_close(scores, contiguous, msg=name)
        dy, x = storage[2].t()[:50, :33], storage[2][:50, 3:24]
        truth = wgrad_truth(dy, x, weight, axis, 1)
        scores = wgrad_importance(dy, x, weight, axis=axis, backend=backend)
        assert_error_budget(scores, truth.scores.float(), truth)


def test_expanded_and_batched_tokens() -> None:
    dy, x, weight = torch.randn(1).expand(2, 5, 6), torch.randn(2, 5, 7), torch.randn(6, 7)
    expected = abs_weighted_reduce(weight, dy.flatten(0, 1).T @ x.flatten(0, 1))
    for backend in BACKENDS:
        torch.testing.assert_close(wgrad_importance(dy, x, weight, backend=backend), expected)
    single = wgrad_importance(dy[0, 0], x[0, 0], weight)
    torch.testing.assert_close(single, wgrad_importance(dy[0, :1], x[0, :1], weight))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("rows", "width", "tokens"), [(0, 8, 4), (8, 0, 4), (8, 8, 0), (0, 0, 0)])
def test_empty_shapes_score_zero(backend: str, rows: int, width: int, tokens: int) -> None:
    for axis, count in (("row", rows), ("column", width)):
        dy, x, weight = operands(rows, width, tokens, torch.float32)
        scores = wgrad_importance(dy, x, weight, axis=axis, block=2, backend=backend)
        assert torch.equal(scores, torch.zeros(count // 2))
        scores = abs_weighted_reduce(weight, torch.zeros_like(weight), axis=axis, block=2, backend=backend)
        assert torch.equal(scores, torch.zeros(count // 2))
        batched = wgrad_importance(dy[None], x[None], weight, axis=axis, backend=backend)
        assert torch.equal(batched, torch.zeros(count))


@pytest.mark.parametrize("backend", BACKENDS)
def test_out_is_added_to_and_returned(backend: str) -> None:
    dy, x, weight = operands(12, 20, 9, torch.float32)
    grad = dy.T @ x
    for run in (
        lambda out: wgrad_importance(dy, x, weight, block=3, out=out, backend=backend),
        lambda out: abs_weighted_reduce(weight, grad, block=3, out=out, backend=backend),
    ):
        once = run(None)
        storage = torch.full((8,), 100.0)
        out = storage[::2]
        assert run(out) is out
        torch.testing.assert_close(out, once + 100)
        assert torch.equal(storage[1::2], torch.full((4,), 100.0))


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_and_infinity_reach_exactly_their_structures(backend: str) -> None:
    dy, x, weight = operands(20, 40, 6, torch.float32)
    dy[2, 7] = float("nan")
    dy[3, 11] = float("inf")
    x.abs_()
    scores = wgrad_importance(dy, x, weight, backend=backend)
    assert scores.isnan().nonzero().flatten().tolist() == [7]
    assert scores.isinf().nonzero().flatten().tolist() == [11]
    columns = wgrad_importance(dy, x, weight, axis="column", backend=backend)
    assert columns.isnan().all()


def test_program_order_does_not_matter() -> None:
    dy, x, weight = operands(150, 140, 20, torch.float32)
    for axis in ("row", "column"):
        expected = wgrad_importance(dy, x, weight, axis=axis, backend="triton")
        reduced = abs_weighted_reduce(weight, dy.T @ x, axis=axis, backend="triton")
        for seed in range(3):
            with shuffled_grid(seed):
                assert torch.equal(wgrad_importance(dy, x, weight, axis=axis, backend="triton"), expected)
                again = abs_weighted_reduce(weight, dy.T @ x, axis=axis, backend="triton")
                assert torch.equal(again, reduced)


@pytest.mark.parametrize("choice", ["reference", "triton"])
def test_registration(choice: str) -> None:
    dy, x, weight = operands(6, 10, 4, torch.float32)
    torch.library.opcheck(
        torch.ops.gisp.abs_weighted_reduce_.default, (torch.zeros(3), weight, dy.T @ x, "row", 2, choice, 2)
    )
    torch.library.opcheck(
        torch.ops.gisp.wgrad_importance_.default, ([torch.zeros(10)], dy, x, [weight], [0], [1], "column", choice)
    )


def test_memory_of_the_package_is_poisoned() -> None:
    scope = {"__name__": "gisp_kernels.somewhere", "torch": torch}
    assert eval("torch.empty(3)", scope).isnan().all()
    assert eval("torch.zeros(3).new_empty(2)", scope).isnan().all()
    assert eval("torch.empty_like(torch.zeros(3, dtype=torch.int64))", scope).tolist() == [93] * 3


def test_inputs_that_require_grad_are_only_read() -> None:
    weight = torch.randn(4, 6, requires_grad=True)
    scores = abs_weighted_reduce(weight, torch.randn(4, 6))
    assert not scores.requires_grad
    assert weight.grad is None


W, G = torch.zeros(4, 6), torch.zeros(4, 6)
DY, X = torch.zeros(3, 4), torch.zeros(3, 6)
BAD_CALLS: list[tuple[type[Exception], str, Callable[[], object]]] = [
    (ValueError, "axis must be 'row' or 'column', got 'rows'", lambda: abs_weighted_reduce(W, G, axis="rows")),
    (ValueError, "power must be 1 or 2, got 3", lambda: abs_weighted_reduce(W, G, power=3)),
    (ValueError, "power must be 1 or 2, got 0", lambda: wgrad_importance(DY, X, W, power=0)),
    (RuntimeError, "'native' does not implement", lambda: wgrad_importance(DY, X, W, power=2, backend="native")),
    (ValueError, "block must be at least 1, got 0", lambda: abs_weighted_reduce(W, G, block=0)),
    (ValueError, "block 3 does not divide the 4 rows", lambda: abs_weighted_reduce(W, G, block=3)),
    (ValueError, r"grad must have shape \(4, 6\), got \(6, 4\)", lambda: abs_weighted_reduce(W, G.t())),
    (ValueError, "weight must have 2 dimensions", lambda: abs_weighted_reduce(W[0], G[0])),
    (TypeError, "weight must have one of the dtypes .*float64", lambda: abs_weighted_reduce(W.double(), G)),
    (TypeError, "grad must be a tensor, got NoneType", lambda: abs_weighted_reduce(W, None)),  # type: ignore[arg-type]
    (TypeError, "dense tensor", lambda: abs_weighted_reduce(W, G.to_sparse())),
    (TypeError, "out must be float32", lambda: abs_weighted_reduce(W, G, out=torch.zeros(4).half())),
    (ValueError, r"out must have shape \(4,\), got \(6,\)", lambda: abs_weighted_reduce(W, G, out=torch.zeros(6))),
    (ValueError, "out must not require grad", lambda: abs_weighted_reduce(W, G, out=torch.zeros(4).requires_grad_())),
    (ValueError, "all tensors must be on one device", lambda: abs_weighted_reduce(W, G.to("meta"))),
    (ValueError, "backend must be 'auto' or one of", lambda: abs_weighted_reduce(W, G, backend="cuda")),
    (RuntimeError, "backend 'native' cannot run here: .* on cpu", lambda: wgrad_importance(DY, X, W, backend="native")),
    (TypeError, "grad_output is torch.float32 but input is torch.float16", lambda: wgrad_importance(DY, X.half(), W)),
    (ValueError, "agree on all but the last dimension", lambda: wgrad_importance(DY[:2], X, W)),
    (ValueError, r"weight must have shape \(4, 6\), got \(6, 4\)", lambda: wgrad_importance(DY, X, W.t())),
]


@pytest.mark.parametrize(("error", "message", "call"), BAD_CALLS, ids=[case[1][:40] for case in BAD_CALLS])
def test_bad_arguments(error: type[Exception], message: str, call: Callable[[], object]) -> None:
    with pytest.raises(error, match=message):
        call()


def test_environment_chooses_the_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GISP_BACKEND", "native")
    with pytest.raises(RuntimeError, match="does not implement"):
        abs_weighted_reduce(W, G)
    assert abs_weighted_reduce(W, G, backend="reference").shape == (4,)


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_stacked_layers_score_what_each_scores_alone(count: int, backend: str) -> None:
    x, dy = torch.randn(20, 24), torch.randn(20, 3 * 16 + 5)
    weights = [torch.randn(16, 24) for _ in range(count)]
    outs = [torch.ones(4) for _ in range(count)]
    stack = [
        StackedLinear(5 + 16 * i, weight, 4, out) for i, (weight, out) in enumerate(zip(weights, outs, strict=True))
    ]
    stacked_wgrad_importance(dy, x, stack, backend=backend)
    for layer in stack:
        alone = wgrad_importance(dy[:, layer.start : layer.stop], x, layer.weight, block=4, backend=backend)
        torch.testing.assert_close(layer.out, 1 + alone)


def test_a_stack_of_nothing_does_nothing() -> None:
    stacked_wgrad_importance(torch.randn(4, 8), torch.randn(4, 8), [])


def test_a_layer_without_rows_leaves_the_others_their_scores() -> None:
    dy, x, weight, out = torch.randn(4, 8), torch.randn(4, 6), torch.randn(8, 6), torch.zeros(8)
    stack = [StackedLinear(0, weight[:0], 1, torch.zeros(0)), StackedLinear(0, weight, 1, out)]
    stacked_wgrad_importance(dy, x, stack)
    torch.testing.assert_close(out, wgrad_importance(dy, x, weight))


def test_layers_that_do_not_fit_are_refused() -> None:
    dy, x, weight, out = torch.randn(4, 8), torch.randn(4, 6), torch.randn(8, 6), torch.zeros(8)
    for wrong, message in (
        (StackedLinear(1, weight, 1, out), r"weight must have shape \(7, 6\)"),
        (StackedLinear(0, weight[:, :5], 1, out), r"weight must have shape \(8, 6\)"),
        (StackedLinear(0, weight, 2, out), r"out must have shape \(4,\)"),
    ):
        with pytest.raises(ValueError, match=message):
            stacked_wgrad_importance(dy, x, [wrong])


def test_judges_reject_wrong_scores() -> None:
    weight, grad = torch.randn(8, 64), torch.randn(8, 64)
    truth = reduce_truth(weight, grad, "row", 1)
    exact = truth.scores.float()
    off = exact.clone()
    off[3] *= 1 + 1e-5
    with pytest.raises(AssertionError, match="score 3"):
        assert_error_budget(off, exact, truth)
    with pytest.raises(AssertionError, match="not finite"):
        assert_error_budget(torch.full_like(exact, float("nan")), exact, truth)
    swapped = exact.clone()
    order = exact.argsort()
    swapped[order[0]], swapped[order[-1]] = exact[order[-1]], exact[order[0]]
    with pytest.raises(AssertionError, match="wrong side"):
        assert_same_selection(swapped, truth, 4)
    tie = Truth(torch.tensor([1.0, 1.0, 2.0]).double(), torch.ones(3).double(), 1)
    assert_same_selection(torch.tensor([1.0 + 1e-7, 1.0, 2.0]), tie, 1)
