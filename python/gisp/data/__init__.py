"""Calibration and evaluation data: what a SPEC names, as token sequences or as the rows they come from."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gisp.lazy import lazy

if TYPE_CHECKING:
    from gisp.data.load import DEFAULT_SEQ_LEN, load_sequences
    from gisp.data.sequences import Row, Sequences, Task
    from gisp.data.sources import read_rows

__all__ = ["DEFAULT_SEQ_LEN", "Row", "Sequences", "Task", "load_sequences", "read_rows"]

__getattr__ = lazy(
    __name__,
    {
        **dict.fromkeys(("DEFAULT_SEQ_LEN", "load_sequences"), "gisp.data.load"),
        **dict.fromkeys(("Row", "Sequences", "Task"), "gisp.data.sequences"),
        "read_rows": "gisp.data.sources",
    },
)
