"""What ``gisp inspect`` says of an export is what its report said when it was written."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from export_models import dense, export_one_size, ranked, spec_of
from nested_cases import sound_milestones

from gisp.cli import main
from gisp.errors import GispError
from gisp.export.formats.hf import export_hf
from gisp.export.formats.masked import export_masked
from gisp.export.sizes.written import written_export
from gisp.export.spec import ExportReport


def gguf(base: Any, spec: Any, out: Path) -> ExportReport:
    pytest.importorskip("gguf")
    from gisp.export.formats.gguf.write import export_gguf

    return export_gguf(base, spec, out)


WRITERS: dict[str, Any] = {"hf": export_hf, "masked": export_masked, "gguf": gguf}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", WRITERS)
@pytest.mark.parametrize("family", ["llama-gqa", "qwen2"])
def test_sizes_are_those_of_the_report(family: str, kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    changes = {"use_sliding_window": False, "sliding_window": None} if family == "qwen2" else {}
    spec = spec_of()
    report = WRITERS[kind](dense(family, dtype, **changes), spec, tmp_path / "out")
    found = written_export(str(tmp_path / "out"))
    assert found is not None and found.format == kind
    assert (found.parameters, found.kv_bytes_per_token) == (report.parameters_pruned, report.kv_bytes_per_token)
    for layer, told in zip(found.layers, report.sizes, strict=True):
        assert (layer.query_heads, layer.kv_heads, layer.channels) == (told.query_heads, told.kv_heads, told.channels)
    assert 0.9 * report.bytes < found.bytes <= report.bytes and 0 < sum(n.bytes for n in found.layers) < found.bytes
    assert (found.record["sparsity"], found.record["step"]) == (spec.sparsity, spec.step)
    names = {torch.float32: ("float32", "f32"), torch.bfloat16: ("bfloat16", "f16")}
    assert found.dtype == names[dtype][kind == "gguf"]


def shown(target: Path, capsys: pytest.CaptureFixture[str]) -> str:
    assert main(["inspect", str(target)]) == 0
    return " ".join(capsys.readouterr().out.replace("│", " ").split())


def test_what_an_export_is_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, out = dense("llama-gqa"), tmp_path / "out"
    report = export_hf(base, replace(spec_of(), compensation="lsq of all"), out, min_heads=2)
    text = shown(out, capsys)
    for words in (
        "base model some-org/some-model",
        f"its fingerprint {'f' * 64}",
        "preset paper",
        "format hf, layers differ in size",
        "options --min-heads 2",
        "compensation lsq of all",
        f"parameters stored {report.parameters_pruned:,}",
        f"KV bytes/token {report.kv_bytes_per_token:,}",
        f"load: gisp.load({str(out)!r})",
        "trust_remote_code=True",
    ):
        assert words in text, words
    assert text.count(" 1 2 1 4 ") == 1, "the layer without heads stores two, on one key/value head"
    # Not what someone made of the card, but the files say it.
    (out / "README.md").unlink()
    text = shown(out, capsys)
    assert "base model not told: the folder has no model card" in text and f"{report.parameters_pruned:,}" in text


def test_uniform_and_masked_ones_say_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    export_one_size(dense("llama-gqa"), ranked(spec_of()), tmp_path / "uniform")
    text = shown(tmp_path / "uniform", capsys)
    assert "format uniform, one size for all layers" in text and "size of every layer" in text
    assert "compensation none" in text and "AutoModelForCausalLM.from_pretrained(" in text
    export_masked(dense("llama-gqa"), spec_of(), tmp_path / "masked")
    assert "format masked, dense shapes" in shown(tmp_path / "masked", capsys)


def test_files_for_llama_cpp_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gguf(dense("llama-gqa"), spec_of(), tmp_path / "out")
    for target in (tmp_path / "out", tmp_path / "out" / "model.gguf"):
        text = shown(target, capsys)
        assert "format gguf, for llama.cpp" in text and "base model some-org/some-model" in text
        assert f"load: llama-cli -m {tmp_path / 'out' / 'model.gguf'}" in text


def test_nested_ones_list_their_sizes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sound_milestones(tmp_path / "nested")
    text = shown(tmp_path / "nested", capsys)
    assert "format nested, 5 sizes beside the dense one" in text and "base model some-org/some-model" in text
    # Four layers of two key/value heads of eight numbers, float32, at the dense end.
    assert f" {2 * 4 * 2 * 8 * 4:,} " in text and "sparsity=S)" in text
    assert text.count(", compensation: ") == 2


def test_plain_models_are_no_exports(model_folder: Path, tmp_path: Path) -> None:
    assert written_export(str(model_folder)) is None
    assert written_export("org/name") is None
    shutil.copytree(model_folder, tmp_path / "other")
    config = json.loads((model_folder / "config.json").read_text())
    (tmp_path / "other" / "config.json").write_text(json.dumps({**config, "gisp": "of another program"}))
    assert written_export(str(tmp_path / "other")) is None


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"gisp": {"base_fingerprint": "f", "sparsity": "much"}}, "sparsity of the pruning is no number"),
        ({"num_hidden_layers": 9}, "is missing"),
        ({"head_dim": None, "num_attention_heads": 0}, "is corrupt"),
    ],
)
def test_what_contradicts_itself_is_one_line(change: dict[str, Any], words: str, tmp_path: Path, capsys: Any) -> None:
    export_hf(dense("llama-gqa"), spec_of(), tmp_path / "out")
    path = tmp_path / "out" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    assert main(["inspect", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1
    for file in (tmp_path / "out").glob("*.safetensors"):
        file.unlink()
    if "gisp" not in change:
        with pytest.raises(GispError, match="has no weights: copy the whole folder"):
            written_export(str(tmp_path / "out"))
