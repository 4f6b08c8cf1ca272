"""What a config.json says of the machine it was written on does not bind the machine that reads it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tiny import tiny_model, tiny_tokens

import gisp


@pytest.mark.parametrize("name", ["attn_implementation", "_attn_implementation"])
@pytest.mark.parametrize("value", ["flash_attention_2", "eager"])
def test_attention_code_named_in_a_configuration_is_not_needed(name: str, value: str, tmp_path: Path) -> None:
    model = tiny_model()
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, name: value}))
    loaded = gisp.load(tmp_path)
    assert loaded.config._attn_implementation == "sdpa"
    with torch.no_grad():
        assert torch.equal(loaded(tiny_tokens(2)).logits, model(tiny_tokens(2)).logits)
