"""A tiny measurement that really happens, its goals, and the guard against an earlier one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.common.goals import goal_table
from benchmarks.embed.goals import embed_goals, embed_ratios
from benchmarks.embed.ways import GATE_GRADIENTS, GATE_PARAMETERS, GRAD, PASS, PRODUCTS, STREAM, WAYS
from gisp.cli import main


def test_a_tiny_run_writes_its_result(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "r.json"
    asked = ["bench", "embed", "--model", "tiny", "--device", "cpu", "--layers", "1", "--tokens", "16,32"]
    assert main([*asked, "--repetitions", "1", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    result = json.loads(out.read_text())
    assert {(row["tokens"], row["way"]) for row in result["rows"]} >= {(n, way) for n in (16, 32) for way in WAYS}
    assert all(row["min_ms"] <= row["q1_ms"] <= row["median_ms"] <= row["q3_ms"] for row in result["rows"])
    assert main(["bench", "embed", "--from", str(out), "--goals", "--compare", str(out)]) == 0
    again = capsys.readouterr().out
    assert again.splitlines()[0] in printed
    assert f"tiny 16, {STREAM} over {GRAD}" in again and f"tiny 32, {GATE_GRADIENTS} over {GATE_PARAMETERS}" in again
    for row in result["rows"]:
        if row["way"] == STREAM:
            row |= {key: 0.01 * row[key] for key in ("median_ms", "q1_ms", "q3_ms")}
    out.write_text(json.dumps(result))
    second = tmp_path / "s.json"
    assert main([*asked, "--repetitions", "1", "--out", str(second), "--compare", str(out)]) == 1
    compared = [line for line in capsys.readouterr().out.splitlines() if f"{STREAM} over {GRAD}" in line]
    assert second.is_file() and len(compared) == 2 and all("WORSE" in line for line in compared)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "huge"], "unknown model 'huge'"),
        (["--tokens", "12,x"], "--tokens is '12,x'"),
        (["--tokens", "0"], "give numbers above 0"),
        (["--layers", "0"], "--layers"),
        (["--compare", "no-such-file"], "cannot read no-such-file"),
    ],
)
def test_bad_options(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "embed", *arguments]) == 2
    assert message in capsys.readouterr().err


def rows(tokens: int, times: dict[str, float], extra: dict[str, int]) -> list[dict[str, Any]]:
    found = []
    for way, (_, baseline) in WAYS.items():
        row = {"model": "m", "tokens": tokens, "way": way, "extra_bytes": extra.get(way, 0), "repetitions": 5}
        row |= dict.fromkeys(("median_ms", "q1_ms", "q3_ms", "min_ms", "max_ms"), times[way])
        if baseline is not None:
            row |= {"baseline": baseline, "speedup": times[baseline] / times[way]}
        found.append(row)
    return found


def test_goals_take_the_worst_place() -> None:
    times = {PASS: 2.0, PRODUCTS: 3.0, GRAD: 12.0, STREAM: 4.0, GATE_PARAMETERS: 3.0, GATE_GRADIENTS: 2.5}
    slower = {**times, STREAM: 6.0}
    extra = {GRAD: 5 * 10**9, STREAM: 5 * 10**7, GATE_PARAMETERS: 10**8, GATE_GRADIENTS: 0}
    found = [*rows(512, times, extra), *rows(2048, slower, extra), *rows(8192, {**times, STREAM: 11.0}, extra)]
    over, alone, memory, gates, gates_alone, gate_memory = embed_goals(found)
    assert (over.worst, over.where, over.met) == (2.0, "m 2048", False)
    assert alone.worst == (12 - 2) / (6 - 2)
    assert memory.worst == 0.05 and memory.met
    assert gates.worst == pytest.approx(1.2) and gates_alone.worst == 2.0 and gates_alone.met
    assert gate_memory.worst == -0.1 and gate_memory.met
    # A target of 0 has no fraction to be missed by.
    assert " met " in goal_table([gate_memory]) and "%" not in goal_table([gate_memory])
    assert embed_ratios({"rows": found})[f"m 512, {STREAM} over {GRAD}"].value == 3
    assert all(goal.worst is None for goal in embed_goals([]))
