"""Tokenised rows kept between runs, under ``$GISP_CACHE`` or ``~/.cache/gisp``.

A cache only saves time: an entry that cannot be read or is not what its checksum says is made anew, and one that
cannot be written is not.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from gisp.data.rows import FIELDS, Kind
from gisp.data.sequences import Sequences
from gisp.data.token_files import read_sequences, stored_sequences
from gisp.data.tokenise import FORMAT_VERSION
from gisp.errors import GispError
from gisp.files import lock_beside, one_writer, remove_stale, write_atomic


def cache_folder() -> Path | None:
    """Where entries lie, ``None`` where ``GISP_CACHE`` is ``off`` or there is no home."""
    chosen = os.environ.get("GISP_CACHE", "").strip()
    if chosen.lower() == "off":
        return None
    try:
        return (Path(chosen).expanduser() if chosen else Path.home() / ".cache" / "gisp") / "tokens"
    except RuntimeError:
        return None


def cache_entry(
    rows: Iterable[dict[str, Any]], kind: Kind, tokenizer: Any, seq_len: int, objective: str
) -> Path | None:
    """File of what these rows become; ``None`` = no cache.

    The name is a SHA-256 over the rows' contents and kind, the tokenizer's files, the versions of the libraries that
    read them, the length, the objective and the version of this format.
    """
    folder = cache_folder()
    if folder is None:
        return None
    digest = hashlib.sha256(f"{FORMAT_VERSION},{kind},{seq_len},{objective};".encode())
    digest.update(_tokenizer_digest(tokenizer))
    for row in rows:
        used = {name: row[name] for name in FIELDS if name in row}
        digest.update(json.dumps(used, sort_keys=True, default=str).encode())
        digest.update(b"\n")
    return folder / f"{digest.hexdigest()}.safetensors"


def read_entry(path: Path | None) -> Sequences | None:
    """The sequences of an entry, ``None`` if it is not there or not sound."""
    return None if path is None else read_sequences(path)


def write_entry(path: Path | None, sequences: Sequences) -> None:
    """Keep sequences whose examples are consecutive; without effect where that is not possible."""
    if path is None:
        return
    with contextlib.suppress(OSError, GispError):
        path.parent.mkdir(parents=True, exist_ok=True)
        # Another process that writes the entry writes the same.
        with one_writer(path, lock_beside(path)) as alone:
            if alone:
                remove_stale(path)
            write_atomic(path, stored_sequences(sequences))


def _tokenizer_digest(tokenizer: Any) -> bytes:
    """SHA-256 over the files a tokenizer is saved as: the same for a folder and for a hub name."""
    import tokenizers
    import transformers

    digest = hashlib.sha256(f"{transformers.__version__},{tokenizers.__version__},{type(tokenizer)};".encode())
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        for file in sorted(Path(folder).rglob("*")):
            if file.is_file():
                digest.update(f"{file.name};".encode())
                digest.update(file.read_bytes())
    return digest.digest()
