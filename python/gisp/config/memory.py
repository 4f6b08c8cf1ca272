"""Amounts of memory as users write them."""

from __future__ import annotations

import re

_UNITS = {"": 10**9, "m": 10**6, "mb": 10**6, "mib": 2**20, "g": 10**9, "gb": 10**9, "gib": 2**30}


def bytes_of(text: str) -> int | None:
    """Bytes of ``24GB``, ``24GiB``, ``500MB`` or ``24``, which is in GB; ``None`` for anything else and for nothing."""
    found = re.fullmatch(r"([0-9]{1,9}(?:\.[0-9]{1,9})?)\s*([a-z]*)", text.strip().lower())
    if found is None or found[2] not in _UNITS:
        return None
    return int(float(found[1]) * _UNITS[found[2]]) or None


def gigabytes(size: float) -> str:
    """Bytes in words."""
    return f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"
