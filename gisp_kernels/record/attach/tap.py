"""What every recorded weight shares: where its scores come from, its passes, its width."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial
from typing import Any, Generic, TypeVar

import torch
import torch.nn.functional as F
from torch import nn

from gisp_kernels.groups import Projection, is_transposed
from gisp_kernels.record.attach.copying import Uncopyable
from gisp_kernels.record.attach.parallel import added_over, is_sharded
from gisp_kernels.record.attach.transforms import refuse_transforms
from gisp_kernels.record.attach.use import Needs, RecordedLinear, Use, current_backward, without_autocast
from gisp_kernels.record.attach.watch import Renewed, Watch

Pending = TypeVar("Pending")


class Tap(ABC, Uncopyable, Generic[Pending]):
    """Collects the scores of one weight, for every projection it is scored by.

    A subclass says what it reads of a use of the layer (:attr:`needs`) and what it makes of it (:meth:`_take_use`).
    What has to wait for the end of a backward pass goes to ``_pending``, by the number of the pass, and comes back
    through :meth:`_end_pass`.

    Args:
        name: group name, for messages.
        linear: the module that holds the weight.
        parameter: its name there.
        backend: implementation of the ops.
        seen: called inside each backward pass that reaches the weight; gives the number of the pass.

    Attributes:
        called: whether the layer ran since recording began.
        reached: whether a backward pass brought scores since the last reset.
        degree, score_degree: the power of the loss that the buffers grow with, and that scores made of them do.
    """

    degree = 1
    score_degree = 1
    # Whether scores of parts of one pass add up to those of the pass.
    additive = True

    def __init__(
        self, name: str, linear: nn.Module, parameter: str, backend: str | None, seen: Callable[[], int | None]
    ) -> None:
        self.name = name
        self.linear: Any = linear
        self.parameter = parameter
        self.called = False
        self.reached = False
        self._backend = backend
        self._seen = seen
        self._projections: list[Projection] = []
        self._shape = self._present_shape()
        self._pending: dict[int | None, list[Pending]] = {}
        self._anchor: torch.Tensor | None = None
        self._watch: Watch | None = None
        self._beside = False
        self._frozen = False
        self._own: torch.Tensor | None = None
        # A weight that is computed from others, as the last forward had it.
        self._computed: torch.Tensor | None = None
        # The last passes that brought uses of the layer, and gradients of its weight.
        self._use_pass: int | None = None
        self._grad_pass: int | None = None

    @property
    @abstractmethod
    def needs(self) -> Needs:
        """What a :class:`Use` is to hold."""

    @property
    def gates(self) -> torch.Tensor | None:
        """What the columns of the input are multiplied with, [I]; ``None`` for ones."""
        return None

    @abstractmethod
    def _zero(self) -> None:
        """Make the buffers anew, at the present width."""

    @abstractmethod
    def _totals(self) -> list[torch.Tensor]:
        """The buffers, which add up over passes and processes."""

    @abstractmethod
    def _scores_of(self, projection: Projection, totals: list[torch.Tensor]) -> torch.Tensor:
        """Scores of a projection, [count], from :meth:`_totals` of any number of passes and processes."""

    @abstractmethod
    def _take_use(self, use: Use) -> None:
        """Score one use of the layer in the running backward pass, or keep it until the pass ends."""

    @abstractmethod
    def _take_weight_grad(self, weight: torch.Tensor, grad: torch.Tensor) -> None:
        """Score a weight gradient; both are as :attr:`Projection.weight`."""

    def _end_pass(self, pending: list[Pending]) -> None:
        """Score what uses of the layer left in one backward pass, once the last of them has been seen."""

    @property
    def stored(self) -> torch.Tensor:
        """The weight as the module stores it."""
        # Read for every use of the layer; a module's own lookup takes several times as long.
        own: torch.Tensor | None = self.linear._parameters.get(self.parameter)
        return getattr(self.linear, self.parameter) if own is None else own

    @property
    def weight(self) -> torch.Tensor:
        """The weight as :attr:`Projection.weight`; one that is computed from others as the last forward had it."""
        return self.oriented(self.stored if self._computed is None else self._computed)

    def oriented(self, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor of the shape of :attr:`stored`, outputs first."""
        return tensor.transpose(-1, -2) if is_transposed(self.linear) else tensor

    def add(self, projection: Projection) -> None:
        """Score the layer for one more projection."""
        if projection not in self._projections:
            self._projections.append(projection)

    def reset(self) -> None:
        """Zero the scores, at the present width."""
        self._shape = self._present_shape()
        self._pending.clear()
        self.reached = False
        self._zero()

    def attach(self, *, way: str, keep_grad: bool, frozen: bool, passing: Callable[[], None]) -> None:
        """Begin to record.

        Args:
            way: of :func:`gisp_kernels.record.targets.way_of`.
            keep_grad: leave weight gradients to accumulate.
            frozen: the weight requires no gradient.
            passing: called at every forward of the layer.
        """
        self.called = False
        self._use_pass = self._grad_pass = None
        self._beside = way == "beside"
        self._frozen = frozen
        self._own = self.linear._parameters.get(self.parameter)
        self._computed = None
        if way != "weight":
            self.linear.forward = _Forward(self, passing)
        self._watch = Watch(self, keep_grad=keep_grad, frozen=frozen, in_forward=way != "weight", passing=passing)
        self._watch.attach()

    def detach(self) -> None:
        """End recording, and drop what an interrupted backward pass left behind."""
        self._pending.clear()
        self._anchor = None
        if isinstance(self.linear.__dict__.get("forward"), _Forward):
            del self.linear.forward
        if self._watch is not None:
            self._watch.detach()
            self._watch = None

    def check_width(self) -> None:
        """Require the shape the buffers were made for."""
        shape = self._present_shape()
        if shape != self._shape:
            raise RuntimeError(
                f"group {self.name!r}: a weight changed from {self._shape} to {shape} while being recorded; "
                "read the scores before changing widths and call reset() after"
            )

    def check_own(self) -> None:
        """Require the parameter that recording began with.

        Raises:
            RuntimeError: the module computes with another.
        """
        present = self.linear._parameters.get(self.parameter)
        # fully_shard shows its gathered parameter in a forward.
        if self._own is not None and present is not self._own and not is_sharded(self._own):
            raise RuntimeError(
                f"group {self.name!r}: its layer computes with another weight than recording began with "
                "(torch.func.functional_call, or a parameter that was replaced): record a module that holds the weight"
            )

    def _present_shape(self) -> tuple[int, ...]:
        return tuple(self.stored.shape)

    @torch.no_grad()
    def rescale(self, factor: float) -> None:
        """Multiply the loss of all passes so far, as it were."""
        for total in self._totals():
            total *= factor**self.degree

    def scores(self, *, active: bool, group: Any, scale: float) -> dict[Projection, torch.Tensor]:
        """Scores for every projection, [count]; while recording is ``active`` the width must be as it was.

        Args:
            group: processes to add up over, or ``None``.
            scale: what the loss was multiplied with.
        """
        if active:
            self.check_width()
        totals = self._totals() if group is None else added_over(self._totals(), group)
        found = {p: self._scores_of(p, totals) for p in self._projections}
        return found if scale == 1 else {p: scores / scale**self.score_degree for p, scores in found.items()}

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """The layer, recorded if a graph is being built."""
        linear = self.linear
        refuse_transforms(self.name, input)
        self.check_own()
        self.check_width()
        inside = current_backward() is not None
        if not inside:
            self.called = True
            self._pending.clear()
        # Recomputation inside a backward pass must repeat what the original forward did. A layer not called
        # since recording began ran unrecorded, and the hooks of its weight score it.
        unrecorded = inside and not self.called and not self._frozen
        if unrecorded or not torch.is_grad_enabled():
            return F.linear(self._gated(input), linear.weight, linear.bias)
        if self._beside:
            return self._observed(input)
        if self._anchor is None:
            # It gets no gradient, yet its hook runs once per backward pass, after the last use of the layer in it.
            self._anchor = torch.zeros(0, device=linear.weight.device, requires_grad=True)
            self._anchor.register_hook(self._leave_pass)
        weight = linear.weight.detach()
        if self._own is None:
            self._computed = weight
        return RecordedLinear.apply(input, self._anchor, linear.bias, weight, self)

    def _gated(self, input: torch.Tensor) -> torch.Tensor:
        gates = self.gates
        return input if gates is None else input * gates.to(input.dtype)

    def _observed(self, input: torch.Tensor) -> torch.Tensor:
        """The layer as it is, with hooks on what goes in or comes out."""
        if is_sharded(self.linear.weight):
            raise RuntimeError(
                f"group {self.name!r}: second-order scores do not read a layer split over processes "
                "(parallelize_module): use another mode"
            )
        read = self._gated(input)
        if not read.requires_grad:
            read = read.detach().requires_grad_()
        elif read is input:
            # Others may read the same input; a node of its own has the gradient of this layer alone.
            read = input.view_as(input)
        output = F.linear(read, self.linear.weight, self.linear.bias)
        if self.needs.grad_input:
            value = input.detach()
            read.register_hook(lambda grad: self._collect_beside(Use(None, value, None, grad)))
        else:
            given = output.detach()
            output.register_hook(lambda grad: self._collect_beside(Use(grad, None, given, None)))
        return output

    def _collect_beside(self, use: Use) -> None:
        number = current_backward()
        if number not in self._pending:
            torch.autograd.Variable._execution_engine.queue_callback(partial(self._finish_beside, number))
        with torch.no_grad(), without_autocast(self.linear.weight.device):
            self.collect(use)

    def collect(self, use: Use) -> None:
        """Take one use of the layer in the running backward pass."""
        self.check_width()
        self.reached = self.reached or not self._beside
        self._use_pass = self._seen()
        self._check_one_source()
        self._take_use(use)

    def take_weight_grad(self, weight: torch.Tensor, grad: torch.Tensor) -> None:
        """Take the gradient of the weight, both as the module stores them."""
        self.check_width()
        self._grad_pass = self._seen()
        self.reached = True
        if self._beside:
            torch.autograd.Variable._execution_engine.queue_callback(self._check_observed)
            return
        self._check_one_source()
        with torch.no_grad(), without_autocast(grad.device):
            self._take_weight_grad(self.oriented(weight.detach()), self.oriented(grad.detach()))

    def _check_one_source(self) -> None:
        if not self.additive and self._use_pass is not None and self._use_pass == self._grad_pass:
            raise RuntimeError(
                f"group {self.name!r}: one backward pass uses a weight in its layer and elsewhere (tied weights, or a "
                "graph from before the recorder), and the parts do not add up: use mode 'exact' or, with the weight "
                "trainable, keep_grad=True, which read the whole gradient"
            )

    def _check_observed(self) -> None:
        if self._use_pass != self._grad_pass:
            raise RuntimeError(
                f"group {self.name!r}: second-order scores need the forward inside the recorder, this one ran before it"
            )

    def _finish_beside(self, number: int | None) -> None:
        if self._grad_pass == self._use_pass:
            self._finish_pass(number)
        else:
            # A pass towards other tensors (torch.autograd.grad) forms no gradient of the weight, which scores nothing.
            self._pending.pop(number, None)

    def _leave_pass(self, _: torch.Tensor | None) -> None:
        self._finish_pass(current_backward())

    def _finish_pass(self, number: int | None) -> None:
        pending = self._pending.pop(number, None)
        if pending is not None:
            self._end_pass(pending)


class _Forward(Uncopyable):
    """Stands in for the forward of a recorded layer."""

    def __init__(self, tap: Tap[Any], passing: Callable[[], None]) -> None:
        self._tap = tap
        self._passing = passing
        # Compiled code would drop hooks that are set inside it, and reuse what it has seen of another recorder.
        self._run = torch.compiler.disable(self._record)

    def __call__(self, input: torch.Tensor) -> torch.Tensor:
        return self._run(input) if torch.compiler.is_compiling() else self._record(input)

    def _record(self, input: torch.Tensor) -> torch.Tensor:
        self._passing()
        return self._tap.forward(input)


def is_recorded(module: nn.Module) -> bool:
    """Whether a recorder stands in for the forward of a module."""
    return isinstance(module.__dict__.get("forward"), _Forward | Renewed)
