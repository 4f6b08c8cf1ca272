"""The report of a run folder: pictures, page, values, and folders that are no run."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from html import unescape
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
from report_cases import HEAD_DIM, HEADS, KV_HEADS, LAYERS, PARAMETERS, made_evaluations, make_run
from safetensors.numpy import load_file, save_file

from gisp.errors import GispError
from gisp.report.data import read_run
from gisp.report.html import step_rows
from gisp.report.plots import PICTURES, draw_scores, loss_reading, phase_seconds
from gisp.report.sizes import size_of
from gisp.report.style import LIGHT
from gisp.report.write import ReportFiles, write_report

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
FROM_METRICS = {picture.name for picture in PICTURES if "metrics.jsonl" in picture.absent}
ALL = [picture.name for picture in PICTURES]
UNEVALUATED = [name for name in ALL if name != "quality"]


def rows_of(html: str) -> dict[str, str]:
    """Name -> value of the two-column tables."""
    pairs = re.findall(r'<tr><th scope="row">(.*?)</th><td>(.*?)</td></tr>', html)
    return {unescape(name): unescape(value) for name, value in pairs}


def check_written(files: ReportFiles, folder: Path, names: list[str]) -> str:
    """Every named picture is a PNG, in the page too; the page."""
    assert [png.name for png in files.pngs] == [f"{name}.png" for name in names]
    assert all(png.parent == folder / "plots" and png.read_bytes().startswith(PNG_SIGNATURE) for png in files.pngs)
    html = files.html.read_text(encoding="utf-8")
    assert files.html == folder / "report.html"
    assert html.count("<img ") == len(names)
    return html


@dataclass(frozen=True)
class Made:
    """A run folder with its report."""

    folder: Path
    record: dict[str, Any]
    files: ReportFiles
    html: str


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A complete run of 60 steps with everything a run can have."""
    folder = tmp_path_factory.mktemp("run")
    record = make_run(folder, steps=60, evaluations=True, peak_bytes=3 * 2**29)
    files = write_report(folder)
    return Made(folder, record, files, files.html.read_text(encoding="utf-8"))


def test_full_run_writes_page_and_all_pictures(made: Made) -> None:
    html = check_written(made.files, made.folder, ALL)
    inputs = {"trajectory.json", "trajectory.safetensors", "metrics.jsonl", "evaluations.json"}
    assert {path.name for path in made.folder.iterdir()} == inputs | {"report.html", "plots"}
    assert html.index('alt="Quality against') < html.index('alt="Calibration loss')
    assert {"one-shot", "12.3300", "64.0000"} <= set(re.findall(r"<td[^>]*>(.*?)</td>", html))


def test_page_refers_to_nothing_outside(made: Made) -> None:
    html = made.html
    references = re.findall(r"""\b(?:src|srcset|href|action|data)\s*=\s*["']?([^"'\s>]+)""", html)
    # Light and dark, wide and narrow.
    assert len(references) == 4 * len(ALL)
    assert all(reference.startswith("data:image/png;base64,") for reference in references)
    assert "default-src 'none'" in html
    for word in ("<script src", "<link", "@import", "url(", "http:", "https:"):
        assert word not in html
    assert "<decoder>" not in html


def test_summary_equals_the_input(made: Made) -> None:
    record, rows = made.record, rows_of(made.html)
    last = record["steps"][-1]
    run = read_run(made.folder)
    after = run.stored([60])[0].parameters
    assert after > PARAMETERS - last["removed_parameters"]
    left = LAYERS * HEADS - last["heads_removed"]
    kv_before, kv_after = 2 * LAYERS * KV_HEADS * HEAD_DIM * 2, run.stored_kv_bytes(60)
    seconds = sum(step["seconds"] for step in record["steps"])
    assert rows["Base model"] == "/models/tiny <decoder>"
    assert rows["Preset"] == "fast"
    assert rows["Steps"] == "60"
    assert rows["Status"] == "complete after step 60"
    assert rows["Decoder sparsity"] == f"{100 * last['sparsity']:.2f} %"
    assert rows["Whole-model sparsity"] == f"{100 * last['model_sparsity']:.2f} %"
    assert rows["Parameters an export stores"] == f"{PARAMETERS:,} → {after:,} ({100 * after / PARAMETERS:.1f} %)"
    assert rows["Attention heads"].startswith(f"{LAYERS * HEADS} → {left} ")
    assert rows["KV cache per token of an export"].startswith(f"{kv_before:,} B → {kv_after:,} B ")
    assert rows["Calibration tokens, all steps"] == f"{60 * 8192:,}"
    assert rows["Total time of the steps"] == f"{seconds:,.1f} s (1 min 33 s)"
    assert rows["Peak GPU memory"] == "1.6 GB"
    assert rows["Versions"] == "python 3.12.3, torch 2.11.0, gisp-kernels 0.1.0"
    assert rows["engine"] == "stream"


def test_step_table_equals_the_input_in_at_most_25_rows(made: Made) -> None:
    record, html = made.record, made.html
    table = html[html.index("<summary>Steps</summary>") : html.index("<summary>Options</summary>")]
    rows = [re.findall(r"<td[^>]*>(.*?)</td>", row) for row in re.findall(r"<tr>(.*?)</tr>", table)[1:]]
    assert len(rows) == 25
    assert [rows[0][0], rows[-1][0]] == ["1", "60"]
    for row in rows:
        step = record["steps"][int(row[0]) - 1]
        assert row[1] == f"{100 * step['sparsity']:.2f} %"
        assert row[3:6] == [f"{step[name]:,}" for name in ("removed_parameters", "heads_removed", "channels_removed")]
        assert row[6] == f"{step['loss']:.4f}"
        assert row[9] == f"{read_run(made.folder).stored_kv_bytes(int(row[0])):,}"


def test_kept_fractions_follow_the_removal_steps(tmp_path: Path) -> None:
    record = make_run(tmp_path, empty_layer=2)
    run = read_run(tmp_path)
    kept = run.kept_fraction("channels")
    tensors = load_file(tmp_path / "trajectory.safetensors")
    assert kept.shape == (LAYERS, 13)
    for step in (0, 1, 7, 12):
        for layer in range(LAYERS):
            at = tensors[f"layers.{layer}.channels.removed_at"]
            assert kept[layer, step] == pytest.approx(np.mean((at == 0) | (at > step)), abs=1e-12)
    assert run.kept_fraction("heads")[2, -1] == 0
    assert run.kept_count("heads")[0] == LAYERS * HEADS - record["steps"][-1]["heads_removed"]


@pytest.mark.usefixtures("light_looks")
def test_layer_without_heads_is_drawn(tmp_path: Path) -> None:
    make_run(tmp_path, empty_layer=1)
    check_written(write_report(tmp_path), tmp_path, UNEVALUATED)


def test_loss_belongs_to_the_sparsity_before_the_step(tmp_path: Path) -> None:
    record = make_run(tmp_path, steps=3)
    before = read_run(tmp_path).sparsity_before()
    assert before.tolist() == [0.0, record["steps"][0]["sparsity"], record["steps"][1]["sparsity"]]


@pytest.mark.usefixtures("light_looks")
def test_single_step(tmp_path: Path) -> None:
    make_run(tmp_path, steps=1)
    html = check_written(write_report(tmp_path), tmp_path, UNEVALUATED)
    assert "Not evaluated yet." in html
    assert rows_of(html)["Steps"] == "1"


@pytest.mark.usefixtures("light_looks")
def test_cut_run_ignores_what_is_ahead_of_its_last_step(tmp_path: Path) -> None:
    make_run(tmp_path, steps=5, planned=20)
    tensors = load_file(tmp_path / "trajectory.safetensors")
    tensors["layers.0.channels.removed_at"] = tensors["layers.0.channels.removed_at"].copy()
    tensors["layers.0.channels.removed_at"][np.flatnonzero(tensors["layers.0.channels.removed_at"] == 0)[:3]] = 6
    save_file(tensors, tmp_path / "trajectory.safetensors")
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "loss": 2.')
    html = check_written(write_report(tmp_path), tmp_path, UNEVALUATED)
    assert rows_of(html)["Status"] == "unfinished after step 5 of 20"
    assert sorted(read_run(tmp_path).metrics) == [1, 2, 3, 4, 5]


@pytest.mark.usefixtures("light_looks")
def test_without_metrics_the_page_says_so(tmp_path: Path) -> None:
    make_run(tmp_path, metrics=False)
    html = check_written(write_report(tmp_path), tmp_path, [name for name in UNEVALUATED if name not in FROM_METRICS])
    assert html.count("Not shown: this run has no metrics.jsonl.") == len(FROM_METRICS)


@pytest.mark.usefixtures("light_looks")
def test_unusual_metrics_and_evaluations_are_drawn(tmp_path: Path) -> None:
    make_run(tmp_path, steps=3)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    lines[0]["threshold"] = None
    lines[1]["score_histogram"] = {"log10_edges": [0.0] * 41, "heads": [0] * 40, "channels": [0] * 40}
    lines[1]["score_histogram"]["not_positive"] = {"heads": 36, "channels": 7}
    lines[2]["seconds"] = {"forward_backward": 90.0, "sync": 0.5}
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    evaluations = [*made_evaluations(), {**made_evaluations()[-1], "perplexity": float("inf"), "window": 256}]
    (tmp_path / "evaluations.json").write_text(json.dumps(evaluations))
    html = check_written(write_report(tmp_path), tmp_path, ALL)
    assert ">not finite</td>" in html
    assert phase_seconds(read_run(tmp_path))["sync"].tolist() == [0.0, 0.0, 0.5]
    labels = draw_scores(read_run(tmp_path), LIGHT).axes[1].get_legend_handles_labels()[1]
    assert labels[:2] == ["heads (36 scored, 36 at or below 0)", "channels (7 scored, 7 at or below 0)"]
    for wrong in (5, None, {"heads": -1, "channels": 0}, {"heads": 1}):
        lines[1]["score_histogram"]["not_positive"] = wrong
        (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
        with pytest.raises(GispError, match="not_positive is"):
            read_run(tmp_path)


def test_same_run_gives_the_same_files_and_leaves_settings_alone(made: Made) -> None:
    before = dict(matplotlib.rcParams)
    contents = [path.read_bytes() for path in (made.files.html, *made.files.pngs)]
    second = write_report(made.folder)
    assert [path.read_bytes() for path in (second.html, *second.pngs)] == contents
    assert dict(matplotlib.rcParams) == before


@pytest.mark.parametrize("step", [0, 7, 12])
def test_slider_holds_what_each_layer_keeps(tmp_path: Path, step: int) -> None:
    make_run(tmp_path, evaluations=True)
    run = read_run(tmp_path)
    size = size_of(run, step)
    tensors = load_file(tmp_path / "trajectory.safetensors")
    for kind in ("heads", "channels"):
        left = [tensors[f"layers.{layer}.{kind}.removed_at"] for layer in range(LAYERS)]
        assert size[kind] == [int(((at == 0) | (at > step)).sum()) for at in left]
    assert size["parameters"] == f"{run.stored([step])[0].parameters:,}"
    assert size["kv"] == f"{run.stored_kv_bytes(step):,} B"
    assert size["figures"] == (
        "gisp: perplexity 5.8125 (texts/heldout.jsonl)" if not step else "Not evaluated at this size."
    )


@pytest.mark.parametrize(
    "objective, words", [("lm", "lower is better"), ("margin", "right answers minus that of wrong"), ("mine.loss", "")]
)
def test_the_loss_is_explained(tmp_path: Path, objective: str, words: str) -> None:
    make_run(tmp_path, steps=2, metrics=False)
    record = json.loads((tmp_path / "trajectory.json").read_text())
    record["config"]["objective"] = objective
    (tmp_path / "trajectory.json").write_text(json.dumps(record))
    run = read_run(tmp_path)
    assert words in loss_reading(run)
    assert bool(loss_reading(run)) == bool(words)


@pytest.mark.parametrize("steps, expected", [(1, [0]), (3, [0, 1, 2]), (49, list(range(0, 49, 2)))])
def test_shown_steps_are_evenly_spaced(tmp_path: Path, steps: int, expected: list[int]) -> None:
    make_run(tmp_path, steps=steps, metrics=False)
    assert step_rows(read_run(tmp_path)) == expected
