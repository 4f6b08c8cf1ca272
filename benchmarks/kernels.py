"""Importance kernels on real shapes, against what plain PyTorch offers.

    python -m benchmarks.kernels --out RESULT.json [--quick] [--sweep]

Every implementation is first compared with the plain torch version and the float64 truth on the very inputs to be
timed; a wrong one ends the program. ``--sweep`` also times other tile configurations of the fused kernel.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks.identity import identity
from benchmarks.measure import Ceilings, Inputs, ceilings, measure, rotation
from benchmarks.registry import TOKENS, Case, all_cases, quick_cases
from gisp_kernels import abs_weighted_reduce, reference, wgrad_importance
from gisp_kernels.importance import prefer_fused, wgrad_importance_op
from gisp_kernels.testing import Truth, assert_error_budget, reduce_truth, wgrad_truth

DTYPE = torch.bfloat16
QUICK_TOKENS = (512, 2048, 8192)
Implementation = Callable[..., torch.Tensor]


def reduce_eager(weight: torch.Tensor, grad: torch.Tensor, axis: str, block: int) -> torch.Tensor:
    """The reduction as plain PyTorch writes it."""
    lines = (weight.float() * grad.float()).abs().sum(dim=1 if axis == "row" else 0)
    return lines.view(-1, block).sum(dim=1)


reduce_compiled = torch.compile(reduce_eager, dynamic=True)


def reductions(case: Case) -> dict[str, Implementation]:
    """Implementations of the reduction alone: (weight, grad) to scores."""
    axis, block = case.axis, case.block
    return {
        "triton": lambda w, g: abs_weighted_reduce(w, g, axis=axis, block=block, backend="triton"),
        "eager": lambda w, g: reduce_eager(w, g, axis, block),
        "compiled": lambda w, g: reduce_compiled(w, g, axis, block),
    }


def wgrad_implementations(case: Case) -> dict[str, Implementation]:
    """Implementations of the scores from activations: (grad_output, input, weight) to scores."""
    axis, block = case.axis, case.block
    count = (case.rows if axis == "row" else case.width) // block

    def cublas_and_ours(dy: torch.Tensor, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        out = torch.zeros(count, device=w.device)
        wgrad_importance_op(out, dy, x, w, axis, block, "matmul")
        return out

    return {
        "fused triton": lambda dy, x, w: wgrad_importance(dy, x, w, axis=axis, block=block, backend="triton"),
        "cublas + triton": cublas_and_ours,
        "cublas + compiled": lambda dy, x, w: reduce_compiled(w, reference.weight_grad(dy, x), axis, block),
        "cublas + eager": lambda dy, x, w: reduce_eager(w, reference.weight_grad(dy, x), axis, block),
    }


def gate(implementations: dict[str, Implementation], inputs: Inputs, expected: torch.Tensor, truth: Truth) -> None:
    """Refuse to go on unless every implementation errs no more than ``expected`` does.

    Raises:
        SystemExit: naming the implementation.
    """
    for name, implementation in implementations.items():
        try:
            assert_error_budget(implementation(*inputs), expected, truth)
        except AssertionError as error:
            raise SystemExit(f"error: {name} is wrong and will not be timed: {error}") from error


def time_wgrad(case: Case, tokens: int, peak: Ceilings) -> list[dict[str, Any]]:
    """Rows of scores-from-activations for one case."""
    inputs = _operands(case, tokens)
    dy, x, weight = inputs
    implementations = wgrad_implementations(case)
    expected = wgrad_importance(dy, x, weight, axis=case.axis, block=case.block, backend="reference")
    gate(implementations, inputs, expected, wgrad_truth(dy, x, weight, case.axis, case.block))
    implementations["cublas alone"] = lambda dy, x, w: reference.weight_grad(dy, x)
    copies = rotation(inputs)
    rows = []
    for name, implementation in implementations.items():
        result = measure(implementation, inputs, copies)
        tflops = 2 * tokens * case.rows * case.width / result.median_ms / 1e9
        rows.append(
            {
                "op": "wgrad_importance",
                **asdict(case),
                "tokens": tokens,
                "implementation": name,
                "auto": name == ("fused triton" if prefer_fused(tokens, DTYPE) else "cublas + triton"),
                **asdict(result),
                "tflops": tflops,
                "percent_of_matmul": 100 * tflops / peak.matmul_tflops,
            }
        )
    return rows


def time_reduction(case: Case, peak: Ceilings) -> list[dict[str, Any]]:
    """Rows of the reduction alone for one case; bytes are those of W and G, read once."""
    weight, grad = (torch.randn(case.rows, case.width, device="cuda").to(DTYPE) for _ in range(2))
    truth = reduce_truth(weight, grad, case.axis, case.block)
    gate(reductions(case), (weight, grad), truth.scores.float(), truth)
    copies = rotation((weight, grad))
    rows = []
    for name, implementation in reductions(case).items():
        result = measure(implementation, (weight, grad), copies)
        gbs = 2 * weight.numel() * weight.element_size() / result.median_ms / 1e6
        rows.append(
            {
                "op": "abs_weighted_reduce",
                **asdict(case),
                "implementation": name,
                **asdict(result),
                "gbs": gbs,
                "percent_of_copy": 100 * gbs / peak.copy_gbs,
            }
        )
    return rows


def sweep(case: Case, tokens: int, peak: Ceilings) -> list[dict[str, Any]]:
    """Rows of the fused kernel under every configuration worth trying, fastest first."""
    from triton.runtime.errors import OutOfResources

    from gisp_kernels.triton_kernels import wgrad_importance as kernel

    inputs = _operands(case, tokens)
    dy, x, weight = inputs
    expected = wgrad_importance(dy, x, weight, axis=case.axis, block=case.block, backend="reference")
    truth = wgrad_truth(dy, x, weight, case.axis, case.block)
    copies = rotation(inputs)
    rows: list[dict[str, Any]] = []
    for config in kernel.sweep_configs():

        def run(dy: torch.Tensor, x: torch.Tensor, w: torch.Tensor, config: kernel.TileConfig = config) -> torch.Tensor:
            out = torch.zeros_like(expected)
            kernel.launch(out, dy, x, w, case.axis, case.block, config)
            return out

        row = {"op": "sweep", **asdict(case), "tokens": tokens, "config": asdict(config)}
        try:
            gate({str(config): run}, inputs, expected, truth)
        except OutOfResources as error:
            rows.append({**row, "skipped": str(error)})
            continue
        result = measure(run, inputs, copies)
        tflops = 2 * tokens * case.rows * case.width / result.median_ms / 1e9
        percent = 100 * tflops / peak.matmul_tflops
        rows.append({**row, **asdict(result), "tflops": tflops, "percent_of_matmul": percent})
    return sorted(rows, key=lambda row: row.get("median_ms", float("inf")))


def describe(row: dict[str, Any]) -> str:
    """One line of the table."""
    what = row["implementation"] if "implementation" in row else " ".join(str(v) for v in row["config"].values())
    shape = f"{row['model']:12s} {row['projection']:8s} {row['rows']:6d} x {row['width']:5d}"
    tokens = f"{row['tokens']:6d}" if "tokens" in row else f"{'':6s}"
    if "skipped" in row:
        return f"{shape} {tokens}  {what:22s} skipped: {row['skipped']}"
    speed = (
        f"{row['gbs']:7.0f} GB/s   {row['percent_of_copy']:5.1f} % of copy"
        if "gbs" in row
        else f"{row['tflops']:7.1f} TFLOP/s {row['percent_of_matmul']:4.1f} % of matmul"
    )
    mark = "*" if row.get("auto") else " "
    return f"{shape} {tokens} {mark}{what:22s} {row['median_ms']:9.4f} ms {speed} {row['extra_bytes'] / 2**20:9.1f} MiB"


def _operands(case: Case, tokens: int) -> Inputs:
    shapes = ((tokens, case.rows), (tokens, case.width), (case.rows, case.width))
    return tuple(torch.randn(shape, device="cuda", dtype=DTYPE) for shape in shapes)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernels", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--quick", action="store_true", help="a few shapes, about a minute")
    parser.add_argument("--sweep", action="store_true", help="also time other tile configurations")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        raise SystemExit("error: this benchmark needs a CUDA device")
    torch.manual_seed(0)
    peak = ceilings()
    print(f"ceilings: {peak.matmul_tflops:.0f} TFLOP/s bfloat16 8192^3, {peak.copy_gbs:.0f} GB/s copy")
    print("extra memory is the peak above the inputs; * marks what backend='auto' runs")
    rows: list[dict[str, Any]] = []

    def report(more: list[dict[str, Any]]) -> None:
        rows.extend(more)
        for row in more:
            print(describe(row), flush=True)

    for case in quick_cases() if args.quick else all_cases():
        report(time_reduction(case, peak))
        for tokens in QUICK_TOKENS if args.quick else TOKENS:
            report(time_wgrad(case, tokens, peak))
        torch.cuda.empty_cache()
    if args.sweep:
        for case in quick_cases()[1:3]:
            for tokens in (2048, 8192):
                report(sweep(case, tokens, peak))
    result = {"identity": identity(torch.device("cuda")), "ceilings": asdict(peak), "rows": rows}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(f"wrote {args.out}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
