"""``gisp export`` on a run: formats, sizes, measured perplexity, and one line for what cannot be done."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from run_cases import EXACT_OPTIONS
from safetensors.torch import save_file
from tiny import tiny_model, tiny_tokens
from transformers import AutoModelForCausalLM

import gisp
from gisp.cli import main
from gisp.export.run import export_run
from gisp.export.sizes.options import SizeOptions
from gisp.export.spec import PrunedSpec, last_to_go
from gisp.target import evaluate_target


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A run of six steps to 60 % and evaluation tokens."""
    root = tmp_path_factory.mktemp("run-export")
    tiny_model("llama-mha", num_attention_heads=8, num_key_value_heads=8, head_dim=8).save_pretrained(root / "model")
    save_file({"input_ids": tiny_tokens(16, 16)}, root / "tokens.safetensors")
    gisp.prune(root / "model", root / "tokens.safetensors", out=root / "run", **EXACT_OPTIONS)
    return root / "run", root / "tokens.safetensors"


def test_the_order_of_structures() -> None:
    removed_at = torch.tensor([0, 3, 1, 0, 3, 2, 0], dtype=torch.int32)
    assert last_to_go(removed_at) == (0, 3, 6, 1, 4, 5, 2)


def test_a_point_keeps_a_beginning_of_its_ranking(places: tuple[Path, Path]) -> None:
    trajectory = gisp.Trajectory.load(places[0])
    for step in range(7):
        spec = PrunedSpec.at(trajectory, step)
        for (heads, channels), ranking in zip(spec.keep.layers, spec.ranking, strict=True):
            assert set(heads) == set(ranking.heads[: len(heads)])
            assert set(channels) == set(ranking.channels[: len(channels)])


def _export(run: Path, out: Path, *options: str, sparsity: str = "0.4") -> int:
    return main(["export", str(run), "--sparsity", sparsity, "--out", str(out), "--device", "cpu", *options])


def test_a_uniform_export_with_measured_quality(
    places: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, data = places
    out = tmp_path / "out"
    assert _export(run, out, "--format", "uniform", "--data", str(data), "--window", "8", "--round-mlp", "4") == 0
    printed = capsys.readouterr().out
    assert f"{out}: format uniform, --round-mlp 4, decoder sparsity" in printed
    model = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=False)
    assert type(model).__name__ in ("LlamaForCausalLM", "MistralForCausalLM")
    assert model.config.intermediate_size % 4 == 0
    here = evaluate_target(str(out), str(data), window=8, device="cpu")
    point = evaluate_target(str(run), str(data), sparsity=0.4, window=8, device="cpu")
    how = r"\(224 tokens of tokens.safetensors, window 8, float32\)"
    found = re.search(rf"  perplexity: ([\d.]+) {how}\n  perplexity of .*: ([\d.]+)\n", printed)
    assert found is not None
    assert float(found[1]) == pytest.approx(here["perplexity"], rel=1e-4)
    assert float(found[2]) == pytest.approx(point["perplexity"], rel=1e-4)
    assert here["perplexity"] != pytest.approx(point["perplexity"], rel=1e-3)
    card = (out / "README.md").read_text()
    assert f"| perplexity | {found[1]} (224 tokens of tokens.safetensors, window 8, float32) |" in card
    assert f"| perplexity of the exact pruned point, same tokens | {found[2]} |" in card
    assert "not measured" not in card
    assert str(tmp_path) not in card
    assert here["sparsity"] == json.loads((out / "config.json").read_text())["gisp"]["sparsity"]


def test_without_data_the_card_says_so(places: tuple[Path, Path], tmp_path: Path) -> None:
    done = export_run(places[0], 0.4, tmp_path / "out", format="uniform", device="cpu")
    assert done.quality is None
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| perplexity | not measured; `gisp export RUN --sparsity S --format uniform --data DATA`" in card
    export_run(places[0], 0.4, tmp_path / "hf", device="cpu")
    assert "| perplexity | not measured" not in (tmp_path / "hf" / "README.md").read_text()


def test_the_exact_point_has_one_perplexity(
    places: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, data = places
    for form in ("hf", "masked"):
        assert _export(run, tmp_path / form, "--format", form, "--data", str(data)) == 0
        printed = capsys.readouterr().out
        here = evaluate_target(str(tmp_path / form), str(data), device="cpu")
        assert f"perplexity: {here['perplexity']:.3f}" in printed
        assert "exact pruned point" not in printed
        assert "exact pruned point" not in (tmp_path / form / "README.md").read_text()


@pytest.mark.parametrize("form", ["hf", "uniform"])
def test_sizes_reach_the_checkpoint(
    form: str, places: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = ["--round-mlp", "8", "--align-heads", "4", "--min-heads", "3"]
    assert _export(places[0], tmp_path / "out", "--format", form, *sizes, sparsity="0.6") == 0
    assert "--round-mlp 8 --align-heads 4 --min-heads 3, decoder sparsity" in capsys.readouterr().out
    model: Any = gisp.load(tmp_path / "out")
    for layer in model.model.layers:
        assert layer.mlp.gate_proj.out_features % 8 == 0
        assert layer.self_attn.q_proj.out_features // 8 in (4, 8)
    assert "`--round-mlp 8 --align-heads 4 --min-heads 3`" in (tmp_path / "out" / "README.md").read_text()


def test_rounded_widths_reach_a_gguf_file(places: tuple[Path, Path], tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    assert _export(places[0], tmp_path / "out", "--format", "gguf", "--round-mlp", "8", sparsity="0.6") == 0
    fields = gguf.GGUFReader(tmp_path / "out" / "model.gguf").fields
    assert fields["gisp.options.round_mlp"].contents() == 8
    widths = fields["deci.feed_forward_length"].contents()
    assert len(set(widths)) > 1 and all(width % 8 == 0 for width in widths)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--format", "masked", "--round-mlp", "16"], "--round-mlp 16 changes nothing in format masked"),
        (["--window", "64"], "--window 64 is about --data: give --data SPEC or leave it out"),
        (["--format", "masked", "--align-heads", "2"], "leave it out, or --format hf or uniform"),
        (["--round-mlp", "0"], "--round-mlp 0: give 1 or more"),
        (["--align-heads", "-1"], "--align-heads -1: give 1 or more"),
        (["--min-heads", "0"], "--min-heads 0: give 1 or more"),
        (["--align-heads", "100"], "--align-heads 100: a layer of the dense model has 8 heads"),
        (["--min-heads", "9999999"], "--min-heads 9999999: a layer of the dense model has 8 heads"),
        (["--format", "uniform", "--align-heads", "16"], "satisfies --align-heads 16: give less, or --format hf"),
        (["--format", "onnx"], "format 'onnx' is not available"),
        (["--format", "uniform", "--data", "absent.safetensors"], "absent.safetensors does not exist"),
        (["--format", "uniform", "--data", "{data}", "--window", "1"], "--window is 1"),
    ],
)
def test_one_line_and_nothing_left(
    options: list[str],
    message: str,
    places: tuple[Path, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    options = [option.format(data=places[1]) for option in options]
    assert _export(places[0], tmp_path / "out", *options) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_taken_place_is_refused_before_anything_is_measured(
    places: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from gisp.export import run as run_export

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("measured although nothing can be written")

    monkeypatch.setattr(run_export, "measure_quality", never)
    (tmp_path / "mine.txt").write_text("mine")
    assert _export(places[0], tmp_path, "--format", "uniform", "--data", str(places[1])) == 2
    assert "not an empty folder" in capsys.readouterr().err


@pytest.mark.parametrize("gqa", ["query", "balanced", "group"])
def test_shared_key_value_heads_in_all_modes(gqa: str, tmp_path: Path) -> None:
    tiny_model("llama-gqa", num_attention_heads=8, head_dim=8).save_pretrained(tmp_path / "model")
    save_file({"input_ids": tiny_tokens(16, 16)}, tmp_path / "tokens.safetensors")
    gisp.prune(tmp_path / "model", tmp_path / "tokens.safetensors", out=tmp_path / "run", gqa=gqa, **EXACT_OPTIONS)
    done = export_run(
        tmp_path / "run",
        None,
        tmp_path / "out",
        format="uniform",
        device="cpu",
        sizes=SizeOptions(round_mlp=2),
        data=str(tmp_path / "tokens.safetensors"),
    )
    assert done.report.relative_difference <= 1e-5
    assert done.quality is not None
    here = evaluate_target(str(tmp_path / "out"), str(tmp_path / "tokens.safetensors"), device="cpu")
    assert done.quality.exported.perplexity == pytest.approx(here["perplexity"], rel=1e-4)
    for item in done.report.sizes:
        assert item.query_heads % item.kv_heads == 0
        assert item.kv_heads == 2 or (gqa == "group" and item.query_heads == 4)
