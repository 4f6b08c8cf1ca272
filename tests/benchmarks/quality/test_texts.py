"""Texts of a study: packing of calibration rows, and perplexity by the papers' protocol."""

from __future__ import annotations

import json
import math
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from eval_cases import byte_tokenizer
from tiny import VOCAB
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.quality.runner import Bench, Runner
from benchmarks.quality.texts import read_calibration, read_evaluation
from gisp.errors import GispError


@pytest.mark.parametrize("start", [False, True], ids=["plain", "bos"])
def test_perplexity_is_that_of_the_papers_protocol(files: Path, tmp_path: Path, start: bool) -> None:
    """One string, tokenised whole (with the tokenizer's BOS once), whole windows, exp of the mean NLL."""
    model = AutoModelForCausalLM.from_pretrained(files / "model")
    model.save_pretrained(tmp_path / "model")
    byte_tokenizer(start=start).save_pretrained(tmp_path / "model")
    windows = (128, 1024)
    bench = Bench(
        str(tmp_path / "model"),
        (str(files / "calibration.safetensors"),),
        (str(files / "held-out.txt"),),
        (0.3,),
        windows,
    )
    found = Runner(bench)._dense()
    ids = torch.tensor(
        AutoTokenizer.from_pretrained(tmp_path / "model")((files / "held-out.txt").read_text())["input_ids"]
    )
    assert (int(ids[0]) == 0) is start
    for window in windows:
        losses = []
        for i in range(len(ids) // window):
            batch = ids[None, i * window : (i + 1) * window]
            with torch.no_grad():
                losses.append(float(model(input_ids=batch, labels=batch).loss))
        assert losses, "the text is shorter than a window"
        wanted = math.exp(sum(losses) / len(losses))
        assert found[f"perplexity held-out {window}"] == pytest.approx(wanted, rel=1e-5, abs=1e-4)
    assert found["perplexity"] == found["perplexity held-out 128"]


def test_calibration_rows_are_texts_with_end_tokens_between_them(files: Path) -> None:
    specs = [str(files / "one.jsonl"), str(files / "two.jsonl")]
    packed = read_calibration(specs, str(files / "model"), VOCAB, 64)
    assert {len(ids) for ids, _ in packed.rows} == {64}
    stream = torch.cat([ids for ids, _ in packed.rows]).tolist()
    texts = [json.loads(line)["text"] for spec in specs for line in Path(spec).read_text().splitlines()]
    tokenizer = byte_tokenizer()
    ends = [i for i, token in enumerate(stream) if token == 0]
    pieces = [tokenizer.decode(stream[a + 1 : b]) for a, b in pairwise(ends)]
    assert len(pieces) > 150 and set(pieces) <= set(texts)
    # Texts of both files take turns.
    firsts = [texts.index(piece) < 120 for piece in pieces]
    assert sum(a != b for a, b in pairwise(firsts)) > 10


def test_files_that_do_not_go_together_are_refused(files: Path) -> None:
    model, text, tokens = (str(files / name) for name in ("model", "one.jsonl", "calibration.safetensors"))
    with pytest.raises(GispError, match="token files and text"):
        read_calibration([text, tokens], model, VOCAB, 64)
    with pytest.raises(GispError, match="one name"):
        read_evaluation([tokens, tokens], model, VOCAB, [64], None)
