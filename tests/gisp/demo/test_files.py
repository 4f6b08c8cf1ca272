"""The demo's text, tokenizer and training script."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import gisp.demo as demo
from gisp.demo import corpus as corpora
from gisp.demo.corpus import Corpus, SourceFile
from gisp.demo.llama import TrainConfig, build_model, next_token_loss, perplexity
from gisp.demo.tokens import END_OF_TEXT, encode, train_tokenizer, windows
from gisp.demo.train import batches, fit, main, train

FOLDER = Path(demo.__file__).parent
SHIPPED = {name: FOLDER / f"{name}.jsonl" for name in ("calibration", "heldout")}
TINY = TrainConfig(vocab_size=300, layers=2, hidden=32, heads=2, mlp=48, seq_len=32, batch=8)


def shipped_rows(name: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in SHIPPED[name].read_text("utf-8").splitlines()]


@pytest.fixture(scope="module")
def tiny_corpus() -> Corpus:
    rows = shipped_rows("calibration")[:12] + shipped_rows("heldout")[:2]
    files = (SourceFile(row["path"], row["text"][:3000]) for row in rows)
    return Corpus(tuple(sorted(files, key=lambda f: f.path)), "3.11")


@pytest.fixture
def library(tmp_path: Path) -> Path:
    """A folder laid out like a standard library."""
    root = tmp_path / "lib"
    for number in range(200):
        path = root / f"package{number % 7}" / f"module{number}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"def function_{number}(value):\n    return value + {number}\n" * 3)
    return root


def test_split_is_disjoint_complete_and_by_path(library: Path) -> None:
    corpus = corpora.collect(library)
    kept, heldout = corpus.split()
    assert {f.path for f in kept} | {f.path for f in heldout} == {f.path for f in corpus.files}
    assert not {f.path for f in kept} & {f.path for f in heldout}
    assert 2 <= len(heldout) <= 20
    assert SourceFile(heldout[0].path, "other text").heldout


def test_split_is_pinned() -> None:
    # The shipped decoder was trained on one side: a changed rule would leak held-out files.
    assert SourceFile("colorsys.py", "").heldout
    assert SourceFile("tabnanny.py", "").heldout
    assert not SourceFile("bz2.py", "").heldout
    assert not SourceFile("opcode.py", "").heldout


def test_collect_is_deterministic_and_sorted(library: Path) -> None:
    first, second = corpora.collect(library), corpora.collect(library)
    assert first == second
    assert first.sha256() == second.sha256()
    assert [f.path for f in first.files] == sorted(f.path for f in first.files)
    (library / "package0" / "module0.py").write_text("# changed\n" * 20)
    assert corpora.collect(library).sha256() != first.sha256()


@pytest.mark.parametrize(
    "path",
    [
        "site-packages/numpy/core.py",
        "idlelib/editor.py",
        "lib2to3/tests/data/crlf.py",
        "encodings/cp037.py",
        "_sysconfigdata__linux.py",
        "config-3.11-x86_64/python-config.py",
        "notes.txt",
    ],
)
def test_unwanted_files_are_left_out(library: Path, path: str) -> None:
    before = corpora.collect(library)
    target = library / path
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(f"text of {path} " * 20)
    assert corpora.collect(library) == before


def test_copies_short_files_and_other_encodings_are_left_out(library: Path) -> None:
    before = corpora.collect(library)
    text = before.files[0].text
    (library / "zz_copy.py").write_text(text + "\n\n")
    (library / "zz_short.py").write_text("x = 1\n")
    (library / "zz_latin.py").write_bytes("# caf\xe9 ".encode("latin-1") * 20)
    assert corpora.collect(library) == before


def test_collect_needs_source(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no Python source"):
        corpora.collect(tmp_path)


def test_corpus_file_round_trip(library: Path, tmp_path: Path) -> None:
    corpus = corpora.collect(library)
    path = tmp_path / "a.jsonl.gz"
    corpora.save(corpus, path)
    assert corpora.load(path) == corpus
    again = tmp_path / "b.jsonl.gz"
    corpora.save(corpus, again)
    assert again.read_bytes() == path.read_bytes()


@pytest.mark.parametrize("content", [b"", b"plain text", b"\x1f\x8b broken"])
def test_foreign_corpus_file_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "c.jsonl.gz"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="is not a corpus"):
        corpora.load(path)


def test_samples_leave_out_notices_and_keep_to_their_size() -> None:
    files = [SourceFile(f"m{i}.py", f"x = {i}\n" * 20) for i in range(50)]
    notice = SourceFile("n.py", "# Copyright (c) Somebody\n" * 5)
    large = SourceFile("l.py", "x" * (corpora.SAMPLE_FILE_BYTES + 1))
    chosen = corpora.sample([*files, notice, large], 2000)
    assert chosen == corpora.sample([large, notice, *reversed(files)], 2000)
    assert notice not in chosen and large not in chosen
    assert 1800 < sum(len(f.text) for f in chosen) <= 2000


@pytest.mark.parametrize(("name", "low", "high"), [("calibration", 900_000, 1_100_000), ("heldout", 300_000, 400_000)])
def test_shipped_text_is_valid(name: str, low: int, high: int) -> None:
    rows = shipped_rows(name)
    assert low < SHIPPED[name].stat().st_size < high
    assert all(set(row) == {"path", "text"} for row in rows)
    assert all(len(row["text"]) >= corpora.MIN_BYTES for row in rows)
    for row in rows:
        lowered = row["text"].lower()
        assert not any(word in lowered for word in corpora.SAMPLE_REFUSED_WORDS), row["path"]


def test_shipped_text_lies_on_its_side_of_the_split() -> None:
    calibration, heldout = shipped_rows("calibration"), shipped_rows("heldout")
    assert not any(SourceFile(**row).heldout for row in calibration)
    assert all(SourceFile(**row).heldout for row in heldout)
    assert not {row["text"] for row in calibration} & {row["text"] for row in heldout}


def test_shipped_licence_is_the_psf_one() -> None:
    assert "PYTHON SOFTWARE FOUNDATION LICENSE VERSION 2" in ((FOLDER / "LICENSE-PSF.txt").read_text("utf-8"))


def test_tokenizer_round_trip(tiny_corpus: Corpus) -> None:
    texts = [file.text for file in tiny_corpus.files]
    tokenizer = train_tokenizer(texts, 400)
    assert len(tokenizer) == 400
    for text in [*texts, "  \t\n\n    naïve 漢字 \U0001f600 \x00 end  "]:
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    again = train_tokenizer(texts, 400)
    assert again.get_vocab() == tokenizer.get_vocab()


def test_tokenizer_needs_room_for_bytes() -> None:
    with pytest.raises(ValueError, match="vocab_size must be at least 257"):
        train_tokenizer(["x"], 256)


def test_stream_has_an_end_after_each_text() -> None:
    tokenizer = train_tokenizer(["a b c"], 300)
    stream = encode(tokenizer, ["ab", "c"])
    assert tokenizer.decode(stream) == f"ab{END_OF_TEXT}c{END_OF_TEXT}"
    assert stream.dtype == torch.int64


def test_windows() -> None:
    assert windows(torch.arange(10), 3, 2).tolist() == [[2, 3, 4], [5, 6, 7]]
    with pytest.raises(ValueError, match="fewer than a sequence of 11"):
        windows(torch.arange(10), 11)


@pytest.mark.parametrize("length", [32, 33, 100, 1000])
def test_batches_are_pieces_of_the_stream(length: int) -> None:
    source = batches(torch.arange(length), TINY)
    taken = [next(source) for _ in range(6)]
    for rows in taken:
        assert rows.shape == (TINY.batch, TINY.seq_len)
        assert torch.equal(rows - rows[:, :1], torch.arange(32).expand(8, 32))
        assert int(rows.max()) < length
    again = batches(torch.arange(length), TINY)
    assert all(torch.equal(rows, next(again)) for rows in taken)


def test_learning_rate_rises_then_falls() -> None:
    config = TrainConfig(lr=1.0, warmup=10)
    rates = [config.lr_at(step, 100) for step in range(100)]
    assert rates[:10] == pytest.approx([0.1 * i for i in range(1, 11)])
    assert rates[10] == 1.0
    assert all(a > b for a, b in itertools.pairwise(rates[10:]))
    assert rates[-1] == pytest.approx(0.05, abs=1e-3)


def test_perplexity_weighs_all_tokens_alike(tiny_corpus: Corpus) -> None:
    tokenizer = train_tokenizer([file.text for file in tiny_corpus.files], TINY.vocab_size)
    model = build_model(TINY, tokenizer)
    rows = windows(encode(tokenizer, [tiny_corpus.files[0].text]), TINY.seq_len)[:7]
    with torch.no_grad():
        library_loss = float(model(input_ids=rows, labels=rows).loss)
        assert float(next_token_loss(model, rows)) == pytest.approx(library_loss, rel=1e-6)
    assert perplexity(model, rows, 3) == pytest.approx(math.exp(library_loss), rel=1e-5)


def test_three_steps_reduce_the_loss_and_save_a_loadable_folder(
    tiny_corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = tmp_path / "corpus.jsonl.gz"
    corpora.save(tiny_corpus, small)
    out = tmp_path / "out"
    main(["--out", str(out), "--corpus", str(small), "--steps=3", "--batch=4", "--device=cpu"])
    report = json.loads((out / "training.json").read_text("utf-8"))
    losses = {row["step"]: row["loss"] for row in report["loss_curve"]}
    assert losses[3] < losses[1] - 0.3
    assert report["steps"] == 3 and report["tokens"] == 3 * 4 * 256
    assert report["corpus"]["sha256"] == tiny_corpus.sha256()
    assert report["corpus"]["heldout_files"] == 2

    model = AutoModelForCausalLM.from_pretrained(out)
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert model.dtype == torch.bfloat16
    assert report["parameters"] == sum(p.numel() for p in model.parameters()) <= 3_800_000
    text = tiny_corpus.files[0].text
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    _, heldout = tiny_corpus.split()
    unseen = windows(encode(tokenizer, [file.text for file in heldout]), 256)
    assert perplexity(model, unseen, 4) == pytest.approx(report["heldout_perplexity"], rel=1e-6)
    assert report["heldout_perplexity"] < report["config"]["vocab_size"]
    assert sum(file.stat().st_size for file in out.iterdir()) <= 8_000_000

    for name, shipped in SHIPPED.items():
        (tmp_path / f"{name}.jsonl").write_bytes(shipped.read_bytes())
    out.rename(tmp_path / "decoder")
    monkeypatch.setattr(demo, "files", lambda _: tmp_path)
    found = demo.demo_files()
    assert found.model == tmp_path / "decoder" and found.heldout == tmp_path / "heldout.jsonl"
    found.heldout.unlink()
    with pytest.raises(RuntimeError, match=r"gisp\.demo\.corpus --samples"):
        demo.demo_files()


def test_time_limit_shortens_the_schedule(tiny_corpus: Corpus) -> None:
    config = replace(TINY, batch=2, steps=60, log_every=10, evaluate_every=20)
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


def test_missing_checkpoint_names_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "files", lambda _: tmp_path)
    with pytest.raises(RuntimeError, match=r"python -m gisp\.demo\.train --out"):
        demo.demo_files()


def test_training_needs_both_sides(tmp_path: Path) -> None:
    one_side = Corpus((SourceFile("bz2.py", "x = 1\n" * 100),), "3.11")
    with pytest.raises(ValueError, match="1 training and 0 held-out"):
        train(one_side, tmp_path / "out", TINY, device="cpu")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("arguments", [["--steps", "0"], ["--batch", "-1"], ["--corpus", "none"]])
def test_bad_arguments_exit_with_a_line(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_info:
        main(["--out", str(tmp_path / "out"), *arguments])
    assert exit_info.value.code == 2
    assert arguments[-1] in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
