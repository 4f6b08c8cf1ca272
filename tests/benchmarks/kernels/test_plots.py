"""Pictures of kernels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.common.measure import Ceilings
from benchmarks.common.task import with_speedups
from benchmarks.kernels.plots import write_plots


def test_pictures_of_kernels(tmp_path: Path) -> None:
    shape = {"model": "llama-2-13b", "rows": 64, "width": 32, "kept": 1.0}
    rows: list[dict[str, Any]] = []
    for tokens in (512, 2048):
        rows += with_speedups(
            [
                {**shape, "op": "wgrad_importance", "projection": "o", "tokens": tokens, "implementation": name}
                | {"median_ms": ms, "percent_of_matmul": 50.0 / ms}
                for name, ms in (("auto", 1.0), ("cublas + eager", 2.0), ("cublas alone", 0.9))
            ],
            "cublas + eager",
        )
    rows += [{**shape, "op": "swiglu", "implementation": "auto", "median_ms": 1.0, "percent_of_copy": 90.0}]
    # Rows without a weight of one shape.
    measured = {
        "model": "llama-2-13b",
        "kept": 0.52,
        "implementation": "auto",
        "median_ms": 1.0,
        "percent_of_copy": 90.0,
    }
    rows += [{**measured, "op": "gate_grads", "projection": "o", "tokens": n, "width": 64} for n in (2048, 8192)]
    rows += [{**measured, "op": "layer_reduce", "projection": "layer"}]
    rows += [{**shape, "op": "rotary", "implementation": "auto", "red": "wrong"}]
    peak = Ceilings(800, 4000)
    result = {"identity": {}, "ceilings": vars(peak), "rows": rows}
    paths = write_plots(result, tmp_path / "k.json")
    assert [path.name for path in paths] == ["k-scores.png", "k-reduction.png", "k-elementwise.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths)
