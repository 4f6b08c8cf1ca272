"""Compensation: new output projections for what pruning left, fitted to calibration data.

It composes with any way of choosing structures and ends in plain weights (and biases) of o_proj and down_proj.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from gisp.compensation.options import METHODS, TARGETS, CompensationOptions
from gisp.compensation.request import CompensationRequest, make_request
from gisp.lazy import lazy

if TYPE_CHECKING:
    from gisp.compensation.acceptance import BlockFit, MethodResult, Step
    from gisp.compensation.apply import compensate, fit_compensation
    from gisp.compensation.fold import fold_into_dense, fold_into_pruned
    from gisp.compensation.methods.run import BlockUpdate
    from gisp.compensation.result import Compensation

__all__ = [
    "METHODS",
    "TARGETS",
    "BlockFit",
    "BlockUpdate",
    "Compensation",
    "CompensationOptions",
    "CompensationRequest",
    "MethodResult",
    "Step",
    "compensate",
    "fit_compensation",
    "fold_into_dense",
    "fold_into_pruned",
    "make_request",
]

__getattr__ = lazy(
    __name__,
    {
        **dict.fromkeys(("compensate", "fit_compensation"), "gisp.compensation.apply"),
        **dict.fromkeys(("fold_into_dense", "fold_into_pruned"), "gisp.compensation.fold"),
        "Compensation": "gisp.compensation.result",
        "BlockUpdate": "gisp.compensation.methods.run",
        **dict.fromkeys(("BlockFit", "MethodResult", "Step"), "gisp.compensation.acceptance"),
    },
)
