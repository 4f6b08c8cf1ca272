"""Runs with learned gates: the budget, the structures that go, steps, seeds and what is told of a short training."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from run_cases import cut_after
from score_cases import ragged
from tiny import tiny_model, tiny_tokens

import gisp
from gisp.config.options import make_config
from gisp.data import Sequences, load_sequences
from gisp.demo import demo_files
from gisp.evaluate.perplexity import perplexity
from gisp.model.load import load_dense
from gisp.model.shrink import ShrinkableModel
from gisp.model.structures import map_model
from gisp.progress import Progress
from gisp.run.trajectory import Trajectory
from gisp.score.base import StepScores, make_scorer
from gisp.score.context import Context
from gisp.score.criteria.learned_gates.gates import Gates

TRAINING: dict[str, Any] = {
    "criterion": "learned-gates",
    "gate_steps": 40,
    "gate_rate": 0.1,
    "batch_tokens": 64,
    "align": 1,
    "device": "cpu",
    "dtype": "float32",
}


def scored(model: Any, data: Sequences, **options: Any) -> StepScores:
    config = make_config(**{**TRAINING, **options})
    shrinkable = ShrinkableModel(map_model(model, config.gqa))
    return make_scorer(Context(shrinkable, data, config)).score(1, shrinkable.map.groups)


def structure_cost(name: str, gqa: str) -> int:
    """Parameters of a head of 8, of 2 of them with their key and value, or of a channel; hidden size 32."""
    return 3 * 32 if name.endswith("channels") else {"query": 2, "group": 2 * 2 + 2}[gqa] * 8 * 32


@pytest.mark.parametrize("gqa", ["query", "group"])
@pytest.mark.parametrize("sparsity", [0.2, 0.5])
def test_closed_gates_hold_the_parameters_that_are_to_go(gqa: str, sparsity: float) -> None:
    model = tiny_model("llama-gqa")
    found = scored(model, Sequences.plain([(row, row) for row in tiny_tokens(16)]), gqa=gqa, sparsity=sparsity)
    closed = sum(int((z <= 0).sum()) * structure_cost(name, gqa) for name, z in found.scores.items())
    total = sum(p.numel() for p in model.model.layers.parameters())
    # A short training of few structures, of which one is up to 5 %.
    assert closed / total == pytest.approx(sparsity, abs=0.1)
    assert found.finite and found.tokens == 40 * 64


def test_the_loss_is_that_of_the_model_before_over_all_batches() -> None:
    model = tiny_model()
    rows = Sequences.plain([(row, row) for row in tiny_tokens(4)])
    # The whole set at every step, so that all batches are one.
    expected = perplexity(model, rows, 16).perplexity
    assert scored(model, rows, engine="exact", batch_tokens=None, gate_steps=3).loss.exp() == pytest.approx(expected)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_passes_of_a_batch_add_up(batch_size: int) -> None:
    whole = scored(tiny_model(), ragged(), engine="exact", batch_tokens=None, gate_steps=4, sparsity=0.3)
    options = {"engine": "exact", "batch_tokens": None, "gate_steps": 4, "sparsity": 0.3}
    parts = scored(tiny_model(), ragged(), batch_size=batch_size, **options)
    for name, values in whole.scores.items():
        torch.testing.assert_close(parts.scores[name], values, rtol=0, atol=2e-3)


def test_a_fresh_batch_is_split_where_logits_are_large(monkeypatch: pytest.MonkeyPatch) -> None:
    from gisp.data import batches

    model, passed = tiny_model(), []
    monkeypatch.setattr(batches, "_LOGIT_ELEMENTS", {"cpu": 2 * 16 * 96})
    model.register_forward_pre_hook(lambda _, args, kwargs: passed.append(kwargs["input_ids"].shape), with_kwargs=True)
    scored(model, Sequences.plain([(row, row) for row in tiny_tokens(4)]), gate_steps=1, sparsity=0.3)
    assert passed == [(2, 16)] * 4


def test_the_same_seed_gives_the_same_run_and_steps_are_nested(tmp_path: Path) -> None:
    options = {**TRAINING, "sparsity": 0.4, "steps": 2, "gqa": "query"}
    told: list[int] = []

    def hear(heard: Progress) -> None:
        if heard.what == "training gates":
            told.append(heard.done)

    first, again = (gisp.prune(tiny_model(), tiny_tokens(16), out=tmp_path / n, progress=hear, **options) for n in "ab")
    assert told == [*range(41), 40] * 4
    assert (tmp_path / "a" / "trajectory.safetensors").read_bytes() == (
        tmp_path / "b" / "trajectory.safetensors"
    ).read_bytes()
    assert [step.loss for step in first.steps] == [step.loss for step in again.steps]
    # Each step is trained to its own sparsity, on the model that the one before left.
    assert [step.sparsity for step in first.steps] == pytest.approx([0.2, 0.4], abs=0.03)
    other = gisp.prune(tiny_model(), tiny_tokens(16), **options, seed=1)
    assert any(not torch.equal(at, other.removed_at[name]) for name, at in first.removed_at.items())


def test_a_cut_run_goes_on_to_the_same_bytes(tmp_path: Path, model_folder: Path, token_file: Path) -> None:
    options = {**TRAINING, "sparsity": 0.4, "steps": 2}
    gisp.prune(model_folder, token_file, out=tmp_path / "whole", **options)
    with pytest.raises(KeyboardInterrupt):
        gisp.prune(model_folder, token_file, out=tmp_path / "cut", on_step=cut_after(1), **options)
    gisp.prune(model_folder, token_file, out=tmp_path / "cut", resume=True, **options)
    whole, cut = (Trajectory.load(tmp_path / name) for name in ("whole", "cut"))
    assert all(torch.equal(at, cut.removed_at[name]) for name, at in whole.removed_at.items())


def test_gates_are_gone_and_weights_as_they_were_once_scored() -> None:
    model = tiny_model()
    before = {name: p.clone() for name, p in model.named_parameters()}
    logits = model(tiny_tokens(2)).logits
    scored(model, ragged(), gate_steps=2, sparsity=0.3)
    assert torch.equal(model(tiny_tokens(2)).logits, logits)
    assert all(torch.equal(p, before[name]) and p.grad is None for name, p in model.named_parameters())


def test_a_training_too_short_to_close_gates_is_told() -> None:
    with pytest.warns(UserWarning, match=r"2 training steps closed gates of 0\.0000 .* more --gate-steps"):
        scored(tiny_model(), ragged(), gate_steps=2, sparsity=0.3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scored(tiny_model(), Sequences.plain([(row, row) for row in tiny_tokens(16)]), sparsity=0.3)


def test_nothing_left_to_gate_is_scored_by_its_loss_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(Gates, "__enter__")
    config = make_config(**TRAINING, sparsity=0.3)
    found = make_scorer(Context(ShrinkableModel(map_model(tiny_model())), ragged(), config)).score(1, [])
    assert found.scores == {} and found.finite


def test_on_a_trained_decoder_they_beat_magnitude_and_chance_on_held_out_text() -> None:
    files = demo_files()
    text: dict[str, Any] = {"vocab_size": 2048, "seq_len": 64, "tokenizer_from": str(files.model)}
    calibration = load_sequences(str(files.calibration), **text)
    held_out = load_sequences(str(files.heldout), **text).first(100)
    training = {**TRAINING, "align": 16, "gate_steps": 100, "gate_rate": 0.06, "batch_tokens": 128}

    def after(**options: Any) -> float:
        model = load_dense(str(files.model), torch.device("cpu"), torch.float32)
        gisp.prune(model, calibration, sparsity=0.3, **options)
        return perplexity(model, held_out, 64).perplexity

    own = after(**training)
    others = [after(criterion=name, steps=1, batch_tokens=128) for name in ("magnitude", "random")]
    assert own < 0.75 * min(others)
