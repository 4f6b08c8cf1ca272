"""Statistics of Linear inputs against plain float64 sums over all tokens at once."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from gisp_kernels import record_activations
from gisp_kernels.record import activations


def check(found, tokens: torch.Tensor, rtol: float = 1e-12) -> None:
    """Against two passes over the very values the layer was given."""
    tokens = tokens.double()
    assert found.count.item() == len(tokens)
    mean = tokens.mean(0)
    torch.testing.assert_close(found.mean, mean, rtol=rtol, atol=1e-15)
    torch.testing.assert_close(found.sum, tokens.sum(0), rtol=rtol, atol=1e-12)
    # Deviations are float32, so that each square is off by at most three roundings.
    torch.testing.assert_close(found.deviation, (tokens - mean).square().sum(0), rtol=4e-7, atol=1e-12)
    torch.testing.assert_close(found.variance, (tokens - mean).square().mean(0), rtol=4e-7, atol=1e-12)
    torch.testing.assert_close(found.sumsq, tokens.square().sum(0), rtol=4e-7, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_batches_of_any_size_give_the_statistics_of_all_tokens(dtype):
    linear = nn.Linear(7, 5).to(dtype)
    batches = [torch.randn(shape, dtype=dtype) * 3 + 1 for shape in ((4, 6, 7), (1, 1, 7), (9, 7), (7,))]
    with record_activations({"it": linear}) as recorder:
        for batch in batches:
            linear(batch)
    check(recorder.statistics()["it"], torch.cat([batch.reshape(-1, 7) for batch in batches]))


def test_a_small_variance_beside_a_large_mean_is_kept():
    linear = nn.Linear(3, 2)
    batches = [torch.randn(64, 3) * 1e-2 + torch.tensor([1e3, -3e2, 0.0]) for _ in range(5)]
    with record_activations([linear]) as recorder:
        for batch in batches:
            linear(batch)
    tokens = torch.cat(batches)
    check(recorder.statistics()["0"], tokens)
    # What this guards against: float32 sums of squares lose such a variance altogether.
    naive = tokens.square().mean(0) - tokens.mean(0).square()
    variance = tokens.double().var(0, correction=0)
    assert (naive[0] - variance[0]).abs() > variance[0] / 2


def test_chunks_change_nothing(monkeypatch):
    linear, tokens = nn.Linear(6, 2), torch.randn(50, 6)
    monkeypatch.setattr(activations, "_CHUNK_ELEMENTS", 6 * 7)
    with record_activations(linear) as recorder:
        linear(tokens)
    check(recorder.statistics()["0"], tokens)


def test_masked_tokens_count_nowhere_even_if_broken():
    linear, tokens = nn.Linear(4, 2), torch.randn(3, 5, 4)
    mask = torch.rand(3, 5) < 0.6
    mask[1] = False
    tokens[~mask] = float("nan")
    with record_activations(linear) as recorder:
        recorder.mask = mask
        linear(tokens)
        recorder.mask = torch.zeros(2, dtype=torch.bool)
        linear(torch.ones(2, 4))
    check(recorder.statistics()["0"], tokens[mask])


def test_nothing_counted_is_zero_and_reset_forgets():
    linear = nn.Linear(4, 2)
    with record_activations(linear) as recorder:
        linear(torch.ones(3, 4))
        recorder.reset()
    found = recorder.statistics()["0"]
    assert found.count == 0 and not found.mean.any() and not found.variance.any() and len(found.mean) == 4


def test_equal_inputs_give_equal_bits_and_the_layer_is_left_alone():
    linear, tokens = nn.Linear(9, 4), torch.randn(33, 9)
    results = []
    for _ in range(2):
        with record_activations(linear) as recorder:
            linear(tokens)
            linear(tokens[:5])
        results.append(recorder.statistics()["0"])
    assert torch.equal(results[0].deviation, results[1].deviation) and torch.equal(results[0].mean, results[1].mean)
    linear(tokens)
    assert recorder.statistics()["0"].count == 38


def test_what_does_not_fit_is_named():
    linear = nn.Linear(4, 2)
    with pytest.raises(TypeError, match=r"'0' must be an nn\.Linear, got ReLU"):
        record_activations([nn.ReLU()])  # type: ignore[list-item]
    with record_activations({"down": linear}) as recorder:
        with pytest.raises(RuntimeError, match="already active"):
            recorder.__enter__()
        recorder.mask = torch.ones(3, dtype=torch.bool)
        with pytest.raises(ValueError, match=r"'down': the mask must be bool \(5,\), got torch.bool \(3,\)"):
            linear(torch.ones(5, 4))
        recorder.mask = None
        linear(torch.ones(5, 4))
        with pytest.raises(RuntimeError, match="took 4 channels before and 3 now"):
            nn.Module.__call__(linear, torch.ones(5, 3))
