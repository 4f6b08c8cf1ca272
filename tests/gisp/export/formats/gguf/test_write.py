"""GGUF exports without llama.cpp: every tensor and entry of the file, refusals, and that failures leave nothing."""

from __future__ import annotations

import math
import resource
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from export_models import GGUF_FAMILIES, HEADS, KEPT, LLAMA3_ROPE, VOCAB, dense, masked, spec_of, tokens
from gguf_names import LAYER_NAMES
from safetensors.torch import load_file, save_file
from tiny import tiny_model, tiny_tokens

import gisp
from gisp.cli import main
from gisp.errors import GispError
from gisp.export.formats.gguf import check as gguf_check
from gisp.export.formats.gguf import file as gguf_file
from gisp.export.formats.gguf.write import export_gguf
from gisp.export.formats.hf import export_hf
from gisp.export.run import export_run
from gisp.export.spec import ExportReport

gguf = pytest.importorskip("gguf")

NAMES = {
    **LAYER_NAMES,
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
}
TORCH_TYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@pytest.fixture(autouse=True)
def without_llama_cpp(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same result whether llama-cpp-python is installed or not."""
    monkeypatch.setattr(gguf_check, "has_llama_cpp", lambda: False)


def _export(family: str, out: Path, weights: torch.dtype = torch.float32, *, dtype: str | None = None) -> ExportReport:
    return export_gguf(dense(family, weights, **GGUF_FAMILIES[family]), spec_of(), out, dtype=dtype)


def _read(out: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Entries and tensors of a file, through the gguf package alone."""
    reader = gguf.GGUFReader(out / "model.gguf")
    entries = {key: field.contents() for key, field in reader.fields.items()}
    tensors = {}
    for item in reader.tensors:
        values = torch.from_numpy(gguf.dequantize(item.data, item.tensor_type).copy())
        assert list(values.shape) == list(reversed(item.shape.tolist()))
        tensors[item.name] = values.to(TORCH_TYPES[item.tensor_type.name])
    return entries, tensors


def _neighbours(rows: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Row ``2 i + j`` of a head is the row ``i + j * head_dim / 2`` of the same head in transformers."""
    order = [
        head * head_dim + i + j * head_dim // 2
        for head in range(len(rows) // head_dim)
        for i in range(head_dim // 2)
        for j in range(2)
    ]
    return rows[torch.tensor(order)]


def _expected(out: Path, base: Any) -> dict[str, torch.Tensor]:
    """The tensors the file must hold, from the ``hf`` export."""
    export_hf(base, spec_of(), out)
    head_dim = base.model.layers[0].self_attn.head_dim
    result = {}
    for name, tensor in load_file(out / "model.safetensors").items():
        stem, kind = name.rsplit(".", 1)
        if stem.startswith("model.layers."):
            _, _, layer, part = stem.split(".", 3)
            stem = f"blk.{layer}.{NAMES[part]}"
            tensor = _neighbours(tensor, head_dim) if part in ("self_attn.q_proj", "self_attn.k_proj") else tensor
        else:
            stem = NAMES[stem]
        result[f"{stem}.{kind}"] = tensor.float() if tensor.ndim == 1 else tensor
    return result


@pytest.mark.parametrize("family", GGUF_FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_every_tensor(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    report = _export(family, tmp_path / "out", dtype)
    _, found = _read(tmp_path / "out")
    wanted = _expected(tmp_path / "hf", dense(family, dtype, **GGUF_FAMILIES[family]))
    factors = found.pop("rope_freqs.weight", None)
    assert (factors is not None) == (family == "llama-gqa")
    assert set(found) == set(wanted)
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name
    assert report.parameters_pruned == sum(t.numel() for t in found.values())
    assert report.bytes == (tmp_path / "out" / "model.gguf").stat().st_size


@pytest.mark.parametrize("family", GGUF_FAMILIES)
def test_entries(family: str, tmp_path: Path) -> None:
    report = _export(family, tmp_path / "out")
    entries, _ = _read(tmp_path / "out")
    base = dense(family, **GGUF_FAMILIES[family])
    config, head_dim = base.config, base.model.layers[0].self_attn.head_dim
    assert [layer.query_heads for layer in report.sizes][1:3] == [1, 3]
    for key, value in {
        "general.architecture": "deci",
        "general.name": "some-org/some-model, pruned by 50%",
        "general.file_type": gguf.LlamaFileType.ALL_F32,
        "deci.block_count": 4,
        "deci.context_length": 128,
        "deci.embedding_length": 64,
        "deci.vocab_size": VOCAB,
        "deci.attention.head_count": [layer.query_heads for layer in report.sizes],
        "deci.attention.head_count_kv": [layer.kv_heads for layer in report.sizes],
        "deci.feed_forward_length": [24, 4, 1, 43],
        "deci.attention.key_length": head_dim,
        "deci.attention.value_length": head_dim,
        "deci.rope.dimension_count": head_dim,
        "deci.rope.freq_base": config.rope_parameters["rope_theta"],
        "deci.attention.layer_norm_rms_epsilon": pytest.approx(config.rms_norm_eps, rel=1e-6),
        "tokenizer.ggml.model": "none",
        "gisp.sparsity": 0.5,
        "gisp.model_sparsity": 0.4,
        "gisp.step": 17,
        "gisp.base_fingerprint": "f" * 64,
    }.items():
        assert entries[key] == value, key
    assert [layer.heads for layer in report.sizes] == [len(keep.heads) for keep in KEPT]
    # llama.cpp's cache is float16 unless told otherwise.
    assert report.kv_bytes_per_token == 2 * 2 * head_dim * sum(layer.kv_heads for layer in report.sizes)
    assert report.kv_bytes_per_token_dense == 2 * 2 * head_dim * config.num_key_value_heads * 4


@pytest.mark.parametrize("family", GGUF_FAMILIES)
def test_the_file_read_back_gives_the_masked_logits(family: str, tmp_path: Path) -> None:
    base = dense(family, **GGUF_FAMILIES[family])
    report = export_gguf(base, spec_of(), tmp_path / "out")
    model = gguf_file.read_model(tmp_path / "out" / "model.gguf", base)
    with torch.no_grad():
        got, wanted = (m(input_ids=tokens()).logits for m in (model, masked(base, spec_of().keep)))
    assert float((got - wanted).abs().max() / wanted.abs().max()) <= 1e-5
    assert report.relative_difference <= report.tolerance == 1e-5


def test_llama3_frequencies(tmp_path: Path) -> None:
    """The factors llama.cpp's own converter computes."""
    rope: dict[str, Any] = {**LLAMA3_ROPE, "rope_theta": 100.0}
    export_gguf(dense("llama-mha", rope_parameters=rope), spec_of(), tmp_path / "out")
    _, found = _read(tmp_path / "out")
    factors = []
    for i in range(4):
        wavelength = 2 * math.pi * rope["rope_theta"] ** (2 * i / 8)
        turns = rope["original_max_position_embeddings"] / wavelength
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        smooth = min(max((turns - low) / (high - low), 0.0), 1.0)
        factors.append(1 / ((1 - smooth) / rope["factor"] + smooth))
    assert 1.0 == factors[0] < factors[1] < factors[2] < factors[3] == 8.0
    assert torch.allclose(found["rope_freqs.weight"], torch.tensor(factors), rtol=1e-6, atol=0)


def test_linear_frequencies(tmp_path: Path) -> None:
    base = dense("llama-mha", rope_parameters={"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0})
    export_gguf(base, spec_of(), tmp_path / "out")
    _, found = _read(tmp_path / "out")
    assert torch.allclose(found["rope_freqs.weight"], torch.full((4,), 4.0), rtol=1e-6, atol=0)


@pytest.mark.parametrize(("dtype", "name"), [(None, "F16"), ("f16", "F16"), ("bf16", "BF16"), ("f32", "F32")])
def test_dtypes_of_a_bfloat16_model(dtype: str | None, name: str, tmp_path: Path) -> None:
    report = _export("llama-bias", tmp_path / "out", torch.bfloat16, dtype=dtype)
    entries, found = _read(tmp_path / "out")
    assert report.relative_difference <= report.tolerance == 1e-5
    assert gguf.LlamaFileType(entries["general.file_type"]).name.endswith(f"_{name}")
    base = dense("llama-bias", torch.bfloat16)
    wanted = base.model.layers[3].mlp.up_proj.weight[5:].detach().float()
    assert {t.dtype for t in found.values() if t.ndim == 2} == {TORCH_TYPES[name]}
    assert {t.dtype for t in found.values() if t.ndim == 1} == {torch.float32}
    stored = found["blk.3.ffn_up.weight"].float()
    large = wanted.abs() >= 2**-14
    assert large.any()
    assert torch.equal(stored[large], wanted[large])
    assert float((stored - wanted).abs().max()) <= (2**-25 if name == "F16" else 0)
    card = (tmp_path / "out" / "README.md").read_text()
    assert {"F16": "but for weights below", "BF16": "| bfloat16, exactly", "F32": "| float32, exactly"}[name] in card


@pytest.mark.parametrize(("dtype", "unit"), [("f16", 2**-11), ("bf16", 2**-8)])
def test_rounding_a_float32_model_is_accepted_up_to_what_it_explains(dtype: str, unit: float, tmp_path: Path) -> None:
    report = _export("llama-mha", tmp_path / "out", dtype=dtype)
    assert report.tolerance == unit * 17
    assert 1e-5 < report.relative_difference <= report.tolerance


def test_card(tmp_path: Path) -> None:
    report = _export("llama-gqa", tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    for part in (
        'library_name: "gguf"',
        'base_model: "some-org/some-model"',
        "# some-org/some-model, pruned by 50% (GGUF)",
        "| llama.cpp | **was not run**",
        "| tokenizer | none: token ids only |",
        "takes and gives token ids only",
        "0.5000 (step 17)",
        f"{report.relative_difference:.2e} relative (accepted up to 1e-05)",
        "| 1 | 0 | 1 | 1 | 4 |",
        "| 2 | 3 | 3 | 1 | 1 |",
    ):
        assert part in card, part
    assert "transformers" not in card
    assert str(tmp_path) not in card
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["README.md", "model.gguf"]


@pytest.mark.parametrize(
    ("family", "overrides", "message"),
    [
        ("qwen3", {}, "model type 'qwen3' cannot be written as gguf"),
        ("mistral", {}, "sliding window of 6 tokens"),
        ("qwen2", {}, "sliding window of 6 tokens"),
        ("llama-mha", {"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        (
            "llama-mha",
            {"rope_parameters": {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0}},
            "rotary embedding .*yarn",
        ),
        (
            "llama-mha",
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}},
            "rotary embedding .*dynamic",
        ),
    ],
)
def test_what_llama_cpp_computes_otherwise_is_refused(
    family: str, overrides: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(GispError, match=message) as error:
        export_gguf(dense(family, **overrides), spec_of(), tmp_path / "out")
    assert "--format hf" in str(error.value)
    assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_a_sliding_window_no_text_reaches_is_none(tmp_path: Path) -> None:
    export_gguf(dense("mistral", sliding_window=128), spec_of(), tmp_path / "out")
    assert (tmp_path / "out" / "model.gguf").exists()


def test_unusable_dtypes_and_places_are_refused(tmp_path: Path) -> None:
    with pytest.raises(GispError, match="dtype 'q4_0' is not available: choose one of f32, f16, bf16"):
        _export("llama-mha", tmp_path / "out", dtype="q4_0")
    base = dense("llama-mha")
    with torch.no_grad():
        base.model.layers[0].mlp.up_proj.weight[0, 0] = 1e5
    with pytest.raises(GispError, match=r"up_proj\.weight holds weights beyond 65504"):
        export_gguf(base, spec_of(), tmp_path / "out", dtype="f16")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "out").write_text("mine")
    with pytest.raises(GispError, match="not an empty folder"):
        _export("llama-mha", tmp_path / "out")
    assert (tmp_path / "out").read_text() == "mine"


def test_without_the_gguf_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Named before the run is even looked at: loading a large model takes minutes."""
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(GispError, match=r"pip install 'gisp\[gguf\]'"):
        export_run(tmp_path / "absent", 0.5, tmp_path / "out", format="gguf")
    with pytest.raises(GispError, match=r"pip install 'gisp\[gguf\]'"):
        _export("llama-mha", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_run_is_exported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, data, run = tmp_path / "base", tmp_path / "data.safetensors", tmp_path / "run"
    tiny_model("llama-gqa").to(torch.float16).save_pretrained(base)
    save_file({"input_ids": tiny_tokens()}, data)
    gisp.prune(str(base), str(data), out=run, sparsity=0.3, preset="paper", steps=3, device="cpu", dtype="float32")
    command = ["export", str(run), "--sparsity", "0.3", "--device", "cpu", "--dtype", "f32", "--format"]
    assert main([*command, "gguf", "--out", str(tmp_path / "out")]) == 0
    entries, found = _read(tmp_path / "out")
    keep = gisp.Trajectory.load(run).keep(3)
    assert entries["gisp.step"] == 3
    assert entries["deci.feed_forward_length"] == [max(len(channels), 1) for channels in keep.channels]
    assert sum(entries["deci.feed_forward_length"]) < 4 * 24
    assert found["token_embd.weight"].dtype == torch.float32
    capsys.readouterr()
    assert main([*command, "hf", "--out", str(tmp_path / "other")]) == 2
    assert "--dtype f32 is for --format gguf" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


def test_rows_in_the_wrong_order_leave_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf_file, "interleave", lambda rows, heads: rows)
    with pytest.raises(GispError, match="logits of the exported model differ by"):
        _export("llama-mha", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("key", ["rope_freq_base", "layer_norm_rms_eps"])
def test_a_wrong_entry_leaves_nothing(key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file is read back from what it says, not from the base model."""
    name = f"add_{key}"
    correct = getattr(gguf.GGUFWriter, name)
    monkeypatch.setattr(gguf.GGUFWriter, name, lambda writer, value: correct(writer, 3 * value + 0.01))
    with pytest.raises(GispError, match="logits of the exported model differ by"):
        _export("llama-mha", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_failing_write_leaves_nothing(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, hard))
    try:
        with pytest.raises(GispError, match=r"cannot write .*out"):
            _export("llama-mha", tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.gpu
def test_export_from_the_gpu(tmp_path: Path) -> None:
    base = dense("llama-gqa", torch.bfloat16).to("cuda")
    report = export_gguf(base, spec_of(), tmp_path / "out")
    assert report.relative_difference <= 1e-5
    assert len(report.sizes) == len(KEPT)
    assert max(layer.query_heads for layer in report.sizes) == HEADS
