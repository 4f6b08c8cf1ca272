"""Writing a pruned model as GGUF and reading it back.

llama.cpp rotates neighbouring elements of a head, transformers element ``i`` with ``i + head_dim / 2``: the rows of
q_proj and k_proj are put in llama.cpp's order within every head of their layer.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gisp.errors import GispError
from gisp.export.folder import check_room
from gisp.export.formats.gguf.tokenizer import Vocabulary, add_vocabulary
from gisp.export.modeling_gisp import classes_of
from gisp.export.provenance import base_name
from gisp.export.relayout import LaidOut
from gisp.export.spec import PrunedSpec, gisp_record
from gisp.model.structures import ModelMap
from gisp.offload.place import placed_like

ARCHITECTURE = "deci"
DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
# Names of gguf.GGMLQuantizationType and of gguf.LlamaFileType.
_TYPES = {
    torch.float32: ("F32", "ALL_F32"),
    torch.float16: ("F16", "MOSTLY_F16"),
    torch.bfloat16: ("BF16", "MOSTLY_BF16"),
}
_ROPE_FREQS = "rope_freqs.weight"
_OWN_KEYS = ("model_type", "architectures", "dtype", "transformers_version", "auto_map", "_name_or_path")


def require_gguf() -> Any:
    """The ``gguf`` package.

    Raises:
        GispError: it is not installed.
    """
    try:
        import gguf
    except ImportError:
        raise GispError("the gguf format needs the gguf package: pip install 'gisp[gguf]'") from None
    return gguf


def write_gguf(
    path: Path,
    base: Any,
    model_map: ModelMap,
    spec: PrunedSpec,
    state: LaidOut,
    dtype: torch.dtype,
    vocabulary: Vocabulary | None,
) -> None:
    """Write the file, one tensor at a time; no other is in memory then.

    Args:
        state: weights of the exported model by name, as in the ``hf`` export.
        dtype: of the matrices; vectors are float32.

    Raises:
        GispError: the disk has too little room, or a weight does not fit ``dtype``.
    """
    gguf = require_gguf()
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.DECI, len(model_map.layers))
    shapes = dict(state.shapes)
    factors = rope_factors(base, model_map.head_dim)
    if factors is not None:
        shapes[_ROPE_FREQS] = factors
    check_room(path.parent, sum(shape.numel() * _stored(shape, dtype).itemsize for shape in shapes.values()))
    writer = gguf.GGUFWriter(path, ARCHITECTURE)
    try:
        heads, kv_heads, channels = _widths(model_map, shapes)
        _add_metadata(gguf, writer, base, model_map, spec, dtype)
        writer.add_head_count(heads)
        writer.add_head_count_kv(kv_heads)
        writer.add_feed_forward_length(channels)
        add_vocabulary(gguf, writer, vocabulary)
        for name, shape in shapes.items():
            stored = _stored(shape, dtype)
            raw = gguf.GGMLQuantizationType[_TYPES[stored][0]]
            count = shape.numel() * stored.itemsize
            stored_name = name if name == _ROPE_FREQS else _gguf_name(names, name)
            writer.add_tensor_info(stored_name, tuple(shape.shape), np.dtype(np.float32), count, raw_dtype=raw)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for name in shapes:
            tensor = state[name] if factors is None or name != _ROPE_FREQS else factors
            rotated = _rotated_heads(name, heads, kv_heads)
            rows = interleave(tensor, rotated) if rotated else tensor
            writer.write_tensor_data(_array(name, rows, _stored(rows, dtype)))
    finally:
        writer.close()


def read_state(path: Path) -> tuple[Any, dict[str, torch.Tensor]]:
    """A file's reader and its tensors by their GGUF name, in the stored dtype, rows in the order of the file.

    The file is mapped: what is written to a tensor stays in memory.
    """
    gguf = require_gguf()
    reader = gguf.GGUFReader(path, "c")
    state = {}
    for item in reader.tensors:
        data = torch.from_numpy(item.data)
        if item.tensor_type == gguf.GGMLQuantizationType.BF16:
            data = data.view(torch.bfloat16)
        state[item.name] = data
    return reader, state


def count_parameters(path: Path) -> int:
    """Parameters a file stores; rotary factors are none."""
    return tensor_sizes(require_gguf().GGUFReader(path))[0]


def tensor_sizes(reader: Any) -> tuple[int, dict[str, int], str]:
    """Parameters a file stores, bytes by name of tensor, and dtype of the matrices; rotary factors are left out."""
    tensors = [item for item in reader.tensors if item.name != _ROPE_FREQS]
    dtype = next(item.tensor_type.name.lower() for item in tensors if len(item.shape) > 1)
    return sum(int(item.n_elements) for item in tensors), {t.name: int(t.n_bytes) for t in tensors}, dtype


def read_model(path: Path, base: Any) -> Any:
    """The file as one of our own pruned models, built from what the file says alone.

    Only the kind of block and what is not in the file (the choice of attention code) come from the base model.

    Returns:
        The model where the base computes, matrices in the stored dtype.

    Raises:
        GispError: tensors that no layer takes, or that are missing.
    """
    gguf = require_gguf()
    reader, stored = read_state(path)

    def field(key: str) -> Any:
        return reader.fields[f"{ARCHITECTURE}.{key}"].contents()

    heads, kv_heads, channels = map(field, ("attention.head_count", "attention.head_count_kv", "feed_forward_length"))
    head_dim = field("attention.key_length")
    frequencies = _frequencies(field("rope.freq_base"), head_dim) / stored.pop(_ROPE_FREQS, torch.ones(1))
    config_class, _, model_class, _ = classes_of(f"gisp_{base.config.model_type}")
    values = {key: value for key, value in base.config.to_dict().items() if key not in _OWN_KEYS}
    values.update(
        num_hidden_layers=field("block_count"),
        hidden_size=field("embedding_length"),
        vocab_size=field("vocab_size"),
        rms_norm_eps=field("attention.layer_norm_rms_epsilon"),
        head_dim=head_dim,
        tie_word_embeddings="output.weight" not in stored,
        per_layer_config={
            layer: {"intermediate_size": width, "num_attention_heads": q, "num_key_value_heads": kv}
            for layer, (q, kv, width) in enumerate(zip(heads, kv_heads, channels, strict=True))
        },
    )
    with torch.device("meta"):
        model = model_class(config_class(**values))
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.DECI, field("block_count"))
    if values["tie_word_embeddings"]:
        stored["output.weight"] = stored["token_embd.weight"]
    state = {}
    for name in model.state_dict():
        tensor = stored.pop(_gguf_name(names, name))
        rotated = _rotated_heads(name, heads, kv_heads)
        state[name] = halves(tensor, rotated) if rotated else tensor
    if stored:
        raise GispError(f"{path.name} holds tensors no layer takes, first {min(stored)}: report this model type")
    model.load_state_dict(state, assign=True)
    model.model.rotary_emb = type(model.model.rotary_emb)(config=model.config)
    model.model.rotary_emb.inv_freq = frequencies
    return placed_like(model, base).eval()


def interleave(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows [heads * head_dim, ...] in llama.cpp's order: ``i`` of a head's first half, then ``i`` of its second."""
    return rows.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def halves(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """The inverse of :func:`interleave`."""
    return rows.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)


def rope_factors(base: Any, head_dim: int) -> torch.Tensor | None:
    """What llama.cpp divides the rotary frequencies by, float32 [head_dim / 2]; None where that is 1 everywhere."""
    rope = base.config.rope_parameters
    if rope["rope_type"] == "default":
        return None
    # Made anew: a model moved to bfloat16 holds rounded frequencies, and loading computes them in float32.
    rotary = type(base.model.rotary_emb)(config=base.config)
    return _frequencies(rope["rope_theta"], head_dim) / rotary.inv_freq


def _frequencies(theta: float, head_dim: int) -> torch.Tensor:
    """Rotary frequencies without scaling, float32 [head_dim / 2], computed as transformers does."""
    frequencies: torch.Tensor = 1.0 / theta ** (torch.arange(0, head_dim, 2).float() / head_dim)
    return frequencies


def _stored(tensor: torch.Tensor, dtype: torch.dtype) -> torch.dtype:
    """The dtype a tensor is stored in: llama.cpp adds and scales by float32 vectors."""
    return dtype if tensor.ndim > 1 else torch.float32


def _rotated_heads(name: str, heads: list[int], kv_heads: list[int]) -> int | None:
    """Heads of a q_proj or k_proj by the name of its weight or bias, None for everything else."""
    parts = name.split(".")
    counts = {"q_proj": heads, "k_proj": kv_heads}.get(parts[-2])
    return counts[int(parts[2])] if counts else None


def _widths(model_map: ModelMap, shapes: Mapping[str, torch.Tensor]) -> tuple[list[int], list[int], list[int]]:
    """Query heads, key/value heads and MLP channels of every layer."""
    q, kv, channels = (
        [len(shapes[f"model.layers.{layer}.{name}.weight"]) for layer in range(len(model_map.layers))]
        for name in ("self_attn.q_proj", "self_attn.k_proj", "mlp.gate_proj")
    )
    return [n // model_map.head_dim for n in q], [n // model_map.head_dim for n in kv], channels


def _gguf_name(names: Any, name: str) -> str:
    """The name in the file of a weight or bias."""
    return str(names.get_name(name, try_suffixes=(".weight", ".bias")))


def _add_metadata(
    gguf: Any,
    writer: Any,
    base: Any,
    model_map: ModelMap,
    spec: PrunedSpec,
    dtype: torch.dtype,
) -> None:
    """Everything the file says but the widths of the layers and the tokenizer."""
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(f"{base_name(base, spec.base_path)[0]}, pruned by {spec.sparsity:.0%}")
    writer.add_file_type(gguf.LlamaFileType[_TYPES[dtype][1]])
    writer.add_block_count(len(model_map.layers))
    writer.add_context_length(base.config.max_position_embeddings)
    writer.add_embedding_length(model_map.hidden_size)
    writer.add_vocab_size(model_map.vocab_size)
    writer.add_key_length(model_map.head_dim)
    writer.add_value_length(model_map.head_dim)
    writer.add_rope_dimension_count(model_map.head_dim)
    writer.add_rope_freq_base(float(base.config.rope_parameters["rope_theta"]))
    writer.add_layer_norm_rms_eps(base.config.rms_norm_eps)
    _add_record(writer, "gisp", gisp_record(base, spec))


def _add_record(writer: Any, prefix: str, record: Mapping[str, Any]) -> None:
    """A record under dotted keys; the format has no nested ones."""
    for key, value in record.items():
        if isinstance(value, Mapping):
            _add_record(writer, f"{prefix}.{key}", value)
            continue
        add = {int: writer.add_uint32, float: writer.add_float64, str: writer.add_string}[type(value)]
        add(f"{prefix}.{key}", value)


def _array(name: str, tensor: torch.Tensor, dtype: torch.dtype) -> np.ndarray[Any, Any]:
    """The tensor's bytes in ``dtype``, contiguous."""
    stored = tensor.to("cpu").to(dtype).contiguous()
    if dtype == torch.float16 and bool((stored.isinf() & tensor.to("cpu").isfinite()).any()):
        raise GispError(f"{name} holds weights beyond 65504, the end of f16: give --dtype bf16 or f32")
    return stored.view(torch.int16).numpy() if dtype == torch.bfloat16 else stored.numpy()
