"""Evaluations whose model has its layers in host memory: planned and told first, refused or equal to others."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from eval_cases import GQA, byte_tokenizer, write_rows
from harness_cases import CHOICES, write_tasks
from run_cases import EXACT_OPTIONS
from safetensors.torch import save_file
from tiny import tiny_model, tiny_tokens
from transformers import GPT2Config, GPT2LMHeadModel

import gisp
from gisp.cli import main
from gisp.compensation import make_request
from gisp.config.evaluation import EvalOptions, LmEvalTasks
from gisp.errors import GispError
from gisp.offload import plan as plans
from gisp.offload.plan import Plan
from gisp.offload.stream import LayerStream
from gisp.run.resources import placement
from gisp.run.resources.base import BasePlace
from gisp.target import evaluate_along, evaluate_target, open

CPU = ("--device", "cpu", "--dtype", "float32")


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with a tokenizer, its run, an export, and data of every kind."""
    root = tmp_path_factory.mktemp("offload")
    tiny_model("llama-gqa", **GQA).save_pretrained(root / "model")
    byte_tokenizer().save_pretrained(root / "model")
    save_file({"input_ids": tiny_tokens(8, 16)}, root / "tokens.safetensors")
    write_rows(root / "choices.jsonl", CHOICES[:4])
    write_rows(root / "completions.jsonl", [{"prompt": "a c", "completion": "ab"}, {"prompt": "b", "completion": "g"}])
    gisp.prune(root / "model", root / "tokens.safetensors", out=root / "run", **EXACT_OPTIONS)
    gisp.export_run(root / "run", 0.3, root / "hf", device="cpu")
    return root


def watch(monkeypatch: pytest.MonkeyPatch) -> list[Plan]:
    """The plans that are made from here on; no model may lie elsewhere than one of them says."""
    found: list[Plan] = []
    made, placed = BasePlace.plan, LayerStream.__init__

    def planned(self: BasePlace, *given: Any) -> Plan:
        found.append(made(self, *given))
        return found[-1]

    def streamed(self: LayerStream, *given: Any, head: Any = None, **options: Any) -> None:
        assert found and (head is not None) == found[-1].ends_on_host
        placed(self, *given, head=head, **options)

    monkeypatch.setattr(BasePlace, "plan", planned)
    monkeypatch.setattr(LayerStream, "__init__", streamed)
    return found


@pytest.mark.parametrize("target", ["model", "run", "hf"])
def test_the_plan_with_the_least_on_the_device_gives_the_same_figures(
    places: Path, target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plans, "_SEGMENTS", 0)
    options = EvalOptions(generate=True, max_new_tokens=4)
    given: dict[str, Any] = {"options": options, "device": "cpu", "dtype": "float32"}
    name, data = str(places / target), str(places / "completions.jsonl")
    wanted = evaluate_target(name, data, **given)
    found = watch(monkeypatch)
    assert evaluate_target(name, data, **given, offload=True) == wanted
    # So little that embedding and output projection do not stay.
    limit = f"{(found[0].device - 1) / plans._USABLE / 1e6:.6f}MB"
    assert evaluate_target(name, data, **given, offload=True, gpu_memory=limit) == wanted
    assert [plan.ends_on_host for plan in found] == [False, True]
    more = EvalOptions(generate=True, max_new_tokens=20)
    evaluate_target(name, data, **{**given, "options": more}, offload=True)
    assert found[2].demand.working > 2 * found[0].demand.working


def test_all_that_is_done_along_a_run_is_planned(places: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens, found = str(places / "tokens.safetensors"), watch(monkeypatch)
    common: dict[str, Any] = {"sparsities": [0.2, 0.5], "device": "cpu", "dtype": "float32"}
    evaluate_along(str(places / "run"), tokens, **common, offload=True)
    request = make_request("kfac", tokens, steps=1, tokens=100)
    compensated = evaluate_along(str(places / "run"), tokens, **common, offload=True, compensation=request)
    assert compensated == evaluate_along(str(places / "run"), tokens, **common, compensation=request)
    plain, kfac = (plan.demand for plan in found)
    assert not plain.beside and not plain.inputs
    assert kfac.beside and kfac.inputs and kfac.working > plain.working
    # One more point may ask for more, never for less.
    evaluate_target(str(places / "run"), tokens, sparsity=0.2, device="cpu", offload=True, compensation=request)
    assert found[2].demand.beside <= kfac.beside and found[2].demand.working <= kfac.working


def test_tasks_of_lm_eval_are_planned(places: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("lm_eval")
    pytest.importorskip("datasets")
    write_tasks(tmp_path)
    given: dict[str, Any] = {"lm_eval": LmEvalTasks(("gisp_choices",), tmp_path), "device": "cpu", "dtype": "float32"}
    wanted, found = evaluate_target(str(places / "hf"), **given), watch(monkeypatch)
    assert evaluate_target(str(places / "hf"), **given, offload=True) == wanted
    assert found[0].demand.working > 0


def test_plans_are_told_and_figures_stay(places: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokens = str(places / "tokens.safetensors")
    given = ["eval", str(places / "run"), "--sparsity", "0.4", "--data", tokens, "--json", *CPU]
    assert main(given) == 0
    wanted = json.loads(capsys.readouterr().out)
    assert main([*given, "--offload", "--gpu-memory", "1GB"]) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out) == wanted
    lines = [line for line in printed.err.splitlines() if line.startswith(("offload:", "  "))]
    assert lines[0].startswith("offload: 4 of 4 layers in host memory (") and len(lines) == 2
    assert lines[1].startswith("  device peak ") and " of 1.0 GB, host " in lines[1]


def test_what_cannot_be_is_one_line(
    places: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def never(*_: Any, **__: Any) -> Any:
        raise AssertionError("loaded")

    monkeypatch.setattr(gisp.Trajectory, "load_base", never)
    monkeypatch.setattr(open, "load", never)
    GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=96)).save_pretrained(tmp_path / "gpt2")
    tokens = str(places / "tokens.safetensors")
    small = ["--offload", "--gpu-memory", "50MB"]
    kfac = ["--compensate", "kfac", "--calibration", tokens]
    smaller = "may be used: give a smaller --batch-size or --window, or more --gpu-memory"
    refused: list[tuple[Path, list[str], str]] = [
        *((places / name, small, smaller) for name in ("model", "run", "hf")),
        (places / "run", [*small, "--sparsities", "0.2,0.4"], smaller),
        (places / "run", [*small, *kfac], "may be used: give fewer --calibration-tokens, or more --gpu-memory"),
        (places / "run", ["--gpu-memory", "24GB"], "--gpu-memory 24GB belongs to --offload: give both, or leave it"),
        (places / "run", ["--offload", "--gpu-memory", "much"], "--gpu-memory is 'much': give an amount as 24GB"),
        (tmp_path / "gpt2", ["--offload"], "model type 'gpt2' has no decoder layers at model.layers: leave --offload"),
    ]
    for target, given, words in refused:
        assert main(["eval", str(target), "--data", tokens, *CPU, *given]) == 2, given
        error = capsys.readouterr().err
        assert words in error and error.count("\n") == 1, given


def test_host_memory_is_that_of_all_processes(places: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found, given = watch(monkeypatch), {"device": "cpu", "dtype": "float32", "offload": True}
    run, tokens = str(places / "run"), str(places / "tokens.safetensors")
    evaluate_target(run, tokens, **given)  # type: ignore[arg-type]
    host = found[0].host
    monkeypatch.setattr(placement, "available_bytes", lambda: host)
    evaluate_target(run, tokens, **given)  # type: ignore[arg-type]
    monkeypatch.setattr(placement, "processes_here", lambda: 2)
    with pytest.raises(GispError, match=r"--offload needs .* of host memory, .* are free: free some$"):
        evaluate_target(run, tokens, **given)  # type: ignore[arg-type]
