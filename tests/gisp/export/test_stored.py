"""Sizes told without a model are those of the export, at every point of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tiny import tiny_model, tiny_tokens

import gisp
from gisp.export.formats.hf import export_hf
from gisp.export.sizes.stored import element_bytes
from gisp.export.spec import PrunedSpec
from gisp.report.data import read_run
from gisp.run.resources.base import BasePlace
from gisp.target.open import open_target, stored_at

CASES = [("llama-gqa", "query"), ("llama-gqa", "group"), ("llama-gqa", "balanced"), ("llama-mha", "query")]
CASES += [("llama-bias", "query"), ("qwen2", "query"), ("qwen2", "group"), ("qwen3", "query")]
# Three query heads to a key/value head: kept heads are spread unevenly as soon as one goes.
UNEVEN = {"num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 8, "hidden_size": 48}
SHAPED = [(family, gqa, {} if family == "llama-mha" else UNEVEN) for family, gqa in CASES]
# As many parameters as these biases would biases of the MLP and norms of queries and keys have.
SHAPED += [("qwen2", "query", {"num_key_value_heads": 4})]


@pytest.mark.parametrize(("family", "gqa", "heads"), SHAPED)
def test_the_sizes_of_a_point_are_those_of_its_export(
    family: str, gqa: str, heads: dict[str, int], tmp_path: Path
) -> None:
    tiny_model(family, layers=3, **heads).save_pretrained(tmp_path / "model")
    run = tmp_path / "run"
    options: dict[str, Any] = {
        "preset": "paper",
        "criterion": "random",
        "protect_last": 0,
        "dtype": "float32",
        "device": "cpu",
    }
    gisp.prune(tmp_path / "model", tiny_tokens(2, 8), out=run, steps=4, sparsity=0.8, gqa=gqa, **options)
    trajectory = gisp.Trajectory.load(run)
    steps = range(len(trajectory.steps) + 1)
    told = stored_at(trajectory, steps)
    assert read_run(run).stored(steps) == told
    more = 0
    for step, size in zip(steps, told, strict=True):
        base = trajectory.load_base(device="cpu")
        report = export_hf(base, PrunedSpec.at(trajectory, step), tmp_path / f"export-{step}")
        assert (size.parameters, size.kv_bytes_per_token(4)) == (report.parameters_pruned, report.kv_bytes_per_token)
        point = open_target(str(run), sparsity=trajectory.sparsity_at(step), place=BasePlace("cpu")).describe()
        assert point["parameters"] == report.parameters_pruned
        assert point["kv_bytes_per_token"] == report.kv_bytes_per_token
        removed = trajectory.steps[step - 1].removed_parameters if step else 0
        more += size.parameters > base.num_parameters() - removed
    assert more > 0 or (family, gqa) != ("llama-gqa", "query")


@pytest.mark.parametrize("family", ["llama-gqa", "qwen2"])
def test_records_that_do_not_tell_biases_have_those_of_the_model_type(family: str, tmp_path: Path) -> None:
    tiny_model(family).save_pretrained(tmp_path / "model")
    options: dict[str, Any] = {"preset": "paper", "criterion": "random", "dtype": "float32", "device": "cpu"}
    gisp.prune(tmp_path / "model", tiny_tokens(2, 8), out=tmp_path / "run", steps=2, sparsity=0.4, **options)
    trajectory = gisp.Trajectory.load(tmp_path / "run")
    told = stored_at(trajectory, range(3))
    assert trajectory.base_model.pop("biases") == ([] if family == "llama-gqa" else ["k_proj", "q_proj", "v_proj"])
    assert stored_at(trajectory, range(3)) == told


def test_numbers_of_a_cache_have_the_bytes_of_the_run(tmp_path: Path) -> None:
    tiny_model("llama-gqa").bfloat16().save_pretrained(tmp_path / "model")
    options: dict[str, Any] = {"preset": "paper", "criterion": "random", "dtype": "bfloat16", "device": "cpu"}
    gisp.prune(tmp_path / "model", tiny_tokens(2, 8), out=tmp_path / "run", steps=2, sparsity=0.3, **options)
    run = read_run(tmp_path / "run")
    assert element_bytes(run.base_model, run.heads, run.steps, None) == 2
    assert element_bytes(run.base_model, run.heads, [], "float32") == 4
    assert element_bytes(run.base_model, run.heads, [], None) is None
