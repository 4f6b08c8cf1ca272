"""The command line before a command runs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import gisp

HEAVY = ("torch", "transformers", "matplotlib", "datasets", "lm_eval")


def _run(*commands: list[str], forbidden: tuple[str, ...] = HEAVY) -> list[tuple[int, str]]:
    """Exit code and output of commands, run in turn in a new interpreter that refuses to import what is forbidden."""
    code = f"""
import contextlib, io, json, sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name in {forbidden!r}:
            raise AssertionError(f"{{name}} was imported")
sys.meta_path.insert(0, Refuse())
from gisp.cli import main
results = []
for command in {list(commands)!r}:
    text = io.StringIO()
    with contextlib.redirect_stdout(text), contextlib.redirect_stderr(text):
        code = main(command)
    results.append((code, text.getvalue()))
print(json.dumps(results))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [(code, text) for code, text in json.loads(done.stdout)]


def test_a_bad_option_is_refused_before_torch_is_imported():
    command = ["prune", "model", "--data", "x", "--out", "y", "--ratio", "0.3"]
    ((code, _),) = _run(command, forbidden=(*HEAVY, "numpy"))
    assert code == 2


@pytest.mark.parametrize(
    ("command", "help"),
    [
        (["prune", "model", "--offload", "sometimes", "--data", "x", "--out", "y"], "gisp prune --help"),
        (["eval", "run", "--stagess", "2"], "gisp eval --help"),
        (["prun", "model"], "gisp --help"),
        (["--quiet"], "gisp --help"),
    ],
)
def test_words_that_no_command_knows_lead_to_help(command: list[str], help: str, capsys: Any) -> None:
    from gisp.cli import main

    assert main(command) == 2
    line = capsys.readouterr().err
    assert len(line.splitlines()) == 1 and line.endswith(f"{help} tells what there is\n")


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory, model_folder, token_file) -> Path:
    out = tmp_path_factory.mktemp("quick") / "run"
    options: dict[str, Any] = {"preset": "paper", "steps": 2, "sparsity": 0.3, "device": "cpu", "dtype": "float32"}
    gisp.prune(model_folder, token_file, out=out, **options)
    return out


USAGE = {
    "prune no data": ["prune", "MODEL", "--data", "nowhere.jsonl", "--out", "NEW"],
    "prune no token file": ["prune", "MODEL", "--data", "nowhere.safetensors", "--out", "NEW"],
    "prune unknown data": ["prune", "MODEL", "--data", "nowhere", "--out", "NEW"],
    "prune no model": ["prune", "/nowhere", "--data", "TOKENS", "--out", "NEW"],
    "prune a taken folder": ["prune", "MODEL", "--data", "TOKENS", "--out", "RUN"],
    "prune --config missing": ["prune", "--config", "nowhere.yaml"],
    "export no run": ["export", "/nowhere", "--sparsity", "0.2", "--out", "NEW"],
    "export beyond": ["export", "RUN", "--sparsity", "0.9", "--out", "NEW"],
    "export taken": ["export", "RUN", "--sparsity", "0.2", "--out", "MODEL"],
    "export format": ["export", "RUN", "--sparsity", "0.2", "--out", "NEW", "--format", "onnx"],
    "export sizes": ["export", "RUN", "--sparsity", "0.2", "--out", "NEW", "--format", "masked", "--round-mlp", "8"],
    "export method": ["export", "RUN", "--sparsity", "0.2", "--out", "NEW", "--compensate", "magic"],
    "export damping": ["export", "RUN", "--sparsity", "0.2", "--out", "NEW", "--damping", "0.5"],
    "export no calibration": ["export", "RUN", "--sparsity", "0.2", "--out", "NEW", "--compensate", "lsq"],
    "export calibration missing": [
        *("export", "RUN", "--sparsity", "0.2", "--out", "NEW", "--compensate", "lsq", "--calibration", "nowhere.txt")
    ],
    "nested no run": ["export", "/nowhere", "--nested", "NEW"],
    "eval nothing": ["eval", "RUN"],
    "eval window": ["eval", "RUN", "--data", "TOKENS", "--window", "1"],
    "eval stride": ["eval", "RUN", "--data", "TOKENS", "--stride", "0"],
    "eval no data": ["eval", "RUN", "--data", "nowhere.txt"],
    "eval no model": ["eval", "/nowhere", "--data", "TOKENS"],
    "eval a point of a model": ["eval", "MODEL", "--sparsity", "0.3", "--data", "TOKENS"],
    "eval beyond": ["eval", "RUN", "--sparsity", "0.9", "--data", "TOKENS"],
    "eval points beyond": ["eval", "RUN", "--sparsities", "0.1,0.9", "--data", "TOKENS"],
    "eval compensation": ["eval", "RUN", "--data", "TOKENS", "--compensate", "lsq", "--damping", "-1"],
    "inspect nothing": ["inspect", "/nowhere"],
    "report nothing": ["report", "/nowhere"],
}


def test_usage_errors_come_before_anything_heavy_is_imported(tmp_path, run_folder, model_folder, token_file):
    places = {"MODEL": model_folder, "TOKENS": token_file, "RUN": run_folder, "NEW": tmp_path / "new"}
    commands = [[str(places.get(word, word)) for word in words] for words in USAGE.values()]
    for name, (code, text) in zip(USAGE, _run(*commands), strict=True):
        assert code == 2, name
        assert text.startswith("error: ") and len(text.strip().splitlines()) == 1, (name, text)
    assert not (tmp_path / "new").exists()


def test_inspecting_a_run_and_the_version_need_no_torch(run_folder):
    import gisp_kernels

    inspected, version, help = _run(["inspect", str(run_folder)], ["--version"], ["prune", "--help"])
    assert [code for code, _ in (inspected, version, help)] == [0, 0, 0]
    for record in gisp.Trajectory.load(run_folder).steps:
        assert f"{record.sparsity:.4f}" in inspected[1]
    assert version[1] == f"gisp {gisp_kernels.__version__}\n"
