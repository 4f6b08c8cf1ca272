"""The masked reference itself: its forward pass, its gradients and its stability."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from . import models, oracle
from .conftest import AMOUNT, STEPS


@pytest.mark.parametrize("family", models.FAMILIES)
def test_forward_equals_transformers(family: str, model_folder: Callable[[str], Path], input_ids: torch.Tensor) -> None:
    path = model_folder(family)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        theirs = model(input_ids=input_ids).logits.double()
        ours = oracle.Decoder.load(path, torch.float64).logits(input_ids)
    assert (ours - theirs).abs().max() <= 5e-6 * theirs.abs().max()


@pytest.mark.parametrize("family", ["llama-mha", "qwen3", "llama-bias"])
def test_gradient_equals_finite_difference(
    family: str, model_folder: Callable[[str], Path], input_ids: torch.Tensor
) -> None:
    decoder = oracle.Decoder.load(model_folder(family), torch.float64)
    labels = models.partial_labels(input_ids)
    grads = oracle.gradients(decoder, input_ids, labels, batch=5)
    generator = torch.Generator().manual_seed(0)
    for name in ("layers.0.self_attn.k_proj", "layers.1.self_attn.o_proj", "layers.2.mlp.up_proj"):
        key = f"model.{name}.weight"
        weight = decoder.weights[key]
        direction = torch.randn(weight.shape, generator=generator, dtype=torch.float64)
        losses = []
        for sign in (1, -1):
            decoder.weights[key] = weight + sign * 1e-6 * direction
            # The mean over rows of the mean over scored tokens, from all rows at once.
            losses.append(float(oracle.sequence_losses(decoder, input_ids, labels).mean()))
        decoder.weights[key] = weight
        slope = (losses[0] - losses[1]) / 2e-6
        assert slope == pytest.approx(float((grads[key] * direction).sum()), rel=1e-6)


def test_loss_matches_transformers_without_masking(
    model_folder: Callable[[str], Path], input_ids: torch.Tensor
) -> None:
    path = model_folder("qwen2")
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    with torch.no_grad():
        theirs = float(model(input_ids=input_ids, labels=input_ids).loss)
        losses = oracle.sequence_losses(oracle.Decoder.load(path, torch.float64), input_ids)
    assert float(losses.mean()) == pytest.approx(theirs, rel=1e-6)


@pytest.mark.parametrize("preset", AMOUNT)
@pytest.mark.parametrize("family", models.FAMILIES)
def test_no_near_ties_and_both_kinds_removed(
    family: str,
    preset: str,
    model_folder: Callable[[str], Path],
    input_ids: torch.Tensor,
    expected: Callable[[str, str], oracle.Removal],
) -> None:
    """float32 and float64, and two batch splits, choose the same structures: the comparison is well posed."""
    wide = expected(family, preset)
    narrow = oracle.prune(
        model_folder(family), preset, input_ids, steps=STEPS, amount=float(AMOUNT[preset][1]),
        batch=12, dtype=torch.float32,
    )  # fmt: skip
    assert narrow.flat() == wide.flat()
    assert narrow.sparsity == wide.sparsity
    assert wide.sparsity == sorted(wide.sparsity)
    last = len(wide.heads) - 1
    for layer in range(last + 1):
        untouched = not any(wide.heads[layer]) and not any(wide.channels[layer])
        assert not (layer in oracle.protected_layers(last + 1) and not untouched)
    assert any(t for row in wide.channels for t in row)
    if preset == "paper":
        assert any(t for row in wide.heads for t in row)


def test_reference_empties_blocks(expected: Callable[[str, str], oracle.Removal]) -> None:
    """The biased model loses all heads of one layer and all channels of another, so that case is covered."""
    for preset in AMOUNT:
        removal = expected("llama-bias", preset)
        assert all(removal.heads[1])
        assert all(removal.channels[2])


def test_ties_go_by_index_and_all_at_once_in_official(
    expected: Callable[[str, str], oracle.Removal],
) -> None:
    paper, official = expected("llama-ties", "paper"), expected("llama-ties", "official")
    zero_heads = [(0, 2), (0, 5), (1, 3), (2, 1)]
    steps = [paper.heads[layer][head] for layer, head in zero_heads]
    assert steps == [1, 1, 1, 2]
    assert {official.heads[layer][head] for layer, head in zero_heads} == {1}
    assert {official.channels[1][c] for c in range(7, 31)} == {1}
