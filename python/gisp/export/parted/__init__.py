"""Exports of a model that no process holds whole."""

from gisp.export.parted.export import export_parted

__all__ = ["export_parted"]
