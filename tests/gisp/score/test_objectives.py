"""Objectives: completion, margin against two float64 passes, and losses of one's own."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
import yaml
from objective_oracle import double_model, gradients, mean_nll, scores
from score_cases import gradient_scorer
from tiny import VOCAB, tiny_model, tiny_tokens
from torch.nn import functional

from gisp.data import Sequences, load_sequences
from gisp.data.sequences import IGNORED
from gisp.errors import GispError
from gisp.model.structures import map_model
from gisp.run.prune import prune
from gisp.score.objectives import objective_name, own_losses, sequence_curvature, sequence_nll

OPTIONS: dict[str, Any] = {"steps": 3, "sparsity": 0.3, "align": 1, "device": "cpu", "dtype": "float32"}


def ragged(signs: tuple[int, ...] | None = None) -> Sequences:
    generator = torch.Generator().manual_seed(3)
    rows = []
    for length in (16, 7, 12, 3, 9, 5):
        ids = torch.randint(0, VOCAB, (length,), generator=generator)
        labels = ids.clone()
        labels[: length // 3] = IGNORED
        rows.append((ids, labels))
    plain = Sequences.plain(rows)
    return Sequences(plain.rows, signs or plain.signs, plain.examples)


@pytest.mark.parametrize(("kind", "batch_size"), [("stream", None), ("stream", 2), ("exact", 1), ("exact", None)])
@pytest.mark.parametrize("family", ["llama-mha", "qwen3"])
def test_margin_in_one_signed_pass_is_gold_minus_wrong_passes(family, kind, batch_size):
    model, data = tiny_model(family), ragged((1, -1, -1, 1, -1, -1))
    oracle, groups = double_model(family)
    grads = {}
    for sign in (1, -1):
        losses = [mean_nll(oracle, *row) for row, s in zip(data.rows, data.signs, strict=True) if s == sign]
        grads[sign] = gradients(torch.stack(losses).mean(), groups)
    expected = scores(groups, [gold - wrong for gold, wrong in zip(grads[1], grads[-1], strict=True)])
    scorer = gradient_scorer(map_model(model), data, engine=kind, batch_size=batch_size, batch_tokens=10**6, seed=0)
    found = scorer.score(1, map_model(model).groups).scores
    assert scorer.refused is None
    for name, values in expected.items():
        torch.testing.assert_close(found[name].double(), values, rtol=2e-5, atol=1e-7)


@pytest.mark.parametrize("batch_size", [1, 2, 4, None])
@pytest.mark.parametrize("kind", ["stream", "exact"])
def test_ragged_rows_score_the_same_in_any_batch(kind, batch_size):
    model, data = tiny_model(), ragged()
    alone = gradient_scorer(map_model(model), data, engine="exact", batch_size=1, batch_tokens=10**6, seed=0)
    expected = alone.score(1, map_model(model).groups)
    scorer = gradient_scorer(map_model(model), data, engine=kind, batch_size=batch_size, batch_tokens=10**6, seed=0)
    found = scorer.score(1, map_model(model).groups)
    assert found.loss.item() == pytest.approx(expected.loss.item(), rel=1e-5)
    for name, values in expected.scores.items():
        torch.testing.assert_close(found.scores[name], values, rtol=2e-5, atol=1e-7)


def test_completion_refuses_what_has_no_prompt(tmp_path):
    path = tmp_path / "t.jsonl"
    path.write_text(json.dumps({"text": "the cat"}) + "\n")
    for spec, message in ((str(path), "is plain text"), (torch.tensor([[1, 2, 3]]), "the token tensor scores every")):
        with pytest.raises(GispError, match=message) as caught:
            load_sequences(spec, vocab_size=9, seq_len=None, objective="completion")
        assert "\n" not in str(caught.value)


def nll_of_my_own(model, input_ids, labels):
    logits = model(input_ids=input_ids).logits[:, :-1].transpose(1, 2)
    losses = functional.cross_entropy(logits, labels[:, 1:], ignore_index=IGNORED, reduction="none")
    return losses.sum(1) / (labels[:, 1:] != IGNORED).sum(1)


class HalfLoss:
    """A callable without a name of its own."""

    def __call__(self, model, input_ids, labels):
        return nll_of_my_own(model, input_ids, labels) / 2


@pytest.mark.parametrize("kind", ["stream", "exact"])
def test_a_loss_of_ones_own_is_weighted_like_the_built_in_one(kind):
    model, data = tiny_model(), ragged((1, -1, -1, 1, -1, -1))
    places = {"engine": kind, "batch_size": 2 if kind == "exact" else None, "batch_tokens": 10**6, "seed": 0}
    expected = gradient_scorer(map_model(model), data, **places).score(1, map_model(model).groups)
    scorer = gradient_scorer(map_model(model), data, loss=nll_of_my_own, **places)
    found = scorer.score(1, map_model(model).groups)
    assert "nll_of_my_own is a loss of its own" in str(scorer.refused)
    halved = gradient_scorer(map_model(model), data, loss=HalfLoss(), **places).score(1, map_model(model).groups)
    assert found.loss.item() == pytest.approx(expected.loss.item(), rel=1e-5)
    assert halved.loss.item() == pytest.approx(expected.loss.item() / 2, rel=1e-5)
    for name, values in expected.scores.items():
        torch.testing.assert_close(found.scores[name], values, rtol=2e-5, atol=1e-7)
        torch.testing.assert_close(2 * halved.scores[name], values, rtol=2e-5, atol=1e-7)


def test_losses_of_another_shape_are_refused():
    ids = tiny_tokens(3, 8)
    for wrong in (
        lambda m, i, labels: m(input_ids=i, labels=labels).loss,
        lambda m, i, labels: m(input_ids=i).logits.mean((1, 2)).tolist(),
        lambda m, i, labels: i.sum(1),
    ):
        with pytest.raises(GispError, match=r"one loss per sequence, here \[3\]") as caught:
            own_losses(wrong, tiny_model(), ids, ids)
        assert "\n" not in str(caught.value)


def test_a_run_records_the_name_of_its_loss_and_resumes_with_no_other(tmp_path):
    name = objective_name(nll_of_my_own)
    assert name == f"{__name__}.nll_of_my_own" and objective_name(HalfLoss()) == f"{__name__}.HalfLoss"
    tiny_model().save_pretrained(tmp_path / "model")
    model, data, out = tmp_path / "model", tiny_tokens(8, 16), tmp_path / "run"

    def stop(record, steps):
        if record.step == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prune(model, data, out=out, on_step=stop, objective=nll_of_my_own, **OPTIONS)
    assert json.loads((out / "trajectory.json").read_text())["config"]["objective"] == name
    assert yaml.safe_load((out / "config.yaml").read_text())["objective"] == name
    with pytest.raises(GispError, match=f"was made with objective {name}, not {__name__}.HalfLoss"):
        prune(model, data, out=out, resume=True, objective=HalfLoss(), **OPTIONS)
    with pytest.raises(GispError, match=f"objective {name} is a function's name"):
        prune(model, data, out=out, resume=True, objective=name, **OPTIONS)
    resumed = prune(model, data, out=out, resume=True, objective=nll_of_my_own, **OPTIONS)
    built_in = prune(model, data, **OPTIONS)
    assert resumed.complete
    assert [s.loss for s in resumed.steps] == pytest.approx([s.loss for s in built_in.steps], rel=1e-5)


def test_a_loss_without_a_gradient_is_refused():
    def detached(model, input_ids, labels):
        return sequence_nll(model, input_ids, labels).detach()

    for criterion in ("gisp", "second-order", "signed"):
        with pytest.raises(GispError, match="the loss of your own has no gradient"):
            prune(tiny_model(), tiny_tokens(8, 16), objective=detached, criterion=criterion, **OPTIONS)


def test_sequences_made_by_hand_are_checked():
    ids = tiny_tokens(3, 8)
    rows = [(row, row) for row in ids]
    sound = Sequences.plain(rows)
    for data, message in (
        (Sequences((), (), ()), "0 rows"),
        (Sequences(sound.rows, (1,), sound.examples), "3 rows have 1 signs"),
        (Sequences(sound.rows, sound.signs, ((0,), (1,))), "examples of 2 rows"),
        (Sequences.plain([*rows, (ids[0], ids[0][1:])]), "row 3 of the Sequences has no int64"),
        (Sequences.plain([*rows, (ids[0].int(), ids[0])]), "row 3 of the Sequences has no int64"),
        (Sequences.plain([*rows, (ids[0] + 1000, ids[0])]), "row 3 of the Sequences has 8 tokens from 1"),
        (Sequences.plain([(ids[0][:1], ids[0][:1])]), "row 0 of the Sequences has 1 tokens"),
    ):
        for engine in ("stream", "exact"):
            with pytest.raises(GispError, match=message):
                prune(tiny_model(), data, engine=engine, **OPTIONS)
    for sign in (1, -1):
        with pytest.raises(GispError, match="margin needs right and wrong answers"):
            prune(tiny_model(), Sequences(sound.rows, (sign,) * 3, sound.examples), objective="margin", **OPTIONS)


def test_a_float16_model_is_warned_of():
    with pytest.warns(UserWarning, match="float16: gradients of large calibration sets underflow"):
        prune(tiny_model().half(), tiny_tokens(8, 16), **OPTIONS)


def test_a_sequence_of_no_weight_has_no_curvature():
    labels = torch.tensor([[1, 2, 3], [1, -100, 3], [1, 2, -100]])
    found = sequence_curvature(labels, torch.tensor([0.5, -0.25, 0.0]))
    assert found.tolist() == [4.0, 4.0, 0.0]
