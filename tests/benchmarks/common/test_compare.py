"""The guard against regressions: what counts as worse, and what can be compared."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.common.command import result_of
from benchmarks.common.compare import Ratio, card, comparison, of_times, regressed, worse
from benchmarks.common.identity import ROOT
from benchmarks.common.measure import quartiles, summarised
from benchmarks.infer.goals import infer_ratios
from benchmarks.kernels.goals import kernel_ratios
from benchmarks.prune.goals import prune_ratios
from gisp.cli import main
from gisp.errors import GispError

H100 = "NVIDIA H100 80GB HBM3"


def test_quartiles_lie_within_the_repetitions() -> None:
    assert quartiles([3.0]) == (3, 3)
    found = summarised([1.0, 2.0, 3.0, 4.0, 100.0])
    assert found == {"median_ms": 3, "q1_ms": 2, "q3_ms": 4, "min_ms": 1, "max_ms": 100, "repetitions": 5}


def test_a_ratio_takes_the_noise_of_both_its_times() -> None:
    own, baseline = summarised([9.0, 10.0, 11.0]), summarised([18.0, 20.0, 22.0])
    assert of_times(own, baseline) == Ratio(2, 19 / 10.5, 21 / 9.5)
    for row in (own, baseline):
        del row["q1_ms"], row["q3_ms"]
    assert of_times(own, baseline) == Ratio(2, 18 / 11, 22 / 9)


@pytest.mark.parametrize(("new", "is_worse"), [(Ratio(1.5, 1.4, 1.6), True), (Ratio(1.7, 1.6, 1.9), False)])
def test_worse_is_below_the_noise_of_both(new: Ratio, is_worse: bool) -> None:
    old = Ratio(2.0, 1.8, 2.2)
    assert worse(new, old) == is_worse
    shown, found = comparison({"a": new, "new": old}, {"a": old, "gone": old})
    assert found == is_worse and ("WORSE" in shown) == is_worse
    assert "gone" not in shown and "new" not in shown.splitlines()[-1]
    assert not comparison({"a": old}, {"a": new})[1]


def test_nothing_in_common_is_refused() -> None:
    with pytest.raises(GispError, match="nothing to compare"):
        comparison({"a": Ratio(1, 1, 1)}, {"b": Ratio(1, 1, 1)})


@pytest.mark.parametrize(
    ("device", "folder"),
    [(H100, "h100"), ("NVIDIA H200", "h200"), ("NVIDIA A100-SXM4-80GB", "a100"), ("NVIDIA B200", "b200"),
     ("NVIDIA GeForce RTX 5090", "rtx-5090"), ("NVIDIA L40S", "l40s"), ("x86_64", "cpu"), ("cpu", "cpu")],
)  # fmt: skip
def test_cards(device: str, folder: str) -> None:
    assert card(device) == folder


def result(device: str, speed: float) -> dict[str, Any]:
    return {"benchmark": "b", "identity": {"device": device}, "speed": speed}


def ratios(found: dict[str, Any]) -> dict[str, Ratio]:
    return {"speed": Ratio(found["speed"], found["speed"], found["speed"])}


def test_results_of_one_card_are_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "old.json"
    path.write_text(json.dumps(result(H100, 2)))
    assert not regressed(Namespace(compare=None, source=None), result(H100, 1), ratios)
    assert regressed(Namespace(compare=path, source=None), result(H100, 1), ratios)
    assert not regressed(Namespace(compare=path, source=None), result("NVIDIA H100 PCIe", 2), ratios)
    with pytest.raises(GispError, match="was measured on NVIDIA H100 80GB HBM3, not on NVIDIA H200"):
        regressed(Namespace(compare=path, source=None), result("NVIDIA H200", 2), ratios)
    with pytest.raises(GispError, match=r"cannot read .*results.h100.b\.json"):
        regressed(Namespace(compare=Path("last"), source=None), result(H100, 2), ratios)


@pytest.mark.parametrize(
    ("name", "of", "least"),
    [("kernels", kernel_ratios, 100), ("prune", prune_ratios, 2), ("prune-8b", prune_ratios, 3)],
)
def test_kept_results_have_ratios(name: str, of: Any, least: int) -> None:
    kept = json.loads((ROOT / "benchmarks" / "results" / "h100" / f"{name}.json").read_text())
    found = of(kept)
    assert len(found) >= least
    assert all(0 < ratio.low <= ratio.value <= ratio.high for ratio in found.values())


def test_ratios_of_sizes_and_shared_runs() -> None:
    dense = {"asked": 0.0, "times": {"prefill": summarised([4.0, 4.0])}}
    half = {"asked": 0.5, "times": {"prefill": summarised([2.0, 2.0])}}
    models = [{"model": "m", "rows": [dense, half]}]
    assert infer_ratios({"models": models}) == {"m at 0.5, prefill": Ratio(2, 2, 2)}
    replicas = [
        {"model": "m", "gpus": n, "slices": s, "step_seconds_dense": t, "step_quartiles_dense": [t, t]}
        for n, s, t in ((1, None, 4.0), (2, 8, 2.0))
    ]
    steps = [{"step_rows": [{"step_seconds": 9.0}, {"step_seconds": seconds}]} for seconds in (1.0, 2.0)]
    offload = [{"model": "m", "resident": steps[0], "offloaded": steps[1]}, {"model": "n", "offloaded": None}]
    found = prune_ratios({"runs": [], "replicas": replicas, "offload": offload})
    assert found == {"m on 2 GPUs, dense step": Ratio(2, 2, 2), "m offloaded, dense step": Ratio(0.5, 0.5, 0.5)}


@pytest.mark.parametrize("damage", ["rows", "identity", "times"])
@pytest.mark.parametrize("name", ["kernels", "embed", "infer", "prune"])
def test_damaged_results_are_one_line(
    name: str, damage: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sound = next((ROOT / "benchmarks" / "results").glob(f"h?00/{name}.json"))
    found = json.loads(sound.read_text())
    rows = next(entry for entry in ("rows", "models", "runs") if entry in found)
    if damage == "rows":
        found[rows] = [5]
    elif damage == "identity":
        found["identity"] = []
    else:
        found[rows] = [{"model": "a"}]
    path = tmp_path / "damaged.json"
    path.write_text(json.dumps(found))
    for command in (["--from", str(sound), "--compare", str(path)], ["--from", str(path), "--compare", str(sound)]):
        assert main(["bench", name, *command]) == 2
        told = capsys.readouterr().err
        # Rows of some benchmarks need no times.
        lines = (f"error: {path} is corrupt: ", "error: nothing to compare: ")
        assert told.startswith(lines) and told.count("\n") == 1


def test_what_cannot_be_compared_is_refused_before_it_is_measured(tmp_path: Path) -> None:
    path = tmp_path / "old.json"
    path.write_text(json.dumps({"benchmark": "b", "identity": {"device": H100}}))
    args = Namespace(compare=path, source=None, out=None)
    with pytest.raises(GispError, match=r"old\.json is corrupt: speed is missing"):
        result_of(args, "b", lambda: pytest.fail("it was measured"), ratios)
