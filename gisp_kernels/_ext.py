"""Lazy loading of the compiled core ``gisp_kernels._core``; a missing core is a state with a reason, not an error."""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from gisp_kernels._version import __version__

# The binary holds no code for older GPUs.
MIN_CAPABILITY = (8, 0)
# The build writes this file when it leaves the core out.
BUILD_NOTE = Path(__file__).with_name("_build.json")


@functools.cache
def _load() -> tuple[ModuleType | None, str | None]:
    try:
        return importlib.import_module("gisp_kernels._core"), None
    except ModuleNotFoundError as error:
        if error.name != "gisp_kernels._core":
            return None, f"the compiled core does not load: {error}"
        return None, f"the compiled core was not built: {_build_reason()}"
    except ImportError as error:
        return None, f"the compiled core does not load: {error}"


def _build_reason() -> str:
    try:
        return str(json.loads(BUILD_NOTE.read_text(encoding="utf-8"))["reason"])
    except (OSError, ValueError, KeyError):
        return "reinstall with a C++ compiler and cmake, and GISP_BUILD_EXT=1 to see why it fails"


def core() -> ModuleType:
    """The compiled core.

    Raises:
        RuntimeError: it is not there, with the reason.
    """
    module, reason = _load()
    if module is None:
        raise RuntimeError(reason)
    return module


def why_not(device_type: str) -> str | None:
    """Why the core cannot run on tensors of a device type, or ``None`` when it can.

    For ``"cuda"`` the current device is asked for its compute capability.
    """
    module, reason = _load()
    if module is None:
        return reason
    if device_type == "cpu":
        return None
    if device_type != "cuda":
        return f"the compiled core has no code for device type {device_type!r}"
    if not module.cuda:
        return "the compiled core was built without CUDA (no nvcc)"
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is not a CUDA build"
    if not torch.cuda.is_available():
        return "no CUDA device is available"
    capability = torch.cuda.get_device_capability()
    if capability < MIN_CAPABILITY:
        return f"the GPU has compute capability {capability}, the compiled core needs {MIN_CAPABILITY}"
    return None


def has_sm90() -> bool:
    """Whether the core holds the kernels for Hopper GPUs."""
    module, _ = _load()
    return module is not None and getattr(module, "sm90", False)


def build_info() -> dict[str, Any]:
    """What is installed, as JSON-ready values; touches no device.

    Returns:
        ``version``; ``core`` (whether the compiled core loads), ``reason`` (why not, else ``None``); ``cuda`` (whether
        it holds CUDA kernels), ``cuda_archs`` (list), ``sm90`` (whether it holds the kernels for Hopper GPUs),
        ``compiler`` and ``nvcc`` (versions or ``None``); ``torch``; ``triton`` (version or ``None``).
    """
    module, reason = _load()
    return {
        "version": __version__,
        "core": module is not None,
        "reason": reason,
        "cuda": bool(module and module.cuda),
        "cuda_archs": module.cuda_archs.split() if module else [],
        "sm90": has_sm90(),
        "compiler": module.compiler if module else None,
        "nvcc": (module.nvcc or None) if module else None,
        "torch": torch.__version__,
        "triton": _version_of("triton"),
    }


def _version_of(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
