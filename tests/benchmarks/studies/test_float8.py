"""Agreement of choices counted right, and a study of a tiny decoder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tiny import tiny_model, tiny_tokens

from benchmarks.studies.float8 import main, shared
from gisp.errors import GispError

SHAPE = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 16, "intermediate_size": 48}


def test_agreement_counts_what_both_chose() -> None:
    one, other = torch.tensor([1, 1, 0, 0]).bool(), torch.tensor([1, 0, 1, 1]).bool()
    assert shared(one, one) == 1
    assert shared(one, ~one) == 0
    assert shared(one, other) == pytest.approx(1 / 2.5)


@pytest.fixture
def study(tmp_path: Path) -> list[str]:
    tiny_model("llama-mha", layers=6, **SHAPE).save_pretrained(tmp_path / "model")
    save_file({"input_ids": tiny_tokens(32)}, tmp_path / "c.safetensors")
    save_file({"input_ids": tiny_tokens(seed=5)}, tmp_path / "e.safetensors")
    files = ["--calibration", str(tmp_path / "c.safetensors"), "--evaluation", str(tmp_path / "e.safetensors")]
    return [str(tmp_path / "model"), *files, "--steps", "3", "--batch-tokens", "64", "--device", "cpu"]


@pytest.mark.parametrize("criterion", ["second-order", "gisp"])
def test_a_study_compares_steps_and_runs(
    study: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], criterion: str
) -> None:
    assert main([*study, "--sparsities", "0.2,0.4", "--criterion", criterion, "--out", str(tmp_path / "r.json")]) == 0
    result = json.loads((tmp_path / "r.json").read_text())
    assert result["benchmark"] == "float8" and result["steps"] == 3 and result["criterion"] == criterion
    found = {(row["reading"], row["pair"], row["sparsity"]): row for row in result["rows"]}
    assert len(found) == 6
    for row in found.values():
        assert 0 < row["chance"] < 0.7 and row["chance"] < row["agreement"] <= 1
        assert (row["perplexities"] is None) == (row["reading"] == "one step")
    assert "another data order" in capsys.readouterr().out


def test_a_study_refuses_sparsities_that_are_no_numbers(study: list[str]) -> None:
    with pytest.raises(GispError, match="--sparsities is 'a,b'"):
        main([*study, "--sparsities", "a,b"])
