"""What serving engines need of an export, checked here, and vLLM itself where it is installed."""

from __future__ import annotations

import importlib.util
import inspect
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from export_models import FAMILIES, dense, export_one_size, ranked, spec_of, tokens
from transformers import AttentionInterface, AutoConfig, AutoModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

import gisp
from gisp.export.formats.hf import export_hf
from gisp.export.modeling_gisp import AUTO_CLASSES, classes_of
from gisp.export.modeling_gisp import FAMILIES as MODEL_TYPES
from gisp.export.sizes.rounding import round_mlp
from gisp.export.spec import ExportReport, LayerSizes
from gisp.model.structures import map_model

DEVICES = 2


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, ExportReport]]:
    """Of every family the exact export, one whose layers two devices can share, and a uniform one."""
    root = tmp_path_factory.mktemp("serving")
    reports = {}
    for family in FAMILIES:
        base = dense(family)
        shared = round_mlp(map_model(base), ranked(spec_of()), 4)
        reports[f"{family}-exact"] = export_hf(base, spec_of(), root / f"{family}-exact")
        reports[f"{family}-shared"] = export_hf(base, shared, root / f"{family}-shared", align_heads=DEVICES)
        reports[f"{family}-uniform"] = export_one_size(base, spec_of(), root / f"{family}-uniform")
    return root, reports


@pytest.fixture
def probe() -> Iterator[list[tuple[int, int, int]]]:
    """An attention function as an engine registers its own; collects (layer, query heads, key/value heads) per call."""
    calls: list[tuple[int, int, int]] = []

    def attend(module: Any, query: Any, key: Any, value: Any, mask: Any, **kwargs: Any) -> Any:
        calls.append((module.layer_idx, query.shape[1], key.shape[1]))
        return sdpa_attention_forward(module, query, key, value, mask, **kwargs)

    AttentionInterface.register("probe", attend)
    AttentionMaskInterface.register("probe", sdpa_mask)
    yield calls


@pytest.mark.parametrize("family", FAMILIES)
def test_attention_dispatches_through_the_interface(
    family: str, exported: tuple[Path, dict[str, ExportReport]], probe: list[tuple[int, int, int]]
) -> None:
    model = gisp.load(exported[0] / f"{family}-exact")
    with torch.no_grad():
        wanted = model(input_ids=tokens()).logits
        model.set_attn_implementation("probe")
        assert torch.equal(model(input_ids=tokens()).logits, wanted)
    layout = exported[1][f"{family}-exact"].sizes
    assert probe == [(i, item.query_heads, item.kv_heads) for i, item in enumerate(layout)]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_decoder_is_built_from_the_configuration_alone(
    family: str, exported: tuple[Path, dict[str, ExportReport]]
) -> None:
    """As vLLM's backend does it: auto_map names the decoder, AutoModel builds it without weights, layer by layer."""
    folder = exported[0] / f"{family}-exact"
    raw = json.loads((folder / "config.json").read_text())
    # The configuration class must be imported before the models.
    assert list(raw["auto_map"]) == list(AUTO_CLASSES)
    # A name transformers know would make an engine take the stock class.
    assert not hasattr(transformers, raw["architectures"][0])
    gisp.export.load.register_models()
    config = AutoConfig.from_pretrained(folder)
    with torch.device("meta"):
        decoder: Any = AutoModel.from_config(config)
    assert type(decoder) is classes_of(raw["model_type"])[1]
    assert decoder.get_decoder() is decoder
    assert decoder._can_set_attn_implementation()
    for index, (layer, item) in enumerate(zip(decoder.layers, exported[1][f"{family}-exact"].sizes, strict=True)):
        own = config.per_layer_config[index]
        assert own.num_attention_heads == item.query_heads == layer.self_attn.q_proj.out_features // config.head_dim
        assert own.num_key_value_heads == item.kv_heads == layer.self_attn.k_proj.out_features // config.head_dim
        assert own.intermediate_size == item.channels == layer.mlp.down_proj.in_features
        assert own.head_dim == layer.self_attn.head_dim == config.head_dim
    plan = {f"layers.*.{name}" for name in ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj")}
    assert plan <= set(decoder.tp_plan)
    assert {"embed_tokens", "layers", "norm"} <= set(decoder._pp_plan)


@pytest.mark.parametrize("family", MODEL_TYPES)
def test_no_annotation_of_a_decoder_is_text(family: str) -> None:
    """vLLM asks ``isinstance(argument, annotation)`` of a decoder's positional arguments: text raises TypeError."""
    parameters = inspect.signature(classes_of(f"gisp_{family}")[1].__init__).parameters
    assert list(parameters) == ["self", "config"]
    assert not [name for name, item in parameters.items() if isinstance(item.annotation, str)]


def test_which_devices_can_share_the_layers(exported: tuple[Path, dict[str, ExportReport]]) -> None:
    for family in FAMILIES:
        # A layer of KEPT has no head, one no channel: each is stored as a single zeroed one.
        assert exported[1][f"{family}-exact"].tensor_parallel == (1,)
        assert DEVICES in exported[1][f"{family}-shared"].tensor_parallel
        card = (exported[0] / f"{family}-shared" / "README.md").read_text()
        assert "| devices for tensor parallelism | 1, 2 |" in card

    def sizes(*layers: tuple[int, int, int]) -> tuple[int, ...]:
        layout = tuple(LayerSizes(heads, heads, kv_heads, channels) for heads, kv_heads, channels in layers)
        return ExportReport(Path(), 0, 0, 1, 1, 1, 1, 1, layout).tensor_parallel

    assert sizes((8, 8, 16)) == (1, 2, 4, 8)
    # One key/value head is repeated on every device, two are shared or split; three cannot be on two devices.
    assert sizes((8, 1, 16)) == (1, 2, 4, 8)
    assert sizes((8, 2, 16), (12, 4, 12)) == (1, 2, 4)
    assert sizes((6, 3, 24)) == (1, 3, 6)
    assert sizes((8, 8, 16), (8, 8, 12)) == (1, 2, 4)
    assert sizes((8, 8, 7)) == (1,)


HAS_VLLM = importlib.util.find_spec("vllm") is not None


@pytest.mark.skipif(not HAS_VLLM, reason="needs vllm")
@pytest.mark.parametrize("devices", [1, DEVICES])
def test_vllm_computes_the_same(devices: int, exported: tuple[Path, dict[str, ExportReport]], tmp_path: Path) -> None:
    """Its configuration reader, model choice, weight loader and models; on two devices those layers can share."""
    # vLLM's own Qwen2 has no sliding window in some layers alone, dense or pruned.
    folders = [
        exported[0] / f"{family}-{kind}"
        for family in FAMILIES
        for kind in (("exact", "shared", "uniform") if devices == 1 else ("shared",))
        if (family, kind) != ("qwen2", "uniform")
    ]
    script = Path(__file__).parents[2] / "support" / "vllm_reload.py"
    environment = {**os.environ, "HF_HOME": str(tmp_path), "WORLD_SIZE": str(devices), "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, script, str(rank), str(devices), tmp_path / "store", *folders],
            env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(devices)
    ]
    outputs = [process.communicate() for process in processes]
    for process, (out, error) in zip(processes, outputs, strict=True):
        assert process.returncode == 0, error
        results = [json.loads(line) for line in out.splitlines() if line.startswith("{")]
        assert [result["folder"] for result in results] == [folder.name for folder in folders]
        for result in results:
            layout = exported[1][result["folder"]].sizes
            heads = [[i.query_heads // devices, max(i.kv_heads // devices, 1)] for i in layout]
            assert result["heads"] == heads
            assert result["difference"] <= 1e-5
            stock = result["folder"].endswith("uniform")
            assert result["model"].startswith("Transformers") != stock
