"""Memory of tensors that files back, given back once it was read: the system reads it again when it is needed.

What was read of a mapped file counts as resident memory of a process until something else wants the room. A limit on
that memory would be set by the size of a model, though nothing holds it.
"""

from __future__ import annotations

import ctypes
import mmap
from contextlib import suppress
from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

_PAGE = mmap.PAGESIZE
# Of an entry of /proc/self/pagemap, which has 64 bits a page: it is in memory, it was swapped out, a file backs it.
_PRESENT, _SWAPPED, _BACKED = (1 << bit for bit in (63, 62, 61))
_DONT_NEED = 4


def give_back(tensor: torch.Tensor) -> None:
    """Let the system have the pages that lie wholly in a tensor of a mapped file; its values stay as they are.

    Nothing happens to a tensor that no file backs, to one that was written to, and where the system does not tell.
    """
    if tensor.device.type != "cpu" or not tensor.is_contiguous():
        return
    begin = -(-tensor.data_ptr() // _PAGE)
    end = (tensor.data_ptr() + tensor.numel() * tensor.element_size()) // _PAGE
    if begin >= end:
        return
    with suppress(OSError, ValueError, AttributeError):
        if _of_file(begin * _PAGE, end * _PAGE) and _as_in_file(begin, end):
            _library().madvise(ctypes.c_void_p(begin * _PAGE), ctypes.c_size_t((end - begin) * _PAGE), _DONT_NEED)


def _of_file(begin: int, end: int) -> bool:
    """Whether addresses lie in one mapping of a file."""
    with open("/proc/self/maps", encoding="utf-8", errors="replace") as lines:  # noqa: PTH123 - half the time of Path
        for line in lines:
            first, _, rest = line.partition("-")
            last = rest.partition(" ")[0]
            if int(first, 16) <= begin and end <= int(last, 16):
                path = line.split(maxsplit=5)[5:]
                # Devices have mappings too, and shared memory has no other place to be read from.
                return bool(path) and path[0].startswith("/") and not path[0].startswith(("/dev/", "/memfd:", "/SYSV"))
    return False


def _as_in_file(begin: int, end: int) -> bool:
    """Whether no page of these numbers is a copy of this process, which holds what was written."""
    # Commands import this module before they look at their options.
    import numpy as np

    with open("/proc/self/pagemap", "rb", buffering=0) as table:  # noqa: PTH123
        table.seek(begin * 8)
        entries = np.frombuffer(table.read((end - begin) * 8), dtype=np.uint64)
    if len(entries) != end - begin:
        return False
    present, swapped, backed = ((entries & np.uint64(bit)).astype(bool) for bit in (_PRESENT, _SWAPPED, _BACKED))
    return not bool(((present & ~backed) | swapped).any())


@cache
def _library() -> Any:
    return ctypes.CDLL(None, use_errno=True)
