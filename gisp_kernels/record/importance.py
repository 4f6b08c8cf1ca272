"""Recording importance around an ordinary ``loss.backward()``: the two ways in."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from gisp_kernels.groups import Axis, StructureGroup
from gisp_kernels.record.coverage import coverage_of, coverage_of_groups, refuse_partial
from gisp_kernels.record.recorder import ImportanceRecorder
from gisp_kernels.record.targets import (
    Mode,
    Target,
    groups_of,
    is_layer,
    line_groups,
    refuse_split,
    refuse_tied,
    refuse_wrapped,
)


def record_importance(
    target: Target,
    *,
    mode: Mode = "stream",
    power: int = 1,
    keep_grad: bool = False,
    strict: bool = True,
    ignore: Iterable[str] = (),
    loss_scale: Any = None,
    reduce_group: Any = None,
    backend: str | None = None,
    closed: Mapping[str, torch.Tensor] | None = None,
) -> ImportanceRecorder:
    """Recorder of structure scores, a context manager to put around any ``loss.backward()``.

    ::

        with record_importance(model) as recorder:
            model(**batch).loss.backward()
        scores = recorder.scores()  # {"model.layers.0.mlp": float32 [channels], ...}

    The forward may run inside the context or, for weights that require a gradient, before it. The ``.grad`` of
    covered weights is left as it was, unless ``keep_grad``; other parameters get their gradients as always.

    Args:
        target: a module (what :func:`~gisp_kernels.iter_groups` finds in it), an iterable of
            :class:`~gisp_kernels.groups.StructureGroup`, or an iterable or mapping of ``nn.Linear``, each then a group
            of its own, scored by output rows and named by its position or key.
        mode: what is summed, see :class:`ImportanceRecorder`.
        power: modes ``stream`` and ``exact``: 2 sums ``(W * G)^2`` in place of ``|W * G|`` (LLM-Pruner's
            ``param_second``).
        keep_grad: weight gradients are formed once, accumulate into ``.grad`` as always and are scored, so that
            training goes on as without a recorder. Frozen weights are scored as without ``keep_grad``.
        strict: refuse a module that holds weights which would not be scored; :class:`Coverage` has the rules of what
            counts. Otherwise :meth:`ImportanceRecorder.coverage` tells.
        ignore: names of parameters of the module that need no scores, as patterns of ``fnmatch``.
        loss_scale: what the loss is multiplied with before its backward pass, a number or a ``GradScaler``: scores are
            those of the loss itself. float16 autocast asks for it, 1.0 where the loss is not scaled.
        reduce_group: a ``torch.distributed`` process group: scores are sums over the losses of its processes, all of
            which must read them together.
        backend: implementation of the ops, see :mod:`gisp_kernels.backend`.
        closed: mode ``second-order`` alone: group name -> bool [count], structures whose gate stands at 0 while
            recording: the model computes as if they were gone, and their gate gradients, ``sum g_b`` of
            :meth:`ImportanceRecorder.gate_sums`, say how the loss changes as they come back.

    Raises:
        TypeError: ``target`` is none of these, or a covered layer is neither a plain floating-point ``nn.Linear`` nor
            has a weight that requires a gradient.
        ValueError: no group found, weights left out (``strict``), repeated names, a weight with two uses that are
            scored apart, an unknown mode or power, or ``closed`` that does not fit.
        RuntimeError: ``DistributedDataParallel`` or ``DataParallel`` that recording would break, or weights flattened
            in parts; (on entering) a covered layer is already being recorded; (while active) its width changed, or it
            computes with another weight than its own.
    """
    options = {"mode": mode, "power": power, "keep_grad": keep_grad, "loss_scale": loss_scale}
    options |= {"reduce_group": reduce_group, "backend": backend, "closed": closed}
    refuse_split(target)
    return _recorder(target, groups_of(target), strict, ignore, options)


def record_lines(
    linears: nn.Module | Iterable[nn.Module] | Mapping[str, nn.Module],
    axes: Iterable[Axis] = ("row", "column"),
    *,
    mode: Mode = "stream",
    power: int = 1,
    keep_grad: bool = False,
    strict: bool = True,
    ignore: Iterable[str] = (),
    loss_scale: Any = None,
    reduce_group: Any = None,
    backend: str | None = None,
) -> ImportanceRecorder:
    """Recorder of the scores of every row and every column of Linear layers, from one weight gradient each.

    ::

        with record_lines(model) as recorder:
            model(**batch).loss.backward()
        recorder.scores_of(model.layers[0].mlp.down_proj, "column")  # float32 [in_features]

    For code that has its own idea of what a structure is, as dependency graphs do, and adds lines up itself.

    Args:
        linears: layers, by name or position, or a module: all its ``nn.Linear`` and ``Conv1D``, without adapters and
            without layers whose weight is an embedding too.
        axes: ``"row"``, ``"column"`` and ``"element"``; the last are scores of every element, a float32 matrix of the
            size of the weight.
        mode, power, keep_grad, strict, ignore, loss_scale, reduce_group, backend: as of :func:`record_importance`,
            without mode ``second-order``.

    Returns:
        A recorder with groups named ``"NAME.AXIS"``; :meth:`ImportanceRecorder.scores_of` finds scores by layer.

    Raises:
        TypeError, ValueError, RuntimeError: as :func:`record_importance`.
    """
    if mode == "second-order":
        raise ValueError("mode 'second-order' is for groups with an output projection, not for lines")
    refuse_split(linears)
    embeddings: set[int] = set()
    if isinstance(linears, nn.Module):
        embeddings = {id(m.weight) for m in linears.modules() if isinstance(m, nn.Embedding)}
    options = {"mode": mode, "power": power, "keep_grad": keep_grad, "loss_scale": loss_scale}
    options |= {"reduce_group": reduce_group, "backend": backend}
    return _recorder(linears, line_groups(linears, tuple(axes), embeddings), strict, ignore, options)


def _recorder(
    target: Any, groups: tuple[StructureGroup, ...], strict: bool, ignore: Iterable[str], options: dict[str, Any]
) -> ImportanceRecorder:
    refuse_wrapped(target, keep_grad=options["keep_grad"])
    refuse_tied(target, groups, mode=options["mode"], keep_grad=options["keep_grad"])
    if isinstance(target, nn.Module) and not is_layer(target):
        coverage = coverage_of(target, groups, ignore)
        if strict:
            refuse_partial(coverage, target)
    else:
        coverage = coverage_of_groups(groups)
    return ImportanceRecorder(groups, coverage, **options)
