"""GGUF files as base models: pruned, evaluated and exported like the folder with the same weights."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from eval_cases import byte_tokenizer, write_rows
from gguf_names import LAYER_NAMES
from tiny import VOCAB, tiny_model, tiny_tokens

import gisp
from gisp.cli import main
from gisp.data.encode import load_tokenizer
from gisp.errors import GispError
from gisp.export.run import export_run
from gisp.model import gguf as module
from gisp.model.load import load_dense

gguf = pytest.importorskip("gguf")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``m.gguf`` with matrices of 8 bits, ``dense/`` with the values they stand for, and text."""
    folder = tmp_path_factory.mktemp("gguf")
    model = tiny_model("llama-gqa", layers=4, intermediate_size=64)
    write_gguf(model, folder / "m.gguf")
    model.save_pretrained(folder / "dense")
    byte_tokenizer().save_pretrained(folder / "dense")
    write_rows(folder / "text.jsonl", [{"text": f"the cab is {i} and a bag is not"} for i in range(60)])
    return folder


def write_gguf(model: Any, path: Path) -> None:
    """A Llama as llama.cpp's converter writes it; the model's matrices become what 8 bits hold of them."""
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(config.vocab_size)
    tokenizer = byte_tokenizer()
    inner = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(sorted(inner["vocab"], key=inner["vocab"].__getitem__))
    writer.add_token_types([3, *([1] * (VOCAB - 1))])
    writer.add_token_merges([pair if isinstance(pair, str) else " ".join(pair) for pair in inner["merges"]])
    writer.add_eos_token_id(0)
    eight_bits = gguf.GGMLQuantizationType.Q8_0
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            writer.add_tensor(_name(name), parameter.detach().numpy())
            continue
        packed = gguf.quantize(_laid_out(name, parameter, config).numpy(), eight_bits)
        writer.add_tensor(_name(name), packed, raw_dtype=eight_bits)
        exact = gguf.quantize(parameter.detach().numpy(), eight_bits)
        parameter.data.copy_(torch.from_numpy(gguf.dequantize(exact, eight_bits).copy()))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _name(name: str) -> str:
    plain = {"model.embed_tokens.weight": "token_embd", "model.norm.weight": "output_norm", "lm_head.weight": "output"}
    if name in plain:
        return f"{plain[name]}.weight"
    _, _, layer, *rest, kind = name.split(".")
    return f"blk.{layer}.{LAYER_NAMES['.'.join(rest)]}.{kind}"


def _laid_out(name: str, parameter: torch.Tensor, config: Any) -> torch.Tensor:
    """Rotary pairs stand side by side in llama.cpp's q and k."""
    weight = parameter.detach()
    if "q_proj" not in name and "k_proj" not in name:
        return weight
    return weight.view(-1, 2, config.head_dim // 2, weight.shape[1]).transpose(1, 2).reshape(weight.shape).contiguous()


def test_a_file_loads_as_the_folder_of_its_values(files: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = str(files / "m.gguf")
    with caplog.at_level(logging.WARNING):
        model = load_dense(path, torch.device("cpu"), torch.float32)
    assert f"{path}: weights are dequantised to float32" in caplog.text
    wanted = load_dense(str(files / "dense"), torch.device("cpu"), torch.float32)
    ids = tiny_tokens(2, 20)
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, wanted(input_ids=ids).logits)
    assert "quantization_config" not in model.config.to_dict()
    text = "the cab is 12 and\n\na bag"
    assert load_tokenizer(path, "x").encode(text) == load_tokenizer(str(files / "dense"), "x").encode(text)


def test_a_run_on_a_file_is_that_on_the_folder_and_exports_carry_its_tokenizer(files: Path, tmp_path: Path) -> None:
    removed = {}
    for name in ("m.gguf", "dense"):
        options: dict[str, Any] = {"sparsity": 0.3, "steps": 3, "batch_tokens": 256, "align": 1, "device": "cpu"}
        run = gisp.prune(str(files / name), str(files / "text.jsonl"), out=tmp_path / name, seq_len=32, **options)
        removed[name] = run.removed_at
        assert run.base_model["fingerprint"] == gisp.Trajectory.load(tmp_path / name).base_model["fingerprint"]
    assert all(torch.equal(removed["m.gguf"][key], value) for key, value in removed["dense"].items())
    for name in ("m.gguf", "dense"):
        export_run(str(tmp_path / name), sparsity=0.3, out=str(tmp_path / f"{name}-out"), device="cpu")
    ids = tiny_tokens(2, 20)
    one, two = (gisp.load(str(tmp_path / f"{name}-out")) for name in ("m.gguf", "dense"))
    with torch.no_grad():
        assert torch.equal(one.float()(input_ids=ids).logits, two.float()(input_ids=ids).logits)
    assert load_tokenizer(str(tmp_path / "m.gguf-out"), "x").encode("a bag") == byte_tokenizer().encode("a bag")


def test_what_cannot_be_read_is_one_line(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "broken.gguf").write_bytes(b"GGUF\x03\x00\x00\x00")
    with pytest.raises(GispError, match=r"broken\.gguf cannot be loaded"):
        load_dense(str(tmp_path / "broken.gguf"), torch.device("cpu"), torch.float32)
    with pytest.raises(GispError, match=r"none\.gguf does not exist"):
        load_dense(str(tmp_path / "none.gguf"), torch.device("cpu"), torch.float32)
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    out = ["--data", str(files / "text.jsonl"), "--out", str(tmp_path / "run")]
    assert main(["prune", str(files / "m.gguf"), *out]) == 2
    assert "needs the gguf package: pip install 'gisp[gguf]'" in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "run").exists()
