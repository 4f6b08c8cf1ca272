"""Exports of a model that no process holds whole."""

from gisp.export.staged.export import export_staged

__all__ = ["export_staged"]
