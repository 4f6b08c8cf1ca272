"""The quality study end to end on a tiny decoder: every way runs, results go on where they stopped, figures add up."""

from __future__ import annotations

import json
from collections import Counter
from fractions import Fraction
from itertools import pairwise

import pytest
import torch
from safetensors.torch import save_file
from tiny import tiny_model, tiny_tokens

from benchmarks.quality import bench_data, cells, summary
from benchmarks.quality.__main__ import main
from benchmarks.quality.cells import Cell
from benchmarks.quality.choices import CONTEXT, CONTINUATION, ChoiceTask
from benchmarks.quality.distillation import Distillation
from benchmarks.quality.run_cell import Bench, Runner

STEPS = 4


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("quality")
    model = tiny_model("llama-gqa", layers=4, intermediate_size=128, max_position_embeddings=128)
    model.save_pretrained(folder / "model")
    for name, rows in (("calibration", 12), ("evaluation", 6)):
        save_file({"input_ids": tiny_tokens(rows, 104, seed=len(name))}, folder / f"{name}.safetensors")
    return folder


@pytest.fixture
def arguments(files, tmp_path):
    made = [str(files / "model"), "--calibration", str(files / "calibration.safetensors")]
    made += ["--evaluation", str(files / "evaluation.safetensors"), "--out", str(tmp_path / "R.json")]
    return [
        *made,
        "--device",
        "cpu",
        "--steps",
        str(STEPS),
        "--exact-tokens",
        "416",
        "--exact-steps",
        "5",
        "--sparsities",
        "0.25,0.3",
    ]


def test_every_way_runs_and_a_second_call_adds_nothing(arguments, tmp_path, capsys):
    options = [
        *arguments,
        "--seeds",
        "1",
        "--study",
        "criteria",
        "--study",
        "compensation",
        "--study",
        "task",
        "--plot",
    ]
    assert main(options) == 0
    result = json.loads((tmp_path / "R.json").read_text())
    assert {cell["name"] for cell in result["cells"] if cell["study"] == "criteria"} >= {
        "fast",
        "paper, 5 steps",
        "official, 5 steps",
        "wanda-sp",
        "flap",
        "owl",
        "block-influence",
        "random",
        "magnitude",
        "signed",
        "taylor-local",
    }
    for cell in result["cells"]:
        assert [point["asked"] for point in cell["points"] if point["compensation"] is None] == [0.25, 0.3], cell
        assert len(cell["points"]) == 2 * (1 + len(cell["compensate"]))
        assert all(point["perplexity"] > 1 for point in cell["points"])
    assert (tmp_path / "R-criteria.png").stat().st_size > 5000
    printed = capsys.readouterr().out
    assert "30 %: fast is number" in printed and "30 %: accuracy on continuations: lm on text, second-order" in printed
    assert main(options) == 0
    again = json.loads((tmp_path / "R.json").read_text())
    assert again["cells"] == result["cells"]


def test_the_parts_of_fast_change_what_they_name(files):
    bench = Bench(
        bench_data.Decoder(files / "model", files / "calibration.safetensors", files / "evaluation.safetensors"),
        (0.3,),
        104,
        None,
        "cpu",
    )
    runner = Runner(bench)
    found = {}
    named = ("as it is", "8 steps", "2,048 tokens a step", "align 1", "exact, 1 steps")
    made = [cell for cell in cells.fast_cells(range(1), STEPS, 416) if cell.name in named]
    assert len(made) == len(named)
    for cell in made:
        result = runner.run(cell)
        assert "error" not in result, result
        found[cell.name] = result["points"][0]
    assert found["8 steps"]["tokens"] == 2 * found["as it is"]["tokens"]
    assert found["2,048 tokens a step"]["perplexity"] == found["as it is"]["perplexity"]  # the set is smaller
    assert found["align 1"]["perplexity"] != found["as it is"]["perplexity"]


def test_tasks_and_seeds_draw_what_they_say(files):
    data = bench_data.read_tokens(files / "calibration.safetensors", 96)
    drawn = bench_data.drawn(data, 3 * 104, seed=1)
    assert len(drawn) == 3 and drawn.digest() != bench_data.drawn(data, 3 * 104, seed=2).digest()
    choices = ChoiceTask("continuation", data).examples(data)
    assert len(choices.examples) == 12 and set(choices.signs) == {1, -1}
    row = data.rows[0][0]
    assert choices.rows[0][0].tolist() == row[: CONTEXT + CONTINUATION].tolist()
    assert [choices.signs[i] for i in choices.examples[0]] == [1, -1, -1, -1]
    question = ChoiceTask("continuation", data).questions(data)[0]
    assert question.requests[0].targets == tuple(row[CONTEXT:][:CONTINUATION].tolist())


def test_replacements_differ_in_one_token_of_the_context(files):
    data = bench_data.read_tokens(files / "calibration.safetensors", 96)
    choices = ChoiceTask("replacement", data).examples(data)
    assert 0 < len(choices.examples) <= 12
    rows = {tuple(ids[:CONTEXT].tolist()): ids for ids, _ in data.rows}
    for right, *wrong in choices.examples:
        ids, labels = choices.rows[right]
        context = ids[:CONTEXT].tolist()
        assert torch.equal(ids, rows[tuple(context)][: len(ids)])
        assert (labels[:CONTEXT] == -100).all() and torch.equal(labels[CONTEXT:], ids[48:])
        places = set()
        for other in wrong:
            (place,) = (choices.rows[other][0] != ids).nonzero().flatten().tolist()
            assert 48 < place < 59 and int(ids[place]) in context and int(choices.rows[other][0][place]) in context
            places.add((place, int(choices.rows[other][0][place])))
        assert len(places) == 3 and len({place for place, _ in places}) == 1
        assert [choices.signs[i] for i in (right, *wrong)] == [1, -1, -1, -1]


def test_the_answers_do_not_tell_which_one_is_right(files):
    data = bench_data.read_tokens(files / "calibration.safetensors", 96)
    every = [ids.tolist() for ids, _ in data.rows]
    pairs = Counter(pair for ids in every for pair in pairwise(ids))
    tokens = Counter(token for ids in every for token in ids)
    for name in ("follower", "label"):
        task = ChoiceTask(name, data)
        made = task.pieces(data)
        assert len(made) > 3
        answers = {}
        for context, pieces in made:
            right, *wrong = (int(piece) for piece in pieces)
            assert any(ids[i : i + 16] == [*context.tolist(), right] for ids in every for i in range(len(ids) - 15))
            assert len({right, *wrong}) == 4
            known = int(context[-1]) if name == "follower" else None
            assert answers.setdefault(known, {right, *wrong}) == {right, *wrong}
        for known, four in answers.items():
            counts = tokens if known is None else Counter({b: n for (a, b), n in pairs.items() if a == known})
            assert min(counts[token] for token in four) >= max(
                (n for t, n in counts.items() if t not in four), default=0
            )
        if name == "label":
            assert len(set(Counter(int(pieces[0]) for _, pieces in made).values())) == 1
        examples, right = task.examples(data), task.right_ones(data)
        assert [examples.signs[i] for i in examples.examples[0]] == [1, -1, -1, -1]
        assert all((labels[:15] == -100).all() and labels[15] == ids[15] for ids, labels in examples.rows)
        assert len(right.rows) == len(examples.examples) == len(made) and set(right.signs) == {1}


def test_what_pairs_of_tokens_tell(files):
    data = bench_data.read_tokens(files / "calibration.safetensors", 96)
    pairs = Counter(pair for ids, _ in data.rows for pair in pairwise(ids.tolist()))
    for name in ("follower", "label"):
        task, right = ChoiceTask(name, data), 0
        for context, pieces in task.pieces(data):
            last, worth = int(context[-1]), {}
            for token in map(int, pieces):
                before = sum(n for (_, b), n in pairs.items() if b == token)
                worth[token] = pairs[last, token] / (before if name == "label" else 1)
            best = [token for token, value in worth.items() if value == max(worth.values())]
            right += Fraction(int(pieces[0]) in best, len(best))
        assert task.by_pairs(data) == pytest.approx(float(right / len(task.pieces(data))))
    assert ChoiceTask("continuation", data).by_pairs(data) is None


def test_distillation_is_the_divergence_from_the_dense_model():
    dense, pruned, tokens = tiny_model(seed=1).double(), tiny_model(seed=2).double(), tiny_tokens(3)
    labels = tokens.clone()
    labels[:, :6] = -100
    found = Distillation(dense, 0.25)(pruned, tokens, labels)
    for row in range(3):
        p, q = (torch.softmax(model(tokens[row : row + 1]).logits[0, 5:-1], -1) for model in (dense, pruned))
        divergence = (p * (p / q).log()).sum(-1).mean()
        nll = -q.gather(1, tokens[row, 6:, None]).log().mean()
        assert float(found[row]) == pytest.approx(float(0.25 * divergence + 0.75 * nll), rel=1e-4)
    assert Distillation(dense, 1.0)(dense, tokens, labels).abs().max() < 1e-6


def test_a_distilled_cell_differs_from_the_plain_one(files):
    decoder = bench_data.Decoder(files / "model", files / "calibration.safetensors", files / "evaluation.safetensors")
    runner = Runner(Bench(decoder, (0.3,), 104, None, "cpu"))
    plain, distilled = (
        runner.run(cell)["points"][0]["perplexity"]
        for cell in cells.fast_cells(range(1), STEPS, 416)
        if cell.name in ("as it is", "distillation loss")
    )
    assert plain != distilled


def test_means_spreads_and_verdicts():
    def cell(name, seed, value, extra=()):
        points = [{"asked": 0.5, "compensation": None, "perplexity": value, "tokens": 10, "seconds": 1.0}]
        points += [{**points[0], "compensation": {"method": "lsq"}, "perplexity": other} for other in extra]
        return {**Cell("criteria", name, {}, seed).to_dict(), "points": points}

    result = {
        "dense": {"perplexity": 5.0},
        "cells": [cell("fast", 0, 10.0, [7.0]), cell("fast", 1, 12.0, [8.0]), cell("flap", 0, 20.0)],
    }
    shown = summary.show(result, "criteria")
    assert "11.00 (2.00)" in shown and shown.index("fast + lsq") < shown.index("11.00") < shown.index("flap")
    assert summary.verdicts(result) == [
        "50 %: fast is number 1 of 2 (11.00); best of the others: flap (20.00)",
        "50 %: fast + lsq removes 58 % of the excess perplexity (11.00 to 7.50, dense 5.00)",
    ]
    exact = cell("paper, 112 steps", 0, 13.0)
    exact["points"][0]["tokens"] = 200
    result["cells"].append(exact)
    assert "50 %: fast 11.00 on 10 tokens, paper, 112 steps 13.00 on 200 (5.0 % of them)" in summary.verdicts(result)
