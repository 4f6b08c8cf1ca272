"""Nested checkpoints: one set of weights in which every sparsity of a run is a prefix of each matrix."""

from gisp.export.nested.export import NestedReport, export_nested
from gisp.export.nested.files import is_nested
from gisp.export.nested.model import load_nested

__all__ = ["NestedReport", "export_nested", "is_nested", "load_nested"]
