"""Ways make the scores they say they make, leave the model as it was, and a wrong one is not timed."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import nn

from benchmarks.common.registry import Model
from benchmarks.embed import measure, peers, ways
from benchmarks.embed.subject import Subject, build_decoder, make_subject

SHARED_KV = Model(2, hidden=32, heads=4, kv_heads=2, head_dim=8, channels=48, vocabulary=64)
OWN_KV = Model(2, hidden=32, heads=4, kv_heads=4, head_dim=8, channels=48, vocabulary=64)
EVERY = {**ways.WAYS, **peers.PEERS}


@pytest.fixture(params=[SHARED_KV, OWN_KV], ids=["gqa", "mha"])
def subject(request: pytest.FixtureRequest) -> Subject:
    return make_subject(request.param, build_decoder(request.param, 2, torch.device("cpu")), 24)


def truth(subject: Subject) -> dict[str, torch.Tensor]:
    """``|w * grad|`` summed over the elements of every structure, one after the other."""
    found = {}
    linears = {p.linear for g in subject.groups for p in g.projections}
    for linear in linears:
        linear.weight.requires_grad_(True)
    subject.backward()
    for group in subject.groups:
        scores = []
        for s in range(group.count):
            total = 0.0
            for p in group.projections:
                span = slice(s * p.block, (s + 1) * p.block)
                part = (span, slice(None)) if p.axis == "row" else (slice(None), span)
                assert p.linear.weight.grad is not None
                total += float((p.linear.weight.detach()[part] * p.linear.weight.grad[part]).double().abs().sum())
            scores.append(total)
        found[group.name] = torch.tensor(scores)
    for linear in linears:
        linear.weight.grad = None
        linear.weight.requires_grad_(False)
    return found


@pytest.mark.parametrize("name", [name for name, (_, baseline) in EVERY.items() if baseline == ways.GRAD])
def test_scores(subject: Subject, name: str) -> None:
    expected = truth(subject)
    with EVERY[name][0](subject) as step:
        for found in (step(), step()):
            assert found and set(found) <= set(expected)
            for group, scores in found.items():
                torch.testing.assert_close(scores, expected[group], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("name", [ways.GATE_PARAMETERS, ways.GATE_GRADIENTS])
def test_gates(subject: Subject, name: str) -> None:
    """By the change of the loss when a gate is opened a little."""

    def loss() -> float:
        with torch.no_grad():
            hidden = subject.decoder(input_ids=subject.ids, use_cache=False).last_hidden_state
            return float((hidden.double() * subject.probe).sum() / subject.ids.numel())

    with EVERY[name][0](subject) as step:
        found = step()
    assert set(found) == {group.name for group in subject.groups}
    for group in (subject.groups[0], subject.groups[-1]):
        (p,) = (p for p in group.projections if p.axis == "column")
        columns = p.linear.weight.data[:, p.block : 2 * p.block]
        before, width, values = columns.clone(), 0.05, []
        for factor in (1 - width, 1 + width):
            columns.copy_(before * factor)
            values.append(loss())
        columns.copy_(before)
        change = torch.tensor((values[1] - values[0]) / (2 * width))
        torch.testing.assert_close(found[group.name][1], change.float(), rtol=2e-2, atol=1e-5)


@pytest.mark.parametrize("name", EVERY)
def test_nothing_is_left_behind(subject: Subject, name: str) -> None:
    state = {key: value.clone() for key, value in subject.decoder.state_dict().items()}
    with EVERY[name][0](subject) as step:
        step()
    after = subject.decoder.state_dict()
    assert set(after) == set(state) and all(torch.equal(after[key], value) for key, value in state.items())
    assert all(p.grad is None and not p.requires_grad for p in subject.decoder.parameters())
    assert not any("forward" in m.__dict__ for m in subject.decoder.modules() if isinstance(m, nn.Linear))


def test_a_wrong_way_is_reported_and_not_timed(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    @contextmanager
    def doubled(subject: Subject) -> Iterator[ways.Step]:
        with ways.stream(subject) as step:
            yield lambda: {name: 2 * scores for name, scores in step().items()}

    @contextmanager
    def missing(subject: Subject) -> Iterator[ways.Step]:
        raise ModuleNotFoundError("No module named 'peer'")
        yield

    monkeypatch.setattr(measure, "PEERS", {"doubled": (doubled, ways.GRAD), "missing": (missing, ways.GRAD)})
    rows = {row["way"]: row for row in measure.measure_ways(subject, 1)}
    assert "is off by 1 relative" in rows["doubled"]["red"] and "median_ms" not in rows["doubled"]
    assert rows["missing"]["red"] == "No module named 'peer'"
    assert rows[ways.STREAM]["speedup"] > 0 and rows[ways.GRAD]["speedup"] == 1


def test_peers_are_those_installed() -> None:
    assert (peers.TORCH_PRUNING in peers.PEERS) == (importlib.util.find_spec("torch_pruning") is not None)
    assert (peers.LLM_PRUNER in peers.PEERS) == (importlib.util.find_spec("LLMPruner") is not None)
