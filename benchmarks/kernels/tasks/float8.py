"""Products in 8 bits as the importance pass makes them, rounding of both operands included, beside cuBLAS in 16."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from benchmarks.common.registry import DENSE, HALF, MODELS, REAL, kept_channels
from benchmarks.common.task import AUTO, EAGER, Implementation, Prepared, Task, random_matrix
from gisp_kernels.ops import float8

TOKENS = 8192
CUBLAS = "cublas, 16 bits"
# A product may add a quarter to the error that rounding its operands alone makes.
SLACK = 1.25


def tasks(quick: bool) -> list[Task]:
    """Tasks of this file."""
    found = []
    for name in REAL[:1] if quick else REAL:
        model = MODELS[name]
        for kept in (DENSE,) if quick else (DENSE, HALF):
            channels = kept_channels(model, kept)
            shapes = {"gate+up": (2 * channels, model.hidden), "down": (model.hidden, channels)}
            for projection, (rows, width) in shapes.items():
                labels = {"model": name, "projection": projection, "rows": rows, "width": width, "kept": kept}
                prepare = partial(_prepare_product, TOKENS, rows, width)
                found.append(Task("float8_product", {**labels, "tokens": TOKENS}, prepare))
        # What gate and up read, and their gradients, whose columns are scaled.
        for width, scaled in ((model.hidden, False), (2 * model.channels, True)):
            labels = {"model": name, "rows": TOKENS, "width": width, "kept": DENSE}
            found.append(Task("quantize_rows", labels, partial(_prepare_rows, TOKENS, width, scaled)))
        weight = {"model": name, "rows": model.channels, "width": model.hidden, "kept": DENSE}
        found.append(Task("quantize_transposed", weight, partial(_prepare_turned, model.channels, model.hidden)))
    return found


def product(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """``x @ w.T`` in 8 bits."""
    weight, scale = float8.quantize_rows(w)
    return float8.scaled_product(*float8.quantize_rows(x), weight, scale, x.dtype)


def _prepare_product(tokens: int, rows: int, width: int) -> Prepared:
    x, w = random_matrix(tokens, width), random_matrix(rows, width)
    rounded = (*float8.quantize_rows(x), *float8.quantize_rows(w))
    parts: dict[str, Implementation] = {"8-bit product alone": lambda x, w: float8.scaled_product(*rounded, x.dtype)}
    if x.is_cuda:
        one = torch.ones((), device=x.device)
        left, right = rounded[0], rounded[2].t()
        parts["the same, a scale per tensor"] = lambda x, w: torch._scaled_mm(
            left, right, scale_a=one, scale_b=one, out_dtype=x.dtype, use_fast_accum=True
        )

    def check(implementation: Implementation) -> None:
        # The corner is as good as the whole, and float64 takes long.
        corner, columns = x[:512].double(), w[:512].double()
        truth = corner @ columns.t()
        (xq, xs), (wq, ws) = float8.quantize_rows(x[:512]), float8.quantize_rows(w[:512])
        reference = (xq.double() * xs.double()[:, None]) @ (wq.double() * ws.double()[:, None]).t()
        allowed = SLACK * float((reference - truth).norm())
        error = float((implementation(x, w)[:512, :512].double() - truth).norm())
        assert error <= allowed, f"the product is off by {error:.3g}, allowed {allowed:.3g}"

    return Prepared(
        inputs=(x, w),
        implementations={AUTO: product, CUBLAS: lambda x, w: x @ w.t()},
        check=check,
        baseline=CUBLAS,
        flops=2 * tokens * rows * width,
        parts=parts,
    )


def _prepare_rows(rows: int, width: int, scaled: bool = False) -> Prepared:
    x = random_matrix(rows, width)
    column = torch.rand(width, device=x.device) if scaled else None
    plain = partial(float8.quantize_rows, backend="reference")
    return _rounding(x, lambda x: float8.quantize_rows(x, column)[0], lambda x: plain(x, column)[0])


def _prepare_turned(rows: int, width: int) -> Prepared:
    w = random_matrix(rows, width)
    scale = float8.quantize_rows(w)[1]
    plain = partial(float8.quantize_transposed, backend="reference")
    return _rounding(w, lambda w: float8.quantize_transposed(w, scale), lambda w: plain(w, scale))


def _rounding(x: torch.Tensor, ours: Implementation, plain: Callable[[torch.Tensor], torch.Tensor]) -> Prepared:
    expected = plain(x)

    def check(implementation: Implementation) -> None:
        found = implementation(x)
        assert torch.equal(found.view(torch.uint8), expected.view(torch.uint8)), "the rounded numbers differ"

    moved = x.numel() * (x.element_size() + 1)
    return Prepared((x,), {AUTO: ours, EAGER: plain}, check, baseline=EAGER, bytes=moved)
