"""Calibration and evaluation data: what a SPEC names, as token sequences or as the rows they come from."""

from gisp.data.load import DEFAULT_SEQ_LEN, load_sequences
from gisp.data.sequences import Row, Sequences, Task
from gisp.data.sources import read_rows

__all__ = ["DEFAULT_SEQ_LEN", "Row", "Sequences", "Task", "load_sequences", "read_rows"]
