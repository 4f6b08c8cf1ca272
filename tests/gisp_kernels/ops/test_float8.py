"""8-bit products: rounding against torch's own, kernels in the interpreter, and a whole pass against autograd."""

from __future__ import annotations

import pytest
import torch
from recorder_oracle import grad_of
from score_cases import gradient_scorer, live
from tiny import tiny_model, tiny_tokens
from torch import nn

from gisp.config.options import make_config
from gisp.data import Sequences
from gisp.errors import GispError
from gisp.model.structures import map_model
from gisp.score.fused import Float8Products, ImportancePass, MicroBatch
from gisp.score.gradient import GradientScorer
from gisp.score.objectives import sequence_nll
from gisp_kernels.ops import float8

# Dimensions that are multiples of 16 all through.
SHAPE = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "intermediate_size": 48}
# Spacing of e4m3 relative to a number's magnitude, and of the smallest ones.
RELATIVE_STEP, SMALLEST_STEP = 2.0**-3, 2.0**-9


def spread(rows: int, columns: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Rows of very different size."""
    return (torch.randn(rows, columns) * torch.logspace(-6, 3, rows)[:, None]).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scaled", [False, True])
def test_rows_are_rounded_to_the_nearest_of_their_scale(dtype, scaled):
    x = spread(9, 70, dtype)
    column = torch.rand(70) + 0.1 if scaled else None
    q, scale = float8.quantize_rows(x, column)
    exact = x.double() if column is None else x.double() * column.double()
    torch.testing.assert_close(scale.double(), exact.abs().amax(1) / 448, rtol=1e-6, atol=0)
    # Half a step of the format, and float32 rounding of the quotient.
    unit = exact / scale.double()[:, None]
    allowed = torch.maximum(unit.abs() * RELATIVE_STEP, torch.tensor(SMALLEST_STEP)) / 2 * (1 + 1e-5)
    assert ((q.double() - unit).abs() <= allowed).all()
    assert torch.equal(q.float().abs().amax(1), torch.full((9,), 448.0))


@pytest.mark.parametrize("shape", [(5, 64), (3, 4100), (2, 8300), (1, 17), (33, 16)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_kernels_do_what_the_reference_does(shape, dtype):
    x = torch.randn(shape[0], 2 * shape[1]).to(dtype)[:, : shape[1]]
    column = torch.rand(shape[1])
    for given in (None, column):
        expected, expected_scale = float8.quantize_rows(x, given, backend="reference")
        block = torch.zeros(shape[0], shape[1] + 16).to(float8.FLOAT8)
        found, scale = float8.quantize_rows(x, given, out=block[:, : shape[1]], backend="triton")
        assert torch.equal(scale, expected_scale)
        assert torch.equal(found.float(), expected.float())
        assert not block[:, shape[1] :].float().any()
    scale = float8.quantize_rows(x)[1]
    expected = float8.quantize_transposed(x, scale, backend="reference")
    block = torch.zeros(shape[1], shape[0] + 16).to(float8.FLOAT8)
    found = float8.quantize_transposed(x, scale, out=block[:, : shape[0]], backend="triton")
    assert torch.equal(found.float(), expected.float())
    assert not block[:, shape[0] :].float().any()


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_rows_of_zeros_and_rows_that_are_not_finite(backend):
    x = torch.randn(4, 32)
    x[0], x[1, 3], x[2, 5] = 0, float("nan"), float("inf")
    q, scale = float8.quantize_rows(x, backend=backend)
    assert not q[0].float().any() and scale[0] > 0
    assert torch.equal(q.float().isnan().any(1), torch.tensor([False, True, True, False]))


def test_the_transpose_is_that_of_the_rounded_rows():
    weight = spread(32, 48)
    q, scale = float8.quantize_rows(weight)
    assert torch.equal(float8.quantize_transposed(weight, scale).float(), q.t().float())


def test_the_product_is_that_of_the_rounded_operands():
    x, w = spread(7, 64), spread(32, 64)
    (xq, xs), (wq, ws) = float8.quantize_rows(x), float8.quantize_rows(w)
    found = float8.scaled_product(xq, xs, wq, ws, torch.float32)
    expected = (xq.double() * xs.double()[:, None]) @ (wq.double() * ws.double()[:, None]).t()
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))
    alone = float8.scaled_product(xq, xs, wq, None, torch.float32)
    torch.testing.assert_close(alone * ws, found)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: float8.quantize_rows(x[0]), "x must have 2 dimensions"),
        (lambda x: float8.quantize_rows(x, x[0, :3]), "column_scale must have shape"),
        (lambda x: float8.quantize_rows(x, out=x.to(float8.FLOAT8)[:2]), "out must have shape"),
        (lambda x: float8.quantize_rows(x, scale=x[0, :1]), "scale must have shape"),
        (lambda x: float8.quantize_transposed(x, x[0]), "scale must have shape"),
        (lambda x: float8.quantize_transposed(x, x[:, 0], out=x.to(float8.FLOAT8)), "out must have shape"),
    ],
)
def test_operands_that_do_not_fit_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.randn(4, 16))


class RoundedLinear(torch.autograd.Function):
    """The products of the pass, put down again for autograd: rounded operands, weight gradient from unrounded ones."""

    @staticmethod
    def round(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        scale = x.abs().amax(1, keepdim=True).clamp_min(1e-30) / 448
        return (x / scale).to(torch.float8_e4m3fn).float(), scale

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        (xq, xs), (wq, ws) = RoundedLinear.round(x.flatten(0, 1)), RoundedLinear.round(weight)
        return ((xq * xs) @ (wq * ws).t()).view(*x.shape[:2], -1)

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        wq, ws = RoundedLinear.round(weight)
        flat = grad.flatten(0, 1)
        gq, gs = RoundedLinear.round(flat * ws.t())
        return (gq * gs @ wq).view(x.shape), flat.t() @ x.flatten(0, 1)


def test_a_pass_is_what_autograd_makes_of_rounded_products(monkeypatch):
    model = tiny_model("llama-mha", **{**SHAPE, "num_key_value_heads": 4})
    model_map = map_model(model)
    ids = tiny_tokens()
    weights = [1 / len(ids)] * len(ids)
    plain = ImportancePass(model_map).score([MicroBatch(ids, ids, weights)], live(model_map))[0][0]
    scores, loss = ImportancePass(model_map, Float8Products()).score([MicroBatch(ids, ids, weights)], live(model_map))[
        0
    ]
    head = model.get_output_embeddings()
    apart = nn.Linear.forward

    def rounded(self: nn.Linear, x: torch.Tensor) -> torch.Tensor:
        return apart(self, x) if self is head else RoundedLinear.apply(x, self.weight)

    monkeypatch.setattr(nn.Linear, "forward", rounded)
    nll = sequence_nll(model, ids, ids)
    (nll * torch.tensor(weights)).sum().backward()
    # A last bit of float32 can turn a rounding to 8 bits, which moves scores, but less than rounding itself does.
    torch.testing.assert_close(loss, nll.detach().double().mean(), rtol=1e-3, atol=0)
    for group in model_map.groups:
        expected = torch.zeros(group.count)
        for part in group.projections:
            product = (part.linear.weight * grad_of(part.linear.weight)).detach().abs()
            expected += product.sum(1 if part.axis == "row" else 0).view(group.count, -1).sum(1)
        error = (scores[group.name] - expected).norm() / expected.norm()
        rounding = (plain[group.name] - expected).norm() / expected.norm()
        assert error < rounding / 2


def test_of_layers_with_shared_heads_or_biases_scores_stay_near(monkeypatch):
    for family in ("llama-gqa", "qwen2", "qwen3"):
        model_map = map_model(tiny_model(family, **SHAPE))
        ids = tiny_tokens()
        weights = [1 / len(ids)] * len(ids)
        plain, loss = ImportancePass(model_map).score([MicroBatch(ids, ids, weights)], live(model_map))[0]
        scores, rounded_loss = ImportancePass(model_map, Float8Products()).score(
            [MicroBatch(ids, ids, weights)], live(model_map)
        )[0]
        torch.testing.assert_close(rounded_loss, loss, rtol=0.02, atol=0)
        assert not torch.equal(rounded_loss, loss)
        for name, values in plain.items():
            assert (scores[name] - values).norm() / values.norm() < 0.2


def test_widths_that_do_not_fit_run_as_before():
    model_map = map_model(tiny_model("llama-gqa", **{**SHAPE, "hidden_size": 40}))
    ids = tiny_tokens()
    weights = [1 / len(ids)] * len(ids)
    plain = ImportancePass(model_map).score([MicroBatch(ids, ids, weights)], live(model_map))[0]
    found = ImportancePass(model_map, Float8Products()).score([MicroBatch(ids, ids, weights)], live(model_map))[0]
    assert torch.equal(plain[1], found[1])
    for name, values in plain[0].items():
        assert torch.equal(values, found[0][name])


def scorer_of(model, **options) -> GradientScorer:
    data = Sequences.plain([(row, row) for row in tiny_tokens()])
    given = {"engine": "stream", "batch_size": None, "batch_tokens": 64, "seed": 0, "fp8": True, **options}
    return gradient_scorer(map_model(model), data, **given)


def test_the_scorer_takes_8_bit_products_only_when_asked():
    model = tiny_model("llama-gqa", **SHAPE)
    groups = map_model(model).groups
    losses = [float(scorer_of(model, fp8=fp8).score(1, groups).loss) for fp8 in (False, True)]
    assert losses[0] != losses[1]
    assert abs(losses[0] - losses[1]) < 0.02 * losses[0]


@pytest.mark.parametrize("kind", ["stream", "exact"])
def test_second_order_scores_of_8_bits_are_near_those_of_16(kind):
    model = tiny_model("llama-gqa", **SHAPE)
    groups = map_model(model).groups
    plain, rounded = (
        scorer_of(model, fp8=fp8, engine=kind, batch_size=2, criterion="second-order").score(1, groups).scores
        for fp8 in (False, True)
    )
    for name, values in plain.items():
        distance = float((rounded[name] - values).norm() / values.norm())
        # They read the rounded gradient of every activation, so single scores move more than sums of |W * G| do.
        assert 0 < distance < 0.5, (name, distance)
    config = make_config(engine="exact", fp8=True)
    assert config.criterion == "second-order"
    with pytest.raises(GispError, match="one batch a step"):
        make_config(engine="exact", fp8=True, criterion="gisp")


def test_what_cannot_run_in_8_bits_is_refused():
    model = tiny_model("llama-gqa", **SHAPE)
    with pytest.raises(GispError, match="--fp8 needs the fused pass over one batch: --batch-size 2"):
        scorer_of(model, batch_size=2).score(1, map_model(model).groups)
    hooked = tiny_model("llama-gqa", **SHAPE)
    hooked.model.layers[0].mlp.register_forward_hook(lambda module, args, output: output)
    with pytest.raises(GispError, match="--fp8 needs the fused pass over one batch: a module has hooks"):
        scorer_of(hooked).score(1, map_model(hooked).groups)
