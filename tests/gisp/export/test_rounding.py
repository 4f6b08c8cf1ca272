"""MLP widths rounded up with real weights, and the options that reach every exporter."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from export_models import CHANNELS, FAMILIES, KEPT, RUN, Kept, dense, layers_of, masked, ranked, spec_of, tokens

import gisp
from gisp.errors import GispError
from gisp.export.formats.hf import export_hf
from gisp.export.sizes.options import SizeOptions
from gisp.export.sizes.rounding import round_mlp
from gisp.export.spec import PrunedSpec
from gisp.model.structures import map_model


@pytest.mark.parametrize("multiple", [1, 2, 7, 16, 20, 48, 64])
def test_the_channels_that_went_last_come_back(multiple: int) -> None:
    model_map, spec = map_model(dense("llama-gqa")), ranked(spec_of(), seed=2)
    rounded = round_mlp(model_map, spec, multiple)
    added = 0
    for old, new, ranking in zip(layers_of(spec), layers_of(rounded), spec.ranking, strict=True):
        width = len(new.channels)
        assert width == CHANNELS or width % multiple == 0
        assert width - len(old.channels) < multiple or not old.channels
        # Every layer of KEPT holds a beginning of its ranking: what is kept then is a longer beginning.
        assert set(new.channels) == set(ranking.channels[:width])
        assert list(new.channels) == sorted(new.channels)
        assert new.heads == old.heads
        added += width - len(old.channels)
    assert (added == 0) == (multiple == 1)
    assert rounded.sparsity == pytest.approx(spec.sparsity - added * 3 * 64 / model_map.decoder_parameters)
    assert rounded.model_sparsity == pytest.approx(spec.model_sparsity - added * 3 * 64 / model_map.parameters)
    assert rounded.options == {"round_mlp": multiple}
    assert f"{added:,} channels of the dense model are back: {added * 192:,} parameters more" in rounded.notes[0][1]


def test_an_emptied_mlp_gets_a_whole_multiple_back() -> None:
    rounded = round_mlp(map_model(dense("llama-gqa")), ranked(spec_of()), 8)
    assert [len(keep.channels) for keep in layers_of(rounded)] == [24, 8, 8, 48]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_rounded_export_equals_the_masked_model_with_those_channels(family: str, tmp_path: Path) -> None:
    base = dense(family)
    spec = round_mlp(map_model(base), ranked(spec_of()), 16)
    report = export_hf(base, spec, tmp_path / "out", align_heads=4)
    assert [item.channels for item in report.sizes] == [32, 16, 16, 48]
    assert all(item.query_heads % 4 == 0 for item in report.sizes)
    with torch.no_grad():
        wanted = masked(base, spec.keep)(input_ids=tokens()).logits
        got = gisp.load(tmp_path / "out")(input_ids=tokens()).logits
        narrow = masked(base, spec_of().keep)(input_ids=tokens()).logits
    assert float((got - wanted).abs().max()) <= 1e-5 * float(wanted.abs().max())
    # The channels that are back are not zeros.
    assert float((got - narrow).abs().max()) > 1e-3 * float(wanted.abs().max())
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| options | `--round-mlp 16 --align-heads 4` |" in card
    biases = 2 if family == "llama-bias" else 0  # of gate and up
    back = f"41 channels of the dense model are back: {41 * (3 * 64 + biases):,} param"
    assert f"| MLP widths rounded up to multiples of 16 | {back}" in card
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["gisp"]["options"] == {"round_mlp": 16, "align_heads": 4}
    assert config["gisp"]["sparsity"] == spec.sparsity < 0.5


def test_rounding_refuses_what_it_cannot_do() -> None:
    model_map = map_model(dense("llama-gqa"))
    for multiple in (0, -16):
        with pytest.raises(GispError, match=f"--round-mlp {multiple}: give 1 or more"):
            round_mlp(model_map, ranked(spec_of()), multiple)
    with pytest.raises(GispError, match="--round-mlp 16 needs a ranking of 4 layers, the spec has 0"):
        round_mlp(model_map, spec_of(), 16)


def test_options_are_checked_and_named_as_typed() -> None:
    assert SizeOptions().given() == {}
    assert SizeOptions(round_mlp=64, min_heads=1).given() == {"round_mlp": 64, "min_heads": 1}
    for name in ("round_mlp", "align_heads", "min_heads"):
        with pytest.raises(GispError, match=f"--{name.replace('_', '-')} 0: give 1 or more"):
            SizeOptions(**{name: 0}).given()


def test_unrounded_exports_say_nothing_of_options(tmp_path: Path) -> None:
    spec: PrunedSpec = replace(spec_of((Kept((0,), (0,)),) * len(KEPT)), run=RUN)
    export_hf(dense("llama-mha"), spec, tmp_path / "out")
    assert "options" not in (tmp_path / "out" / "README.md").read_text()
    assert "options" not in json.loads((tmp_path / "out" / "config.json").read_text())["gisp"]
