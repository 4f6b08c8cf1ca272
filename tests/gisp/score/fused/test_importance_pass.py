"""The fused pass against plain autograd: every family, uneven widths, empty blocks, padding, signs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from score_cases import REMOVALS, autograd_scores, gradient_scorer, live, pruned, ragged
from tiny import FAMILIES, tiny_model, tiny_tokens

import gisp
from gisp.data import Sequences
from gisp.data.sequences import row_weights
from gisp.model.structures import channels_name, heads_name, map_model
from gisp.progress import Progress, reporting
from gisp.score.fused import ImportancePass, MicroBatch, differs, importance_pass, memory, products, why_not
from gisp.score.fused.memory import Kept, recomputed_within
from gisp.score.fused.products import Products
from gisp.score.gradient import GradientScorer
from gisp.score.objectives import sequence_nll


def expected_scores(model, model_map, data: Sequences, signs: list[int]) -> dict[str, torch.Tensor]:
    weights = row_weights(signs)
    model.zero_grad()
    for (ids, labels), weight in zip(data.rows, weights, strict=True):
        (sequence_nll(model, ids[None], labels[None]).sum() * weight).backward()
    result = {}
    for group in model_map.groups:
        total = torch.zeros(group.count)
        for part in group.projections if group.count else ():
            product = (part.linear.weight * part.linear.weight.grad).detach().abs()
            total += product.sum(1 if part.axis == "row" else 0).view(group.count, -1).sum(1)
        result[group.name] = total
    model.zero_grad()
    return result


@pytest.mark.parametrize("stacking", [(), ("cpu",)], ids=["apart", "stacked"])
@pytest.mark.parametrize("removal", REMOVALS)
@pytest.mark.parametrize("family", FAMILIES)
def test_scores_and_loss_equal_autograd(monkeypatch, family, removal, stacking):
    monkeypatch.setattr(products, "_STACKING", stacking)
    model, model_map = pruned(family, removal)
    data, signs = ragged(), [1, -1, 1, 1, -1]
    expected = expected_scores(model, model_map, data, signs)
    ids, labels = data.batch(list(range(len(data))))
    scores, loss = ImportancePass(model_map).score([MicroBatch(ids, labels, row_weights(signs))], live(model_map))[0]
    assert scores.keys() == {name for name, _ in live(model_map)}
    for name, values in scores.items():
        torch.testing.assert_close(values, expected[name], rtol=5e-5, atol=1e-6)
    with torch.no_grad():
        nll = sequence_nll(model, ids, labels).double()
    torch.testing.assert_close(loss, (nll * torch.tensor(row_weights(signs)).double()).sum(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("names", [[heads_name(2)], [channels_name(1), channels_name(3)], [channels_name(0)]])
def test_scoring_some_groups_gives_what_scoring_all_gives(names):
    _, model_map = pruned("llama-gqa", "uneven")
    ids = tiny_tokens()
    weights = [1 / len(ids)] * len(ids)
    run = ImportancePass(model_map)
    everything, loss = run.score([MicroBatch(ids, ids, weights)], live(model_map))[0]
    some, same_loss = run.score([MicroBatch(ids, ids, weights)], [(n, c) for n, c in live(model_map) if n in names])[0]
    assert list(some) == [n for n, _ in live(model_map) if n in names]
    for name, values in some.items():
        torch.testing.assert_close(values, everything[name], rtol=0, atol=0)
    assert torch.equal(loss, same_loss)


def test_nothing_to_score_still_gives_the_loss():
    _, model_map = pruned("llama-mha", "dense")
    ids = tiny_tokens()
    weights = [1 / len(ids)] * len(ids)
    run = ImportancePass(model_map)
    scores, loss = run.score([MicroBatch(ids, ids, weights)], [])[0]
    assert scores == {}
    assert torch.equal(loss, run.score([MicroBatch(ids, ids, weights)], live(model_map))[0][1])


@pytest.mark.parametrize("kept", [Kept(), Kept(1, attention=True), Kept(3), Kept(4)], ids=str)
@pytest.mark.parametrize("removal", REMOVALS)
@pytest.mark.parametrize("family", ["qwen3", "llama-gqa"])
def test_what_layers_keep_changes_no_bit(monkeypatch, kept, removal, family):
    _, model_map = pruned(family, removal)
    ids = tiny_tokens()
    weights = [1 / len(ids)] * len(ids)
    run = ImportancePass(model_map)
    everything, loss = run.score([MicroBatch(ids, ids, weights)], live(model_map))[0]
    monkeypatch.setattr(importance_pass, "what_layers_keep", lambda held, tokens, device: kept)
    recomputed, same_loss = run.score([MicroBatch(ids, ids, weights)], live(model_map))[0]
    assert torch.equal(loss, same_loss)
    for name, values in everything.items():
        assert torch.equal(values, recomputed[name]), name


def test_a_gradient_in_chunks_of_tokens_is_the_gradient(monkeypatch):
    _, model_map = pruned("llama-gqa", "dense")
    ids = torch.cat([tiny_tokens()] * 3)
    weights = [1 / len(ids)] * len(ids)
    run = ImportancePass(model_map)
    whole, loss = run.score([MicroBatch(ids, ids, weights)], live(model_map))[0]
    monkeypatch.setattr("gisp.score.fused.lm_head.CHUNK_ELEMENTS", 1)
    chunked, same_loss = run.score([MicroBatch(ids, ids, weights)], live(model_map))[0]
    torch.testing.assert_close(loss, same_loss)
    for name, values in whole.items():
        torch.testing.assert_close(values, chunked[name])


def test_weights_and_gradients_of_the_model_stay_as_they_were():
    model, model_map = pruned("qwen2", "uneven")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    ids = tiny_tokens()
    ImportancePass(model_map).score([MicroBatch(ids, ids, [1 / len(ids)] * len(ids))], live(model_map))[0]
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) and parameter.grad is None


def test_fewest_layers_are_recomputed():
    one = [(1, [10, 20, 30])]
    assert [recomputed_within(budget, one, 2) for budget in (60, 59, 52, 51, 0)] == [0, 1, 1, 2, 3]
    # Two chunks of one stage, the first held by two batches.
    two = [(2, [10, 20]), (1, [30])]
    assert [recomputed_within(budget, two, 2) for budget in (90, 89, 46, 45, 0)] == [0, 1, 1, 2, 2]


def test_small_layers_that_read_one_input_make_one_product(monkeypatch):
    _, model_map = pruned("qwen2", "uneven")
    layer, made, mm = model_map.layers[0], [], torch.mm
    attention, mlp = layer.attention, layer.layer.mlp
    readers = [[attention.q_proj, attention.k_proj, attention.v_proj], [mlp.gate_proj, mlp.up_proj]]
    monkeypatch.setattr(products, "_STACKING", ("cpu",))

    def counted(*args, **kwargs):
        made.append(args)
        return mm(*args, **kwargs)

    monkeypatch.setattr(torch, "mm", counted)
    own = Products()
    for linears in readers:
        stack = own.stacked(linears)
        assert stack is not None
        x = torch.randn(5, stack.shape[1])
        out = own.forward(x, linears, stack)
        torch.testing.assert_close(out, torch.cat([linear(x) for linear in linears], 1))
        made.clear()
        torch.testing.assert_close(own.input_grad(out, linears, stack), own.input_grad(out, linears))
        assert len(made) == 2
        monkeypatch.setattr(products, "_MOST_STACKED", stack.numel() - 1)
        assert own.stacked(linears) is None
        monkeypatch.setattr(products, "_MOST_STACKED", stack.numel() * 10)


def test_stacked_weights_count_as_kept(monkeypatch):
    _, model_map = pruned("llama-gqa", "uneven")
    layer = model_map.layers[0]
    plain = memory.LayerBytes.of(layer, 64)
    monkeypatch.setattr(products, "_STACKING", ("cpu",))
    attention, mlp = layer.attention, layer.layer.mlp
    names = (attention.q_proj, attention.k_proj, attention.v_proj, mlp.gate_proj, mlp.up_proj)
    assert memory.LayerBytes.of(layer, 64).kept - plain.kept == 4 * sum(linear.weight.numel() for linear in names)


@pytest.mark.parametrize("family", ["llama-gqa", "llama-mha", "qwen3"])
def test_attention_is_kept_where_everything_fits(monkeypatch, family):
    _, model_map = pruned(family, "dense")
    tokens, device, items = 64, torch.device("cuda"), model_map.layers
    layers = [memory.LayerBytes.of(item, tokens) for item in items]
    needed = sum(layer.kept for layer in layers) + max(layer.working for layer in layers)
    more = sum(layer.attention for layer in layers)
    for budget, expected in (
        (needed + more, Kept(0, attention=True)),
        (needed + more - 1, Kept(0)),
        (needed, Kept(0)),
        (needed - 1, Kept(1)),
    ):
        monkeypatch.setattr(memory, "_usable_bytes", lambda device, budget=budget: budget)
        assert memory.what_layers_keep([(1, items)], tokens, device) == expected


def stream_scorer(model_map, data: Sequences) -> GradientScorer:
    return gradient_scorer(model_map, data, engine="stream", batch_size=None, batch_tokens=8192, seed=0)


def test_the_scorer_takes_the_pass_and_gets_what_autograd_gives():
    model, data = tiny_model("llama-gqa"), ragged()
    model_map = map_model(model)
    scorer = stream_scorer(model_map, data)
    scored = scorer.score(1, model_map.groups)
    assert scorer.refused is None
    expected = autograd_scores(model, data, [1] * len(data))
    for name, values in expected.items():
        torch.testing.assert_close(scored.scores[name], values, rtol=5e-5, atol=1e-6)


def refused(model, length: int = 16) -> str | None:
    scorer = stream_scorer(map_model(model), Sequences.plain([(row, row) for row in tiny_tokens(length=length)]))
    scores = scorer.score(1, scorer._context.map.groups).scores
    rows = tiny_tokens(length=length)
    expected = autograd_scores(model, Sequences.plain([(row, row) for row in rows]), [1] * len(rows))
    for name, values in expected.items():
        torch.testing.assert_close(scores[name], values, rtol=5e-5, atol=1e-6)
    return scorer.refused


def test_a_model_that_computes_something_else_is_scored_by_autograd():
    model = tiny_model("llama-mha")
    attention: Any = type(model.model.layers[1].self_attn)

    class Scaled(attention):
        def forward(self, *args, **kwargs):
            output, weights = super().forward(*args, **kwargs)
            return 1.5 * output, weights

    model.model.layers[1].self_attn.__class__ = Scaled
    assert "hidden state after layer 3 is off by" in str(refused(model))


def test_a_slower_pass_is_told_once():
    class Heard:
        def __init__(self) -> None:
            self.said: list[str] = []

        def __call__(self, _: Progress) -> None: ...

        def say(self, message: str) -> None:
            self.said.append(message)

    for activation, told in (("gelu", ["GELU"]), ("silu", [])):
        hears = Heard()
        with reporting(hears):
            gisp.prune(tiny_model("llama-mha", hidden_act=activation), tiny_tokens(), steps=3, sparsity=0.2)
        slower = [line for line in hears.said if line.startswith("gradients come from autograd")]
        assert len(slower) == len(told) and all(name in line for name, line in zip(told, slower, strict=True))


def test_hooks_windows_and_other_activations_are_seen():
    model = tiny_model("llama-mha")
    model.model.layers[2].mlp.register_forward_hook(lambda module, args, output: 0.5 * output)
    assert "hooks" in str(refused(model))
    assert "window of 8" in str(refused(tiny_model("mistral", sliding_window=8)))
    assert refused(tiny_model("mistral", sliding_window=16)) is None
    assert "not SiLU" in str(refused(tiny_model("llama-mha", hidden_act="gelu")))


def test_agreement_is_measured_against_the_models_own_hidden_states():
    model = tiny_model("qwen3")
    model_map = map_model(model)
    ids = tiny_tokens(rows=2)
    streams = ImportancePass(model_map).streams(ids, every=1)
    assert sorted(streams) == [*range(1, len(model_map.layers) + 1)]
    assert why_not(model_map, 16) is None
    assert differs(model, streams, ids) is None
    for number in streams:
        wrong = {i: stream.clone() for i, stream in streams.items()}
        wrong[number][0] += 1
        assert f"after layer {number - 1} is off" in str(differs(model, wrong, ids))


def test_roundings_of_a_deep_model_do_not_add_up_to_a_difference():
    # Weights as large as those of a wide model: every layer changes the stream by several times what it was.
    model = tiny_model("llama-mha", layers=96, intermediate_size=128).bfloat16()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "proj" in name:
                parameter.normal_(0, 0.4)
    ids = tiny_tokens(rows=1)
    found = ImportancePass(map_model(model)).streams(ids)
    assert differs(model, found, ids) is None
    whole = {len(model.model.layers): found[len(model.model.layers)]}
    assert differs(model, whole, ids) is not None
