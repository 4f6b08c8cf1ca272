"""GISP: global iterative structured pruning of decoder LLMs.

``prune`` removes attention heads and MLP channels of a loaded model in place and returns a :class:`Trajectory` holding
every sparsity passed on the way; ``load`` opens an exported model and ``fuse`` lets it run fused kernels;
``export_run`` writes one from a run folder. ``register_criterion`` adds a criterion of your own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from gisp.errors import GispError

if TYPE_CHECKING:
    from gisp.compensation import compensate
    from gisp.export.load import load
    from gisp.export.run import export_run
    from gisp.model.fuse import fuse
    from gisp.run.loop import prune
    from gisp.run.trajectory import Trajectory
    from gisp.score.base import register_criterion

__all__ = ["GispError", "Trajectory", "compensate", "export_run", "fuse", "load", "prune", "register_criterion"]

_HOME = {
    "Trajectory": ("gisp.run.trajectory", "Trajectory"),
    "compensate": ("gisp.compensation", "compensate"),
    "export_run": ("gisp.export.run", "export_run"),
    "fuse": ("gisp.model.fuse", "fuse"),
    "load": ("gisp.export.load", "load"),
    "prune": ("gisp.run.loop", "prune"),
    "register_criterion": ("gisp.score.base", "register_criterion"),
}


def __getattr__(name: str) -> Any:
    """Public names, imported on first use: torch and transformers take seconds."""
    if name not in _HOME:
        raise AttributeError(f"module 'gisp' has no attribute {name!r}")
    import importlib

    module, attribute = _HOME[name]
    return getattr(importlib.import_module(module), attribute)
