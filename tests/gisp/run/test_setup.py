"""Steps that would remove by number: scores that say nothing end a run before anything is removed."""

from __future__ import annotations

import pytest
import torch
from run_cases import OPTIONS, logits
from tiny import VOCAB, tiny_model, tiny_tokens

import gisp
from gisp.config.options import make_config
from gisp.data import load_sequences
from gisp.errors import GispError
from gisp.run.one_shot import one_shot


def zero():
    model = tiny_model()
    for parameter in model.parameters():
        parameter.data.zero_()
    return model


def one_token():
    """A loss of nothing: there is one token to choose from."""
    return tiny_model(vocab_size=1)


@pytest.mark.parametrize("preset", ["fast", "paper", "official"])
@pytest.mark.parametrize("made", [zero, one_token])
def test_scores_that_are_all_equal_end_a_run(tmp_path, made, preset):
    model = made()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    options = {**OPTIONS, "preset": preset, "batch_tokens": 64 if preset == "fast" else None}
    with pytest.raises(GispError, match="all scores of step 1 are equal"):
        gisp.prune(model, torch.zeros(16, 16, dtype=torch.long), out=tmp_path / "run", **options)
    assert not (tmp_path / "run").exists()
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())


@pytest.mark.parametrize("criterion", ["gisp", "magnitude", "wanda-sp", "taylor-local", "block-influence"])
def test_one_shot_of_equal_scores_is_refused(criterion):
    model = zero()
    data = load_sequences(tiny_tokens(8, 16), vocab_size=VOCAB, seq_len=16)
    config = make_config(one_shot=True, criterion=criterion, keep_minimum=False)
    with pytest.raises(GispError, match="all scores of step 1 are equal"):
        next(one_shot(model, data, [0.5], config))


def test_ties_of_some_scores_are_decided():
    model = tiny_model()
    for layer in model.model.layers[:2]:
        layer.mlp.down_proj.weight.data.zero_()
    before = logits(model)
    gisp.prune(model, tiny_tokens(16, 16), **{**OPTIONS, "protect_first": 0.0})
    assert not torch.equal(logits(model), before)
