"""Choices and completions against sums over single tokens, and malformed rows in one line each."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from eval_cases import byte_tokenizer, greedy, log_probability, shrunken, write_rows
from tiny import tiny_model
from word_tokenizer import CHAT_TEMPLATE

from gisp.errors import GispError
from gisp.evaluate import EvalOptions
from gisp.evaluate.data import prepare
from gisp.evaluate.generation import generate_greedily
from gisp.evaluate.pairs import Request, RequestEncoder, log_likelihoods

ROWS: list[dict[str, Any]] = [
    {"context": "a cab ", "choices": ["cab", "bag", "a"], "answer": 0},
    {"context": "one two", "choices": [" a", " three and four", " ab", " é"], "answer": 3},
    {"context": "", "choices": ["cab", "ab ab ab"], "answer": 1},
    {"context": "a longer line of text, no", "choices": ["w", "pe"], "answer": 1},
    {"contexts": ["the cab", "the bag", "it"], "continuation": " was big", "answer": 2},
]

LENGTHS: dict[str, Callable[[str], int]] = {
    "acc": lambda _: 1,
    "acc_norm": len,
    "acc_bytes": lambda text: len(text.encode()),
}


@pytest.fixture
def model_folder(tmp_path: Path) -> Path:
    tiny_model("llama-gqa", max_position_embeddings=48).save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def measured(model: Any, folder: Path, rows: list[dict[str, Any]], **options: Any) -> dict[str, Any]:
    data = write_rows(folder.parent / "rows.jsonl", rows)
    return prepare(str(data), EvalOptions(**options), model, str(folder))(model)


def split(context: str, continuation: str) -> tuple[list[int], list[int]]:
    """Tokens of both by their definition: trailing spaces move, the whole text is encoded, the context cut off."""
    encode = byte_tokenizer().encode
    bare = context.rstrip()
    if not bare:
        return [0], encode(context + continuation)
    return encode(bare), encode(context + continuation)[len(encode(bare)) :]


def scores(model: Any, row: dict[str, Any]) -> list[float]:
    if "contexts" in row:
        pairs = [(context, row["continuation"]) for context in row["contexts"]]
    else:
        pairs = [(row["context"], choice) for choice in row["choices"]]
    return [log_probability(model, *split(*pair)) for pair in pairs]


@pytest.mark.parametrize("gqa", [None, "query", "balanced", "group"])
def test_accuracies_follow_from_single_tokens(gqa: str | None, model_folder: Path) -> None:
    model = shrunken(gqa, empty_layer=1)
    found = measured(model, model_folder, ROWS)
    sums = [scores(model, row) for row in ROWS]
    for name, length in LENGTHS.items():
        hits = []
        for row, values in zip(ROWS, sums, strict=True):
            normed = [v / length(text) for v, text in zip(values, row.get("choices") or row["contexts"], strict=True)]
            hits.append(float(normed.index(max(normed)) == row["answer"]))
        assert found[name] == statistics.mean(hits)
        assert found[f"{name}_stderr"] == pytest.approx(statistics.stdev(hits) / math.sqrt(len(hits)))
    gold = sum(values[row["answer"]] for row, values in zip(ROWS, sums, strict=True))
    tokens = sum(
        len(split(row["context"], row["choices"][row["answer"]])[1]) if "context" in row else len(" was big")
        for row in ROWS
    )
    assert found["perplexity"] == pytest.approx(math.exp(-gold / tokens), rel=1e-5)
    assert (found["tokens"], found["examples"], found["truncated"], found["window"]) == (tokens, 5, 0, 48)


def test_contexts_may_repeat_their_continuation(model_folder: Path) -> None:
    model, shared = shrunken("query"), ROWS[-1]
    repeated = {"contexts": shared["contexts"], "choices": [" was big"] * 3, "answer": 2}
    assert measured(model, model_folder, [shared]) == measured(model, model_folder, [repeated])


def test_choices_of_a_conversation_are_its_last_turn(model_folder: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(model_folder)
    model = shrunken("query")
    asked: dict[str, Any] = {
        "messages": [{"role": "user", "content": "a cab "}],
        "choices": ["cab", "bag", "a"],
        "answer": 1,
    }
    told: dict[str, Any] = {
        "context": "user a cab  stop assistant ",
        "choices": ["cab stop ", "bag stop ", "a stop "],
        "answer": 1,
    }
    found, expected = (measured(model, model_folder, [row]) for row in (asked, told))
    assert found["perplexity"] == expected["perplexity"] and found["acc"] == expected["acc"]
    assert found["tokens"] == len(split(told["context"], told["choices"][1])[1])
    # What is divided by is the choice, without the template around it.
    values = scores(model, told)
    best = max(range(3), key=lambda i: values[i] / len(asked["choices"][i]))
    assert found["acc_norm"] == (best == 1)


def test_a_delimiter_is_scored_but_not_counted(model_folder: Path) -> None:
    model = shrunken("query")
    row = {
        "context": "a cab",
        "choices": ["..n", "..and a bag", "..a longer end of it"],
        "delimiter": "..",
        "answer": 0,
    }
    values = scores(model, row)
    lengths = [1, len("and a bag"), len("a longer end of it")]
    for counted, given in ((lengths, row), ([n + 2 for n in lengths], {**row, "delimiter": ""})):
        normed = [value / length for value, length in zip(values, counted, strict=True)]
        best = normed.index(max(normed))
        for answer in range(3):
            assert measured(model, model_folder, [{**given, "answer": answer}])["acc_norm"] == float(answer == best)


def test_batches_and_padding_change_nothing() -> None:
    model = shrunken("query", empty_layer=1)
    generator = torch.Generator().manual_seed(3)
    requests = []
    for _ in range(24):
        length, scored = (int(torch.randint(2, 30, (), generator=generator)) for _ in range(2))
        ids = torch.randint(0, 96, (length + 1,), generator=generator).tolist()
        scored = min(scored, length)
        requests.append(Request(tuple(ids[:-1]), tuple(ids[-scored:]), False))
    # Of equal inputs with different targets each gets its own score.
    requests.append(Request(requests[0].inputs, (5,), False))
    wanted = [log_probability(model, [*r.inputs, 0][: len(r.inputs) + 1 - len(r.targets)], r.targets) for r in requests]
    for batch_size in (None, 1, 5):
        assert log_likelihoods(model, requests, batch_size) == pytest.approx(wanted, rel=1e-5)


def test_long_contexts_lose_their_beginning() -> None:
    encoder = RequestEncoder(byte_tokenizer(), 6, 96)
    request = encoder.request("abcdefghij", "xyz", "row 0")
    encode = byte_tokenizer().encode
    assert request == Request(tuple(encode("fghijxyz")[-7:-1]), tuple(encode("xyz")), True)
    assert not encoder.request("abc", "xyz", "row 0").truncated
    with pytest.raises(GispError, match="row 7: 9 tokens of a continuation exceed the longest input, 6"):
        encoder.request("a", "123456789", "row 7")


def test_a_start_token_is_not_doubled() -> None:
    encoder, plain = RequestEncoder(byte_tokenizer(start=True), 32, 96), byte_tokenizer().encode
    for context in ("cab", "<end>cab"):
        request = encoder.request(context, " bag", "row 0")
        assert [*request.inputs, request.targets[-1]] == [0, *plain("cab bag")]
    assert encoder.request("", "bag", "row 0") == Request((0, *plain("ba")), tuple(plain("bag")), False)
    assert encoder.request("  ", "bag", "row 0").targets == tuple(plain("  bag"))


def test_completions_and_exact_match(model_folder: Path) -> None:
    model, tokenizer = shrunken("query", empty_layer=2), byte_tokenizer()
    model.generation_config.eos_token_id = None
    rows, expected = [], []
    for number, prompt in enumerate(["a cab", "one two three four", "x", "bag " * 5, "12+7="]):
        answer = tokenizer.decode(greedy(model, tokenizer.encode(prompt), 6), skip_special_tokens=True)
        right = number % 2 == 0 and bool(answer.strip())
        rows.append({"prompt": prompt, "completion": f" {answer.strip()}\n" if right else answer + "?"})
        expected.append(right)
    assert any(expected)
    for batch_size in (None, 1, 2):
        found = measured(model, model_folder, rows, generate=True, max_new_tokens=6, batch_size=batch_size)
        assert found["exact_match"] == sum(expected) / len(expected)
    pairs = [split(row["prompt"], row["completion"]) for row in rows]
    tokens = sum(len(tail) for _, tail in pairs)
    nll = -sum(log_probability(model, *pair) for pair in pairs)
    assert found["perplexity"] == pytest.approx(math.exp(nll / tokens), rel=1e-5)
    assert (found["tokens"], found["examples"]) == (tokens, len(rows))


def test_answers_end_where_they_are_told(model_folder: Path) -> None:
    model, tokenizer = shrunken(None), byte_tokenizer()
    model.generation_config.eos_token_id = 0
    prompts = [tokenizer.encode(text) for text in ("cab", "a bag of", "12")]
    for prompt in prompts:
        whole = tokenizer.decode(greedy(model, prompt, 12), skip_special_tokens=True)
        ends = (whole[5:7], whole[3])
        found = generate_greedily(model, tokenizer, [prompt], until=ends, max_new_tokens=12)
        assert found == [whole[: min(whole.index(end) for end in ends)]]
    together = generate_greedily(model, tokenizer, prompts, until=("q",), max_new_tokens=12)
    alone = [generate_greedily(model, tokenizer, [p], until=("q",), max_new_tokens=12)[0] for p in prompts]
    assert together == alone
    # A token the model gives is declared to end text: nothing after it counts.
    generated = greedy(model, prompts[0], 12)
    model.generation_config.eos_token_id = [generated[4], 95]
    stop = generated.index(generated[4])
    text = tokenizer.decode(generated[:stop], skip_special_tokens=True)
    assert generate_greedily(model, tokenizer, prompts[:1], max_new_tokens=12) == [text]
    # In a batch that goes on, the row is filled up with tokens that are no part of its answer.
    assert generate_greedily(model, tokenizer, prompts, max_new_tokens=12)[0] == text


def test_a_pattern_picks_what_is_compared(model_folder: Path) -> None:
    model, tokenizer = shrunken(None), byte_tokenizer()
    model.generation_config.eos_token_id = None
    answer = tokenizer.decode(greedy(model, tokenizer.encode("cab"), 8))
    part = answer[2:5]
    rows = [{"prompt": "cab", "completion": f"?!{part}"}, {"prompt": "cab", "completion": "?!zzz"}]
    pattern = r"^.{2}((?s:.){3})"
    found = measured(model, model_folder, rows, generate=True, max_new_tokens=8, extract=pattern)
    assert found["exact_match"] == 0.5
    with pytest.raises(GispError, match="row 1: --extract finds nothing"):
        measured(model, model_folder, rows, generate=True, max_new_tokens=8, extract=f"!{part}")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"context": "a", "choices": ["x", "c"], "answer": 2}, "answer 2: give the index of one of 2 choices"),
        ({"context": "a", "choices": ["b", "c"], "answer": -1}, "answer -1"),
        ({"context": "a", "choices": ["b", "c"], "answer": True}, "answer True"),
        ({"context": "a", "choices": ["b", "c"]}, "answer None"),
        ({"context": "a", "choices": ["b"], "answer": 0}, "at least two texts"),
        ({"context": "a", "choices": "bc", "answer": 0}, "at least two texts"),
        ({"context": "a", "choices": ["b", ""], "answer": 0}, "every one must be a text"),
        ({"choices": ["b", "c"], "answer": 0}, "context None"),
        ({"messages": ["a"], "choices": ["b", "c"], "answer": 0}, "messages .*give a list of role and content"),
        ({"contexts": ["b", "c"], "answer": 0}, "continuation None"),
        ({"contexts": ["b", "c"], "choices": ["x", "y", "z"], "answer": 0}, "2 contexts and 3 choices"),
        ({"context": "a", "choices": ["x", "c" * 60], "answer": 0}, "60 tokens of a continuation exceed"),
        ({"text": "speech"}, "choices None"),
        # The tokenizer merges "ab": the choice has no token of its own, which lm-eval asserts.
        ({"context": "a", "choices": ["b", "c"], "answer": 0}, "'b' adds no token to its context"),
    ],
)
def test_malformed_choices(row: dict[str, Any], message: str, model_folder: Path) -> None:
    with pytest.raises(GispError, match=f"rows.jsonl: row 1.*{message}"):
        measured(shrunken("query"), model_folder, [ROWS[0], row])


def test_malformed_completions_and_options(model_folder: Path) -> None:
    model, good = shrunken("query"), {"prompt": "a", "completion": "x"}
    cases: tuple[tuple[dict[str, Any], list[dict[str, Any]], str], ...] = (
        ({}, [good, {"prompt": "a", "completion": 3}], "row 1 has the keys prompt, completion"),
        ({}, [good, {"prompt": "a", "completion": ""}], "row 1: '' adds no token"),
        ({"generate": True, "max_new_tokens": 48}, [good], "--max-new-tokens is 48"),
        ({"generate": True, "max_new_tokens": 0}, [good], "--max-new-tokens is 0"),
        ({"generate": True, "extract": "("}, [good], "no regular expression"),
        ({"until": ("x",)}, [good], "--until belongs to --generate"),
        ({"extract": "x"}, [good], "--extract belongs to --generate"),
        ({"max_new_tokens": 8}, [good], "--max-new-tokens belongs to --generate"),
        ({"generate": True}, ROWS, "--generate needs rows of prompt and completion"),
        ({"stride": 2}, ROWS, "--stride is for text and tokens"),
        ({"limit": 0}, ROWS, "--limit is 0"),
        ({}, [], "holds no rows"),
    )
    for options, rows, message in cases:
        with pytest.raises(GispError, match=message):
            measured(model, model_folder, rows, **options)
