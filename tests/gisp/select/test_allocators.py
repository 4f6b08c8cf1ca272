"""Shares of blocks, selection of whole layers, and whole runs of every criterion."""

from __future__ import annotations

import copy
import gc
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from criteria_oracle import Oracle
from tiny import tiny_model, tiny_tokens

import gisp
from gisp.config.criteria import CRITERIA
from gisp.config.options import make_config
from gisp.data import Sequences
from gisp.errors import GispError
from gisp.run.one_shot import one_shot
from gisp.run.trajectory import Trajectory
from gisp.select.allocators import owl_shares
from gisp.select.schedule import structure_ratio, threshold_rank

WIDTH, HEADS, LAYERS = 24, 4, 6
# Six sequences, each an example.
EACH = tuple((number,) for number in range(6))
# Some steps of a few sequences, so that the order of the data and the averages matter; single heads of small models.
FAST: dict[str, Any] = {
    **{"preset": "fast", "steps": 6, "sparsity": 0.4, "align": 1, "batch_tokens": 64},
    **{"gqa": "query", "protect_last": 1},
}
# Steps that see all data have no batch.
WHOLE: dict[str, Any] = {"batch_tokens": None}


def model_of(family: str = "llama-gqa", **shape: Any) -> Any:
    return tiny_model(family, layers=LAYERS, **shape)


def run(model: Any | None = None, **options: Any) -> Trajectory:
    return gisp.prune(model or model_of(), tiny_tokens(12, 16), **{**FAST, **options})


def same(one: Trajectory, other: Trajectory) -> bool:
    return all(torch.equal(at, other.removed_at[name]) for name, at in one.removed_at.items())


def fractions(trajectory: Trajectory, step: int) -> dict[str, float]:
    """Part of every group removed by a step."""
    return {n: float(((at > 0) & (at <= step)).double().mean()) for n, at in trajectory.removed_at.items()}


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("preset", ["fast", "official"])
def test_every_criterion_runs_protects_and_repeats_itself(criterion: str, preset: str) -> None:
    if preset == "official" and CRITERIA[criterion].trains:
        return  # trained to removed parameters, not to a ratio of structures
    options: dict[str, Any] = {"criterion": criterion, "protect_first": 0.2, "protect_last": 2, "sparsity": 0.25}
    if CRITERIA[criterion].trains:
        options |= {"gate_steps": 60, "steps": 2}
    if preset == "official":
        options |= {"preset": "official", "ratio": 0.4, "sparsity": None, "steps": 4, **WHOLE}
    found = run(**options)
    assert same(found, run(**options))
    assert found.steps[-1].sparsity > 0.1 and all(record.loss == record.loss for record in found.steps)
    assert all(b.sparsity >= a.sparsity for a, b in zip(found.steps, found.steps[1:], strict=False))
    for layer in (0, 4, 5):
        assert not found.removed_at[f"layers.{layer}.heads"].any()
        assert not found.removed_at[f"layers.{layer}.channels"].any()


@pytest.mark.parametrize("criterion", ["wanda-sp", "random", "flap", "block-influence"])
@pytest.mark.parametrize("allocator", ["global", "uniform", "owl"])
def test_a_cut_run_ends_as_an_undisturbed_one(criterion: str, allocator: str, tmp_path: Path) -> None:
    if criterion == "block-influence" and allocator != "global":
        return
    options: dict[str, Any] = {"criterion": criterion, "allocator": allocator, "ema": 0.7}
    whole = run(**options)
    assert max(whole.removed_at["layers.2.channels"].max(), whole.removed_at["layers.3.channels"].max()) > 3

    class CutError(Exception):
        pass

    def cut(record: Any, _: int) -> None:
        if record.step == 3:
            raise CutError

    with pytest.raises(CutError):
        run(out=tmp_path / "run", on_step=cut, **options)
    resumed = run(out=tmp_path / "run", resume=True, **options)
    assert len(resumed.steps) == len(whole.steps) and same(resumed, whole)
    other = "random" if criterion != "random" else "magnitude"
    with pytest.raises(GispError, match=f"made with criterion {criterion}, not {other}"):
        run(out=tmp_path / "run", resume=True, **{**options, "criterion": other, "allocator": "global"})


@pytest.mark.parametrize("align", [1, 4])
@pytest.mark.parametrize("criterion", ["wanda-sp", "taylor-local"])
def test_uniform_takes_the_same_part_of_every_block_at_every_step(criterion: str, align: int) -> None:
    found = run(criterion=criterion, align=align, steps=8)
    assert found.config["allocator"] == "uniform"
    for step in range(1, 9):
        gone = {n: part for n, part in fractions(found, step).items() if n.split(".")[1] != "5"}
        heads = [part for name, part in gone.items() if name.endswith("heads")]
        channels = [part for name, part in gone.items() if name.endswith("channels")]
        # The budget may end between two layers; a width multiple defers up to a multiple of channels.
        assert max(heads) - min(heads) <= 1 / HEADS and max(channels) - min(channels) <= align / WIDTH + 1e-9
        assert abs(sum(heads) / len(heads) - sum(channels) / len(channels)) <= 1 / HEADS + align / WIDTH
    assert max(channels) > 0.3


def test_uniform_takes_the_lowest_of_every_block() -> None:
    model, ids = model_of("llama-bias"), tiny_tokens(12, 16)
    oracle = Oracle(model, [(row, row) for row in ids])
    found = gisp.prune(
        model, ids, criterion="wanda-sp", one_shot=True, sparsity=0.3, align=1, protect_last=1, gqa="query"
    )
    for name, scores in oracle.wanda().items():
        gone = found.removed_at[name] > 0
        if name.startswith("layers.5"):
            assert not gone.any()
        else:
            assert gone.any() and scores[gone].max() < scores[~gone].min()


def test_owl_shares_are_the_published_ones() -> None:
    ratios = {1: 0.02, 2: 0.05, 4: 0.03, 7: 0.10}
    # As the released code computes the parts to keep.
    found = torch.tensor([*ratios.values()], dtype=torch.float64)
    kept = (found - found.min()) * (1 / (found.max() - found.min()) * 0.08 * 2)
    kept = kept - kept.mean() + (1 - 0.4)
    assert [*owl_shares(ratios, 0.4).values()] == pytest.approx((1 - kept).tolist())
    assert sum(owl_shares(ratios, 0.4).values()) / 4 == pytest.approx(0.4)
    assert owl_shares({0: 0.3, 1: 0.3}, 0.5) == {0: 0.5, 1: 0.5}
    assert owl_shares(ratios, 0.01)[7] == 0.0 and owl_shares(ratios, 0.99)[1] == 1.0


@pytest.mark.parametrize("criterion", ["wanda-sp", "gisp"])
def test_owl_gives_every_block_its_share(criterion: str) -> None:
    model, ids = model_of(intermediate_size=96), tiny_tokens(12, 16)
    with torch.no_grad():
        for i, layer in enumerate(model.model.layers):
            layer.mlp.up_proj.weight[: 1 + 2 * i] *= 10
    ratios = Oracle(model, [(row, row) for row in ids]).outliers(5.0)[:5]
    prunable = sum(p.numel() for i in range(5) for n, p in model.model.layers[i].named_parameters() if "proj" in n)
    # Keys and values stay where query heads share them.
    prunable -= 5 * sum(model.model.layers[0].self_attn.get_submodule(n).weight.numel() for n in ("k_proj", "v_proj"))
    fraction = 0.4 * sum(p.numel() for p in model.model.layers.parameters()) / prunable
    shares = owl_shares(dict(enumerate(ratios)), fraction)
    assert max(shares.values()) - min(shares.values()) == pytest.approx(0.16)
    found = gisp.prune(model, ids, **{**FAST, **WHOLE, "preset": "paper", "criterion": criterion, "allocator": "owl"})
    for layer, share in shares.items():
        gone = fractions(found, len(found.steps))
        # Half a unit of rounding, and one where the budget ended.
        assert gone[f"layers.{layer}.channels"] == pytest.approx(share, abs=2.5 / 96)
        assert gone[f"layers.{layer}.heads"] == pytest.approx(share, abs=1.5 / HEADS)
    half = fractions(found, 3)
    assert half["layers.0.channels"] > half["layers.4.channels"]


@pytest.mark.parametrize("family", ["llama-mha", "llama-gqa"])
@pytest.mark.parametrize(
    "options", [{"one_shot": True, "steps": 1, **WHOLE}, {"preset": "paper", "steps": 12, **WHOLE}, {"gqa": "balanced"}]
)
def test_block_influence_takes_whole_layers_lowest_first(family: str, options: dict[str, Any]) -> None:
    model = model_of(family)
    rows = [(row, row) for row in tiny_tokens(12, 16)]
    influence = Oracle(model, rows).influence(rows)
    options = {"gqa": "query", "protect_last": 0, "protect_first": 0.0, **options}
    found = run(model, criterion="block-influence", sparsity=0.5, **options)
    gone = []
    for layer in range(LAYERS):
        heads, channels = found.removed_at[f"layers.{layer}.heads"], found.removed_at[f"layers.{layer}.channels"]
        steps = {*heads.tolist(), *channels.tolist()}
        assert len(steps) == 1
        gone += [layer] * (steps != {0})
    # Norms stay, and keys and values that query heads share.
    layers = tiny_model(family, layers=LAYERS).model.layers
    total = sum(p.numel() for p in layers.parameters())
    stays = ("norm",) if family == "llama-mha" else ("norm", "k_proj", "v_proj")
    one = sum(p.numel() for n, p in layers[0].named_parameters() if not any(part in n for part in stays))
    assert len(gone) == total // 2 // one and found.steps[-1].sparsity == pytest.approx(len(gone) * one / total)
    if "one_shot" in options:
        assert sorted(gone) == sorted(sorted(range(LAYERS), key=influence.__getitem__)[: len(gone)])


def test_less_than_a_layer_is_refused() -> None:
    with pytest.raises(GispError, match=r"sparsity 0.1 is less than one layer, which is 0.1\d+"):
        run(criterion="block-influence", sparsity=0.1)


@pytest.mark.parametrize("criterion", [name for name, criterion in CRITERIA.items() if not criterion.trains])
def test_one_shot_to_several_sizes_is_the_run_of_one_step(criterion: str) -> None:
    allocators = ["global"] if criterion == "block-influence" else ["global", "uniform", "owl"]
    ids = tiny_tokens(6, 16)
    data = Sequences.plain([(row, row) for row in ids])
    for allocator in allocators:
        options: dict[str, Any] = {"criterion": criterion, "allocator": allocator, "one_shot": True, "align": 1}
        model = model_of()
        before = copy.deepcopy(model.state_dict())
        for sparsity, (reached, pruned) in zip(
            (0.2, 0.4), one_shot(model, data, (0.2, 0.4), make_config(**options)), strict=True
        ):
            single = model_of()
            found = gisp.prune(single, ids, sparsity=sparsity, **options)
            assert len(found.steps) == 1 and reached == found.steps[0].sparsity
            assert torch.equal(pruned(ids).logits, single(ids).logits)
        assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_uniform_argument_of_one_shot_is_the_allocator() -> None:
    data, model = Sequences.plain([(row, row) for row in tiny_tokens(6, 16)]), model_of()
    logits = []
    for options, uniform in (({}, True), ({"allocator": "uniform"}, False)):
        (_, pruned), *_ = [
            (s, m(tiny_tokens(2)).logits)
            for s, m in one_shot(model, data, [0.3], make_config(one_shot=True, **options), uniform=uniform)
        ]
        logits.append(pruned)
    assert torch.equal(*logits)
    with pytest.raises(GispError, match="of a run of many steps"):
        next(one_shot(model, data, [0.4], make_config()))


@pytest.mark.parametrize(
    ("options", "sparsity", "message"),
    [
        ({}, 0.97, "sparsity 0.97 is out of reach"),
        ({"protect_first": 0.8, "protect_last": 1}, 0.4, "out of reach"),
        ({"objective": "a.b"}, 0.4, "objective a.b is a function's name"),
        ({"objective": "choice"}, 0.4, "objective choice needs one"),
        ({"objective": "margin"}, 0.4, "margin needs right and wrong answers"),
    ],
)
def test_one_shot_refuses_what_a_run_refuses(options: dict[str, Any], sparsity: float, message: str) -> None:
    ids = tiny_tokens(6, 16)
    data = Sequences(tuple((row, row) for row in ids), (-1 if options.get("objective") == "choice" else 1,) * 6, EACH)
    with pytest.raises(GispError, match=message):
        next(one_shot(model_of(), data, [0.2, sparsity], make_config(one_shot=True, **options)))


def test_one_shot_leaves_a_dense_model_and_sees_what_is_not_finite() -> None:
    data, model = Sequences.plain([(row, row) for row in tiny_tokens(6, 16)]), model_of()
    before = model(tiny_tokens(2)).logits
    for _ in one_shot(model, data, [0.2, 0.4], make_config(one_shot=True, align=1)):
        break
    gc.collect()
    assert torch.equal(model(tiny_tokens(2)).logits, before)
    with torch.no_grad():
        model.lm_head.weight[0, 0] = math.nan
    with pytest.raises(GispError, match="not finite"):
        next(one_shot(model, data, [0.2], make_config(one_shot=True)))


def test_whole_layers_of_a_ratio_schedule_follow_the_ratio() -> None:
    found = run(criterion="block-influence", preset="official", sparsity=None, ratio=0.5, steps=4, **WHOLE)
    # Each step's threshold counts structures that are gone already: layers go one after the other, none in a rush.
    gone = [record.channels_removed for record in found.steps]
    width = found.base_model["intermediate_size"]
    allowed = [structure_ratio(0.5, step, 4) for step in range(1, 5)]
    size = sum(len(at) for at in found.removed_at.values())
    one = size // found.layers
    assert [count // width for count in gone] == [threshold_rank(size, ratio) // one for ratio in allowed]


def test_defaults_are_the_published_way() -> None:
    found = {name: make_config(criterion=name) for name in CRITERIA}
    assert {name: c.allocator for name, c in found.items() if c.allocator != "global"} == {
        "taylor-local": "uniform",
        "wanda-sp": "uniform",
    }
    assert {n: c.norm for n, c in found.items() if c.norm != "params"} == {
        "random": "none",
        "flap": "zscore",
        "learned-gates": "none",
        "block-influence": "none",
    }
    assert {n: c.steps for n, c in found.items() if c.steps != 200} == {"learned-gates": 1}
    once = make_config(criterion="flap", one_shot=True)
    assert (once.steps, once.ema, once.engine, once.allocator) == (1, 0.0, "exact", "global")
    assert make_config(one_shot=True, engine="stream").engine == "stream"
    for config in [*found.values(), once]:
        assert make_config(**config.to_dict()) == config


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"criterion": "luck"}, "unknown criterion 'luck': choose one of gisp, second-order"),
        ({"allocator": "fair"}, "unknown allocator 'fair'"),
        ({"one_shot": True, "steps": 3}, r"leave --steps \(3\)"),
        ({"one_shot": True, "ema": 0.5}, r"--ema \(0.5\) out"),
        ({"criterion": "flap", "objective": "margin"}, "--criterion flap sees no loss"),
        ({"criterion": "signed", "fp8": True}, "--fp8 goes with --criterion gisp, second-order, taylor-local"),
        ({"criterion": "block-influence", "allocator": "owl"}, "leave --allocator and --norm out"),
        ({"criterion": "block-influence", "keep_minimum": True}, "keep_minimum cannot be true"),
    ],
)
def test_what_does_not_go_together_is_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(GispError, match=message):
        make_config(**options)


@pytest.mark.parametrize("criterion", ["flap", "gisp"])
@pytest.mark.parametrize("gqa", ["balanced", "group"])
def test_standardised_scores_go_with_shared_heads(criterion: str, gqa: str) -> None:
    found = run(criterion=criterion, norm="zscore", gqa=gqa, sparsity=0.3)
    kept = torch.stack([found.removed_at[f"layers.{i}.heads"] == 0 for i in range(LAYERS)]).view(LAYERS, 2, 2)
    per_kv = kept.sum(2)
    assert torch.equal(per_kv[:, 0], per_kv[:, 1]) if gqa == "balanced" else set(per_kv.flatten().tolist()) <= {0, 2}
