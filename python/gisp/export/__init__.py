"""Exports: pruned checkpoints that load in other programs, checked against the masked model before they appear."""

from __future__ import annotations

from gisp.export.gguf import export_gguf
from gisp.export.hf import export_hf
from gisp.export.masked import export_masked
from gisp.export.rounding import SizeOptions, round_mlp
from gisp.export.spec import ExportReport, LayerKeep, LayerLayout, LayerRanking, PrunedSpec
from gisp.export.uniform import export_uniform, uniform_spec

__all__ = [
    "ExportReport",
    "LayerKeep",
    "LayerLayout",
    "LayerRanking",
    "PrunedSpec",
    "SizeOptions",
    "export_gguf",
    "export_hf",
    "export_masked",
    "export_uniform",
    "round_mlp",
    "uniform_spec",
]
