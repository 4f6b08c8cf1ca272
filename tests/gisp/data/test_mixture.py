"""Mixtures: what their file may hold, how they are sampled, and that their loss is the weighted sum of their tasks'."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from objective_oracle import double_model, gradients, mean_nll, scores
from safetensors.torch import save_file
from score_cases import gradient_scorer
from tiny import VOCAB, tiny_model
from word_tokenizer import save_tokenizer

import gisp
from gisp.data import Sequences, Task, load_sequences
from gisp.data.batches import StratifiedSampler
from gisp.data.mixture import read_mixture
from gisp.data.sequences import IGNORED
from gisp.errors import GispError
from gisp.evaluate import perplexity
from gisp.model.structures import map_model
from gisp.run.prune import prune


@pytest.fixture
def folder(tmp_path):
    """A choice task of ragged rows, a completion task and a file of tokens."""
    rows = [
        {"context": "the cat", "choices": [" sat", " ran on", " a"][: 2 + i % 2], "answer": i % 2} for i in range(6)
    ]
    (tmp_path / "choices.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    rows = [{"prompt": "a dog", "completion": " ran" + " on the mat" * (i % 3)} for i in range(5)]
    (tmp_path / "completions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    generator = torch.Generator().manual_seed(4)
    save_file({"input_ids": torch.randint(0, 12, (8, 10), generator=generator)}, tmp_path / "tokens.safetensors")
    save_tokenizer(tmp_path / "model")
    return tmp_path


def mixture(folder, text: str, **options) -> Sequences:
    (folder / "mix.yaml").write_text(text)
    given = {"vocab_size": VOCAB, "seq_len": None, "tokenizer_from": str(folder / "model"), **options}
    return load_sequences(str(folder / "mix.yaml"), **given)


BOTH = """
tasks:
  - {data: choices.jsonl, objective: margin, weight: 1.0}
  - {data: tokens.safetensors, weight: 3}
"""


def test_tasks_follow_each_other_with_normalised_weights(folder):
    found = mixture(folder, BOTH)
    assert [(p.objective, p.weight, p.examples) for p in found.tasks] == [("margin", 0.25, 6), ("lm", 0.75, 8)]
    assert found.signs[:2] == (1, -1) and found.signs[-8:] == (1,) * 8
    choices = load_sequences(
        folder / "choices.jsonl",
        vocab_size=VOCAB,
        seq_len=None,
        tokenizer_from=str(folder / "model"),
        objective="margin",
    )
    assert len(found) == len(choices) + 8
    assert found.examples[: len(choices.examples)] == choices.examples
    assert all(torch.equal(a, b) for a, b in zip(found.rows[3], choices.rows[3], strict=True))


def test_budgets_and_seeds(folder):
    text = "tokens: 61\ntasks:\n" + "  - {data: tokens.safetensors}\n" * 2
    found = mixture(folder, text)
    # 30 tokens each are three rows of ten, of the eight there are.
    assert [part.examples for part in found.tasks] == [3, 3]
    halves = [[ids.tolist() for ids, _ in rows] for rows in (found.rows[:3], found.rows[3:])]
    assert halves[0] != halves[1]
    assert mixture(folder, text).digest() == found.digest() != mixture(folder, text, seed=1).digest()
    own = "tokens: 60\ntasks:\n  - {data: tokens.safetensors, samples: 5}\n  - {data: tokens.safetensors, tokens: 15}\n"
    assert [part.examples for part in mixture(folder, own).tasks] == [5, 1]
    cut = mixture(folder, "tasks: [{data: tokens.safetensors, samples: 2, seq_len: 5}]")
    assert cut.examples == ((0, 1), (2, 3)) and all(len(ids) == 5 for ids, _ in cut.rows)


def test_objectives_of_tasks(folder):
    text = "tasks: [{data: completions.jsonl}, {data: choices.jsonl, objective: margin}]"
    found = mixture(folder, text, objective="completion")
    assert [part.objective for part in found.tasks] == ["completion", "margin"]
    with pytest.raises(GispError, match=r"completions.jsonl: --objective margin needs rows of context"):
        mixture(folder, text, objective="margin")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tasks: [", "is not valid YAML"),
        ("data: a.txt", "lists no tasks"),
        ("- a.txt", "lists no tasks"),
        ("tasks: []", "lists no tasks"),
        ("tasks: [choices.jsonl]", "task 1 is 'choices.jsonl': give it data"),
        ("tasks: [{data: choices.jsonl, wieght: 2}]", "task 1 has 'wieght'"),
        ("tasks: [{data: choices.jsonl}]\nsteps: 3", "has 'steps'"),
        ("tasks: [{data: choices.jsonl, weight: 0}]", "has weight 0"),
        ("tasks: [{data: choices.jsonl, weight: .nan}]", "has weight nan"),
        ("tasks: [{data: choices.jsonl, objective: kl}]", "has objective 'kl'"),
        ("tasks: [{data: choices.jsonl, tokens: 0}]", "has tokens 0"),
        ("tasks: [{data: choices.jsonl, seq_len: 1}]", "has seq_len 1"),
        ("tokens: 1\ntasks: [{data: choices.jsonl}, {data: choices.jsonl}]", "tokens is 1 for 2 tasks"),
        ("tasks: [{data: other.yaml}]", "holds no mixtures"),
        ("tasks: [{data: missing.jsonl}]", "missing.jsonl does not exist"),
        ("tasks: [{data: no-such-data}]", "'no-such-data' is neither"),
    ],
)
def test_bad_mixtures_name_the_value(folder, text, message):
    with pytest.raises(GispError, match=message) as caught:
        mixture(folder, text)
    assert "\n" not in str(caught.value)


def test_samples_do_not_go_with_a_mixture(folder):
    with pytest.raises(GispError, match="--samples 3 does not go with a mixture"):
        mixture(folder, BOTH).first(3)
    with pytest.raises(GispError, match=r"cannot read mixture .*missing.yml"):
        load_sequences(folder / "missing.yml", vocab_size=VOCAB, seq_len=None)


def test_a_mixture_has_no_perplexity():
    with pytest.raises(GispError, match="a mixture of 2 tasks has no perplexity"):
        perplexity(tiny_model(), ragged_mixture())


def ragged_mixture() -> Sequences:
    """Two tasks of unlike lengths, one with two or three answers an example."""
    generator = torch.Generator().manual_seed(5)

    def row(length: int, scored: int) -> tuple[torch.Tensor, torch.Tensor]:
        ids = torch.randint(0, VOCAB, (length,), generator=generator)
        labels = ids.clone()
        labels[:-scored] = IGNORED
        return ids, labels

    text = Sequences.plain([row(length, length) for length in (16, 11, 14, 9)])
    rows = [row(5 + i, 1 + i % 3) for i in range(10)]
    choices = Sequences(tuple(rows), (1, -1, -1, 1, 1, -1, -1, -1, 1, -1), ((0, 1, 2), (3, 5), (4, 6, 7), (8, 9)))
    return Sequences.mixture([(Task("text", "lm", 0.75, 4), text), (Task("choices", "margin", 0.25, 4), choices)])


def loss_by_hand(model, data: Sequences) -> torch.Tensor:
    """0.75 * mean over text + 0.25 * (mean over gold - mean over wrong answers)."""
    nll = [mean_nll(model, *row) for row in data.rows]
    answers = list(zip(nll[4:], data.signs[4:], strict=True))
    gold, wrong = (torch.stack([value for value, sign in answers if sign == s]).mean() for s in (1, -1))
    return 0.75 * torch.stack(nll[:4]).mean() + 0.25 * (gold - wrong)


@pytest.mark.parametrize("batch_size", [1, 3, 14, None])
@pytest.mark.parametrize("kind", ["exact", "stream"])
def test_scores_of_a_mixture_are_those_of_the_weighted_loss(kind, batch_size):
    model, data = tiny_model(), ragged_mixture()
    oracle, groups = double_model()
    loss = loss_by_hand(oracle, data)
    scorer = gradient_scorer(map_model(model), data, engine=kind, batch_size=batch_size, batch_tokens=10**6, seed=0)
    scored = scorer.score(1, map_model(model).groups)
    assert scored.loss.item() == pytest.approx(loss.item(), rel=1e-5)
    assert scorer.refused is None
    for name, expected in scores(groups, gradients(loss, groups)).items():
        torch.testing.assert_close(scored.scores[name].double(), expected, rtol=2e-5, atol=1e-7)


def test_a_stream_step_holds_every_task_and_its_expected_loss_is_the_mixtures():
    model, data = tiny_model(), ragged_mixture()
    scorer = gradient_scorer(map_model(model), data, engine="stream", batch_size=None, batch_tokens=30, seed=3)
    sampler = StratifiedSampler(data, 30, 3)
    losses, seen = [], []
    for step in range(1, 5):
        numbers = sampler.numbers(step)
        assert {number // 4 for number in numbers} == {0, 1}
        assert numbers == StratifiedSampler(data, 30, 3).numbers(step)
        seen += numbers
        losses.append(scorer.score(step, map_model(model).groups).loss.item())
    # Every example has been in equally many batches, so the mean over the steps is the expectation.
    assert sorted(seen.count(i) for i in range(4)) == [seen.count(0)] * 4
    assert sorted(seen.count(i) for i in range(4, 8)) == [seen.count(4)] * 4
    assert sum(losses) / 4 == pytest.approx(loss_by_hand(model, data).item(), rel=1e-5)


def test_batches_are_split_by_weight():
    rows = [(torch.ones(10, dtype=torch.int64),) * 2 for _ in range(40)]
    parts = (Task("a", "lm", 0.8, 20), Task("b", "lm", 0.2, 20))
    numbers = StratifiedSampler(
        Sequences(tuple(rows), (1,) * 40, tuple((i,) for i in range(40)), parts), 100, 0
    ).numbers(1)
    assert [sum(n < 20 for n in numbers), sum(n >= 20 for n in numbers)] == [8, 2]


def test_a_run_on_a_mixture_resumes_to_the_same_end(folder):
    (folder / "mix.yaml").write_text(BOTH)
    tiny_model().save_pretrained(folder / "model")
    options: dict[str, Any] = {
        "steps": 4,
        "sparsity": 0.3,
        "batch_tokens": 60,
        "align": 1,
        "device": "cpu",
        "dtype": "float32",
    }
    runs = [folder / name for name in ("whole", "cut")]
    whole = prune(folder / "model", folder / "mix.yaml", out=runs[0], **options)

    def stop(record, steps):
        if record.step == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prune(folder / "model", folder / "mix.yaml", out=runs[1], on_step=stop, **options)
    resumed = prune(folder / "model", folder / "mix.yaml", out=runs[1], resume=True, **options)
    assert [step.loss for step in resumed.steps] == [step.loss for step in whole.steps]
    assert all(torch.equal(resumed.removed_at[name], at) for name, at in whole.removed_at.items())
    assert [task["weight"] for task in resumed.data["tasks"]] == [0.25, 0.75]
    (folder / "mix.yaml").write_text(BOTH.replace("weight: 3", "weight: 2"))
    with pytest.raises(GispError, match="was made with another data"):
        prune(folder / "model", folder / "mix.yaml", out=runs[1], resume=True, **options)


@pytest.mark.parametrize("text", ["x: 2024-13-45", "[" * 3000, "x: !!int y"])
def test_yaml_whose_values_do_not_convert(text: str, tmp_path: Path) -> None:
    path = tmp_path / "mixture.yaml"
    path.write_text(text)
    with pytest.raises(GispError, match="is not valid YAML"):
        load_sequences(str(path), vocab_size=9, seq_len=None)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (f"tasks: [{{data: a.txt, weight: {10**400}}}]", "give a finite number above 0"),
        ("tasks: [{data: a.txt, weight: .inf}]", "give a finite number above 0"),
        ("tasks: [{data: a.txt, weight: 1.0e+308}, {data: b.txt, weight: 1.0e+308}]", "no share of the loss"),
        ("tasks: [{data: a.txt, weight: 1.0e-320}, {data: b.txt, weight: 1.0e+300}]", "no share of the loss"),
        (f"tasks: [{{data: a.txt, seq_len: {2**63}}}]", "seq_len 9223372036854775808: give a whole number from 2"),
        (f"tasks: [{{data: a.txt, tokens: 0x{'f' * 5000}}}]", "tokens a number of thousands of digits"),
        (f"tasks: [{{data: a.txt, samples: {10**400}}}]", "give a whole number from 1"),
        (f"tasks: [{{data: a.txt, objective: {'x' * 100000}}}]", "has objective"),
        (f"tasks: [{{data: a.txt, {'x' * 900}: 1}}]", "choose among"),
        ("tasks: [{data: a.txt, weight: [&a [x, x], &b [*a, *a], &c [*b, *b], [*c, *c]]}]", "finite number above 0"),
    ],
    ids=range(10),
)
def test_numbers_out_of_range_and_long_values_are_one_short_line(tmp_path, text, words):
    (tmp_path / "m.yaml").write_text(text)
    with pytest.raises(GispError, match=words) as refused:
        read_mixture(tmp_path / "m.yaml", "lm")
    assert len(str(refused.value)) < 500


@pytest.mark.parametrize("what", ["mixture", "data", "model"])
def test_a_name_longer_than_file_systems_take_is_one_line(tmp_path, what):
    name = "a" * 300
    (tmp_path / "m.yaml").write_text(f"tasks: [{{data: {name}}}]")
    with pytest.raises(GispError, match="is no path: it holds a name of more than 255 bytes"):
        if what == "model":
            gisp.load(name)
        else:
            load_sequences(str(tmp_path / "m.yaml") if what == "mixture" else name, vocab_size=VOCAB, seq_len=16)


def test_questions_are_of_the_kind_their_task_names(folder):
    rows = [{"prompt": "a dog", "completion": " ran", "task": name} for name in ("b", "a", "b")]
    (folder / "named.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = mixture(folder, "tasks: [{data: named.jsonl}, {data: completions.jsonl}]")
    assert found.kinds == ("b", "a", "b", *["completions.jsonl"] * 5)
    assert found.chosen([2, 1, 4]).kinds == ("b", "a", "completions.jsonl")
