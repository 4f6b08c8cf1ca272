"""Exports: pruned checkpoints that load in other programs, checked against the masked model before they appear."""

from __future__ import annotations

from gisp.export.gguf import export_gguf
from gisp.export.hf import export_hf
from gisp.export.masked import export_masked
from gisp.export.spec import ExportReport, LayerKeep, LayerLayout, PrunedSpec

__all__ = ["ExportReport", "LayerKeep", "LayerLayout", "PrunedSpec", "export_gguf", "export_hf", "export_masked"]
