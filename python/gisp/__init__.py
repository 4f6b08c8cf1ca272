"""GISP: global iterative structured pruning of decoder LLMs.

``prune`` removes attention heads and MLP channels of a loaded model in place and returns a :class:`Trajectory` holding
every sparsity passed on the way; ``load`` opens an exported model and ``fuse`` lets it run fused kernels;
``export_run`` writes one from a run folder, ``export_model`` from a model pruned in memory.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from gisp.errors import GispError
from gisp.lazy import lazy

if TYPE_CHECKING:
    from gisp.compensation import compensate
    from gisp.export.in_memory import export_model
    from gisp.export.load import load
    from gisp.export.run import export_run
    from gisp.model.fuse import fuse
    from gisp.run.prune import prune
    from gisp.run.trajectory import Trajectory
    from gisp.score.base import register_criterion

__all__ = [
    "GispError",
    "Trajectory",
    "compensate",
    "export_model",
    "export_run",
    "fuse",
    "load",
    "prune",
    "register_criterion",
]

__getattr__ = lazy(
    __name__,
    {
        "Trajectory": "gisp.run.trajectory",
        "compensate": "gisp.compensation",
        "export_model": "gisp.export.in_memory",
        "export_run": "gisp.export.run",
        "fuse": "gisp.model.fuse",
        "load": "gisp.export.load",
        "prune": "gisp.run.prune",
        "register_criterion": "gisp.score.base",
    },
)
