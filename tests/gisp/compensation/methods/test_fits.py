"""Compensation against plain float64 formulas on materialised activations."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from compensation_oracle import REMOVED, Masked, columns, kept_of, oracle, projection, seen_rows, weight_of
from tiny import FAMILIES, tiny_model, tiny_tokens

import gisp
from gisp.compensation import (
    BlockFit,
    Compensation,
    CompensationOptions,
    MethodResult,
    compensate,
    fit_compensation,
    fold_into_dense,
)
from gisp.compensation.methods.fits import LeastSquaresFit, RescaleFit, ridge
from gisp.compensation.options import make_options
from gisp.data import Sequences
from gisp.data.held_out import hold_out
from gisp.errors import GispError
from gisp.model.keep import Keep
from gisp.model.shrink import ShrinkableModel
from gisp.model.structures import map_model

TOKENS = tiny_tokens(24, 16)
SEEN = seen_rows(TOKENS)


def pruned(model: Any, removed: dict[str, torch.Tensor], gqa: str = "query") -> ShrinkableModel:
    """The model pruned in two steps, so that its columns stand in another order than the original one."""
    shrinkable = ShrinkableModel(map_model(model, gqa))
    share = 1 if gqa != "group" else shrinkable.map.heads_per_structure
    first = {name: index[:1] if name.endswith("channels") else index[:share] for name, index in removed.items()}
    second = {name: index[len(first[name]) :] for name, index in removed.items()}
    for step in (first, second):
        shrinkable.remove({name: index for name, index in step.items() if len(index)})
    return shrinkable


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(tiny_tokens(4, 16, seed=9)).logits


@pytest.mark.usefixtures("accept_all")
@pytest.mark.parametrize("family", ["llama-mha", "llama-gqa", "llama-bias", "qwen3"])
@pytest.mark.parametrize(
    ("method", "target", "options"),
    [
        ("bias", "local", {}),
        ("bias", "dense", {}),
        ("affine", "local", {}),
        ("affine", "dense", {}),
        ("rescale", "local", {}),
        ("rescale", "dense", {}),
        ("lsq", "local", {"damping": 0.1}),
        ("lsq", "dense", {"damping": 0.1}),
        ("lsq", "dense", {"damping": 0.1, "intercept": True}),
    ],
)
def test_every_method_is_its_formula(family: str, method: str, target: str, options: dict[str, Any]) -> None:
    model = tiny_model(family)
    removed = dict(REMOVED)
    if family == "llama-mha":
        removed["layers.3.heads"] = torch.tensor([1])
    wanted = logits(oracle(model, removed, SEEN, method, target, **options).model)
    pruned(model, removed)
    plain = logits(model)
    found = compensate(model, TOKENS, method=method, target=target, **options)
    assert [update.name for update in found.updates] == sorted(removed, key=lambda n: (n[:8], "channels" in n))
    scale = float(wanted.abs().max())
    assert float((logits(model) - wanted).abs().max()) < 1e-4 * scale
    assert float((plain - wanted).abs().max()) > 1e-2 * scale


@pytest.mark.usefixtures("accept_all")
@pytest.mark.parametrize("gqa", ["query", "balanced", "group"])
def test_modes_of_shared_heads(gqa: str) -> None:
    model = tiny_model("llama-gqa")
    heads = {"query": [1], "balanced": [0, 3], "group": [2, 3]}[gqa]
    removed = {**REMOVED, "layers.1.heads": torch.tensor(heads)}
    if gqa == "group":
        removed["layers.2.heads"] = torch.tensor([0, 1])
    wanted = logits(oracle(model, removed, SEEN, "lsq", "dense", damping=0.1).model)
    pruned(model, removed, gqa)
    compensate(model, TOKENS, damping=0.1, target="dense")
    assert torch.allclose(logits(model).double(), wanted, atol=1e-4 * float(wanted.abs().max()))


@pytest.mark.usefixtures("accept_all")
@pytest.mark.parametrize("family", FAMILIES)
def test_empty_blocks(family: str) -> None:
    model = tiny_model(family)
    removed = {**REMOVED, "layers.1.heads": torch.arange(4), "layers.2.channels": torch.arange(24)}
    shrinkable = pruned(model, removed)
    before = logits(model)
    found = compensate(model, TOKENS, method="lsq", target="local", intercept=True, damping=0.1)
    empty = [u for u in found.updates if len(u.columns) == 0]
    assert [u.name for u in empty] == ["layers.1.heads", "layers.2.channels"]
    assert all(weight_of(u).shape[1] == 0 and u.bias is not None for u in empty)
    fits = {fit.name: fit for fit in found.results[0].blocks}
    assert all(fits[u.name].after < fits[u.name].before for u in empty)
    assert torch.isfinite(logits(model)).all()
    shrinkable.rollback(0)
    assert torch.equal(logits(model), before)
    # Without an intercept there is nothing an empty block could change.
    for options in ({"method": "lsq", "damping": 0.1}, {"method": "rescale"}):
        found = compensate(model, TOKENS, target="local", **options)
        fits = {fit.name: fit for fit in found.results[0].blocks}
        assert all(fits[u.name].before == pytest.approx(fits[u.name].after) for u in empty)


def test_least_squares_is_the_best_fit() -> None:
    def left(method: str, **options: Any) -> dict[str, float]:
        model = tiny_model("llama-gqa")
        # One block only: later ones see other inputs.
        pruned(model, {"layers.1.channels": REMOVED["layers.1.channels"]})
        found = compensate(model, TOKENS, method=method, target="local", **options)
        return {"before": found.results[0].blocks[0].before, "after": found.results[0].blocks[0].after}

    bias, affine = left("bias"), left("affine")
    lsq = left("lsq", damping=0, intercept=True)
    assert bias["before"] == pytest.approx(lsq["before"], rel=1e-9)
    assert lsq["after"] < affine["after"] < bias["after"] < bias["before"]
    slopes, scale = left("affine", intercept=False), left("rescale")
    assert left("lsq", damping=0)["after"] < slopes["after"] < scale["after"] < scale["before"] == bias["before"]
    assert lsq["after"] < left("lsq", damping=0.1, intercept=True)["after"]


def test_rescale_is_one_number_by_least_squares() -> None:
    generator = torch.Generator().manual_seed(3)
    x, w, r = (torch.randn(*shape, generator=generator) for shape in ((40, 5), (3, 5), (40, 3)))
    r += 0.4 * x @ w.T + 2
    fit = RescaleFit(w)
    for part in (slice(0, 7), slice(7, 40)):
        fit.add(x[part], r[part])
    found = fit.solve()
    p, wide = (x.double() @ w.double().T), r.double()
    a = float((p * wide).sum() / (p * p).sum())
    assert found.bias is None and weight_of(found).dtype == torch.float64
    assert torch.allclose(weight_of(found), a * w.double(), rtol=1e-5)
    assert found.before == pytest.approx(float(wide.square().sum()), rel=1e-9)
    left = [float((wide - factor * p).square().sum()) for factor in (a, a - 1e-3, a + 1e-3)]
    assert found.after == pytest.approx(left[0], rel=1e-6)
    assert left[0] < min(left[1:]) and found.after <= found.before


def test_rescale_leaves_an_output_of_zeros_and_passes_on_what_is_not_finite() -> None:
    for weight, inputs in ((torch.ones(2, 3), torch.zeros(5, 3)), (torch.ones(2, 0), torch.zeros(5, 0))):
        fit = RescaleFit(weight)
        fit.add(inputs, torch.ones(5, 2))
        found = fit.solve()
        assert torch.equal(weight_of(found), torch.zeros(weight.shape, dtype=torch.float64))
        assert found.before == found.after == 10
    fit = RescaleFit(torch.ones(2, 3))
    fit.add(torch.full((5, 3), math.nan), torch.ones(5, 2))
    assert not torch.isfinite(weight_of(fit.solve())).any()


@pytest.mark.usefixtures("accept_all")
@pytest.mark.parametrize("options", [{"method": "rescale"}, {"method": "lsq", "damping": 0.1}])
def test_the_reported_errors_are_those_of_the_activations(options: dict[str, Any]) -> None:
    model = tiny_model("llama-mha")
    name = "layers.2.channels"
    removed = {name: torch.tensor([0, 7, 9])}
    masked = Masked(model)
    x, before, after = masked.stream(masked.model, name, SEEN)
    wanted = after - before
    pruned(model, removed)
    found = compensate(model, TOKENS, target="local", **options)
    (update,), (fit,) = found.updates, found.results[0].blocks
    linear, _ = projection(masked.dense, name)
    plain = wanted - x[:, update.columns] @ linear.weight[:, update.columns].detach().T
    rest = wanted - x[:, update.columns] @ weight_of(update).double().T
    assert fit.before == pytest.approx(float(plain.square().sum() / wanted.square().sum()), rel=1e-4)
    assert fit.after == pytest.approx(float(rest.square().sum() / wanted.square().sum()), rel=1e-4)
    assert fit.after <= fit.before


@pytest.mark.usefixtures("accept_all")
@pytest.mark.parametrize("target", ["local", "dense"])
def test_blocks_that_lost_nothing_stay(target: str) -> None:
    model = tiny_model("llama-bias")
    weights = {name: p.clone() for name, p in model.named_parameters()}
    pruned(model, {})
    found = compensate(model, TOKENS, target=target)
    assert found.updates == ()
    assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters())
    model = tiny_model("llama-bias")
    pruned(model, {"layers.1.channels": torch.tensor([2])})
    compensate(model, TOKENS, target=target, intercept=True)
    changed = {n for n, p in model.named_parameters() if p.shape != weights[n].shape or not torch.equal(p, weights[n])}
    assert changed == {
        f"model.layers.1.mlp.{n}" for n in ("gate_proj.weight", "up_proj.weight", "down_proj.weight")
    } | {f"model.layers.1.mlp.{n}_proj.bias" for n in ("gate", "up", "down")}


@pytest.mark.usefixtures("accept_all")
@pytest.mark.parametrize(
    "options",
    [
        {"method": "bias"},
        {"method": "affine"},
        {"method": "rescale"},
        {"method": "kfac"},
        {"method": "gates", "steps": 5, "batch_tokens": 64},
        {"method": "bias+distil", "steps": 5, "batch_tokens": 64, "learning_rate": 1e-3},
        {"intercept": True},
        {},
    ],
)
def test_moving_takes_it_back_bit_for_bit(options: dict[str, Any]) -> None:
    model = tiny_model("llama-gqa")
    names, dense = [n for n, _ in model.named_parameters()], logits(model)
    trajectory = gisp.prune(
        model, TOKENS, sparsity=0.4, steps=4, align=4, batch_tokens=64, device="cpu", dtype="float32"
    )
    small = logits(model)
    gisp.compensate(model, TOKENS, **options)
    compensated = logits(model)
    assert not torch.equal(compensated, small)
    gisp.compensate(model, TOKENS, **options)
    assert torch.equal(logits(model), compensated)
    other = copy.deepcopy(model)
    trajectory.at(0.4, other)
    assert torch.equal(logits(other), small)
    assert torch.equal(logits(model), compensated)
    trajectory.at(0.4, model)
    assert torch.equal(logits(model), small)
    gisp.compensate(model, TOKENS, **options)
    trajectory.at(0, model)
    assert torch.equal(logits(model), dense)
    assert [n for n, _ in model.named_parameters()] == names
    trajectory.at(0.4, model)
    gisp.compensate(model, TOKENS, **options)
    shrinkable = ShrinkableModel.of(model)
    assert shrinkable is not None
    shrinkable.pack()
    assert torch.equal(logits(model), compensated)
    with pytest.raises(GispError, match="cannot be undone"):
        gisp.compensate(model, TOKENS, **options)
    assert torch.equal(logits(model), compensated)


@pytest.mark.usefixtures("accept_all")
def test_bfloat16_models_are_solved_wider() -> None:
    wide, narrow = tiny_model("llama-gqa"), tiny_model("llama-gqa").bfloat16()
    for parameter in wide.parameters():
        parameter.data = parameter.data.bfloat16().float()
    removed = {"layers.0.channels": REMOVED["layers.0.channels"]}
    changes = []
    for model in (wide, narrow):
        pruned(model, removed)
        update = compensate(model, TOKENS, target="local", damping=0.1).updates[0]
        assert weight_of(update).dtype == model.dtype
        changes.append(weight_of(update).double())
    # Activations in bfloat16 are off by 2**-9 each; the fit must not amplify that.
    assert float((changes[0] - changes[1]).norm() / changes[0].norm()) < 0.03


@pytest.mark.usefixtures("accept_all")
def test_padding_and_the_number_of_tokens() -> None:
    rows = [(ids[:n], ids[:n]) for ids, n in zip(TOKENS, [16, 5, 9, 16, 3, 12] * 4, strict=True)]
    seen, held_out = hold_out(Sequences.plain(rows))
    # Rows one by one give the same as padded together.
    model = tiny_model("llama-gqa")
    masked = oracle_rows(model, list(seen.rows))
    pruned(model, {"layers.0.channels": REMOVED["layers.0.channels"]})
    found = compensate(model, Sequences.plain(rows), target="local", damping=0.1)
    assert torch.allclose(weight_of(found.updates[0]).double(), masked, atol=1e-5)
    assert found.tokens + found.seen == sum(len(ids) for ids, _ in rows) == 244
    assert found.tokens == sum(len(ids) for ids, _ in held_out.rows) and found.texts == len(held_out.rows)
    assert compensate(model, TOKENS, tokens=100).seen == 100


def oracle_rows(model: Any, rows: list[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
    masked = Masked(model)
    name = "layers.0.channels"
    parts = [masked.stream(masked.model, name, ids[None]) for ids, _ in rows]
    x, wanted = torch.cat([p[0] for p in parts]), torch.cat([p[2] - p[1] for p in parts])
    keep = kept_of(model, {name: REMOVED[name]})[name]
    w, xk = projection(masked.model, name)[0].weight[:, keep].detach(), x[:, keep]
    gram = xk.T @ xk
    gram += 0.1 * gram.diagonal().mean() * torch.eye(len(gram), dtype=torch.float64)
    return w + torch.linalg.solve(gram, xk.T @ (wanted - xk @ w.T)).T


@pytest.mark.usefixtures("accept_all")
def test_a_dense_model_is_left_as_it_was_and_takes_the_update() -> None:
    model, moved = tiny_model("qwen2"), tiny_model("qwen2")
    state = {name: t.clone() for name, t in model.state_dict().items()}
    found = fit_compensation(map_model(model), Keep.of(kept_of(model, REMOVED)), TOKENS, CompensationOptions("affine"))
    assert all(torch.equal(t, state[name]) for name, t in model.state_dict().items())
    pruned(moved, REMOVED)
    compensate(moved, TOKENS, method="affine")
    fold_into_dense(map_model(model), found)
    for layer, linear in [(i, k) for i in range(4) for k in ("self_attn.o_proj", "mlp.down_proj")]:
        assert f"model.layers.{layer}.{linear}.bias" in model.state_dict()
    kept = kept_of(model, REMOVED)
    masked = Masked(model)
    for name in REMOVED:
        linear, width = projection(model, name)
        masked.put(name, kept[name], linear.weight[:, columns(kept[name], width)].double(), None)
    assert torch.allclose(logits(masked.model), logits(moved).double(), atol=1e-4)


def test_damping_rises_until_the_matrix_can_be_factored() -> None:
    column = torch.arange(1.0, 5.0, dtype=torch.float64)
    gram = torch.outer(column, column) - 1e-9 * torch.eye(4, dtype=torch.float64)
    solution, damping = ridge(gram, column[None].clone(), 0.0)
    assert 0 < damping < 1e-5
    assert torch.allclose(solution @ gram, column[None], atol=1e-5)
    with pytest.raises(ArithmeticError, match="no Cholesky"):
        ridge(torch.diag(torch.tensor([3.0, -1.0], dtype=torch.float64)), torch.ones(1, 2, dtype=torch.float64), 0.0)
    fit = BlockFit("layers.0.heads", 1.0, 0.5, damping, True)
    result = MethodResult("lsq", 9, 1.0, 0.5, 0.1, True, 1.0, (fit,))
    note = Compensation(CompensationOptions(damping=0.0), (), (result,), 4, 9).describe()
    assert note.startswith(f"lsq (target local, damping 0 (raised up to {damping:g} in 1 blocks")
    silent = LeastSquaresFit(torch.ones(2, 3), damping=0.1)
    silent.add(torch.zeros(5, 3), torch.ones(5, 2))
    assert float(weight_of(silent.solve()).abs().max()) == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "lasso"}, "--compensate is 'lasso': choose one of bias, affine, rescale, lsq"),
        ({"target": "teacher"}, "--target is 'teacher': choose one of local, dense"),
        ({"damping": -1.0}, "--damping is -1.0: give a number of at least 0"),
        ({"damping": math.nan}, "--damping is nan"),
        ({"tokens": 0}, "--calibration-tokens is 0"),
        ({"method": "bias", "intercept": False}, "fits output biases alone"),
        ({"method": "rescale", "intercept": True}, "--intercept True changes nothing in --compensate rescale"),
        ({"ridge": 1.0}, "compensation has method, target, damping, tokens, intercept"),
    ],
)
def test_bad_options_leave_the_model(options: dict[str, Any], message: str) -> None:
    model = tiny_model()
    pruned(model, REMOVED)
    compensate(model, TOKENS)
    before = logits(model)
    with pytest.raises(GispError, match=message):
        compensate(model, TOKENS, **options)
    with pytest.raises(GispError, match="does not exist"):
        compensate(model, "none.safetensors")
    assert torch.equal(logits(model), before)


def test_models_that_cannot_be_compensated() -> None:
    with pytest.raises(GispError, match="this model was not pruned"):
        compensate(tiny_model(), TOKENS)
    model = tiny_model()
    pruned(model, REMOVED)
    small = logits(model)
    layer = model.model.layers[0]
    plain = type(layer).forward
    layer.forward = lambda *args, **kwargs: 0.5 * plain(layer, *args, **kwargs)
    with pytest.raises(GispError, match="layer 0 is not an attention and an MLP block"):
        compensate(model, TOKENS)
    del layer.__dict__["forward"]
    assert torch.equal(logits(model), small)


def test_inference_mode_of_the_caller_leaves_a_model_to_train() -> None:
    for family, method in (("llama-gqa", "lsq"), ("llama-mha", "affine")):
        model = tiny_model(family)
        gisp.prune(model, tiny_tokens(8, 16), sparsity=0.3, steps=2, align=4, batch_tokens=64)
        with torch.inference_mode():
            compensate(model, tiny_tokens(8, 16), tokens=64, method=method)
        assert not any(tensor.is_inference() for tensor in (*model.parameters(), *model.buffers()))
        model.requires_grad_(True)
        model(input_ids=tiny_tokens(2, 8), labels=tiny_tokens(2, 8)).loss.backward()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"token": 5}, "unknown option token: compensation has method"),
        ({"tokens": "many"}, "--calibration-tokens is 'many': give a whole number"),
        ({"method": "kfac", "steps": 2.5}, "--compensation-steps is 2.5: give a whole number"),
        ({"damping": "much"}, "--damping is much"),
    ],
)
def test_options_of_another_type_are_one_line(options: dict[str, Any], message: str) -> None:
    with pytest.raises(GispError, match=message):
        make_options(**options)
