"""Kernels for structured pruning of decoder LLMs: fused importance scores and in-place compaction.

Importing this package compiles nothing, imports no triton and touches no CUDA device.
"""

from __future__ import annotations

from gisp_kernels._ext import build_info
from gisp_kernels._version import __version__
from gisp_kernels.compaction.compactor import Compactor
from gisp_kernels.families import experts_group, iter_groups, latent_attention_group
from gisp_kernels.groups import Projection, StructureGroup, attention_group, mlp_group
from gisp_kernels.ops.gate_grads import gate_grads, gate_sums, loss_change, predicted_loss_change
from gisp_kernels.ops.importance import abs_weighted_reduce, wgrad_importance
from gisp_kernels.record.activations import ActivationRecorder, ActivationStatistics, record_activations
from gisp_kernels.record.coverage import Coverage
from gisp_kernels.record.importance import record_importance, record_lines
from gisp_kernels.record.recorder import ImportanceRecorder

__all__ = [
    "ActivationRecorder",
    "ActivationStatistics",
    "Compactor",
    "Coverage",
    "ImportanceRecorder",
    "Projection",
    "StructureGroup",
    "__version__",
    "abs_weighted_reduce",
    "attention_group",
    "build_info",
    "experts_group",
    "gate_grads",
    "gate_sums",
    "iter_groups",
    "latent_attention_group",
    "loss_change",
    "mlp_group",
    "predicted_loss_change",
    "record_activations",
    "record_importance",
    "record_lines",
    "wgrad_importance",
]
