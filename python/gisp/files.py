"""Files and folders that appear whole or not at all, written by one process at a time."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

from gisp.errors import GispError, quoted

try:
    import fcntl
except ImportError:  # pragma: no cover
    fcntl = None  # type: ignore[assignment]

_TEMPORARY = re.compile(r"\.(.+)\.[0-9]+-[0-9a-f]{8}\.tmp")
# What a file system that has no locks answers.
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)
_LONGEST_NAME = 255
# Lock files this thread holds: what writes a folder calls what writes parts of it.
_HELD: ContextVar[frozenset[Path]] = ContextVar("held", default=frozenset())


def temporary_path(path: Path) -> Path:
    """A new hidden name beside ``path`` that no other process takes; two containers can have equal process numbers."""
    return path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")


def final_name(path: Path) -> str | None:
    """The name that a file or folder of :func:`temporary_path` was to get; ``None`` for any other."""
    found = _TEMPORARY.fullmatch(path.name)
    return found.group(1) if found else None


def remove_stale(path: Path) -> None:
    """Remove what killed processes were writing to become ``path``; the caller is its one writer."""
    with contextlib.suppress(OSError):
        for left in path.parent.iterdir():
            if final_name(left) != path.name:
                continue
            if left.is_dir() and not left.is_symlink():
                shutil.rmtree(left, ignore_errors=True)
            else:
                left.unlink(missing_ok=True)


def lock_beside(path: Path) -> Path:
    """The lock file of what is written to ``path`` and is not there before it is whole."""
    return path.with_name(f".{path.name}.lock")


@contextmanager
def one_writer(path: Path, lock: Path, *, looking: bool = False) -> Iterator[bool]:
    """Be the only writer of ``path``, in this and all other processes, until the block ends.

    The lock is the system's, on the file ``lock``: it ends with the process that holds it, however that ends, and a
    lock file a killed process left locks nothing. It goes when a block ends well; one that fails leaves what was there.
    Folders made for it go again if they are empty in the end. Within the block the same lock can be taken again.

    Args:
        looking: nothing is written in the block: what a killed process left stays in any case.

    Yields:
        Whether there is a lock; a file system that has none is written to all the same.

    Raises:
        GispError: another writer is at work, or the lock file cannot be written.
    """
    lock = Path(os.path.realpath(lock.parent)) / lock.name
    if lock in _HELD.get():
        yield True
        return
    left = lock.exists()
    missing = [folder for folder in lock.parents if not folder.exists()]
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        held = _lock(path, lock)
    except OSError as error:
        _remove_empty(missing)
        raise GispError(disk_message(path, error)) from None
    token = _HELD.set(_HELD.get() | {lock})
    try:
        yield held is not None
        left = left and looking
    finally:
        _HELD.reset(token)
        # Removed before it is released: who opened the old file sees that it is gone and takes a new one.
        with contextlib.suppress(OSError):
            if not left:
                lock.unlink()
        if held is not None:
            os.close(held)
        _remove_empty(missing)


def _lock(path: Path, lock: Path) -> int | None:
    """Descriptor of the locked file, ``None`` where the file system has no locks."""
    while True:
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            if fcntl is not None:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            raise GispError(
                f"{path} is being written by another process: wait for its end or give another place"
            ) from None
        except OSError as error:
            os.close(descriptor)
            if error.errno in _NO_LOCKS:
                return None
            raise
        if fcntl is None:
            os.close(descriptor)
            return None
        if _is_file(descriptor, lock):
            return descriptor
        os.close(descriptor)


def _is_file(descriptor: int, path: Path) -> bool:
    """Whether an open file is still the one of that name."""
    with contextlib.suppress(OSError):
        return os.path.samestat(os.fstat(descriptor), path.stat())
    return False


def _remove_empty(folders: list[Path]) -> None:
    """Remove folders, inner ones first, as far as they are empty."""
    with contextlib.suppress(OSError):
        for folder in folders:
            folder.rmdir()


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
        raise GispError(disk_message(path, error)) from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def as_path(value: object, what: str) -> Path:
    """A path as callers give it; an empty text, which is the working folder to ``Path``, is none.

    Raises:
        GispError: names the argument and its value.
    """
    if not isinstance(value, (str, os.PathLike)) or not isinstance(os.fspath(value), str) or not os.fspath(value):
        raise GispError(f"{what} is {quoted(value)}: give a path")
    return Path(value)


def as_text(value: object, what: str) -> str:
    """A path or name as callers give it, as a text that is otherwise the same.

    Raises:
        GispError: as :func:`as_path`.
    """
    as_path(value, what)
    return os.fspath(value)  # type: ignore[call-overload]


def check_names(path: str | Path, what: str) -> None:
    """Refuse a path with a name longer than file systems take, which they answer with errors of their own.

    Raises:
        GispError: names it.
    """
    if any(len(part.encode(errors="replace")) > _LONGEST_NAME for part in Path(path).parts):
        raise GispError(f"{what} {quoted(str(path))} is no path: it holds a name of more than {_LONGEST_NAME} bytes")


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
