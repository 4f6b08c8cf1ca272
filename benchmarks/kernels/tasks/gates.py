"""Gate gradients of second-order scores on real shapes: one read of an output projection's input and its gradient."""

from __future__ import annotations

from functools import partial

import torch

from benchmarks.common.measure import Inputs
from benchmarks.common.registry import DENSE, HALF, MODELS, REAL, kept_channels, kept_heads
from benchmarks.common.task import AUTO, COMPILED, EAGER, Implementation, Prepared, Task, random_matrix
from gisp_kernels import gate_grads
from gisp_kernels.testing import assert_error_budget, gate_truth

LENGTH = 256
TOKENS = (2048, 8192)
QUICK_TOKENS = (8192,)


def tasks(quick: bool) -> list[Task]:
    """Tasks of this file."""
    found = []
    for tokens in QUICK_TOKENS if quick else TOKENS:
        for name in REAL[:1] if quick else REAL:
            model = MODELS[name]
            for kept in (DENSE,) if quick else (DENSE, HALF):
                heads = kept_heads(model, kept)
                shapes = {"o": (heads * model.head_dim, model.head_dim), "down": (kept_channels(model, kept), 1)}
                for projection, (width, block) in shapes.items():
                    labels = {"model": name, "projection": projection, "tokens": tokens, "width": width, "kept": kept}
                    found.append(Task("gate_grads", labels, partial(_prepare, tokens // LENGTH, width, block)))
    return found


def gate_grads_eager(x: torch.Tensor, grad: torch.Tensor, block: int) -> torch.Tensor:
    """The sums as plain PyTorch writes them."""
    return (x.float() * grad.float()).sum(1).unflatten(1, (-1, block)).sum(2)


gate_grads_compiled = torch.compile(gate_grads_eager, dynamic=True)


def _prepare(sequences: int, width: int, block: int) -> Prepared:
    x, grad = (random_matrix(sequences * LENGTH, width).view(sequences, LENGTH, width) for _ in range(2))
    inputs: Inputs = (x, grad)
    truth = gate_truth(x, grad, block)
    expected = gate_grads(x, grad, block=block, backend="reference").flatten()

    def check(implementation: Implementation) -> None:
        assert_error_budget(implementation(*inputs).flatten(), expected, truth)

    return Prepared(
        inputs=inputs,
        implementations={
            AUTO: partial(gate_grads, block=block),
            COMPILED: lambda x, g: gate_grads_compiled(x, g, block),
            EAGER: lambda x, g: gate_grads_eager(x, g, block),
        },
        check=check,
        baseline=EAGER,
        bytes=2 * x.numel() * x.element_size(),
    )
