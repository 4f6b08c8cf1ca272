"""Which folder is a nested checkpoint."""

from __future__ import annotations

from pathlib import Path

RECORD = "nested.json"


def is_nested(path: str | Path) -> bool:
    """Whether a folder is a nested checkpoint."""
    return (Path(path) / RECORD).is_file()
