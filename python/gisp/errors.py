"""The one exception users see, and the words of its line."""

from __future__ import annotations

import errno
import reprlib
from typing import Any

_LONGEST_LINE = 1000
_LONGEST_VALUE = 80
# Without limits the text of a YAML file's nested aliases would fill memory.
_VALUES = reprlib.Repr()
_VALUES.maxstring = _VALUES.maxother = _VALUES.maxlong = _LONGEST_VALUE
_VALUES.maxlevel = 2
# How allocators of torch, CUDA, its libraries and safetensors say it.
_NO_MEMORY = (
    "out of memory",
    "can't allocate memory",
    "cannot allocate memory",
    "not enough memory",
    "alloc_failed",
    "bad_alloc",
)


class GispError(ValueError):
    """Bad input or an impossible request; the message is one line: what, which value, what to do."""

    def __init__(self, message: str) -> None:
        super().__init__(shortened(message, _LONGEST_LINE))


def shortened(text: str, longest: int) -> str:
    """A text, less its middle where it is longer than ``longest``: the remedy stands at the end of a message."""
    if len(text) <= longest:
        return text
    return f"{text[: longest * 2 // 3]} [...] {text[-(longest // 3) :]}"


def quoted(value: Any) -> str:
    """A value as a message quotes it: its ``repr``, cut where it is long."""
    try:
        return shortened(_VALUES.repr(value), _LONGEST_VALUE)
    except ValueError:  # Python writes out no integer of more than some thousand digits
        return "a number of thousands of digits"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory, of the machine or of a GPU, did not suffice."""
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
        return True
    text = str(error).lower()
    return isinstance(error, Exception) and any(words in text for words in _NO_MEMORY)
