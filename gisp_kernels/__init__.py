"""Kernels for structured pruning of decoder LLMs: fused importance scores and in-place compaction.

Importing this package compiles nothing, imports no triton and touches no CUDA device.
"""

from __future__ import annotations

from gisp_kernels._ext import build_info
from gisp_kernels._version import __version__
from gisp_kernels.compaction import Compactor
from gisp_kernels.groups import Projection, StructureGroup, attention_group, iter_groups, mlp_group
from gisp_kernels.ops.gate_grads import gate_grads, gate_sums, loss_change, predicted_loss_change
from gisp_kernels.ops.importance import abs_weighted_reduce, wgrad_importance
from gisp_kernels.record.activations import ActivationRecorder, ActivationStatistics, record_activations
from gisp_kernels.record.recorder import ImportanceRecorder, record_importance

__all__ = [
    "ActivationRecorder",
    "ActivationStatistics",
    "Compactor",
    "ImportanceRecorder",
    "Projection",
    "StructureGroup",
    "__version__",
    "abs_weighted_reduce",
    "attention_group",
    "build_info",
    "gate_grads",
    "gate_sums",
    "iter_groups",
    "loss_change",
    "mlp_group",
    "predicted_loss_change",
    "record_activations",
    "record_importance",
    "wgrad_importance",
]
