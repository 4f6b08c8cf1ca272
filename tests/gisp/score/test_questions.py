"""Objective choice: losses, scores of every kind and batching against autograd over the likelihoods of answers."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from gate_oracle import unit_scores
from objective_oracle import double_model, gradients, mean_nll, scores
from question_cases import EXAMPLES, answers, letters, mixed
from score_cases import gradient_scorer
from tiny import VOCAB, tiny_model
from word_tokenizer import save_tokenizer

import gisp
from gisp.cli import main
from gisp.data import Sequences, Task, load_sequences
from gisp.data.batches import StepBatches
from gisp.data.sequences import IGNORED
from gisp.errors import GispError
from gisp.model.structures import map_model
from gisp.score import gradient as gradient_module
from gisp.score.questions import Questions
from gisp_kernels.record.gates import gate_projection


def question_loss(model: Any, data: Sequences, example: tuple[int, ...]) -> torch.Tensor:
    """By the definition: minus the logarithm of the right answer's share of the likelihood."""
    likelihoods = {}
    for i in example:
        ids, labels = data.rows[i]
        logits = model(input_ids=ids[None]).logits[0, :-1].log_softmax(-1)
        scored = [(t, int(token)) for t, token in enumerate(labels[1:]) if token != IGNORED]
        likelihoods[i] = torch.stack([logits[t, token] for t, token in scored]).sum().exp()
    (right,) = (i for i in example if data.signs[i] > 0)
    return -(likelihoods[right] / sum(likelihoods.values())).log()


def weighted_parts(data: Sequences) -> list[tuple[Any, float, float]]:
    """Loss, weight and factor of the squares of everything independent in the loss."""
    parts: list[tuple[Any, float, float]] = []
    for number, example in enumerate(data.examples):
        if not data.compares(number):
            n = len(data.rows[example[0]][0]) - 1
            parts.append((lambda m, e=example: mean_nll(m, *data.rows[e[0]]), 0.6 / 3, n / (0.6 / 3)))
        else:
            weight = 0.4 / 4 if data.tasks else 1 / 4
            parts.append((lambda m, e=example: question_loss(m, data, e), weight, 1 / weight))
    return parts


@pytest.mark.parametrize("make", [answers, letters, mixed])
@pytest.mark.parametrize("batch_size", [1, 2, 4, None])
@pytest.mark.parametrize("kind", ["exact", "stream"])
def test_scores_are_those_of_the_likelihood(make: Any, batch_size: int | None, kind: str) -> None:
    model, data = tiny_model(), make()
    oracle, groups = double_model()
    loss = sum(weight * part(oracle) for part, weight, _ in weighted_parts(data))
    scorer = gradient_scorer(map_model(model), data, engine=kind, batch_size=batch_size, batch_tokens=10**6, seed=0)
    found = scorer.score(1, map_model(model).groups)
    assert scorer.refused is None
    assert found.loss.item() == pytest.approx(loss.item(), rel=1e-5)
    for name, expected in scores(groups, gradients(loss, groups)).items():
        torch.testing.assert_close(found.scores[name].double(), expected, rtol=2e-5, atol=1e-7)


@pytest.mark.parametrize("make", [answers, letters, mixed])
@pytest.mark.parametrize("batch_size", [1, 4, None])
@pytest.mark.parametrize("by_autograd", [True, False])
@pytest.mark.parametrize("family", ["llama-gqa", "qwen3"])
def test_a_question_is_squared_as_one(make: Any, batch_size: int | None, by_autograd: bool, family: str) -> None:
    model, data = tiny_model(family), make()
    model_map = map_model(model)
    groups = [(g.name, p.linear, p.block) for g in model_map.groups if (p := gate_projection(g))]
    expected = unit_scores(model, weighted_parts(data), groups)
    scorer = gradient_scorer(
        model_map, data, engine="exact", batch_size=batch_size, batch_tokens=8192, seed=0, criterion="second-order"
    )
    if by_autograd:
        scorer.refused = "asked to"
    found = scorer.score(1, model_map.groups).scores
    for name, values in expected.items():
        torch.testing.assert_close(found[name].double(), values, rtol=1e-4, atol=2e-6 * float(values.abs().max()))


def test_answers_of_one_token_share_a_pass() -> None:
    data = letters()
    assert [data.leaders(number) for number in range(4)] == [(0, 0, 0, 0), (0, 0, 2, 0), (0, 0, 0, 0), (0, 1, 0, 0)]
    assert [data.tokens_of(number) for number in range(4)] == [7, 10, 10, 6 + 7]
    apart = Sequences(data.rows, data.signs, data.examples)
    assert apart.leaders(0) == (0, 1, 2, 3) and apart.tokens_of(0) == 28
    model_map = map_model(tiny_model())
    options: dict[str, Any] = {"engine": "stream", "batch_size": None, "batch_tokens": 10**6, "seed": 0}
    shared, by_autograd = (
        gradient_scorer(model_map, data, criterion="second-order", first_order="shrunk", **options) for _ in range(2)
    )
    by_autograd.refused = "asked to"
    one, other = (scorer.score(1, model_map.groups) for scorer in (shared, by_autograd))
    # Six sequences of sixteen, as long as the longest.
    assert one.tokens == other.tokens == 6 * 10
    assert one.loss.item() == pytest.approx(other.loss.item(), rel=1e-6)
    for name, values in other.scores.items():
        torch.testing.assert_close(one.scores[name], values, rtol=1e-4, atol=1e-5 * float(values.abs().max()))
    few = gradient_scorer(model_map, data, **{**options, "batch_tokens": 20})
    assert len(few._context.steps.questions(1)) == 2


def test_noise_is_that_of_questions(monkeypatch: pytest.MonkeyPatch) -> None:
    units, weights = [], gradient_module.first_order_weights

    def spy(sums: Any, kinds: Any, count: int, batches: float) -> Any:
        units.append(count)
        return weights(sums, kinds, count, batches)

    monkeypatch.setattr(gradient_module, "first_order_weights", spy)
    model_map = map_model(tiny_model())
    options: dict[str, Any] = {"engine": "stream", "batch_size": None, "batch_tokens": 10**6, "seed": 0}
    options["criterion"] = "second-order"
    plain, shrunk = (
        gradient_scorer(model_map, answers(), first_order=s, **options).score(1, model_map.groups)
        for s in ("plain", "shrunk")
    )
    assert any(not torch.equal(plain.scores[name], shrunk.scores[name]) for name in plain.scores)
    assert units == [len(EXAMPLES)]
    opposed = Sequences.mixture(
        [
            (Task("questions", "choice", 0.5, 4), answers()),
            (Task("margin", "margin", 0.5, 4), Sequences(answers().rows, answers().signs, EXAMPLES)),
        ]
    )
    plain, shrunk = (
        gradient_scorer(model_map, opposed, first_order=s, **options).score(1, model_map.groups)
        for s in ("plain", "shrunk")
    )
    assert all(torch.equal(plain.scores[name], shrunk.scores[name]) for name in plain.scores)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 9])
def test_a_question_is_never_split(size: int) -> None:
    data = answers()
    steps = StepBatches(map_model(tiny_model()), data, kind="exact", batch_size=size, tokens=1, seed=0)
    places = steps.questions(1)
    assert [[steps.numbers(1)[i] for i in place] for place in places] == [list(example) for example in EXAMPLES]
    batches = list(steps.batches(steps.numbers(1), places))
    assert [i for start, stop in batches for i in range(start, stop)] == list(range(9))
    assert all(any(start <= place.start and place.stop <= stop for start, stop in batches) for place in places)
    assert all(stop - start <= max(size + 2, 3) for start, stop in batches)


def test_weights_of_answers_from_chance_to_certainty() -> None:
    questions = Questions.of([range(0, 4)], [-1, 1, -1, -1], [-0.5 / 3, 0.5, -0.5 / 3, -0.5 / 3])
    assert questions.weights == (0.5,)
    for nll, wanted, loss in (
        # Where nothing is known: margin's weights, by three quarters.
        ([2.0, 2.0, 2.0, 2.0], [-0.125, 0.375, -0.125, -0.125], 0.5 * math.log(4)),
        ([300.0, 1.0, 300.0, 300.0], [0, 0, 0, 0], 0),
        ([0.0, 800.0, 900.0, 900.0], [-0.5, 0.5, 0, 0], 400),
        ([2.0, 2.0, math.inf, math.inf], [-0.25, 0.25, 0, 0], 0.5 * math.log(2)),
    ):
        values = torch.tensor(nll, dtype=torch.float64)
        weights, correction = questions.compare(values, [1] * 4, [-1, 1, -1, -1], [7.0] * 4)
        assert weights == pytest.approx(wanted, abs=1e-12)
        total = sum(w * v for w, v in zip(weights, nll, strict=True) if w) + correction
        assert total == pytest.approx(loss, abs=1e-9)


def test_data_and_runs(tmp_path: Any, capsys: pytest.CaptureFixture[str]) -> None:
    model, data = tmp_path / "model", tmp_path / "rows.jsonl"
    model.mkdir()
    save_tokenizer(model)
    tiny_model().save_pretrained(model)
    rows = [{"context": "the cat", "choices": [" ran", " sat on", " mat"], "answer": n % 3} for n in range(8)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for _ in range(2):  # read, then from the cache
        found = load_sequences(str(data), vocab_size=VOCAB, seq_len=None, tokenizer_from=str(model), objective="choice")
        assert found.signs[:3] == (1, -1, -1) and found.examples[0] == (0, 1, 2)
        assert found.compares(0) and found.first(2).compares(1) and found.chosen([1, 0]).compares(0)
    options = ["--sparsity", "0.2", "--steps", "3", "--device", "cpu", "--align", "1"]
    common = ["prune", str(model), "--data", str(data), *options]
    for criterion in ("second-order", "gisp", "signed", "taylor-local"):
        out = tmp_path / criterion
        assert main([*common, "--objective", "choice", "--criterion", criterion, "--out", str(out)]) == 0
        trajectory = gisp.Trajectory.load(out)
        assert trajectory.config["objective"] == "choice" and 0 < trajectory.steps[0].loss < 20
    capsys.readouterr()
    out = tmp_path / "bad"
    assert main([*common, "--objective", "choice", "--criterion", "wanda-sp", "--out", str(out)]) == 2
    assert "--criterion wanda-sp sees no loss: --objective choice needs" in capsys.readouterr().err
    data.write_text('{"text": "the cat sat on the mat"}\n')
    assert main([*common, "--objective", "choice", "--out", str(out)]) == 2
    assert "--objective choice needs rows of context, choices and answer" in capsys.readouterr().err
    assert not out.exists()


OPTIONS: dict[str, Any] = {"sparsity": 0.2, "steps": 3, "device": "cpu", "align": 1, "batch_tokens": 60}


def test_the_objective_of_the_run_decides() -> None:
    plain = Sequences(answers().rows, answers().signs, EXAMPLES)
    losses = {
        (objective, data.compared): [
            step.loss for step in gisp.prune(tiny_model(), data, objective=objective, **OPTIONS).steps
        ]
        for objective in ("choice", "margin")
        for data in (answers(), plain)
    }
    assert losses["choice", True] == losses["choice", False] and min(losses["choice", True]) > 0
    assert losses["margin", True] == losses["margin", False] != losses["choice", True]


def a_loss(model: Any, input_ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return model(input_ids=input_ids).logits.float().mean((1, 2))


@pytest.mark.parametrize(
    ("data", "options", "message"),
    [
        (Sequences(answers().rows, (-1,) * 9, EXAMPLES), {}, "example 0 has 0 right answers of 3"),
        (
            Sequences(answers().rows, (1, -1, -1, 1, 1, -1, 1, 1, -1), EXAMPLES),
            {},
            "example 1 has 2 right answers of 2",
        ),
        (Sequences.plain(list(answers().rows)), {}, "no question has two different answers"),
        (Sequences((answers().rows[0],) * 2, (1, -1), ((0, 1),)), {}, "no question has two different answers"),
        (
            mixed(),
            {"objective": a_loss},
            r"a loss of your own \([\w.]*test_questions.a_loss\) takes no task of objective choice",
        ),
        (mixed(), {"objective": "lm", "criterion": "wanda-sp"}, "sees no loss: objective choice of questions needs"),
    ],
)
def test_what_is_no_question_is_one_line(data: Sequences, options: dict[str, Any], message: str) -> None:
    with pytest.raises(GispError, match=message) as caught:
        gisp.prune(tiny_model(), data, **{"objective": "choice", **OPTIONS, **options})
    assert "\n" not in str(caught.value)


def test_a_mixture_whose_tasks_have_other_objectives_is_another_run(tmp_path: Any) -> None:
    def cut(record: Any, steps: int) -> None:
        raise KeyboardInterrupt

    def mixture(objective: str) -> Sequences:
        parts = (Task("text", "lm", 0.6, 3), Task("questions", objective, 0.4, 4))
        return Sequences(mixed().rows, mixed().signs, mixed().examples, parts)

    with pytest.raises(KeyboardInterrupt):
        gisp.prune(tiny_model(), mixture("margin"), out=tmp_path / "run", on_step=cut, **OPTIONS)
    with pytest.raises(GispError, match="made with objectives lm, margin of its tasks, not lm, choice"):
        gisp.prune(tiny_model(), mixture("choice"), out=tmp_path / "run", resume=True, **OPTIONS)
    resumed = gisp.prune(tiny_model(), mixture("margin"), out=tmp_path / "run", resume=True, **OPTIONS)
    assert resumed.complete
