"""Triton's CPU interpreter for tests: switched on where there is no GPU, repaired, and run in any order of programs.

Imported before anything that may import triton: it reads its switch when a kernel is defined, its own included.
"""

from __future__ import annotations

import contextlib
import os
import random
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch

HAS_CUDA = torch.cuda.is_available()
if not HAS_CUDA:
    os.environ["TRITON_INTERPRET"] = "1"


def repair_interpreter() -> None:
    """Let Triton's interpreter do what compiled kernels do, where it does not.

    It holds scalars as arrays of one element, which NumPy from 2.4 on no longer turns into an ``int`` for a loop. Its
    float8 of float32 loses carries and NaN; torch rounds instead.
    """
    from triton import language
    from triton.runtime import interpreter

    convert = interpreter._convert_float

    def round_to(data: Any, input_dtype: Any, output_dtype: Any, mode: Any) -> Any:
        if (input_dtype, output_dtype) != (language.float32, language.float8e4nv):
            return convert(data, input_dtype, output_dtype, mode)
        return torch.from_numpy(data.view("float32").copy()).to(torch.float8_e4m3fn).view(torch.uint8).numpy()

    interpreter._convert_float = round_to
    original = interpreter._patch_lang_tensor

    def patch(tensor: Any, scope: Any) -> None:
        original(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patch


@contextlib.contextmanager
def shuffled_grid(seed: int = 0) -> Iterator[None]:
    """Run the programs of interpreted kernels in a random order.

    Programs normally run in ascending order, which hides a kernel that relies on it.
    """
    from triton.runtime import interpreter

    builder = interpreter.interpreter_builder
    visit, dims = builder.set_grid_idx, builder.set_grid_dim
    shuffle = random.Random(seed)
    order: dict[tuple[int, int, int], tuple[int, int, int]] = {}

    def set_grid_dim(x: int, y: int, z: int) -> None:
        cells = [(i, j, k) for i in range(x) for j in range(y) for k in range(z)]
        order.clear()
        order.update(zip(cells, shuffle.sample(cells, len(cells)), strict=True))
        dims(x, y, z)

    def set_grid_idx(x: int, y: int, z: int) -> None:
        visit(*order[x, y, z])

    with (
        mock.patch.object(builder, "set_grid_dim", set_grid_dim),
        mock.patch.object(builder, "set_grid_idx", set_grid_idx),
    ):
        yield
