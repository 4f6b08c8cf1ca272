"""Compiles every Triton kernel for a GPU that need not be there: ``compile_kernels.py CAPABILITY`` prints JSON.

The launchers run as they do on a GPU, with operands on the CPU. What they launch is compiled to machine code and not
run. A process of its own does this, because Triton's interpreter, in which the other tests run, is chosen at import.
"""

from __future__ import annotations

import importlib
import json
import pkgutil
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from gisp_kernels import abs_weighted_reduce, backend
from gisp_kernels import triton as room
from gisp_kernels.ops.swap import block_layout
from gisp_kernels.triton import float8, gate_grads, grouped_reduce, swap, wgrad_importance, wgrad_tma
from gisp_kernels.triton.decoder import cross_entropy, kv_heads, rms_norm, rotary, swiglu

TOKENS, WIDTH, BLOCK = 64, 4096, 128
# First capabilities with 8-bit floats and with a tensor memory accelerator.
FLOAT8, TMA = 89, 90


class Target:
    """Stands in for the driver: a GPU of a capability that can be compiled for and not launched on."""

    def __init__(self, capability: int) -> None:
        self._target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def name_of(kernel: JITFunction) -> str:
    return f"{kernel.__module__.rpartition('.')[2]}.{kernel.__name__}"


def kernels() -> set[str]:
    """Names of all kernels, those of modules that nothing here launches included."""
    modules = (
        importlib.import_module(found.name) for found in pkgutil.walk_packages(room.__path__, f"{room.__name__}.")
    )
    found = (value for module in modules for value in vars(module).values() if isinstance(value, JITFunction))
    return {name_of(kernel) for kernel in found if kernel.__name__.endswith("_kernel")}


def launches(capability: int, dtype: torch.dtype) -> Iterator[Callable[[], Any]]:
    """Calls that together launch every kernel."""

    def matrix(*shape: int, of: torch.dtype = dtype) -> torch.Tensor:
        return torch.zeros(shape, dtype=of)

    x, weight = matrix(TOKENS, WIDTH), matrix(WIDTH, WIDTH)
    vector, rstd = matrix(WIDTH), matrix(TOKENS, of=torch.float32)
    for axis in ("row", "column"):
        for block in (1, BLOCK):
            yield partial(abs_weighted_reduce, weight, weight, axis=axis, block=block, backend="triton")
        for config in (None, wgrad_importance.SMALL_16BIT if dtype != torch.float32 else None):
            yield partial(wgrad_importance.partial_sums, x, x, weight, axis, config)
        if capability >= TMA and dtype != torch.float32:
            yield partial(wgrad_tma.partial_sums, x, x, [weight], [0], axis, 8)
    targets = torch.zeros(TOKENS, dtype=torch.int64)
    yield partial(cross_entropy.launch, x, targets, None, -100)
    yield partial(cross_entropy.launch, x, targets, rstd, -100)
    x3 = x.view(1, TOKENS, WIDTH)
    for block in (1, BLOCK):
        out = matrix(1, WIDTH // block, of=torch.float32)
        yield partial(gate_grads.launch, out, x3, x3, block)
        jobs = [(weight, weight, own, axis, block) for axis in ("row", "column") for own in (out[0], out[0].clone())]
        yield partial(grouped_reduce.launch, jobs, 1, False)
    heads, index = x.view(TOKENS, -1, BLOCK), torch.zeros(WIDTH // BLOCK, dtype=torch.int64)
    yield partial(kv_heads.expand, heads[:, :4], index, heads)
    yield partial(rms_norm.add_norm, x, x, vector, 1e-5, x.clone(), x.clone())
    yield partial(rms_norm.add_norm, x, None, vector, 1e-5, x.clone(), x.clone())
    yield partial(rms_norm.apply_norm, x, rstd, vector, x.clone())
    yield partial(rms_norm.backward, x.clone(), x, x, rstd, vector)
    table = matrix(TOKENS, BLOCK)
    yield partial(rotary.launch, heads, table, table, heads.clone())
    by_head = heads.transpose(0, 1)[None]
    for asked, count in ((index, 4), (None, len(index))):
        out = matrix(TOKENS, WIDTH + 2 * count * BLOCK)
        yield partial(rotary.unrotate, (by_head, by_head, by_head), table, table, asked, count, out)
    yield partial(swiglu.forward, x, x, x.clone())
    yield partial(swiglu.backward, x.clone(), x.clone(), x.clone())
    yield partial(swiglu.backward_gates, x.clone(), x.clone(), x, TOKENS, None, matrix(1, WIDTH, of=torch.float32))
    bits = weight.view({2: torch.int16, 4: torch.int32}[weight.element_size()])
    pairs = torch.tensor([[0, 1]])
    yield partial(swap.launch, [bits], [pairs], [tuple(block_layout(bits, "column", 1))])
    if capability >= FLOAT8:
        eight = matrix(TOKENS, WIDTH, of=torch.float8_e4m3fn)
        yield partial(float8.quantize_rows, x, None, eight, rstd[:, None], 448.0, 1e-12)
        wide = matrix(WIDTH, WIDTH, of=torch.float8_e4m3fn)
        yield partial(float8.quantize_transposed, weight, matrix(WIDTH, of=torch.float32), wide)


def main(capability: int) -> None:
    driver.set_active(Target(capability))
    # Ops take operands on the CPU for it.
    backend._why_not = lambda name, tensor: None
    shared: dict[str, int] = {}

    def compiled(self: JITFunction, grid: Any) -> Callable[..., Any]:
        def launch(*args: Any, **options: Any) -> Any:
            kernel = self.run(*args, grid=grid, warmup=True, **options)
            name = name_of(self)
            assert kernel.asm["cubin"], name
            shared[name] = max(shared.get(name, 0), kernel.metadata.shared)
            return kernel

        return launch

    JITFunction.__getitem__ = compiled
    for dtype in (torch.bfloat16, torch.float32):
        for launch in launches(capability, dtype):
            launch()
    print(json.dumps({"shared": shared, "kernels": sorted(kernels())}))


if __name__ == "__main__":
    main(int(sys.argv[1]))
