"""Amounts of memory as users write them."""

from __future__ import annotations

import re

from gisp.errors import GispError, quoted

_UNITS = {"": 10**9, "m": 10**6, "mb": 10**6, "mib": 2**20, "g": 10**9, "gb": 10**9, "gib": 2**30}


def bytes_of(text: str) -> int | None:
    """Bytes of ``24GB``, ``24GiB``, ``500MB`` or ``24``, which is in GB; ``None`` for anything else and for nothing."""
    found = re.fullmatch(r"([0-9]{1,9}(?:\.[0-9]{1,9})?)\s*([a-z]*)", text.strip().lower())
    if found is None or found[2] not in _UNITS:
        return None
    return int(float(found[1]) * _UNITS[found[2]]) or None


def amount_problem(text: str) -> str | None:
    """What is wrong with an amount of a GPU's memory, ``None`` for nothing."""
    return None if bytes_of(text) else f"--gpu-memory is {quoted(text)}: give an amount as 24GB or 24GiB"


def check_gpu_memory(text: str | None, offload: bool) -> None:
    """Refuse what is no amount of a GPU's memory, and one without layers in host memory.

    Raises:
        GispError: names it.
    """
    if text is None:
        return
    problem = amount_problem(text)
    if problem is None and not offload:
        problem = f"--gpu-memory {text} belongs to --offload: give both, or leave it out"
    if problem is not None:
        raise GispError(problem)


def gigabytes(size: float) -> str:
    """Bytes in words."""
    return f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"
