"""Which implementation an op runs: reference (plain torch), triton or native (the compiled core).

``GISP_BACKEND`` (``auto`` by default) sets it for the whole process, the ``backend`` argument of an op for one call.
An explicit choice is honoured or raises; only ``auto`` picks for itself.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Sequence

import torch

BACKENDS = ("reference", "triton", "native")


@functools.cache
def has_triton() -> bool:
    """Whether triton can be imported (nothing is imported or compiled by asking)."""
    return importlib.util.find_spec("triton") is not None


def interpreting() -> bool:
    """Whether Triton kernels run in its CPU interpreter."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def requested(backend: str | None) -> str:
    """The choice of a call or else of the process."""
    return backend or os.environ.get("GISP_BACKEND", "auto")


def resolve(backend: str | None, tensor: torch.Tensor, supported: Sequence[str] = ("triton",)) -> str:
    """Name of the implementation for ``tensor``.

    Args:
        backend: ``None`` or ``"auto"`` to choose, otherwise one of :data:`BACKENDS`.
        tensor: an operand, for its device.
        supported: what the op offers, best first; ``"reference"`` is always understood.

    Raises:
        ValueError: unknown name.
        RuntimeError: the explicit choice cannot run this tensor, with the reason.
    """
    choice = requested(backend)
    if choice == "triton" and tensor.is_cuda and choice in supported and has_triton():
        # A pass says so to every op, a thousand times.
        return choice
    if choice == "auto":
        for name in supported:
            # The interpreter is for testing kernels, never a better choice than plain torch.
            if name == "triton" and tensor.device.type != "cuda":
                continue
            if name == "reference" or _why_not(name, tensor) is None:
                return name
        return "reference"
    if choice not in BACKENDS:
        raise ValueError(f"backend must be 'auto' or one of {BACKENDS}, got {choice!r}")
    if choice == "reference":
        return choice
    if choice not in supported:
        raise RuntimeError(f"backend {choice!r} does not implement this op; it has {tuple(supported)}")
    reason = _why_not(choice, tensor)
    if reason is not None:
        raise RuntimeError(f"backend {choice!r} cannot run here: {reason}")
    return choice


def _why_not(name: str, tensor: torch.Tensor) -> str | None:
    if name == "triton":
        if not has_triton():
            return "triton is not installed"
        if tensor.device.type != "cuda" and not interpreting():
            return f"the tensor is on {tensor.device} and TRITON_INTERPRET is not 1"
        return None
    from gisp_kernels import _ext

    return _ext.why_not(tensor.device.type)
