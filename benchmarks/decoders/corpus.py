"""Text to train on: Python source of a CPython standard library, split by file.

    python -m benchmarks.decoders.corpus --out FILE.jsonl.gz --samples DIR

--out collects it into one file for training on another machine, --samples writes the calibration and held-out text
that the package ships.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import platform
import sysconfig
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.common.command import Parser, check_writable, exit_code
from gisp.errors import GispError
from gisp.files import write_atomic

NAME = "python -m benchmarks.decoders.corpus"

# Installed packages are not the standard library; the others are tables, data or an application.
EXCLUDED_FOLDERS = (
    "site-packages",
    "dist-packages",
    "idlelib",
    "lib2to3/tests/data",
    "pydoc_data",
    "encodings",
)
# Written by the build: they hold paths and flags of the machine that compiled the interpreter.
EXCLUDED_PREFIXES = ("_sysconfigdata", "config-")
MIN_BYTES = 64
HELDOUT_ONE_IN = 25

CALIBRATION_BYTES = 1_000_000
HELDOUT_BYTES = 360_000
# Files of modest size make the shipped samples varied.
SAMPLE_FILE_BYTES = 40_000
# A file with a notice of its own may have other terms than PSF-2.0; the keys of test certificates
# alarm secret scanners.
SAMPLE_REFUSED_WORDS = ("copyright", "license", "licence", "private key")


@dataclass(frozen=True)
class SourceFile:
    """One file: its path below the library's root, with forward slashes, and its text."""

    path: str
    text: str

    @property
    def digest(self) -> str:
        """SHA-256 of the path, which decides the split and the order of the samples."""
        return hashlib.sha256(self.path.encode()).hexdigest()

    @property
    def heldout(self) -> bool:
        """Whether the file is kept from training (about 4 %); depends on the path alone."""
        return int(self.digest[:8], 16) % HELDOUT_ONE_IN == 0


@dataclass(frozen=True)
class Corpus:
    """Files in path order and the version of the Python they come from, as far as known."""

    files: tuple[SourceFile, ...]
    python: str

    def split(self) -> tuple[list[SourceFile], list[SourceFile]]:
        """Training files and held-out files."""
        return [f for f in self.files if not f.heldout], [f for f in self.files if f.heldout]

    def texts(self) -> tuple[list[str], list[str]]:
        """Texts of the training files and of the held-out files."""
        train, heldout = self.split()
        return [f.text for f in train], [f.text for f in heldout]

    def sha256(self) -> str:
        """Digest over all paths and texts, whatever the file they are stored in."""
        digest = hashlib.sha256()
        for file in self.files:
            for part in (file.path, file.text):
                data = part.encode()
                digest.update(f"{len(data)}:".encode())
                digest.update(data)
        return digest.hexdigest()


def collect(root: Path) -> Corpus:
    """All source files below ``root`` that are text and wanted, without repeats.

    Raises:
        GispError: there are none.
    """
    files: list[SourceFile] = []
    seen: set[str] = set()
    for path, source in sorted((p.relative_to(root).as_posix(), p) for p in root.rglob("*.py")):
        if not _wanted(path) or not source.is_file():
            continue
        try:
            text = source.read_bytes().decode("utf-8").replace("\r\n", "\n")
        except UnicodeDecodeError:
            # The library tests its own decoding with files in other encodings.
            continue
        # A copy must not sit on both sides of the split.
        key = " ".join(text.split())
        if len(text.encode()) < MIN_BYTES or key in seen:
            continue
        seen.add(key)
        files.append(SourceFile(path, text))
    if not files:
        raise GispError(f"no Python source below {root}: give the folder of a standard library")
    # Of another library only the folder is known.
    version = platform.python_version() if root == standard_library() else f"of {root.name}"
    return Corpus(tuple(files), version)


def _wanted(path: str) -> bool:
    if any(f"/{folder}/" in f"/{path}" for folder in EXCLUDED_FOLDERS):
        return False
    return not any(part.startswith(EXCLUDED_PREFIXES) for part in path.split("/"))


def standard_library() -> Path:
    """Folder of the running interpreter's standard library."""
    return Path(sysconfig.get_path("stdlib"))


def save(corpus: Corpus, path: Path) -> None:
    """Write ``.jsonl.gz``: a row ``{"python"}``, then ``{"path", "text"}`` rows.

    Equal corpora give equal bytes.

    Raises:
        GispError: the file cannot be written.
    """
    check_writable(path)
    rows = [{"python": corpus.python}, *map(asdict, corpus.files)]
    write_atomic(path, gzip.compress(_jsonl(rows), compresslevel=9, mtime=0))


def load(path: Path) -> Corpus:
    """Read what :func:`save` wrote, or collect from a folder.

    Raises:
        GispError: not such a file.
    """
    if path.is_dir():
        return collect(path)
    try:
        with gzip.open(path, "rt", encoding="utf-8") as stream:
            head, *rows = [json.loads(line) for line in stream]
        return Corpus(tuple(SourceFile(**row) for row in rows), head["python"])
    except (OSError, EOFError, ValueError, KeyError, TypeError) as error:
        raise GispError(f"{path} is not a corpus: give a .jsonl.gz of {NAME} ({error!r})") from error


def sample(files: Iterable[SourceFile], size: int) -> list[SourceFile]:
    """Files of modest size with no notice of their own, up to ``size`` bytes in all.

    Their order is set by their paths.
    """
    chosen, total = [], 0
    for file in sorted(files, key=lambda f: f.digest):
        length = len(file.text.encode())
        lowered = file.text.lower()
        if length > SAMPLE_FILE_BYTES or any(word in lowered for word in SAMPLE_REFUSED_WORDS):
            continue
        if total + length > size:
            break
        chosen.append(file)
        total += length
    return chosen


def save_samples(corpus: Corpus, folder: Path) -> None:
    """Write ``calibration.jsonl`` (training files) and ``heldout.jsonl`` into ``folder``.

    Raises:
        GispError: a file cannot be written.
    """
    train, heldout = corpus.split()
    for name, files, size in (
        ("calibration.jsonl", train, CALIBRATION_BYTES),
        ("heldout.jsonl", heldout, HELDOUT_BYTES),
    ):
        check_writable(folder / name)
        write_atomic(folder / name, _jsonl(map(asdict, sample(files, size))))


def _jsonl(rows: Iterable[dict[str, str]]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def parser() -> argparse.ArgumentParser:
    options = Parser(prog=NAME, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--out", type=Path, help="write the whole corpus to this .jsonl.gz")
    options.add_argument("--samples", type=Path, help="write calibration.jsonl and heldout.jsonl into this folder")
    add_corpus_option(options)
    return options


def add_corpus_option(options: argparse.ArgumentParser) -> None:
    """Which text a command takes."""
    options.add_argument(
        "--corpus", type=Path, default=standard_library(), help="library folder or .jsonl.gz (this interpreter's own)"
    )


def main(argv: list[str] | None = None) -> int:
    """Run the command.

    Raises:
        GispError: bad options, no corpus, or a file that cannot be written.
    """
    args = parser().parse_args(argv)
    if args.out is None and args.samples is None:
        raise GispError("give --out, --samples or both")
    corpus = load(args.corpus)
    if args.out is not None:
        save(corpus, args.out)
    if args.samples is not None:
        save_samples(corpus, args.samples)
    train, heldout = corpus.split()
    characters = sum(len(file.text) for file in corpus.files)
    print(
        f"{len(train)} training and {len(heldout)} held-out files of Python {corpus.python}, "
        f"{characters:,} characters; sha256 {corpus.sha256()}"
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(exit_code(main))
