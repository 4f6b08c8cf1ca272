"""What ``gisp inspect`` says of runs and models, whatever they are called."""

from __future__ import annotations

import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest

import gisp
from gisp.cli import main
from gisp.run.evaluations import EVALUATIONS

OPTIONS: dict[str, Any] = {"preset": "paper", "steps": 2, "sparsity": 0.3, "device": "cpu", "dtype": "float32"}
# Rich would take parts of these for markup.
NAMES = ("a [red] run", "b[", "c :smile:")


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory, model_folder: Path, token_file: Path) -> Path:
    out = tmp_path_factory.mktemp("inspected") / "run"
    gisp.prune(model_folder, token_file, out=out, progress=False, **OPTIONS)
    return out


@pytest.mark.parametrize("name", NAMES)
def test_names_are_printed_as_they_are(
    name: str, tmp_path: Path, run_folder: Path, model_folder: Path, token_file: Path, capsys: Any
) -> None:
    place = tmp_path / name / "red]"
    run, data = place / "run", place / f"{name}.safetensors"
    shutil.copytree(run_folder, run)
    shutil.copytree(model_folder, place / "m")
    shutil.copy(token_file, data)
    assert main(["inspect", str(run)]) == 0
    said = capsys.readouterr().out
    assert f"gisp export {shlex.quote(str(run))} --sparsity S" in said and f"gisp eval {shlex.quote(str(run))} " in said
    assert main(["eval", str(run), "--sparsities", "0.2", "--data", str(data), "--device", "cpu", "-q"]) == 0
    assert main(["inspect", str(run)]) == 0
    assert data.name in capsys.readouterr().out
    assert main(["inspect", str(place / "m")]) == 0
    assert "".join(name.split()) in "".join(capsys.readouterr().out.split())


def test_broken_evaluations_are_one_line(tmp_path: Path, run_folder: Path, capsys: Any) -> None:
    shutil.copytree(run_folder, tmp_path / "run")
    (tmp_path / "run" / EVALUATIONS).write_text("{")
    assert main(["inspect", str(tmp_path / "run")]) == 2
    out, err = capsys.readouterr()
    assert out == "" and len(err.splitlines()) == 1 and "evaluations.json is corrupt" in err
