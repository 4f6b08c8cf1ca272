"""Products over tokens of 16-bit factors on real shapes: second moments of an output projection at one half."""

from __future__ import annotations

from functools import partial

import torch

from benchmarks.common.registry import HALF, MODELS, REAL, kept_channels, kept_heads
from benchmarks.common.task import AUTO, Implementation, Prepared, Task, random_matrix
from gisp.model.modes import exact_products
from gisp_kernels.testing import product

TOKENS = (512, 16384)
QUICK_TOKENS = (16384,)
FLOAT32 = "float32 factors"


def tasks(quick: bool) -> list[Task]:
    """Tasks of this file."""
    found = []
    for tokens in QUICK_TOKENS if quick else TOKENS:
        for name in REAL[:1] if quick else REAL:
            model = MODELS[name]
            shapes = {"o": kept_heads(model, HALF) * model.head_dim, "down": kept_channels(model, HALF)}
            for projection, width in shapes.items():
                labels = {"model": name, "projection": projection, "tokens": tokens, "width": width, "kept": HALF}
                found.append(Task("products", labels, partial(_prepare, tokens, model.hidden, width)))
    return found


def product_float32(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """The product of converted factors, not on tensor cores."""
    with exact_products():
        return left.float().T @ right.float()


def _prepare(tokens: int, rows: int, width: int) -> Prepared:
    left, right = random_matrix(tokens, rows), random_matrix(tokens, width)
    truth = left.double().T @ right.double()

    def check(implementation: Implementation) -> None:
        torch.testing.assert_close(implementation(left, right).double(), truth, rtol=1e-4, atol=1e-5 * tokens)

    return Prepared(
        inputs=(left, right),
        implementations={AUTO: product, FLOAT32: product_float32},
        check=check,
        baseline=FLOAT32,
        flops=2 * tokens * rows * width,
    )
