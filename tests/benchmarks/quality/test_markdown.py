"""Markdown tables and the picture of a study's result."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.quality.cells import Cell
from benchmarks.quality.markdown import main, merged, tables
from gisp.errors import GispError


def result_of(*ways: tuple[str, int, float, float]) -> dict[str, Any]:
    """Perplexity and accuracy by way and seed, at 50 %; with least squares half the perplexity in 3 seconds."""
    cells = []
    for name, seed, value, acc in ways:
        figures = {"perplexity": value, "perplexity wiki 128": value, "acc piqa": acc}
        point = {"asked": 0.5, "compensation": None, "tokens": 2_000_000, "seconds": 10.0, **figures}
        better = {"perplexity": value / 2, "perplexity wiki 128": value / 2, "compensation_seconds": 3.0}
        points = [point, {**point, "compensation": {"method": "lsq"}, **better}]
        cells.append({**Cell("criteria", name, {}, seed).to_dict(), "points": points})
    return {
        "benchmark": "quality",
        "identity": {"device": "cpu", "commit": "abc"},
        "setting": {"model": "m", "dtype": "float32", "calibration": ["c.jsonl"], "seq_len": 512},
        "dense": {"perplexity": 5.0, "perplexity wiki 128": 5.0, "chance piqa": 0.5, "acc piqa": 0.7},
        "cells": cells,
    }


def test_tables_hold_every_measure_best_first() -> None:
    result = result_of(("fast", 0, 10.0, 0.6), ("fast", 1, 12.0, 0.6), ("flap", 0, 30.0, 0.55))
    result["cells"].append({**Cell("criteria", "owl", {}, 0).to_dict(), "error": "out of memory"})
    lines = tables(result).splitlines()
    assert "| perplexity wiki 128 (dense 5.00) | 50 % | tokens | seconds | seeds |" in lines
    first = lines.index("| fast + lsq | 5.50 (1.00) | 2.00M | 10 | 2 |")
    assert lines[first + 1 : first + 4] == [
        "| fast | 11.00 (2.00) | 2.00M | 10 | 2 |",
        "| flap + lsq | 15.00 | 2.00M | 10 | 1 |",
        "| flap | 30.00 | 2.00M | 10 | 1 |",
    ]
    assert (
        "| fast | 60.0 | 50.0 |" in lines and "| dense | 70.0 | 100 |" in lines and "| guessing | 50.0 | 0 |" in lines
    )
    assert "| fast + lsq | 13 s: 5.5 |" in lines and "| fast | 10 s: 11.0 |" in lines
    assert lines[-1] == "- criteria/owl/0: out of memory"


def test_results_of_one_setting_are_one_and_others_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one, two = result_of(("fast", 0, 10.0, 0.6)), result_of(("fast", 0, 12.0, 0.6), ("flap", 0, 9.0, 0.6))
    assert [cell["points"][0]["perplexity"] for cell in merged([one, two])["cells"]] == [12.0, 9.0]
    for name, result in (("one", one), ("two", two)):
        (tmp_path / f"{name}.json").write_text(json.dumps(result))
    assert main([*(str(tmp_path / f"{n}.json") for n in ("one", "two")), "--png", str(tmp_path / "p.png")]) == 0
    assert "| flap | 9.00 |" in capsys.readouterr().out
    assert (tmp_path / "p.png").read_bytes()[:4] == b"\x89PNG"
    other = copy.deepcopy(two)
    other["setting"]["model"] = "n"
    with pytest.raises(GispError, match="differ in model"):
        merged([one, other])
    (tmp_path / "two.json").write_text(json.dumps({**two, "dense": {"error": "x"}}))
    with pytest.raises(GispError, match=r"two\.json has no figures of the dense model"):
        main([str(tmp_path / "two.json")])
