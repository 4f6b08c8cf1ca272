"""Training: its batches, its time limit, the folder it leaves, its command line."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import gisp.demo as demo
from benchmarks.common.command import exit_code
from benchmarks.decoders import corpus as corpora
from benchmarks.decoders.corpus import Corpus, SourceFile
from benchmarks.decoders.llama import TrainConfig, build_model, perplexity
from benchmarks.decoders.tokens import encode, train_tokenizer, windows
from benchmarks.decoders.train import batches, fit, main, train
from gisp.errors import GispError


@pytest.mark.parametrize("length", [32, 33, 100, 1000])
def test_batches_are_pieces_of_the_stream(length: int, config: TrainConfig) -> None:
    source = batches(torch.arange(length), config)
    taken = [next(source) for _ in range(6)]
    for rows in taken:
        assert rows.shape == (config.batch, config.seq_len)
        assert torch.equal(rows - rows[:, :1], torch.arange(32).expand(8, 32))
        assert int(rows.max()) < length
    again = batches(torch.arange(length), config)
    assert all(torch.equal(rows, next(again)) for rows in taken)


def test_three_steps_reduce_the_loss_and_save_a_loadable_folder(
    tiny_corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = tmp_path / "corpus.jsonl.gz"
    corpora.save(tiny_corpus, small)
    out = tmp_path / "out"
    assert main(["--out", str(out), "--corpus", str(small), "--steps=3", "--batch=4", "--device=cpu"]) == 0
    report = json.loads((out / "training.json").read_text("utf-8"))
    losses = {row["step"]: row["loss"] for row in report["loss_curve"]}
    assert losses[3] < losses[1] - 0.3
    assert report["steps"] == 3 and report["tokens"] == 3 * 4 * 256
    assert report["corpus"]["sha256"] == tiny_corpus.sha256()
    assert report["corpus"]["heldout_files"] == 2

    model = AutoModelForCausalLM.from_pretrained(out)
    tokenizer: Any = AutoTokenizer.from_pretrained(out)
    assert model.dtype == torch.bfloat16
    assert report["parameters"] == sum(p.numel() for p in model.parameters()) <= 3_800_000
    text = tiny_corpus.files[0].text
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    _, heldout = tiny_corpus.split()
    unseen = windows(encode(tokenizer, [file.text for file in heldout]), 256)
    assert perplexity(model, unseen, 4) == pytest.approx(report["heldout_perplexity"], rel=1e-6)
    assert report["heldout_perplexity"] < report["config"]["vocab_size"]
    assert sum(file.stat().st_size for file in out.iterdir()) <= 8_000_000

    for name in ("calibration", "heldout"):
        (tmp_path / f"{name}.jsonl").touch()
    out.rename(tmp_path / "decoder")
    monkeypatch.setattr(demo, "files", lambda _: tmp_path)
    found = demo.demo_files()
    assert found.model == tmp_path / "decoder" and found.heldout == tmp_path / "heldout.jsonl"


def test_time_limit_shortens_the_schedule(tiny_corpus: Corpus, config: TrainConfig) -> None:
    config = replace(config, batch=2, steps=60, log_every=10, evaluate_every=20)
    texts = [file.text for file in tiny_corpus.files]
    tokenizer = train_tokenizer(texts, config.vocab_size)
    stream = encode(tokenizer, texts)
    unseen = windows(stream, config.seq_len)[:4]
    model = build_model(config, tokenizer)
    curve, steps = fit(model, stream, unseen, config, max_seconds=0.0)
    assert steps == 40
    assert [row["step"] for row in curve] == [1, 11, 20, 21, 31, 40]
    evaluated = {row["step"]: row["heldout_perplexity"] for row in curve if len(row) == 6}
    assert set(evaluated) == {20, 40}
    assert evaluated[40] == perplexity(model, unseen, config.batch)
    _, steps = fit(model, stream, unseen, config, max_seconds=1e6)
    assert steps == 60


def test_training_needs_both_sides(tmp_path: Path, config: TrainConfig) -> None:
    one_side = Corpus((SourceFile("bz2.py", "x = 1\n" * 100),), "3.11")
    with pytest.raises(GispError, match="1 training and 0 held-out"):
        train(one_side, tmp_path / "out", config, device="cpu")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        ["--steps", "0"],
        ["--batch", "-1"],
        ["--lr", "0"],
        ["--max-seconds", "-5"],
        ["--device", "tpu"],
        ["--corpus", "none"],
    ],
)
def test_bad_arguments_exit_with_a_line(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = tmp_path / "corpus.jsonl.gz"
    corpora.save(Corpus((SourceFile("bz2.py", "x = 1\n" * 100),), "3.11"), small)
    assert exit_code(lambda: main(["--out", str(tmp_path / "out"), "--corpus", str(small), *arguments])) == 2
    error = capsys.readouterr().err
    assert arguments[-1] in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_file_in_place_of_the_folder_is_refused_before_training(
    tiny_corpus: Corpus, tmp_path: Path, config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("benchmarks.decoders.train.fit", lambda *_, **__: pytest.fail("trained"))
    (tmp_path / "out").touch()
    with pytest.raises(GispError, match="cannot write"):
        train(tiny_corpus, tmp_path / "out", config, device="cpu")
