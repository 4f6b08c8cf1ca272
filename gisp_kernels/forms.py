"""Launches without what Triton's JIT does for every one of them, and compilation ahead of the first.

The JIT looks at names, types and options of all arguments to find the compiled form of a kernel. That takes the host
several times as long as the launch itself, and a pass over a small model is a thousand launches. Here a form that was
found once is found again by what the JIT tells forms apart by, and is launched with addresses in place of tensors.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from functools import partial
from typing import Any, NamedTuple

import torch

# Addresses that are multiples of so many bytes have forms of their own, so have integers that are multiples of it.
_ALIGNED = 16
# Integers from here on are passed in 64 bits.
_LARGE = 2**31
# Elsewhere forms also depend on the size of tensors.
_CUDA = torch.version.cuda is not None

# What asks for the current device of a GPU that is in use, which torch.cuda.current_device first makes sure of.
_current_device: Callable[[], int] = getattr(torch._C, "_cuda_getDevice", torch.cuda.current_device)


class _Form(NamedTuple):
    """A compiled kernel and how to launch it.

    Attributes:
        launch: Triton's own way from a grid, a stream, code and arguments to a launch.
        function, metadata: code that is loaded, and what its launches are told of it.
        stream_of: the current stream of a device.
        compiled: what is unloaded when it is gone.
    """

    launch: Callable[..., None]
    function: int
    metadata: Any
    stream_of: Callable[[int], int]
    compiled: Any

    @classmethod
    def of(cls, compiled: Any) -> _Form:
        """Of Triton's form."""
        from triton.runtime import driver

        # Asked how to launch it, Triton loads the form and compiles the code that passes its arguments.
        compiled[1, 1, 1]
        launch, stream_of = compiled.run, driver.active.get_current_stream
        return cls(launch, compiled.function, compiled.packed_metadata, stream_of, compiled)


_forms: dict[tuple[Any, ...], _Form] = {}
# Within :func:`compiled_ahead` what compiles the forms that lack; other threads go on launching.
_lacking: ContextVar[dict[tuple[Any, ...], Callable[[], Any]] | None] = ContextVar("lacking", default=None)
# By kernel, see :func:`_positions`.
_specialised: dict[int, list[int]] = {}


def ceil_div(extent: int, size: int) -> int:
    """Tiles of a size that cover an extent. Triton's own function takes the host as long as a launch."""
    return -(-extent // size)


def next_power_of_2(extent: int) -> int:
    """The smallest power of 2 that is not below an extent of at least 1."""
    return 1 << (extent - 1).bit_length()


def run(
    kernel: Any,
    grid: tuple[int, ...],
    tensors: Sequence[torch.Tensor],
    numbers: Sequence[int | float],
    constants: tuple[Any, ...],
    *,
    sizes: Sequence[int] | None = None,
    **options: int,
) -> None:
    """Launch a kernel whose parameters are pointers, then numbers, then constants, in this order.

    Args:
        grid: programs along up to three dimensions.
        tensors: what the pointers point to, all on the device of the first; it need not be the current one.
        constants: values of the ``tl.constexpr`` parameters.
        sizes: of the tuples that tensors and then numbers make, 0 for one alone; ``None``: each is alone. Numbers in
            tuples are neither 1 nor multiples of 16, which have forms of their own.
        options: of the compiler, such as ``num_warps``.
    """
    device = tensors[0].get_device()
    # A context costs more than a launch, and mostly there is one GPU.
    if device >= 0 and device != _current_device():
        with torch.cuda.device(device):
            run(kernel, grid, tensors, numbers, constants, sizes=sizes, **options)
        return
    name = id(kernel)
    addresses = [tensor.data_ptr() for tensor in tensors]
    key: list[Any] = [name, device, constants, *options.values(), *[tensor.dtype for tensor in tensors]]
    union = 0
    for address in addresses:
        union |= address
    # Mostly all are aligned, which one number says.
    key.append(union % _ALIGNED == 0 or tuple([address % _ALIGNED == 0 for address in addresses]))
    if sizes is None:
        specialised = _specialised.get(name)
        if specialised is None:
            specialised = _specialised[name] = _positions(kernel, len(tensors))
        for i in specialised:
            key += (numbers[i] == 1, numbers[i] % _ALIGNED == 0)
    if max(numbers) >= _LARGE:
        key += [number >= _LARGE for number in numbers]
    for tensor in tensors:
        if tensor.get_device() != device:
            key.append(("on", tensor.get_device()))
    found = tuple(key)
    form = _forms.get(found)
    if form is None or _lacking.get() is not None:
        _find(found, kernel, grid, tensors, (*_grouped([*tensors, *numbers], sizes), *constants), options)
        return
    launch, function, metadata, stream_of, _ = form
    x, y, z = (*grid, 1, 1)[:3]
    arguments = [*addresses, *numbers]
    if sizes is not None:
        arguments = _grouped(arguments, sizes)
    # Hooks of Triton's profiler are called at launches by the JIT alone: to ask for them takes as long as this.
    launch(x, y, z, stream_of(device), function, metadata, None, None, None, *arguments, *constants)


def _find(
    key: tuple[Any, ...],
    kernel: Any,
    grid: tuple[int, ...],
    tensors: Sequence[torch.Tensor],
    arguments: tuple[Any, ...],
    options: dict[str, int],
) -> None:
    """Launch by the JIT and keep the form it found; within :func:`compiled_ahead` only note a form that lacks."""
    lacking = _lacking.get()
    if lacking is not None:
        if key not in _forms:
            # What is called by several threads computes its hash in this one.
            hash(kernel)
            lacking[key] = partial(kernel.warmup, *arguments, grid=grid, **options)
        return
    compiled = kernel[grid](*arguments, **options)
    # The interpreter has no forms. Operands in a CPU's memory are for the JIT to refuse.
    if compiled is not None and _CUDA and all(tensor.get_device() >= 0 for tensor in tensors):
        _forms[key] = _Form.of(compiled)


def run_grouped(
    kernel: Any,
    grid: tuple[int, ...],
    tensors: Sequence[torch.Tensor | tuple[torch.Tensor, ...]],
    numbers: Sequence[tuple[int, ...]],
    constants: tuple[Any, ...],
    **options: int,
) -> None:
    """The same where parameters are tuples of pointers, and all numbers are in tuples.

    Args:
        numbers: none is 1 or a multiple of 16, which have forms of their own.
        constants: among them how long the tuples are.
    """
    sizes = [len(each) if isinstance(each, tuple) else 0 for each in (*tensors, *numbers)]
    flat = [tensor for each in tensors for tensor in (each if isinstance(each, tuple) else (each,))]
    run(kernel, grid, flat, [n for each in numbers for n in each], constants, sizes=sizes, **options)


def _grouped(flat: list[Any], sizes: Sequence[int] | None) -> list[Any]:
    """Arguments in tuples of these sizes."""
    if sizes is None:
        return flat
    rest = iter(flat)
    return [tuple(itertools.islice(rest, size)) if size else next(rest) for size in sizes]


@contextlib.contextmanager
def compiled_ahead(device: torch.device) -> Iterator[None]:
    """:func:`run` launches nothing inside; on leaving, the forms that lack for it are compiled, in threads.

    One after the other, each when it is first launched, they take several seconds. Results of what runs inside have no
    meaning.

    Args:
        device: a GPU, of all launches.
    """
    lacking: dict[tuple[Any, ...], Callable[[], Any]] = {}
    token = _lacking.set(lacking)
    try:
        yield
    finally:
        _lacking.reset(token)
    if not lacking:
        return

    def build(compile_form: Callable[[], Any]) -> _Form:
        return _Form.of(compile_form())

    with ThreadPoolExecutor(len(lacking), initializer=torch.cuda.set_device, initargs=(device,)) as pool:
        for key, form in zip(lacking, pool.map(build, lacking.values()), strict=True):
            if _CUDA:
                _forms[key] = form


def _positions(kernel: Any, tensors: int) -> list[int]:
    """Which of the numbers a kernel takes after so many tensors have forms of their own for 1 and multiples of 16."""
    params = getattr(kernel, "params", ())[tensors:]
    return [i for i, param in enumerate(params) if not (param.is_constexpr or param.do_not_specialize)]
