"""The corpus: what is collected, how it is split, its file, its samples."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.common.command import exit_code
from benchmarks.decoders import corpus as corpora
from benchmarks.decoders.corpus import SourceFile
from gisp.errors import GispError


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
    with pytest.raises(GispError, match="no Python source"):
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
    with pytest.raises(GispError, match="is not a corpus"):
        corpora.load(path)


def test_samples_leave_out_notices_and_keep_to_their_size() -> None:
    files = [SourceFile(f"m{i}.py", f"x = {i}\n" * 20) for i in range(50)]
    notice = SourceFile("n.py", "# Copyright (c) Somebody\n" * 5)
    large = SourceFile("l.py", "x" * (corpora.SAMPLE_FILE_BYTES + 1))
    chosen = corpora.sample([*files, notice, large], 2000)
    assert chosen == corpora.sample([large, notice, *reversed(files)], 2000)
    assert notice not in chosen and large not in chosen
    assert 1800 < sum(len(f.text) for f in chosen) <= 2000


def test_command_writes_corpus_and_samples(library: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole, samples = tmp_path / "made" / "c.jsonl.gz", tmp_path / "samples"
    assert corpora.main(["--corpus", str(library), "--out", str(whole), "--samples", str(samples)]) == 0
    corpus = corpora.load(whole)
    assert corpus == corpora.collect(library)
    assert f"sha256 {corpus.sha256()}" in capsys.readouterr().out
    for name, texts in zip(("calibration", "heldout"), corpus.texts(), strict=True):
        rows = [json.loads(line) for line in (samples / f"{name}.jsonl").read_text("utf-8").splitlines()]
        assert sorted(row["text"] for row in rows) == sorted(texts)
        assert all(SourceFile(**row) in corpus.files for row in rows)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [([], "give --out, --samples or both"), (["--out", "."], "is a folder"), (["--samples", "here"], "cannot write")],
)
def test_bad_arguments_exit_with_a_line(
    arguments: list[str],
    message: str,
    library: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(library)
    (library / "here").touch()
    assert exit_code(lambda: corpora.main(["--corpus", str(library), *arguments])) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
