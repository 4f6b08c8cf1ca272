"""The recorder on a GPU in bfloat16, around a small decoder block with scaled dot-product attention."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from recorder_oracle import Block, score, true_scores, weight_grads
from torch.utils.checkpoint import checkpoint

from gisp_kernels import iter_groups, record_importance, record_lines
from gisp_kernels.ops.wgrad import FUSED_MAX_TOKENS
from gisp_kernels.record.targets import Mode

pytestmark = pytest.mark.gpu

MODES: tuple[Mode, ...] = ("stream", "exact")
# bfloat16 keeps 8 bits and a gradient of plain autograd is rounded to it once; a score adds many of one sign.
BFLOAT16_ROUNDING = 2.0**-8


@pytest.fixture
def model() -> Block:
    return Block(hidden=256, heads=4, head_dim=64, width=650).to("cuda", torch.bfloat16)


def batch(tokens: int = 96) -> torch.Tensor:
    return torch.randn(2, tokens, 256, device="cuda", dtype=torch.bfloat16)


def assert_scores(scores: dict[str, torch.Tensor], truth: dict[str, torch.Tensor], rtol: float) -> None:
    assert scores.keys() == truth.keys()
    for name, expected in truth.items():
        assert scores[name].dtype == torch.float32
        torch.testing.assert_close(scores[name].cpu().double(), expected, rtol=rtol, atol=0.0)


@pytest.mark.parametrize("frozen", [False, True], ids=["trainable", "frozen"])
@pytest.mark.parametrize("tokens", [96, FUSED_MAX_TOKENS], ids=["fused", "cublas"])
@pytest.mark.parametrize("mode", MODES)
def test_scores_match_autograd(model: Block, mode: Mode, tokens: int, frozen: bool) -> None:
    x = batch(tokens)
    truth = true_scores(model, x)
    model.requires_grad_(not frozen)
    with record_importance(model, mode=mode) as recorder:
        model.loss(x).backward()
    assert_scores(recorder.scores(), truth, BFLOAT16_ROUNDING)
    assert model.mlp.up_proj.weight.grad is None


@pytest.mark.parametrize("mode", MODES)
def test_forward_before(model: Block, mode: Mode) -> None:
    x = batch()
    truth = true_scores(model, x)
    loss = model.loss(x)
    with record_importance(model, mode=mode) as recorder:
        loss.backward()
    assert_scores(recorder.scores(), truth, 1e-5)
    assert model.mlp.up_proj.weight.grad is None


@pytest.mark.parametrize(("rows", "width"), [(64, 128), (67, 133), (1, 1)])
def test_exact_mode_rounds_nothing_below_float32(rows: int, width: int) -> None:
    linear = torch.nn.Linear(width, rows, bias=False).to("cuda", torch.bfloat16)
    x = torch.randn(513, width, device="cuda", dtype=torch.bfloat16)
    dy = torch.randn(513, rows, device="cuda", dtype=torch.bfloat16)
    with record_importance([linear], mode="exact") as recorder:
        for _ in range(2):
            linear(x).backward(dy)
    product = 2 * (dy.double().T @ x.double()) * linear.weight.double()
    torch.testing.assert_close(recorder.scores()["0"].double(), product.abs().sum(1).detach(), rtol=1e-5, atol=0.0)


@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
@pytest.mark.parametrize("mode", MODES)
def test_gradient_checkpointing(model: Block, mode: Mode, reentrant: bool) -> None:
    x = batch().requires_grad_()
    with record_importance(model, mode=mode) as recorder:
        model.loss(x).backward()
        expected = recorder.scores()
        recorder.reset()
        model.wrap = functools.partial(checkpoint, use_reentrant=reentrant)
        model.loss(x).backward()
    assert recorder.backward_calls == 1
    for name, value in recorder.scores().items():
        torch.testing.assert_close(value, expected[name], rtol=BFLOAT16_ROUNDING, atol=0.0)


def test_autocast() -> None:
    model = Block(hidden=256, heads=4, head_dim=64, width=650).cuda()
    x = batch().float()
    groups = list(iter_groups(model))
    with torch.autocast("cuda", dtype=torch.bfloat16):
        loss = model.loss(x)
    truth = score(weight_grads(loss, groups), groups)
    with record_importance(model) as recorder:
        with torch.autocast("cuda", dtype=torch.bfloat16):
            loss = model.loss(x)
        loss.backward()
    assert_scores(recorder.scores(), truth, BFLOAT16_ROUNDING)


def test_two_uses_on_one_graph(model: Block) -> None:
    x = batch()
    groups = list(iter_groups(model))
    truth = score(weight_grads(model(model(x)).float().pow(2).mean(), groups), groups)
    with record_importance(model) as recorder:
        model(model(x)).float().pow(2).mean().backward()
    assert_scores(recorder.scores(), truth, 2 * BFLOAT16_ROUNDING)


@pytest.mark.parametrize("mode", MODES)
def test_repeats_are_bit_identical(model: Block, mode: Mode) -> None:
    x = batch()

    def run() -> dict[str, torch.Tensor]:
        with record_importance(model, mode=mode) as recorder:
            model.mlp(x).float().pow(2).mean().backward()
        return recorder.scores()

    first = run()
    for _ in range(5):
        again = run()
        assert all(torch.equal(again[name], first[name]) for name in first)


def test_stream_mode_keeps_no_weight_gradient() -> None:
    wide = torch.nn.Linear(4096, 4096, bias=False).to("cuda", torch.bfloat16).requires_grad_(False)
    x = torch.randn(64, 4096, device="cuda", dtype=torch.bfloat16)
    with record_importance([wide]) as recorder:
        wide(x).float().sum().backward()
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        wide(x).float().sum().backward()
        assert torch.cuda.max_memory_allocated() - before < wide.weight.numel() // 2
    assert recorder.backward_calls == 2


@pytest.mark.parametrize("backend", ["eager", "inductor"])
@pytest.mark.parametrize("mode", MODES)
def test_kept_gradients_are_those_of_autograd(model: Block, mode: Mode, backend: str) -> None:
    x, plain = batch(), copy.deepcopy(model)
    truth = true_scores(model, x)
    runs = [own if backend == "eager" else torch.compile(own, backend=backend) for own in (plain, model)]
    runs[0](x).float().pow(2).mean().backward()
    with record_importance(model, mode=mode, keep_grad=True) as recorder:
        runs[1](x).float().pow(2).mean().backward()
    for one, other in zip(model.parameters(), plain.parameters(), strict=True):
        assert one.grad is not None and other.grad is not None
        assert torch.equal(one.grad, other.grad)
    assert_scores(recorder.scores(), truth, 1e-5 if backend == "eager" else 4 * BFLOAT16_ROUNDING)
    torch._dynamo.reset()


@pytest.mark.parametrize("power", [1, 2])
def test_rows_and_columns_of_one_product(model: Block, power: int) -> None:
    x = batch()
    grads = weight_grads(model.loss(x), list(iter_groups(model)))
    with record_lines(model, ("row", "column", "element"), power=power) as recorder:
        model.loss(x).backward()
    for linear, grad in grads.items():
        products = (linear.weight.double() * grad.double()).abs().detach() ** power
        for axis, expected in (("row", products.sum(1)), ("column", products.sum(0)), ("element", products)):
            found = recorder.scores_of(linear, axis).double()  # type: ignore[arg-type]
            atol = float(expected.max()) * BFLOAT16_ROUNDING if axis == "element" else 0.0
            torch.testing.assert_close(found, expected, rtol=2 * power * BFLOAT16_ROUNDING, atol=atol)


def test_gradient_scaler() -> None:
    model = Block(hidden=256, heads=4, head_dim=64, width=650).cuda()
    x = batch().float()
    truth = true_scores(model, x)
    scaler = torch.amp.GradScaler("cuda")
    with record_importance(model, keep_grad=True, loss_scale=scaler) as recorder:
        with torch.autocast("cuda", dtype=torch.float16):
            loss = model.loss(x)
        scaler.scale(loss).backward()
    assert_scores(recorder.scores(), truth, 2e-2)
