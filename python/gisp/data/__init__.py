"""Calibration and evaluation data: what a SPEC names, as token sequences or as the rows they come from."""

from gisp.data.load import DEFAULT_SEQ_LEN, load_sequences
from gisp.data.sequences import Part, Row, Sequences
from gisp.data.sources import read_rows

__all__ = ["DEFAULT_SEQ_LEN", "Part", "Row", "Sequences", "load_sequences", "read_rows"]
