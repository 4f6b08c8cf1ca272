"""Host memory that a GPU copies from without waiting for the CPU, and how much of it is left."""

from __future__ import annotations

import contextlib
import mmap
import weakref
from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import Any

import torch

from gisp.progress import note

# cudaHostRegisterPortable: the memory is registered for every context.
_PORTABLE = 1
# Memory is registered by pages, none of them twice.
_PAGE = 4096
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
        self._device = device
        # By address.
        self._registered: dict[int, torch.Tensor] = {}
        self._refused = device.type != "cuda"
        # The end of a process gives memory back by itself.
        weakref.finalize(self, _unregister, self._registered, device).atexit = False

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """A tensor in pages of its own, not initialised."""
        size = prod(shape) * dtype.itemsize
        memory = torch.frombuffer(mmap.mmap(-1, max(1, -(-size // _PAGE)) * _PAGE), dtype=torch.uint8)
        if size and not self._refused:
            self._register(memory)
        return memory[:size].view(dtype).view(shape)

    def seen(self, tensor: torch.Tensor) -> torch.Tensor:
        """One of these tensors as the device sees it: the same memory, read over the bus wherever it is read."""
        if self._device.type != "cuda":
            return tensor
        if tensor.data_ptr() not in self._registered:
            return tensor.to(self._device)
        whole = torch.as_tensor(_Registered(tensor), device=self._device)
        return whole.view(tensor.dtype).view(tensor.shape)

    def free(self, tensor: torch.Tensor) -> None:
        """Give up a tensor that nothing reads any more."""
        memory = self._registered.pop(tensor.data_ptr(), None)
        if memory is not None:
            _unregister({tensor.data_ptr(): memory}, self._device)

    def _register(self, memory: torch.Tensor) -> None:
        with _runtime(self._device) as runtime:
            code = int(runtime.cudaHostRegister(memory.data_ptr(), memory.numel(), _PORTABLE))
        if not code:
            self._registered[memory.data_ptr()] = memory
            return
        self._refused = True
        note(f"host memory cannot be registered with CUDA (error {code}): transfers hold up the computation")
        _take_error(self._device)


class _Registered:
    """Registered memory in the words of the CUDA array interface, which knows no bfloat16: bytes."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self._held = tensor
        self.__cuda_array_interface__ = {
            "shape": (tensor.numel() * tensor.element_size(),),
            "typestr": "|u1",
            "data": (tensor.data_ptr(), False),
            "version": 2,
        }


def _unregister(registered: dict[int, torch.Tensor], device: torch.device) -> None:
    if registered:
        with _runtime(device) as runtime:
            for address in registered:
                runtime.cudaHostUnregister(address)
    registered.clear()


def _take_error(device: torch.device) -> None:
    """Take in an error that CUDA tells once more, to whoever launches next."""
    with contextlib.suppress(RuntimeError):
        torch.zeros(1, device=device)


@contextlib.contextmanager
def _runtime(device: torch.device) -> Iterator[Any]:
    """CUDA, with the device as the current one: memory belongs to the one that it was registered under."""
    with torch.cuda.device(device):
        yield torch.cuda.cudart()


def system_bytes() -> int | None:
    """Memory of the host that is free or can be freed; ``None`` where the system does not tell."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return None


def available_bytes() -> int | None:
    """Host memory that a process may still take; ``None`` where the system does not tell."""
    system = system_bytes()
    found = [] if system is None else [system]
    with contextlib.suppress(OSError, ValueError):
        # A container may take less than its host has. Cached files give way to it.
        limit = int((_CGROUP / "memory.max").read_text())
        stat = dict(line.split() for line in (_CGROUP / "memory.stat").read_text().splitlines())
        used = int((_CGROUP / "memory.current").read_text()) - int(stat.get("inactive_file", 0))
        found.append(max(0, limit - used))
    return min(found, default=None)
