"""Recording importance around an ordinary ``loss.backward()``.

While a recorder is active, the forward of every covered Linear runs an autograd function whose backward returns the
gradient of its input and of its bias as usual and, in place of the gradient of its weight, scores it. Graphs built
before the recorder was entered are scored through hooks on the weights that require a gradient.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, get_args

import torch
from torch import nn

from gisp_kernels import checks
from gisp_kernels.groups import Projection, StructureGroup, iter_groups
from gisp_kernels.record.gates import GateTap, gate_projection
from gisp_kernels.record.scored import ScoredTap
from gisp_kernels.record.signed import SignedTap
from gisp_kernels.record.tap import Tap, current_backward

Mode = Literal["stream", "exact", "signed", "second-order"]
Target = nn.Module | Iterable[StructureGroup] | Iterable[nn.Linear] | Mapping[str, nn.Linear]

_taken: weakref.WeakSet[nn.Linear] = weakref.WeakSet()


class ImportanceRecorder:
    """Scores collected while active as a context manager; made by :func:`record_importance`.

    Attributes:
        backward_calls: backward passes that reached a covered layer since the last reset.
        curvature: mode ``second-order`` alone, to set before each backward pass: for every sequence of the batch the
            factor ``c_b`` of :func:`gisp_kernels.gate_sums`, [B]; ``None`` = the positions of the batch, for a loss
            that is the mean over them, without padding or labels that do not count.
        units: mode ``second-order`` alone, to set with ``curvature``: int64 [B], the same number for sequences whose
            gradients are added before they are squared, ``curvature`` then having a factor for every number; ``None`` =
            every sequence by itself.
    """

    def __init__(
        self,
        groups: tuple[StructureGroup, ...],
        *,
        mode: Mode = "stream",
        backend: str | None = None,
        closed: Mapping[str, torch.Tensor] | None = None,
    ) -> None:
        if mode not in get_args(Mode):
            raise ValueError(f"mode must be one of {', '.join(get_args(Mode))}, got {mode!r}")
        names = [group.name for group in groups]
        if len(set(names)) != len(names):
            raise ValueError(f"group names must be unique, got {names}")
        self.mode = mode
        self.curvature: torch.Tensor | None = None
        self.units: torch.Tensor | None = None
        self._backend = backend
        self._groups = groups
        self._scored = {
            group.name: (gate_projection(group),) if mode == "second-order" else group.projections for group in groups
        }
        self._taps: dict[nn.Linear, Tap[Any]] = {}
        for group in groups:
            for projection in self._scored[group.name]:
                linear = projection.linear
                if linear not in self._taps:
                    _check_linear(group.name, linear)
                    self._taps[linear] = self._tap(group.name, linear)
                self._taps[linear].add(projection)
        self._check_sharing()
        self._close(closed or {})
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        self._active = False
        self._outermost: int | None = None
        self._backwards: set[int] = set()
        self.reset()

    @property
    def backward_calls(self) -> int:
        """Backward passes that reached a covered layer since the last reset."""
        return len(self._backwards)

    def reset(self) -> None:
        """Forget every score, and take over the present widths of the layers."""
        self._backwards.clear()
        for tap in self._taps.values():
            tap.reset()

    def scores(self) -> dict[str, torch.Tensor]:
        """Scores of every group so far, float32 [count]; sums over its projections in their order.

        ``stream``: the sum over backward passes of ``|W * G_pass|``. ``exact``: ``|W * sum of G_pass|`` (paper Eq. 8)
        with the weights as they are now. ``signed``: ``|sum of W * G|`` over all elements and passes.
        ``second-order``: the sum over passes of the predicted change of the loss, of either sign.

        Raises:
            RuntimeError: a covered layer changed its width while being recorded.
        """
        scores = {}
        for group in self._groups:
            parts = [self._taps[p.linear].score(p, self._active) for p in self._scored[group.name]]
            total = parts[0].clone()
            for part in parts[1:]:
                total += part.to(total.device)
            scores[group.name] = total.abs().float() if self.mode == "signed" else total
        return scores

    def gate_sums(self) -> dict[str, torch.Tensor]:
        """What the scores of mode ``second-order`` are made of: group name -> float64 [3, count].

        Sums over sequences as of :func:`gisp_kernels.ops.gate_grads.gate_sums`, over all passes so far.

        Raises:
            RuntimeError: another mode.
        """
        taps = {group.name: self._taps[self._scored[group.name][0].linear] for group in self._groups}
        found = {name: tap.sums.clone() for name, tap in taps.items() if isinstance(tap, GateTap)}
        if len(found) < len(taps):
            raise RuntimeError(f"mode {self.mode!r} records no gates: use mode 'second-order'")
        return found

    def __enter__(self) -> ImportanceRecorder:
        if self._active:
            raise RuntimeError("this recorder is already active")
        for linear, tap in self._taps.items():
            if linear in _taken:
                raise RuntimeError(f"a layer of group {tap.name!r} is already being recorded by another recorder")
            _check_linear(tap.name, linear)
            tap.check_width()
        self._outermost = None
        self._active = True
        for linear, tap in self._taps.items():
            _taken.add(linear)
            tap.called = False
            linear.forward = self._forward_of(tap)  # type: ignore[method-assign, assignment]
            weight = linear.weight
            if weight.requires_grad and weight.is_leaf:
                self._handles.append(weight.register_hook(tap.take_weight_grad))
                self._handles.append(weight.register_post_accumulate_grad_hook(tap.restore_weight_grad))
        return self

    def __exit__(self, *exception: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        for linear, tap in self._taps.items():
            linear.__dict__.pop("forward", None)
            tap.close()
            _taken.discard(linear)
        self._active = False

    def _tap(self, name: str, linear: nn.Linear) -> Tap[Any]:
        shared = name, linear, self._backend, self._saw_backward
        if self.mode == "second-order":
            return GateTap(*shared, factors=lambda: (self.curvature, self.units))
        if self.mode == "signed":
            return SignedTap(*shared)
        return ScoredTap(*shared, exact=self.mode == "exact")

    def _close(self, closed: Mapping[str, torch.Tensor]) -> None:
        for name, gates in closed.items():
            if self.mode != "second-order" or name not in self._scored:
                raise ValueError(f"closed names group {name!r}: give groups that are scored, in mode 'second-order'")
            tap = self._taps[self._scored[name][0].linear]
            assert isinstance(tap, GateTap)
            tap.close_gates(gates)

    def _forward_of(self, tap: Tap[Any]) -> Callable[[torch.Tensor], torch.Tensor]:
        def forward(input: torch.Tensor) -> torch.Tensor:
            backward = current_backward()
            if backward is None:
                self._outermost = None
            elif self._outermost is None:
                # Checkpointing runs the forward again inside a backward pass, and its reentrant form then starts a
                # nested one: all of that is one pass to the caller.
                self._outermost = backward
                torch.autograd.Variable._execution_engine.queue_callback(self._leave_backward)
            return tap.forward(input)

        return forward

    def _leave_backward(self) -> None:
        self._outermost = None

    def _saw_backward(self) -> None:
        current = current_backward()
        outermost = self._outermost if self._outermost is not None else current
        if outermost is not None:
            self._backwards.add(outermost)

    def _check_sharing(self) -> None:
        owners: dict[int, str] = {}
        for linear, tap in self._taps.items():
            if id(linear.weight) in owners:
                raise ValueError(
                    f"two layers (groups {owners[id(linear.weight)]!r} and {tap.name!r}) share one weight: their "
                    "gradients cannot be told apart"
                )
            owners[id(linear.weight)] = tap.name


def record_importance(
    target: Target,
    *,
    mode: Mode = "stream",
    backend: str | None = None,
    closed: Mapping[str, torch.Tensor] | None = None,
) -> ImportanceRecorder:
    """Recorder of structure scores, a context manager to put around any ``loss.backward()``.

    ::

        with record_importance(model) as recorder:
            model(**batch).loss.backward()
        scores = recorder.scores()  # {"model.layers.0.mlp": float32 [channels], ...}

    The forward may run inside the context or, for weights that require a gradient, before it. The ``.grad`` of
    covered weights is left as it was; other parameters get their gradients as always.

    Args:
        target: a module (every attention and gated MLP in it is a group), an iterable of
            :class:`~gisp_kernels.groups.StructureGroup`, or an iterable or mapping of ``nn.Linear``, each then a group
            of its own, scored by output rows and named by its position or key.
        mode: ``"stream"``: every backward pass adds ``|W * G|`` of its own weight gradient ``G``; no gradient is kept
            between passes. ``"exact"``: ``G`` is summed over passes in a float32 buffer of the size of the weight and
            the absolute value is taken once, in :meth:`ImportanceRecorder.scores` (paper Eq. 8). With one pass
            the two agree up to rounding. Uses of one layer in one pass are summed before the absolute value; with
            reentrant checkpointing ``"stream"`` sums only uses within one checkpointed segment. ``"signed"``: the
            absolute value of ``W * G`` summed over a structure, all its projections and all passes, which is the
            gradient of a gate on the structure (LLM-Pruner's "vector" score, arXiv 2305.11627, taken over the whole
            structure). It is linear in ``G``, so it is exact over any number of passes and no weight gradient is
            formed; the outputs of layers scored by rows are kept for the backward pass and must not be changed in
            place. ``"second-order"``: the change of the loss that closing a gate on the structure makes, predicted to
            second order from the gate's gradient for every sequence (:mod:`gisp_kernels.ops.gate_grads`); the lowest
            are
            the least important, as ever. Only output projections are recorded, their inputs must be [B, S, features]
            (2 dimensions are one sequence), the loss a sum over sequences, and the forward must run inside the context.
            Set :attr:`ImportanceRecorder.curvature` where the loss is not the mean over all tokens of the batch.
        backend: implementation of the ops, see :mod:`gisp_kernels.backend`.
        closed: mode ``second-order`` alone: group name -> bool [count], structures whose gate stands at 0 while
            recording: the model computes as if they were gone, and their gate gradients, ``sum g_b`` of
            :meth:`ImportanceRecorder.gate_sums`, say how the loss changes as they come back.

    Raises:
        TypeError: ``target`` is none of these, or a covered layer is no plain floating-point ``nn.Linear``.
        ValueError: no group found, repeated names, a weight shared by two covered layers, an unknown mode, or
            ``closed`` that does not fit.
        RuntimeError: (on entering) a covered layer is already being recorded; (while active) its width changed.
    """
    return ImportanceRecorder(_groups_of(target), mode=mode, backend=backend, closed=closed)


def _groups_of(target: Target) -> tuple[StructureGroup, ...]:
    if isinstance(target, nn.Linear):
        target = [target]
    if isinstance(target, nn.Module):
        return _found_groups(target)
    if isinstance(target, Mapping):
        named = {str(name): linear for name, linear in target.items()}
    elif isinstance(target, Iterable):
        items = list(target)
        if all(isinstance(item, StructureGroup) for item in items):
            return tuple(items)  # type: ignore[arg-type]
        named = {str(i): item for i, item in enumerate(items)}
    else:
        raise TypeError(f"target must be a module, StructureGroups or nn.Linear layers, got {type(target).__name__}")
    for name, linear in named.items():
        if not isinstance(linear, nn.Linear):
            raise TypeError(f"target[{name!r}] must be an nn.Linear, got {type(linear).__name__}")
    return tuple(StructureGroup(name, (Projection(linear, "row"),)) for name, linear in named.items())


def _found_groups(model: nn.Module) -> tuple[StructureGroup, ...]:
    groups = tuple(iter_groups(model))
    if not groups:
        raise ValueError(
            f"no attention (q_proj, k_proj, v_proj, o_proj) or gated MLP (gate_proj, up_proj, down_proj) found in "
            f"{type(model).__name__}: pass StructureGroups or nn.Linear layers"
        )
    return groups


def _check_linear(name: str, linear: nn.Linear) -> None:
    replaced = "forward" in linear.__dict__ and linear not in _taken
    if type(linear).forward is not nn.Linear.forward or replaced:
        raise TypeError(
            f"group {name!r}: a {type(linear).__name__} with its own forward cannot be recorded "
            "(remove adapters and hooks that replace it)"
        )
    checks.check_matrix(f"the weight of a layer of group {name!r}", linear.weight)
