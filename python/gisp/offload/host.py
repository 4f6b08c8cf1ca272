"""Host memory that a GPU copies from without waiting for the CPU, and how much of it is left."""

from __future__ import annotations

import contextlib
import weakref
from pathlib import Path
from typing import Any

import torch

from gisp.progress import note

# cudaHostRegisterPortable: the memory is registered for every context.
_PORTABLE = 1
_CGROUP = Path("/sys/fs/cgroup")


def numbered(device: torch.device) -> torch.device:
    """A device by its number: parameters say that of theirs."""
    return torch.device("cuda", torch.cuda.current_device()) if device == torch.device("cuda") else device


class HostMemory:
    """Tensors in host memory, registered with CUDA where the device is a GPU.

    torch's own pinned memory comes in powers of two, which would waste up to half of a large model. What is registered
    stays so until the object goes.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._held: list[torch.Tensor] = []
        self._refused = False
        weakref.finalize(self, _unregister, self._held)

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """A tensor of its own memory, not initialised."""
        tensor = torch.empty(shape, dtype=dtype)
        if self._on_gpu and tensor.numel() and not self._refused:
            size = tensor.numel() * tensor.element_size()
            code = int(_runtime().cudaHostRegister(tensor.data_ptr(), size, _PORTABLE))
            if code:
                self._refused = True
                note(f"host memory cannot be registered with CUDA (error {code}): transfers hold up the computation")
            else:
                self._held.append(tensor)
        return tensor


def _unregister(held: list[torch.Tensor]) -> None:
    for tensor in held:
        with contextlib.suppress(RuntimeError):
            _runtime().cudaHostUnregister(tensor.data_ptr())
    held.clear()


def _runtime() -> Any:
    return torch.cuda.cudart()


def available_bytes() -> int | None:
    """Host memory that a process may still take; ``None`` where the system does not tell."""
    found = []
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                found.append(int(line.split()[1]) * 1024)
    with contextlib.suppress(OSError, ValueError):
        # A container may take less than its host has. Cached files give way to it.
        limit = int((_CGROUP / "memory.max").read_text())
        stat = dict(line.split() for line in (_CGROUP / "memory.stat").read_text().splitlines())
        used = int((_CGROUP / "memory.current").read_text()) - int(stat.get("inactive_file", 0))
        found.append(max(0, limit - used))
    return min(found, default=None)
