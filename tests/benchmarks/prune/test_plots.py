"""Pictures of whole runs."""

from __future__ import annotations

from pathlib import Path

from benchmarks.prune.plots import write_plots


def test_a_run_that_failed_is_not_drawn(tmp_path: Path) -> None:
    assert write_plots({"runs": [{"model": "tiny", "error": "gone"}]}, tmp_path / "p.json") == []
