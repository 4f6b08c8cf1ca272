"""Files that appear whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
from pathlib import Path

from gisp.errors import GispError

_UNFINISHED = ".tmp"


def is_unfinished(path: Path) -> bool:
    """Whether a file is one that :func:`write_atomic` was killed over."""
    return path.name.startswith(".") and path.suffix == _UNFINISHED


def temporary_path(path: Path) -> Path:
    """A new hidden name beside ``path`` that no other process takes; two containers can have equal process numbers."""
    return path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}{_UNFINISHED}")


def write_atomic(path: Path, data: bytes) -> None:
    """Write ``data`` beside ``path``, flush it to disk and rename it into place.

    Raises:
        GispError: the disk is full or the folder cannot be written; an existing file stays as it was.
    """
    temporary = temporary_path(path)
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise GispError(disk_message(path, error)) from None


def check_writable(path: Path) -> None:
    """Refuse a file that could not be written, before the work it is to hold.

    Raises:
        GispError: the folder is missing or not writable, or a folder stands where the file is to be.
    """
    folder = path.absolute().parent
    if path.is_dir():
        raise GispError(f"cannot write {path}: it is a folder, give a file")
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        raise GispError(f"cannot write {path}: {folder} is not a folder this user may write to")


def disk_message(path: Path, error: OSError) -> str:
    """One line for a failed write."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"cannot write {path}: the disk is full, free some space (a run continues with --resume)"
    return f"cannot write {path}: {error.strerror or error}"
