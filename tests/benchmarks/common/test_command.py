"""`gisp bench`: refusals, earlier results, tables."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import gisp
from benchmarks.common.command import read_json, table
from gisp.cli import main
from gisp.errors import GispError


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["kernels"], "needs a CUDA device"),
        (["kernels", "--only", "softmax"], "matches no benchmark"),
        (["kernels", "--budget", "-1"], "--budget"),
        (["kernels", "--plot"], "--plot writes beside a result"),
        (["kernels", "--from", "nowhere.json"], "cannot read nowhere.json"),
        (["prune"], "needs a CUDA device"),
        (["prune", "--model", "llama-2-13b", "--device", "cpu"], "needs a CUDA device"),
        (["prune", "--model", "gpt"], "unknown model 'gpt': choose one of llama-2-13b"),
        (["prune", "--model", "tiny", "--device", "cpu", "--sparsity", "1.5"], "--sparsity is 1.5"),
        (["prune", "--model", "tiny", "--device", "cpu", "--steps", "0"], "--steps"),
        (["prune", "--model", "tiny", "--device", "cpu", "--out", "."], "is a folder"),
        (["prune", "--bogus"], "unrecognized arguments: --bogus"),
    ],
)
def test_refusals_are_one_line(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["bench", *arguments]) == 2
    captured = capsys.readouterr()
    assert message in captured.err and captured.err.count("\n") == 1
    assert captured.out == ""


def test_without_a_checkout_it_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(gisp, "__file__", str(tmp_path / "lib" / "gisp" / "__init__.py"))
    assert main(["bench", "kernels"]) == 2
    assert "needs a source checkout" in capsys.readouterr().err


def test_help_is_that_of_the_module(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "kernels", "--help"]) == 0
    shown = capsys.readouterr().out
    assert "usage: gisp bench kernels" in shown and "--budget" in shown


def test_results_that_are_none_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    of_another = json.dumps({"benchmark": "kernels", "identity": {}, "rows": []})
    for content, message in (("{", "is no JSON"), ("[]", "no result of gisp bench"), (of_another, "gisp bench prune")):
        path.write_text(content)
        with pytest.raises(GispError, match=message):
            read_json(path, "prune")


def test_table_lines_up() -> None:
    lines = table(("name", "n"), [["a", "1"], ["bb", "100"]]).splitlines()
    assert lines == ["name    n", "----  ---", "a       1", "bb    100"]
