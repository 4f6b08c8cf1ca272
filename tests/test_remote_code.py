"""No code of a model folder runs: every loader says so, and nobody is asked about a folder that brings code."""

from __future__ import annotations

import ast
import contextlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from word_tokenizer import save_tokenizer

import gisp
from gisp.cli import main
from gisp.errors import GispError

ROOT = Path(__file__).parents[1]
SHIPPED = ("python", "gisp_kernels", "benchmarks", "examples")
# What may fetch or import code of the thing it loads.
LOADERS = ("from_pretrained", "from_config", "load_dataset", "load_dataset_builder", "HFLM")


def loading_calls(source: str) -> Iterator[tuple[int, bool]]:
    """Line of every call of a loader, and whether it refuses code."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        if name in LOADERS:
            stated = {keyword.arg: keyword.value for keyword in node.keywords}.get("trust_remote_code")
            yield node.lineno, isinstance(stated, ast.Constant) and stated.value is False


def test_every_loader_refuses_remote_code() -> None:
    found = [
        (f"{path.relative_to(ROOT)}:{line}", refuses)
        for folder in SHIPPED
        for path in sorted((ROOT / folder).rglob("*.py"))
        for line, refuses in loading_calls(path.read_text(encoding="utf-8"))
    ]
    assert len(found) >= 8, "the search finds the loaders"
    assert [place for place, refuses in found if not refuses] == []


@pytest.mark.parametrize("given", ["", "trust_remote_code=True", "trust_remote_code=trust", "**options"])
def test_a_loader_that_does_not_say_so_is_found(given: str) -> None:
    assert [refuses for _, refuses in loading_calls(f"AutoModel.from_pretrained(path, {given})")] == [False]
    assert [refuses for _, refuses in loading_calls("AutoModel.from_pretrained(path, trust_remote_code=False)")] == [
        True
    ]


def spoil(folder: Path, file: str, auto_map: dict[str, object]) -> None:
    """Make a file of a model folder name code, which would leave a file behind if it ran."""
    (folder / "evil.py").write_text(f"open({str(folder / 'ran')!r}, 'w')\nraise SystemExit('remote code ran')\n")
    path = folder / file
    stored = json.loads(path.read_text()) if path.is_file() else {}
    if file == "tokenizer_config.json":
        stored["tokenizer_class"] = "EvilTokenizer"
    path.write_text(json.dumps({**stored, "auto_map": auto_map}))


@pytest.mark.parametrize(
    ("file", "auto_map"),
    [
        ("tokenizer_config.json", {"AutoTokenizer": ["evil.EvilTokenizer", "evil.EvilTokenizer"]}),
        ("config.json", {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}),
        ("config.json", {"AutoTokenizer": ["evil.EvilTokenizer", None]}),
        ("generation_config.json", {"GenerationConfig": "evil.Config"}),
    ],
    ids=["tokenizer", "model", "tokenizer of the model's config", "generation"],
)
def test_a_folder_that_brings_code_is_not_asked_about(
    tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch, file: str, auto_map: dict[str, object]
) -> None:
    folder = tmp_path / "model"
    save_tokenizer(folder)
    shutil.copytree(model_folder, folder, dirs_exist_ok=True)
    spoil(folder, file, auto_map)

    def asked(*_: object) -> str:
        raise AssertionError("the user was asked")

    monkeypatch.setattr("builtins.input", asked)
    (tmp_path / "rows.jsonl").write_text(json.dumps({"text": "a cab stop " * 40}) + "\n")
    rows, out = str(tmp_path / "rows.jsonl"), tmp_path / "run"
    options = ["--steps", "1", "--sparsity", "0.2", "--align", "1", "--seq-len", "16", "--device", "cpu"]
    codes = [main(["eval", str(folder), "--data", rows, "--device", "cpu", "--window", "16"])]
    codes.append(main(["prune", str(folder), "--data", rows, "--out", str(out), *options]))
    if codes[-1] == 0:
        for number, format in enumerate(("hf", "gguf")):
            to = str(tmp_path / f"export{number}")
            codes.append(main(["export", str(out), "--sparsity", "0.2", "--out", to, "--format", format]))
    with contextlib.suppress(GispError):
        gisp.load(folder)
    assert set(codes) <= {0, 2}
    assert not (folder / "ran").exists()
