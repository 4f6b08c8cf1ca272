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
from safetensors.numpy import load_file, save_file

from gisp.errors import GispError
from gisp.plot_style import LIGHT
from gisp.plots import PICTURES, draw_scores, phase_seconds
from gisp.report import ReportFiles, write_report
from gisp.report_data import read_run
from gisp.report_html import step_rows

LAYERS, HEADS, KV_HEADS, HEAD_DIM, HIDDEN, CHANNELS = 6, 8, 4, 16, 128, 96
HEAD_PARAMETERS, CHANNEL_PARAMETERS = 2 * HEAD_DIM * HIDDEN, 3 * HIDDEN
FIXED_PARAMETERS = 2 * KV_HEADS * HEAD_DIM * HIDDEN + 2 * HIDDEN
DECODER = LAYERS * (HEADS * HEAD_PARAMETERS + CHANNELS * CHANNEL_PARAMETERS + FIXED_PARAMETERS)
PARAMETERS = DECODER + 2 * 512 * HIDDEN
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
FROM_METRICS = {picture.name for picture in PICTURES if picture.from_metrics}
ALL = [picture.name for picture in PICTURES]


def make_run(
    folder: Path,
    *,
    steps: int = 12,
    planned: int | None = None,
    sparsity: float = 0.5,
    empty_layer: int | None = None,
    evaluations: bool = False,
    metrics: bool = True,
    peak_bytes: int | None = None,
) -> dict[str, Any]:
    """A consistent run folder; its record."""
    planned = planned or steps
    rng = np.random.default_rng(0)
    removed_at = {}
    for layer in range(LAYERS):
        for kind, count in (("heads", HEADS), ("channels", CHANNELS)):
            # The last layer is protected; the share grows with depth.
            goes = rng.random(count) < sparsity * (0.4 + 1.2 * layer / LAYERS) * (layer < LAYERS - 1)
            when = rng.integers(1, planned + 1, count)
            if layer == empty_layer and kind == "heads":
                goes, when = np.ones(count, bool), rng.integers(1, steps + 1, count)
            removed_at[f"layers.{layer}.{kind}.removed_at"] = np.where(goes & (when <= steps), when, 0).astype(np.int32)
    records = []
    for step in range(1, steps + 1):
        gone = {
            kind: sum(int(((at > 0) & (at <= step)).sum()) for name, at in removed_at.items() if kind in name)
            for kind in ("heads", "channels")
        }
        kept = [np.flatnonzero((at == 0) | (at > step)) for name, at in removed_at.items() if "heads" in name]
        kv_heads = sum(len(np.unique(heads // (HEADS // KV_HEADS))) for heads in kept)
        parameters = gone["heads"] * HEAD_PARAMETERS + gone["channels"] * CHANNEL_PARAMETERS
        records.append(
            {
                "step": step,
                "sparsity": parameters / DECODER,
                "target": sparsity * step / planned,
                "model_sparsity": parameters / PARAMETERS,
                "removed_parameters": parameters,
                "heads_removed": gone["heads"],
                "channels_removed": gone["channels"],
                "loss": 1.8 + 1.1 * (step / planned) ** 2 + 0.03 * float(rng.standard_normal()),
                "tokens": 8192,
                "seconds": 1.25 + 0.01 * step,
                "kv_bytes_per_token": 2 * kv_heads * HEAD_DIM * 2,
            }
        )
    record = {
        "format": "gisp-trajectory",
        "version": 1,
        "complete": steps == planned,
        "base_model": {
            "path": "/models/tiny <decoder>",
            "fingerprint": "0" * 64,
            "model_type": "llama",
            "layers": LAYERS,
            "hidden_size": HIDDEN,
            "num_attention_heads": HEADS,
            "num_key_value_heads": KV_HEADS,
            "head_dim": HEAD_DIM,
            "intermediate_size": CHANNELS,
            "decoder_parameters": DECODER,
            "parameters": PARAMETERS,
        },
        "config": {
            "preset": "fast",
            "sparsity": sparsity,
            "steps": planned,
            "engine": "stream",
            "objective": "lm",
            "dtype": None,
        },
        "data": {"spec": "text.jsonl", "sequences": 384, "sha256": "1" * 64},
        "structures": {"heads": LAYERS * HEADS, "channels": LAYERS * CHANNELS},
        "steps": records,
        "versions": {"python": "3.12.3", "torch": "2.11.0", "gisp-kernels": "0.1.0"},
    }
    folder.mkdir(parents=True, exist_ok=True)
    save_file(removed_at, folder / "trajectory.safetensors")
    (folder / "trajectory.json").write_text(json.dumps(record))
    if metrics:
        lines = [json.dumps(_metrics(step, planned, rng, peak_bytes)) for step in range(1, steps + 1)]
        (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    if evaluations:
        (folder / "evaluations.json").write_text(json.dumps(_evaluations()))
    return record


def _metrics(step: int, planned: int, rng: np.random.Generator, peak_bytes: int | None) -> dict[str, Any]:
    edges = np.linspace(-7 + 0.8 * step / planned, -2.5, 41)
    heads = rng.normal(-4.5 + 0.5 * step / planned, 0.6, LAYERS * HEADS * 4)
    channels = rng.normal(-5 + 0.7 * step / planned, 0.5, LAYERS * CHANNELS)
    return {
        "step": step,
        "loss": 2.0,
        "sparsity": 0.0,
        "threshold": 10 ** (-6.4 + 1.2 * step / planned),
        "seconds": {
            "data": 0.02,
            "forward_backward": 1.0 + 0.2 * step / planned,
            "select": 0.05,
            "compact": 0.03,
            "write": 0.11,
        },
        "tokens_per_second": 8000.0,
        "score_histogram": {
            "log10_edges": edges.tolist(),
            "heads": np.histogram(heads, edges)[0].tolist(),
            "channels": np.histogram(channels, edges)[0].tolist(),
        },
        "peak_bytes": peak_bytes,
    }


def _evaluations() -> list[dict[str, Any]]:
    conditions = {"tokens": 20000, "window": 128, "data": "texts/heldout.jsonl"}
    gisp = {0.0: 5.8125, 0.1: 6.0, 0.2: 6.5, 0.3: 7.5, 0.4: 9.25, 0.5: 12.33}
    one_shot = {0.0: 5.8125, 0.1: 6.25, 0.2: 7.25, 0.3: 10.0, 0.4: 21.5, 0.5: 64.0}
    curves = {"gisp": gisp, "one-shot": one_shot}
    return [
        {"label": label, "sparsity": at, "perplexity": value, **conditions}
        for label, curve in curves.items()
        for at, value in curve.items()
    ]


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
    assert {"one-shot", "12.3300", "64.0000"} <= set(re.findall(r"<td[^>]*>(.*?)</td>", html))


def test_page_refers_to_nothing_outside(made: Made) -> None:
    html = made.html
    references = re.findall(r"""\b(?:src|srcset|href|action|data)\s*=\s*["']?([^"'\s>]+)""", html)
    assert len(references) == 2 * len(ALL)
    assert all(reference.startswith("data:image/png;base64,") for reference in references)
    for word in ("<script", "<link", "@import", "url(", "http:", "https:"):
        assert word not in html
    assert "<decoder>" not in html


def test_summary_equals_the_input(made: Made) -> None:
    record, rows = made.record, rows_of(made.html)
    last = record["steps"][-1]
    after = PARAMETERS - last["removed_parameters"]
    left = LAYERS * HEADS - last["heads_removed"]
    kv_before, kv_after = 2 * LAYERS * KV_HEADS * HEAD_DIM * 2, last["kv_bytes_per_token"]
    seconds = sum(step["seconds"] for step in record["steps"])
    assert rows["Base model"] == "/models/tiny <decoder>"
    assert rows["Preset"] == "fast"
    assert rows["Steps"] == "60"
    assert rows["Status"] == "complete after step 60"
    assert rows["Decoder sparsity"] == f"{100 * last['sparsity']:.2f} %"
    assert rows["Whole-model sparsity"] == f"{100 * last['model_sparsity']:.2f} %"
    assert rows["Parameters"] == f"{PARAMETERS:,} → {after:,} ({100 * after / PARAMETERS:.1f} %)"
    assert rows["Attention heads"].startswith(f"{LAYERS * HEADS} → {left} ")
    assert rows["KV cache per token"].startswith(f"{kv_before:,} B → {kv_after:,} B ")
    assert rows["Calibration tokens, all steps"] == f"{60 * 8192:,}"
    assert rows["Total time of the steps"] == f"{seconds:,.1f} s (1 min 33 s)"
    assert rows["Peak GPU memory"] == "1.50 GiB"
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
        assert row[9] == f"{step['kv_bytes_per_token']:,}"


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


def test_layer_without_heads_is_drawn(tmp_path: Path) -> None:
    make_run(tmp_path, empty_layer=1)
    check_written(write_report(tmp_path), tmp_path, ALL)


def test_loss_belongs_to_the_sparsity_before_the_step(tmp_path: Path) -> None:
    record = make_run(tmp_path, steps=3)
    before = read_run(tmp_path).sparsity_before()
    assert before.tolist() == [0.0, record["steps"][0]["sparsity"], record["steps"][1]["sparsity"]]


def test_single_step(tmp_path: Path) -> None:
    make_run(tmp_path, steps=1)
    html = check_written(write_report(tmp_path), tmp_path, ALL)
    assert rows_of(html)["Steps"] == "1"


def test_cut_run_ignores_what_is_ahead_of_its_last_step(tmp_path: Path) -> None:
    make_run(tmp_path, steps=5, planned=20)
    tensors = load_file(tmp_path / "trajectory.safetensors")
    tensors["layers.0.channels.removed_at"] = tensors["layers.0.channels.removed_at"].copy()
    tensors["layers.0.channels.removed_at"][np.flatnonzero(tensors["layers.0.channels.removed_at"] == 0)[:3]] = 6
    save_file(tensors, tmp_path / "trajectory.safetensors")
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "loss": 2.')
    html = check_written(write_report(tmp_path), tmp_path, ALL)
    assert rows_of(html)["Status"] == "unfinished after step 5 of 20"
    assert sorted(read_run(tmp_path).metrics) == [1, 2, 3, 4, 5]


def test_without_metrics_the_page_says_so(tmp_path: Path) -> None:
    make_run(tmp_path, metrics=False)
    html = check_written(write_report(tmp_path), tmp_path, [name for name in ALL if name not in FROM_METRICS])
    assert html.count("Not shown: this run has no metrics.jsonl.") == len(FROM_METRICS)


def test_unusual_metrics_and_evaluations_are_drawn(tmp_path: Path) -> None:
    make_run(tmp_path, steps=3)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    lines[0]["threshold"] = None
    lines[1]["score_histogram"] = {"log10_edges": [0.0] * 41, "heads": [0] * 40, "channels": [0] * 40}
    lines[1]["score_histogram"]["not_positive"] = {"heads": 36, "channels": 7}
    lines[2]["seconds"] = {"forward_backward": 90.0, "sync": 0.5}
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    evaluations = [*_evaluations(), {**_evaluations()[-1], "perplexity": float("inf"), "window": 256}]
    (tmp_path / "evaluations.json").write_text(json.dumps(evaluations))
    html = check_written(write_report(tmp_path), tmp_path, ALL)
    assert ">inf</td>" in html
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


@pytest.mark.parametrize("steps, expected", [(1, [0]), (3, [0, 1, 2]), (49, list(range(0, 49, 2)))])
def test_shown_steps_are_evenly_spaced(tmp_path: Path, steps: int, expected: list[int]) -> None:
    make_run(tmp_path, steps=steps, metrics=False)
    assert step_rows(read_run(tmp_path)) == expected


def _edit_record(folder: Path, **changes: Any) -> None:
    record = json.loads((folder / "trajectory.json").read_text())
    (folder / "trajectory.json").write_text(json.dumps(record | changes))


def _drop_tensor(folder: Path) -> None:
    tensors = load_file(folder / "trajectory.safetensors")
    del tensors["layers.3.heads.removed_at"]
    save_file(tensors, folder / "trajectory.safetensors")


def _other_tensors(folder: Path) -> None:
    tensors = load_file(folder / "trajectory.safetensors")
    save_file({name: np.zeros_like(at) for name, at in tensors.items()}, folder / "trajectory.safetensors")


DAMAGE = {
    "no record": (lambda f: (f / "trajectory.json").unlink(), "trajectory.json is missing"),
    "record not JSON": (lambda f: (f / "trajectory.json").write_text('{"format":'), "trajectory.json is corrupt"),
    "record not text": (lambda f: (f / "trajectory.json").write_bytes(b"\xff\xfe\x00"), "trajectory.json is corrupt"),
    "foreign format": (lambda f: _edit_record(f, format="other"), "not gisp-trajectory version 1"),
    "newer version": (lambda f: _edit_record(f, version=2), "not gisp-trajectory version 1"),
    "no steps": (lambda f: _edit_record(f, steps=[]), "no finished step"),
    "steps incomplete": (lambda f: _edit_record(f, steps=[{"step": 1}]), "sparsity is missing"),
    "steps of a wrong type": (lambda f: _edit_record(f, steps=["one"]), "trajectory.json is corrupt"),
    "base model incomplete": (lambda f: _edit_record(f, base_model={}), "path is missing"),
    "no tensors": (lambda f: (f / "trajectory.safetensors").unlink(), "holds no run"),
    "tensors cut": (lambda f: (f / "trajectory.safetensors").write_bytes(b"\0" * 20), "safetensors is corrupt"),
    "tensor missing": (_drop_tensor, "layers.3.heads.removed_at"),
    "tensors of another run": (_other_tensors, "of different runs"),
    "metrics corrupt": (lambda f: (f / "metrics.jsonl").write_text("{}\n{}\n"), "metrics.jsonl, line 1 is corrupt"),
    "metrics of a wrong type": (
        lambda f: (f / "metrics.jsonl").write_text('{"step": 1, "seconds": [1]}\n{}\n'),
        "seconds are not numbers",
    ),
    "evaluations corrupt": (lambda f: (f / "evaluations.json").write_text('[{"label": "x"}]'), "sparsity is missing"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_run_is_one_line_and_writes_nothing(tmp_path: Path, name: str) -> None:
    damage, expected = DAMAGE[name]
    make_run(tmp_path, steps=3)
    damage(tmp_path)
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(GispError) as caught:
        write_report(tmp_path)
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == before


@pytest.mark.parametrize("kind", ["absent", "file", "empty"])
def test_no_run_folder(tmp_path: Path, kind: str) -> None:
    target = tmp_path / "run"
    if kind == "file":
        target.write_text("x")
    elif kind == "empty":
        target.mkdir()
    with pytest.raises(GispError, match="gisp prune --out"):
        write_report(target)
    assert not (target / "report.html").exists()


def test_failed_write_keeps_the_old_page(tmp_path: Path) -> None:
    make_run(tmp_path, steps=2)
    (tmp_path / "report.html").write_text("old page")
    (tmp_path / "plots" / "quality.png").mkdir(parents=True)
    with pytest.raises(GispError, match=r"cannot write .*quality\.png"):
        write_report(tmp_path)
    assert (tmp_path / "report.html").read_text() == "old page"
    assert not list((tmp_path / "plots").glob(".*"))
