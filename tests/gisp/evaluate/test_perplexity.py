"""Perplexity with window and stride against a loop over single tokens."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from eval_cases import byte_tokenizer, write_rows
from safetensors.torch import save_file
from tiny import tiny_model, tiny_tokens

from gisp.cli import main
from gisp.data import Sequences
from gisp.errors import GispError
from gisp.evaluate import EvalOptions, perplexity
from gisp.evaluate.perplexity import windows
from gisp.target import evaluate_target


def by_tokens(
    model: torch.nn.Module, rows: list[tuple[list[int], list[int]]], window: int, stride: int
) -> tuple[float, int]:
    """exp(mean NLL) and tokens: each token from the window in which it first appears, by a forward pass of its own."""
    losses = []
    for ids, labels in rows:
        for place in range(1, len(ids)):
            if labels[place] == -100:
                continue
            # The first window that reaches the token; windows begin at multiples of the stride.
            begin = max(0, math.ceil((place + 1 - window) / stride) * stride)
            if begin == place:
                continue
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([ids[begin:place]])).logits[0, -1].double()
            losses.append(float(logits.logsumexp(0) - logits[labels[place]]))
    return math.exp(sum(losses) / len(losses)), len(losses)


@pytest.mark.parametrize(("window", "stride"), [(8, 1), (8, 3), (8, 7), (8, 8), (8, None), (5, 2), (40, 4), (2, 1)])
@pytest.mark.parametrize("labelled", [False, True])
def test_every_stride_equals_a_loop_over_tokens(window: int, stride: int | None, labelled: bool) -> None:
    model = tiny_model("llama-gqa", layers=2)
    rows = []
    for number, length in enumerate((21, 9, 16, 2)):
        ids = tiny_tokens(1, length, seed=number)[0]
        labels = ids.clone()
        if labelled:
            labels[::3] = -100
        rows.append((ids, labels))
    found = perplexity(model, Sequences.plain(rows), window, stride)
    wanted, tokens = by_tokens(model, [(i.tolist(), t.tolist()) for i, t in rows], window, stride or window)
    assert found.perplexity == pytest.approx(wanted, rel=1e-5)
    assert (found.tokens, found.window) == (tokens, window)
    for batch_size in (1, 3):
        other = perplexity(model, Sequences.plain(rows), window, stride, batch_size=batch_size)
        assert other.perplexity == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("length", [1, 7, 8, 9, 23])
@pytest.mark.parametrize("stride", [1, 3, 7])
def test_each_token_is_scored_once_with_enough_context(length: int, stride: int) -> None:
    window, seen = 8, []
    for begin, scored, end in windows(length, window, stride):
        assert end - begin <= window
        for place in range(scored, end):
            seen.append(place)
            assert place == 0 or place - begin >= min(place, window - stride)
    assert seen == list(range(length))


def test_overlapping_windows_read_text_as_one_stream(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_model("llama-mha", layers=2).save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    data = write_rows(tmp_path / "text.jsonl", [{"text": "a cab and a bag"}, {"text": "cabs"}, {"text": "ab ab"}])
    tokenizer = byte_tokenizer()
    stream = [t for text in ("a cab and a bag", "cabs", "ab ab") for t in [*tokenizer.encode(text), 0]]
    common = ["eval", str(tmp_path / "model"), "--data", str(data), "--window", "8", "--device", "cpu", "--json"]
    assert main([*common, "--stride", "4"]) == 0
    found = json.loads(capsys.readouterr().out)
    wanted = by_tokens(tiny_model("llama-mha", layers=2), [(stream, stream)], 8, 4)
    assert (found["perplexity"], found["tokens"]) == (pytest.approx(wanted[0], rel=1e-5), len(stream) - 1)
    assert (found["window"], found["stride"]) == (8, 4)
    assert main(common) == 0
    plain = json.loads(capsys.readouterr().out)
    # A limit takes the same text, whether windows overlap or not.
    assert main([*common, "--stride", "4", "--limit", "2"]) == 0
    limited = json.loads(capsys.readouterr().out)
    wanted = by_tokens(tiny_model("llama-mha", layers=2), [(stream[:16], stream[:16])], 8, 4)
    assert (limited["perplexity"], limited["tokens"]) == (pytest.approx(wanted[0], rel=1e-5), 15)
    rows = [(stream[i : i + 8],) * 2 for i in range(0, len(stream) - 7, 8)]
    assert plain["perplexity"] == pytest.approx(by_tokens(tiny_model("llama-mha", layers=2), rows, 8, 8)[0], rel=1e-5)


def test_token_files_stay_row_by_row(tmp_path: Path) -> None:
    tiny_model("llama-mha", layers=2).save_pretrained(tmp_path / "model")
    ids = tiny_tokens(3, 20)
    save_file({"input_ids": ids}, tmp_path / "tokens.safetensors")
    options = EvalOptions(window=8, stride=2, limit=2)
    found = evaluate_target(
        str(tmp_path / "model"), str(tmp_path / "tokens.safetensors"), options=options, device="cpu"
    )
    rows = [(row, row) for row in ids[:2].tolist()]
    wanted = by_tokens(tiny_model("llama-mha", layers=2), rows, 8, 2)
    assert (found["perplexity"], found["tokens"]) == (pytest.approx(wanted[0], rel=1e-5), 2 * 19)


@pytest.mark.parametrize("stride", [0, -1, 9])
def test_a_stride_outside_the_window_is_refused(stride: int) -> None:
    with pytest.raises(GispError, match=f"--stride is {stride}: give 1 to the window of 8"):
        perplexity(tiny_model(layers=1), Sequences.plain([(tiny_tokens(1)[0],) * 2]), 8, stride)
