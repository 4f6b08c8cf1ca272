"""Launches of every Triton kernel for a GPU that need not be there, by Triton's JIT and then by its compiled forms.

Prints JSON: kernels to which they do not pass the same, and what a pass compiled ahead of its time. Runs in a process
of its own, as ``compile_kernels.py`` does.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
import triton
from compile_kernels import TOKENS, WIDTH, Target, launches
from transformers import LlamaConfig, LlamaForCausalLM
from triton.runtime import driver

from gisp.model.structures import map_model
from gisp.score.fused import ImportancePass, MicroBatch
from gisp_kernels import abs_weighted_reduce, backend, forms
from gisp_kernels.triton.decoder import rms_norm, swiglu

# One of those that test_compile.py compiles for: most code is there then.
CAPABILITY = 100
launched: list[tuple[Any, ...]] = []
_handles = itertools.count(1)


class Loader:
    """Stands in for the part of the driver that loads machine code: every code has a handle of its own."""

    def load_binary(self, *_: Any) -> tuple[int, ...]:
        return 1, next(_handles), 32, 0, 1024

    def get_device_properties(self, _: int) -> dict[str, int]:
        return {"max_shared_mem": 232448}


class Launcher:
    """Notes what a launch passes: numbers and constants by value."""

    def __init__(self, src: Any, _: Any) -> None:
        self._name = src.fn.__name__
        self._kinds = list(src.signature.values())

    def __call__(self, *args: Any) -> None:
        # What Triton says of itself lies between the code and the kernel's own arguments.
        x, y, z, _, code = args[:5]
        own = args[-len(self._kinds) :]
        values = [self._value(value, kind) for value, kind in zip(own, self._kinds, strict=True)]
        launched.append((self._name, code, x, y, z, *values))

    def _value(self, value: Any, kind: Any) -> Any:
        if isinstance(kind, tuple):
            return tuple(map(self._value, value, kind))
        # A descriptor of memory is passed by the JIT alone.
        return "memory" if str(kind).startswith(("*", "tensordesc")) else value


class LaunchTarget(Target):
    """A GPU that is told what it would launch."""

    utils = Loader()
    launcher_cls = Launcher


def taken(run: Callable[[], Any]) -> list[tuple[Any, ...]]:
    """The launches of a call."""
    launched.clear()
    run()
    return list(launched)


def odd_launches(dtype: torch.dtype) -> Iterator[Callable[[], Any]]:
    """Launches of operands that have forms of their own: other alignments and strides, extents of 1."""
    wide = torch.zeros(TOKENS, 2 * WIDTH, dtype=dtype)
    for start, stop in ((0, WIDTH), (1, WIDTH + 1), (8, WIDTH + 8), (0, WIDTH - 1)):
        part = wide[:, start:stop]
        yield partial(swiglu.forward, part, part, torch.zeros_like(part))
        yield partial(rms_norm.apply_norm, part, wide[:, 0].float(), part[0], torch.zeros_like(part))
    weight = torch.zeros(64, 64, dtype=dtype)
    for one in (weight, weight[:, ::2], weight[:, ::16], weight.t(), weight[1:]):
        for out in (torch.zeros(one.shape[0]), torch.zeros(one.shape[0], 16)[:, 0], torch.zeros(65)[1:][: len(one)]):
            yield partial(abs_weighted_reduce, one, one, out=out, backend="triton")


def differing(dtypes: Sequence[torch.dtype]) -> list[str]:
    """Kernels to which Triton's JIT and the forms do not pass the same, or not in the same code."""
    calls = [call for dtype in dtypes for made in (launches(CAPABILITY, dtype), odd_launches(dtype)) for call in made]
    by_jit, by_form = [], []
    for call in calls:
        forms._forms.clear()
        by_jit.append(taken(call))
    for call in calls:
        call()
    for call in calls:
        by_form.append(taken(call))
    assert any(forms._forms) and all(by_jit)
    return [one[0][0] for one, other in zip(by_jit, by_form, strict=True) if one != other]


def ahead() -> dict[str, int]:
    """Kernels launched and compiled while a pass compiles ahead, and compiled by the pass itself afterwards."""
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        use_cache=False,
    )
    model_map = map_model(LlamaForCausalLM(config).eval())
    scored = [(group.name, group.count) for group in model_map.groups]
    ids = torch.zeros(1, 16, dtype=torch.int64)
    compiled: list[str] = []
    triton.knobs.compilation.listener = lambda *, src, **_: compiled.append(src.name)

    def run() -> int:
        compiled.clear()
        ImportancePass(model_map).gate_sums([MicroBatch(ids, ids, [1.0])], scored)
        return len(compiled)

    launches_ahead = len(taken(lambda: ImportancePass(model_map).compile_ahead(ids)))
    compiled_ahead = len(compiled)
    return {"launched_ahead": launches_ahead, "compiled_ahead": compiled_ahead, "compiled_later": run()}


def main() -> None:
    driver.set_active(LaunchTarget(CAPABILITY))
    backend._why_not = lambda name, tensor: None
    for owner, name in ((torch.Tensor, "get_device"), (forms, "_current_device"), (torch.cuda, "set_device")):
        setattr(owner, name, lambda *_: 0)
    forms._CUDA = True
    of_pass = ahead()
    print(json.dumps({"differing": differing((torch.bfloat16, torch.float32)), **of_pass}))


if __name__ == "__main__":
    main()
