"""In-place swaps of blocks of rows or columns, for a whole model in one call.

This is what pruning does to memory here: a removed structure trades places with a kept one, so that the kept ones form
a prefix of the same storage. Swapping the same pairs again undoes it.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import torch

from gisp_kernels import _ext
from gisp_kernels import backend as backends
from gisp_kernels.checks import memory_span

SUPPORTED = ("native", "triton")

# Blocks are moved as integers of the element's size: every bit pattern survives, NaN payloads included.
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_AXES = ("row", "column")
# Bytes of a cache line, and lines to swap above which threads share them: about a millisecond of one.
_LINE = 64
_MANY_LINES = 2**16


class Layout(NamedTuple):
    """Blocks of one tensor, in elements: a block is ``rows`` runs of ``run`` elements, ``pitch`` apart; block ``s``
    starts at ``s * step``. There are ``blocks`` of them."""

    blocks: int
    rows: int
    run: int
    pitch: int
    step: int


def block_layout(tensor: torch.Tensor, axis: str, block: int) -> Layout:
    """Layout of the blocks of a checked tensor; blocks of contiguous rows are one run."""
    if tensor.dim() == 1:
        return Layout(tensor.shape[0] // block, 1, block, block, block)
    height, width = tensor.shape
    pitch = tensor.stride(0)
    if axis == "column":
        return Layout(width // block, height, block, pitch, block)
    if pitch == width:
        return Layout(height // block, 1, block * width, block * width, block * width)
    return Layout(height // block, block, width, pitch, block * pitch)


class PreparedSwaps:
    """Swaps of block ``a`` with block ``b`` in place for pairs ``(a, b)``, in many tensors, over and over.

    The tensors are checked once, so :meth:`run` costs little more than its launch. Their memory must stay where it is.

    Args:
        tensors: matrices [O, I] with contiguous rows (any row stride, so a prefix of columns is fine), or vectors [O]
            with ``axis`` ``"row"``; elements of 1, 2, 4 or 8 bytes. They must not overlap in memory; several devices
            are allowed. Autograd sees that they change, not how.
        axes: for each tensor ``"row"`` or ``"column"``.
        blocks: for each tensor the rows or columns per block.
        backend: ``None`` or ``"auto"``, ``"reference"``, ``"triton"`` (one launch per tensor) or ``"native"`` (one
            launch per device, nothing waits for it).

    Raises:
        ValueError: an argument does not fit.
    """

    def __init__(
        self,
        tensors: Sequence[torch.Tensor],
        axes: Sequence[str],
        blocks: Sequence[int],
        *,
        backend: str | None = None,
    ) -> None:
        for i, (tensor, axis, block) in enumerate(zip(tensors, axes, blocks, strict=True)):
            _check_tensor(f"tensors[{i}]", tensor, axis, block)
        _check_no_overlap(tensors)
        self._backend = backend
        self._tensors = list(tensors)
        self._bits = [_bits(tensor) for tensor in tensors]
        self._axes = [_AXES.index(axis) for axis in axes]
        self._blocks = [int(block) for block in blocks]
        self._layouts = [block_layout(t, a, b) for t, a, b in zip(tensors, axes, blocks, strict=True)]
        # The compiled core gets these of each tensor, and the number of pairs.
        self._entries = [(t.data_ptr(), t.element_size(), *y) for t, y in zip(tensors, self._layouts, strict=True)]
        self._devices = sorted({t.device for t in tensors}, key=str)
        self._members = {d: {i for i, t in enumerate(tensors) if t.device == d and t.numel()} for d in self._devices}

    def run(self, pairs: Mapping[int, torch.Tensor]) -> None:
        """Swap ``pairs[i]``, int64 CPU [n, 2] with n > 0 and different indices of blocks, in tensor ``i``.

        Pairs are not checked: whoever plans a removal numbers blocks that exist, each once.

        Raises:
            RuntimeError: the backend cannot run here; nothing has been swapped then.
        """
        work = []
        for device in self._devices:
            members = self._members[device]
            busy = [i for i in pairs if i in members]
            if busy:
                work.append((backends.resolve(self._backend, self._tensors[busy[0]], SUPPORTED), busy))
        for choice, busy in work:
            chosen = [pairs[i] for i in busy]
            if choice == "native":
                entries = [(*self._entries[i], len(pair)) for i, pair in zip(busy, chosen, strict=True)]
                _run_native(self._tensors[busy[0]].device, entries, chosen)
            else:
                self._swap(busy, chosen, choice)
            torch.autograd.graph.increment_version([self._tensors[i] for i in busy])

    def _swap(self, numbers: list[int], pairs: list[torch.Tensor], choice: str) -> None:
        """Swap in tensors of one device by Triton or plain torch."""
        if choice == "triton":
            from gisp_kernels.triton import swap as kernel

            kernel.launch([self._bits[i] for i in numbers], pairs, [self._layouts[i] for i in numbers])
            return
        for i, pair in zip(numbers, pairs, strict=True):
            tensor, axis, block = self._bits[i], self._axes[i], self._blocks[i]
            lines = (pair.t().unsqueeze(2) * block + torch.arange(block)).flatten(1).to(tensor.device)
            held = tensor.index_select(axis, lines.flip(0).flatten())
            tensor.index_copy_(axis, lines.flatten(), held)


def _run_native(device: torch.device, entries: Sequence[tuple[int, ...]], pairs: Sequence[torch.Tensor]) -> None:
    """Swap blocks as :func:`_launch_native` does; in a CPU's memory by torch's number of threads, where there are many.

    Args:
        pairs: of every entry.
    """

    def run(share: Sequence[int]) -> None:
        _launch_native(device, [entries[i] for i in share], torch.cat([pairs[i] for i in share]))

    # A cache line that is read is what takes time.
    lines = [
        rows * len(pair) * -(-size * length // _LINE)
        for (_, size, _, rows, length, *_), pair in zip(entries, pairs, strict=True)
    ]
    if device.type != "cpu" or sum(lines) < _MANY_LINES or torch.get_num_threads() == 1:
        return run(range(len(entries)))
    shares: list[list[int]] = [[] for _ in range(min(torch.get_num_threads(), len(entries)))]
    loads = [0] * len(shares)
    # The largest first, each to whoever has least; no tensor is split.
    for i in sorted(range(len(entries)), key=lambda i: -lines[i]):
        least = loads.index(min(loads))
        shares[least].append(i)
        loads[least] += lines[i]
    with ThreadPoolExecutor(len(shares)) as pool:
        # Reading the results raises what a thread raised.
        list(pool.map(run, shares))


def _launch_native(device: torch.device, entries: Sequence[tuple[int, ...]], pairs: torch.Tensor) -> None:
    """Swap blocks described by (address, element size, *layout, number of pairs) in one launch.

    ``pairs``: int64 CPU [all, 2], those of one entry after those of another.
    """
    core = _ext.core()
    size = core.swap_table_bytes(len(entries), pairs.shape[0])
    on_gpu = device.type == "cuda"
    table = torch.empty(size, dtype=torch.uint8, pin_memory=on_gpu)
    chunks = core.plan_swaps(entries, pairs.data_ptr(), table.data_ptr(), size)
    if not on_gpu:
        core.swap_blocks_cpu(table.data_ptr(), len(entries))
        return
    with torch.cuda.device(device):
        # Both copies of the table may be freed on return: the allocators reuse them in stream order only.
        resident = table.to(device, non_blocking=True)
        stream = torch.cuda.current_stream(device).cuda_stream
        core.swap_blocks_cuda(resident.data_ptr(), len(entries), chunks, resident.device.index, stream)


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().view(_BITS[tensor.element_size()])


def _check_tensor(name: str, tensor: torch.Tensor, axis: str, block: int) -> None:
    if tensor.layout != torch.strided or tensor.is_meta:
        raise ValueError(f"{name} must be a dense tensor with memory, got {tensor.layout} on {tensor.device}")
    if tensor.element_size() not in _BITS:
        raise ValueError(f"{name} must have elements of 1, 2, 4 or 8 bytes, got {tensor.dtype}")
    if axis not in _AXES:
        raise ValueError(f"axis of {name} must be 'row' or 'column', got {axis!r}")
    if tensor.dim() not in (1, 2) or (tensor.dim() == 1 and axis == "column"):
        raise ValueError(f"{name} must be a matrix, or a vector with rows, got {axis}s of {tuple(tensor.shape)}")
    if block < 1:
        raise ValueError(f"block of {name} must be at least 1, got {block}")
    extent = tensor.shape[_AXES.index(axis)]
    if extent % block:
        raise ValueError(f"block {block} does not divide the {extent} {axis}s of {name}")
    if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
        raise ValueError(f"{name} must have stride 1 along its last dimension, got strides {tensor.stride()}")
    if tensor.dim() == 2 and tensor.shape[0] > 1 and tensor.stride(0) < tensor.shape[1]:
        raise ValueError(f"rows of {name} must not overlap, got strides {tensor.stride()} for {tuple(tensor.shape)}")


def _check_no_overlap(tensors: Sequence[torch.Tensor]) -> None:
    # Swaps in memory that two entries share would run in an undefined order.
    spans: dict[torch.device, list[tuple[int, int, int]]] = {}
    for i, tensor in enumerate(tensors):
        if tensor.numel():
            start = tensor.data_ptr()
            end = start + memory_span(tensor) * tensor.element_size()
            spans.setdefault(tensor.device, []).append((start, end, i))
    for span in spans.values():
        span.sort()
        for (_, end, i), (start, _, j) in itertools.pairwise(span):
            if start < end:
                raise ValueError(f"tensors[{i}] and tensors[{j}] overlap in memory")
