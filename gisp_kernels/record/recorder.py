"""Scores of every group while a recorder is active.

Covered Linear layers run an autograd function whose backward returns the gradient of their input and of their bias as
usual and, in place of the gradient of their weight, scores it. Weights that are used in another way, or whose gradients
are to stay, are scored at their gradient, by hooks. So are graphs built before the recorder was entered.
"""

from __future__ import annotations

import math
import warnings
import weakref
from collections.abc import Callable, Mapping
from typing import Any, get_args

import torch
from torch import nn

from gisp_kernels import checks
from gisp_kernels.groups import Axis, Projection, StructureGroup, check_axis, unwrapped
from gisp_kernels.ops.grouped import grouped_abs_weighted_reduce
from gisp_kernels.record.attach.copying import Uncopyable
from gisp_kernels.record.attach.parallel import added_over
from gisp_kernels.record.attach.tap import Tap
from gisp_kernels.record.attach.use import current_backward
from gisp_kernels.record.coverage import Coverage
from gisp_kernels.record.gates import GateTap, gate_projection
from gisp_kernels.record.scored import ScoredTap
from gisp_kernels.record.signed import SignedTap
from gisp_kernels.record.targets import Mode, Way, refuse_sharing, way_of

Key = tuple[nn.Module, str]

_taken: weakref.WeakSet[nn.Module] = weakref.WeakSet()


class ImportanceRecorder(Uncopyable):
    """Scores collected while active as a context manager; made by :func:`record_importance` or :func:`record_lines`.

    Modes:

    ``"stream"``: every backward pass adds ``|W * G|`` of its own weight gradient ``G``; no gradient is kept between
    passes. Uses of one layer in one pass are summed before the absolute value; with reentrant checkpointing only uses
    within one checkpointed segment.

    ``"exact"``: ``G`` is summed over passes in a float32 buffer of the size of the weight and the absolute value is
    taken once, in :meth:`scores` (paper Eq. 8). With one pass the two agree up to rounding.

    ``"signed"``: the absolute value of ``W * G`` summed over a structure, all its projections and all passes, which is
    the gradient of a gate on the structure (LLM-Pruner's "vector" score, arXiv 2305.11627, taken over the whole
    structure). It is linear in ``G``, so it is exact over any number of passes and no weight gradient is formed; the
    outputs of layers scored by rows are kept for the backward pass and must not be changed in place.

    ``"second-order"``: the change of the loss that closing a gate on the structure makes, predicted to second order
    from the gate's gradient for every sequence (:mod:`gisp_kernels.ops.gate_grads`); the lowest are the least
    important, as ever. Only output projections are recorded, their inputs must be [B, S, features] (2 dimensions are
    one sequence), the loss a sum over sequences, and the forward must run inside the context. Set :attr:`curvature`
    where the loss is not the mean over all tokens of the batch.

    Attributes:
        backward_calls: backward passes that reached a covered layer since the last reset.
        curvature: mode ``second-order`` alone, to set before each backward pass: for every sequence of the batch the
            factor ``c_b`` of :func:`gisp_kernels.gate_sums`, [B]; ``None`` = the positions of the batch, for a loss
            that is the mean over them, without padding or labels that do not count.
        samples: mode ``second-order`` alone, to set with ``curvature``: int64 [B], the same number for sequences of one
            sample, whose gradients are added before they are squared; ``curvature`` then has a factor for every
            sample. ``None`` = every sequence is a sample by itself.
    """

    def __init__(
        self,
        groups: tuple[StructureGroup, ...],
        coverage: Coverage,
        *,
        mode: Mode = "stream",
        power: int = 1,
        keep_grad: bool = False,
        loss_scale: Any = None,
        reduce_group: Any = None,
        backend: str | None = None,
        closed: Mapping[str, torch.Tensor] | None = None,
    ) -> None:
        _check_options(groups, mode, power, loss_scale)
        self.mode = mode
        self.curvature: torch.Tensor | None = None
        self.samples: torch.Tensor | None = None
        self._power = power
        self._keep_grad = keep_grad
        self._scale = _Scale(loss_scale)
        self._reduce_group = reduce_group
        self._backend = backend
        self._groups = groups
        self._coverage = coverage
        self._scored = {
            group.name: (gate_projection(group),) if mode == "second-order" else group.projections for group in groups
        }
        self._taps: dict[Key, Tap[Any]] = {}
        for group in groups:
            for projection in self._scored[group.name]:
                way_of(group.name, projection, mode=mode, keep_grad=keep_grad)
                key = _key(projection)
                if key not in self._taps:
                    self._taps[key] = self._tap(group.name, *key)
                self._taps[key].add(projection)
        self._ways()
        self._close(closed or {})
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

    def coverage(self) -> Coverage:
        """What of the target is scored, what is not, and which groups backward passes have not reached."""
        return self._coverage.with_unreached(self._unreached())

    def _unreached(self) -> list[str]:
        missed = {key for key, tap in self._taps.items() if not tap.reached}
        return [group.name for group in self._groups if missed.intersection(map(_key, self._scored[group.name]))]

    def scores(self) -> dict[str, torch.Tensor]:
        """Scores of every group so far, float32 [count]; sums over its projections in their order.

        ``stream``: the sum over backward passes of ``|W * G_pass|``. ``exact``: ``|W * sum of G_pass|`` (paper Eq. 8)
        with the weights as they are now. ``signed``: ``|sum of W * G|`` over all elements and passes.
        ``second-order``: the sum over passes of the predicted change of the loss, of either sign. With a
        ``reduce_group`` sums run over its processes too, all of which must call. A weight that no backward pass of the
        process has reached scores 0, with a warning.

        Raises:
            RuntimeError: a covered layer changed its width while being recorded, or a scaled loss overflowed.
        """
        self._warn_of(self._unreached())
        scores = self._scores_together()
        apart = [group for group in self._groups if group.name not in scores]
        keys = {_key(projection) for group in apart for projection in self._scored[group.name]}
        parts = {key: self._parts_of(tap) for key, tap in self._taps.items() if key in keys}
        for group in apart:
            first, *others = (parts[_key(p)][p] for p in self._scored[group.name])
            total = first.clone()
            for part in others:
                total += part.to(total.device)
            scores[group.name] = total.abs().float() if self.mode == "signed" else total
        self._scale.check(scores)
        return {group.name: scores[group.name] for group in self._groups}

    def _warn_of(self, unreached: list[str]) -> None:
        empty = {group.name for group in self._groups if not group.count}
        names = [name for name in unreached if name not in empty]
        if names:
            listed = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
            warnings.warn(
                f"no backward pass has reached all weights of {listed}: those score 0. Their code did not run, or it "
                "forms no gradient of the weight (recorder.coverage().unreached)",
                stacklevel=3,
            )

    def scores_of(self, module: nn.Module, axis: Axis = "row", parameter: str = "weight") -> torch.Tensor:
        """Scores of one weight along one axis, float32.

        Args:
            module: a covered layer; adapters of PEFT stand for the layer inside.
            axis: ``"row"`` or ``"column"``: [structures]; ``"element"``: as the weight, outputs first, [O, I].
            parameter: which weight of the module.

        Raises:
            ValueError: an unknown axis.
            KeyError: the weight is not scored along this axis, or in several ways.
            RuntimeError: as :meth:`scores`.
        """
        check_axis(axis)
        tap = self._taps.get((unwrapped(module), parameter))
        found = {p: scores for p, scores in self._parts_of(tap).items() if p.axis == axis} if tap else {}
        if tap is None or len(found) != 1:
            how = f"in {len(found)} ways" if found else "not scored"
            raise KeyError(f"{parameter} of this {type(module).__name__} is {how} by {axis}s")
        self._warn_of([] if tap.reached else [tap.name])
        (scores,) = found.values()
        scores = scores.abs().float() if self.mode == "signed" else scores.clone()
        self._scale.check({tap.name: scores})
        return scores.view(tap.weight.shape) if axis == "element" else scores

    def gate_sums(self) -> dict[str, torch.Tensor]:
        """What the scores of mode ``second-order`` are made of: group name -> float64 [3, count].

        Sums over sequences as of :func:`gisp_kernels.ops.gate_grads.gate_sums`, over all passes so far.

        Raises:
            RuntimeError: another mode.
        """
        taps = {group.name: self._taps[_key(self._scored[group.name][0])] for group in self._groups}
        found = {name: tap.sums.clone() for name, tap in taps.items() if isinstance(tap, GateTap)}
        if len(found) < len(taps):
            raise RuntimeError(f"mode {self.mode!r} records no gates: use mode 'second-order'")
        self._warn_of(self._unreached())
        if self._reduce_group is not None:
            return {name: added_over([sums], self._reduce_group)[0] for name, sums in found.items()}
        return found

    def __enter__(self) -> ImportanceRecorder:
        if self._active:
            raise RuntimeError("this recorder is already active")
        ways = self._ways()
        for tap in self._taps.values():
            if tap.linear in _taken:
                raise RuntimeError(f"a layer of group {tap.name!r} is already being recorded by another recorder")
            tap.check_width()
        self._outermost = None
        self._active = True
        # All of them before the first is attached, which lets it require a gradient: weights may be shared.
        frozen = {key: not tap.stored.requires_grad for key, tap in self._taps.items()}
        for key, tap in self._taps.items():
            _taken.add(tap.linear)
            tap.attach(way=ways[key], keep_grad=self._keep_grad, frozen=frozen[key], passing=self._pass_forward)
        return self

    def __exit__(self, *exception: object) -> None:
        for tap in self._taps.values():
            tap.detach()
            _taken.discard(tap.linear)
        self._active = False

    def _tap(self, name: str, linear: nn.Module, parameter: str) -> Tap[Any]:
        shared = name, linear, parameter, self._backend, self._saw_backward
        if self.mode == "second-order":
            return GateTap(*shared, factors=lambda: (self.curvature, self.samples))
        if self.mode == "signed":
            return SignedTap(*shared)
        return ScoredTap(*shared, exact=self.mode == "exact", power=self._power)

    def _ways(self) -> dict[Key, Way]:
        found: dict[Key, tuple[str, Way, torch.Tensor]] = {}
        for group in self._groups:
            for projection in self._scored[group.name]:
                way = way_of(group.name, projection, mode=self.mode, keep_grad=self._keep_grad)
                found.setdefault(_key(projection), (group.name, way, self._taps[_key(projection)].stored))
        refuse_sharing(found)
        return {key: way for key, (_, way, _) in found.items()}

    def _close(self, closed: Mapping[str, torch.Tensor]) -> None:
        for name, gates in closed.items():
            if self.mode != "second-order" or name not in self._scored:
                raise ValueError(f"closed names group {name!r}: give groups that are scored, in mode 'second-order'")
            tap = self._taps[_key(self._scored[name][0])]
            assert isinstance(tap, GateTap)
            tap.close_gates(gates)

    def _scores_together(self) -> dict[str, torch.Tensor]:
        """Scores of groups whose weights and summed gradients all lie on one device of this process, read at once."""
        scores, matrices = {}, []
        for group in self._groups if self.mode == "exact" and self._reduce_group is None else ():
            projections = self._scored[group.name]
            taps = [self._taps[_key(projection)] for projection in projections]
            out = torch.empty(group.count, dtype=torch.float32, device=taps[0].weight.device)
            found = [
                tap.matrix(projection, out) if isinstance(tap, ScoredTap) and tap.weight.device == out.device else None
                for tap, projection in zip(taps, projections, strict=True)
            ]
            whole = [matrix for matrix in found if matrix is not None]
            if len(whole) == len(found):
                scores[group.name] = out
                matrices += whole
        grouped_abs_weighted_reduce(matrices, power=self._power, add=False, backend=self._backend)
        scale = self._scale.value**self._power
        return scores if scale == 1 else {name: out / scale for name, out in scores.items()}

    def _parts_of(self, tap: Tap[Any]) -> dict[Projection, torch.Tensor]:
        return tap.scores(active=self._active, group=self._reduce_group, scale=self._scale.value)

    def _pass_forward(self) -> None:
        self._scale.meet_forward()
        backward = current_backward()
        if backward is None:
            self._outermost = None
        elif self._outermost is None:
            # Checkpointing runs the forward again inside a backward pass, and its reentrant form then starts a
            # nested one: all of that is one pass to the caller.
            self._outermost = backward
            torch.autograd.Variable._execution_engine.queue_callback(self._leave_backward)

    def _leave_backward(self) -> None:
        self._outermost = None

    def _saw_backward(self) -> int | None:
        current = current_backward()
        outermost = self._outermost if self._outermost is not None else current
        if outermost is not None and outermost not in self._backwards:
            self._backwards.add(outermost)
            self._scale.follow(self._taps.values())
        return outermost


class _Scale:
    """What the loss is multiplied with; buffers are kept in units of the present one."""

    def __init__(self, source: Any) -> None:
        self._source = source
        self.value = 1.0
        self._read = False

    def meet_forward(self) -> None:
        """Require to be told the scale where there is one as a rule."""
        if self._source is not None:
            return
        for device in ("cuda", "cpu"):
            if torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) == torch.float16:
                raise RuntimeError(
                    "float16 autocast goes with a GradScaler, whose factor would stay in the scores: pass "
                    "loss_scale=scaler, or loss_scale=1.0 for a loss that is not scaled"
                )

    def follow(self, taps: Any) -> None:
        """Take over the scale of a pass that has begun."""
        if self._source is None:
            return
        source: Callable[[], float] = getattr(self._source, "get_scale", lambda: self._source)
        value = float(source())
        if not (math.isfinite(value) and value > 0):
            raise RuntimeError(f"loss_scale must be finite and above 0, got {value}")
        if self._read and value != self.value:
            for tap in taps:
                tap.rescale(value / self.value)
        self.value, self._read = value, True

    def check(self, scores: Mapping[str, torch.Tensor]) -> None:
        """Refuse what an overflow of a scaled loss left."""
        if self._source is not None and not all(bool(values.isfinite().all()) for values in scores.values()):
            raise RuntimeError(
                "scores are not finite: the scaled loss overflowed in a pass. Call reset() and record once the scale "
                "has settled"
            )


def _key(projection: Projection) -> Key:
    return projection.linear, projection.parameter


def _check_options(groups: tuple[StructureGroup, ...], mode: Mode, power: int, loss_scale: Any) -> None:
    if mode not in get_args(Mode):
        raise ValueError(f"mode must be one of {', '.join(get_args(Mode))}, got {mode!r}")
    checks.check_power(power)
    if mode in ("signed", "second-order"):
        if power != 1:
            raise ValueError(f"power {power} is for modes 'stream' and 'exact', not {mode!r}")
        if any(p.axis == "element" for group in groups for p in group.projections):
            raise ValueError(f"elements are scored in modes 'stream' and 'exact', not {mode!r}")
    if mode == "second-order" and loss_scale is not None:
        raise ValueError("mode 'second-order' does not undo loss_scale: record with an unscaled loss")
    names = [group.name for group in groups]
    if len(set(names)) != len(names):
        raise ValueError(f"group names must be unique, got {names}")
