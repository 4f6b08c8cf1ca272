"""Recording importance around an ordinary ``loss.backward()``: the two ways in."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from gisp_kernels.checks import as_texts
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
    ignore: str | Iterable[str] = (),
    loss_scale: Any = None,
    reduce_group: Any = None,
    backend: str | None = None,
    closed: Mapping[str, torch.Tensor] | None = None,
) -> ImportanceRecorder:
    """Score structures during any ``loss.backward()``; the recorder is a context manager.

    ::

        with record_importance(model) as recorder:
            model(**batch).loss.backward()
        scores = recorder.scores()  # {"model.layers.0.mlp": float32 [channels], ...}

    The forward pass may run inside the context or, for weights that require a gradient, before it. Without
    ``keep_grad``, the ``.grad`` of scored weights stays as it was. Other parameters get their gradients as always.

    Args:
        target: a module, whose groups :func:`~gisp_kernels.iter_groups` finds; an iterable of
            :class:`~gisp_kernels.groups.StructureGroup`; or an iterable or mapping of ``nn.Linear``. Each layer is then
            a group, named by its position or key, whose structures are its output rows.
        mode: how scores are computed, see :class:`ImportanceRecorder`.
        power: only in modes ``stream`` and ``exact``: 2 sums ``(W * G)^2`` instead of ``|W * G|`` (``param_second`` of
            LLM-Pruner).
        keep_grad: also let weight gradients accumulate into ``.grad``, so that training goes on as without a recorder.
            Frozen weights stay frozen.
        strict: refuse a module with weights that would not be scored; :class:`Coverage` says which weights need no
            score. If ``False``, :meth:`ImportanceRecorder.coverage` lists them.
        ignore: names of parameters that need no score: one or several patterns of ``fnmatch``.
        loss_scale: factor of the loss before its backward pass, a number or a ``GradScaler``. Scores are divided by it.
            Under float16 autocast it is required; give 1.0 if the loss is not scaled.
        reduce_group: a ``torch.distributed`` process group. Scores are then sums over the losses of its processes, and
            all of them must read the scores together.
        backend: implementation of the ops, see :mod:`gisp_kernels.backend`.
        closed: only in mode ``second-order``: group name -> bool [count], structures whose gate is 0 while recording.
            The model computes as if they were removed. Their gate gradients, ``sum g_b`` of
            :meth:`ImportanceRecorder.gate_sums`, say how the loss changes when they come back.

    Raises:
        TypeError: ``target`` is none of these, or a layer is neither a plain floating-point ``nn.Linear`` nor has a
            weight that requires a gradient.
        ValueError: no group is found, weights would not be scored (``strict``), names repeat, a weight has two uses
            that are scored separately, mode or power are unknown, or ``closed`` does not fit.
        RuntimeError: recording would break ``DistributedDataParallel`` or ``DataParallel``, or weights are flattened in
            parts. On entering: a layer is already being recorded. While active: a layer changed its width, or computes
            with another weight than its own.
    """
    options = {"mode": mode, "power": power, "keep_grad": keep_grad, "loss_scale": loss_scale}
    options |= {"reduce_group": reduce_group, "backend": backend, "closed": closed}
    refuse_split(target)
    return _recorder(target, groups_of(target), strict, ignore, options)


def record_lines(
    linears: nn.Module | Iterable[nn.Module] | Mapping[str, nn.Module],
    axes: Axis | Iterable[Axis] = ("row", "column"),
    *,
    mode: Mode = "stream",
    power: int = 1,
    keep_grad: bool = False,
    strict: bool = True,
    ignore: str | Iterable[str] = (),
    loss_scale: Any = None,
    reduce_group: Any = None,
    backend: str | None = None,
) -> ImportanceRecorder:
    """Score every row and every column of Linear layers during a backward pass, from one weight gradient per layer.

    ::

        with record_lines(model) as recorder:
            model(**batch).loss.backward()
        recorder.scores_of(model.layers[0].mlp.down_proj, "column")  # float32 [in_features]

    Use it if your code has its own structures, such as those of a dependency graph, and adds up rows and columns
    itself.

    Args:
        linears: layers by name or position, or a module. Of a module all ``nn.Linear`` and ``Conv1D`` are recorded,
            except adapters and layers whose weight is also an embedding.
        axes: one or several of ``"row"``, ``"column"`` and ``"element"``. The last gives a score for every element, a
            float32 matrix of the size of the weight.

    All other arguments are those of :func:`record_importance`, without mode ``second-order``.

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
    return _recorder(linears, line_groups(linears, as_texts(axes), embeddings), strict, ignore, options)


def _recorder(
    target: Any, groups: tuple[StructureGroup, ...], strict: bool, ignore: str | Iterable[str], options: dict[str, Any]
) -> ImportanceRecorder:
    refuse_wrapped(target, keep_grad=options["keep_grad"])
    refuse_tied(target, groups, mode=options["mode"], keep_grad=options["keep_grad"])
    if isinstance(target, nn.Module) and not is_layer(target):
        coverage = coverage_of(target, groups, as_texts(ignore))
        if strict:
            refuse_partial(coverage, target)
    else:
        coverage = coverage_of_groups(groups)
    return ImportanceRecorder(groups, coverage, **options)
