"""Reports of folders that are no run, of damaged runs, and writes that fail."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from report_cases import make_run
from safetensors.numpy import load_file, save_file

from gisp.errors import GispError
from gisp.report.write import write_report


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
    (tmp_path / "plots" / "loss.png").mkdir(parents=True)
    with pytest.raises(GispError, match=r"cannot write .*loss\.png"):
        write_report(tmp_path)
    assert (tmp_path / "report.html").read_text() == "old page"
    assert not list((tmp_path / "plots").glob(".*"))
