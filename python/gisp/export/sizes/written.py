"""What the files of an export say of it: its record, the sizes of its layers and its bytes. No weight is read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from gisp.errors import GispError
from gisp.export.formats.gguf.file import ARCHITECTURE, require_gguf, tensor_sizes
from gisp.model.gguf import EXPORTED, is_gguf
from gisp.model.load import stored_config
from gisp.model.weight_files import weight_files
from gisp.run.record import INVALID, corrupt, is_finite, require

_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
_NAMES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


@dataclass(frozen=True)
class WrittenLayer:
    """What one layer stores: query heads, key/value heads, MLP channels and bytes of all its weights."""

    query_heads: int
    kv_heads: int
    channels: int
    bytes: int


@dataclass(frozen=True)
class WrittenExport:
    """An export by its files.

    Attributes:
        format: ``hf``, ``uniform``, ``masked`` or ``gguf``.
        record: what :func:`gisp.export.spec.gisp_record` wrote.
        dtype: of the matrices.
        head_dim: numbers of a key, and of a value, of one key/value head.
        parameters, bytes: of all weights, tied ones once.
        cache_bytes: of a number of the key/value cache; llama.cpp takes float16 unless told otherwise.
    """

    format: str
    record: Mapping[str, Any]
    dtype: str
    head_dim: int
    layers: tuple[WrittenLayer, ...]
    parameters: int
    bytes: int
    cache_bytes: int

    @property
    def kv_bytes_per_token(self) -> int:
        """Key/value cache of one token, all layers."""
        return 2 * self.cache_bytes * self.head_dim * sum(layer.kv_heads for layer in self.layers)


def written_export(target: str) -> WrittenExport | None:
    """The export that a path names; ``None`` where it names none.

    Raises:
        GispError: files of an export that are missing or contradict themselves, or a ``gguf`` export without the
            package that reads it.
    """
    folder = Path(target)
    file = folder if is_gguf(folder) else folder / EXPORTED
    try:
        if file.is_file() and not (folder / "config.json").is_file():
            return _gguf(file)
        config = stored_config(target)
        record = config.get("gisp")
        if not isinstance(record, dict) or "base_fingerprint" not in record:
            return None
        _check(record)
        return _folder(folder, config, record)
    except (OSError, *INVALID) as error:
        raise corrupt(folder, error) from None


def _check(record: Mapping[str, Any]) -> None:
    for name in ("sparsity", "model_sparsity", "step"):
        require(is_finite(record[name]), f"{name} of the pruning is no number")
    require(isinstance(record["base_fingerprint"], str), "base_fingerprint is not a text")
    require(isinstance(record.get("compensation", ""), str), "compensation is not a text")
    require(isinstance(record.get("options", {}), dict), "options are no object")


def _folder(folder: Path, config: Mapping[str, Any], record: Mapping[str, Any]) -> WrittenExport:
    """An export that transformers reads."""
    shapes: dict[str, tuple[int, ...]] = {}
    sizes: dict[str, int] = {}
    dtypes: dict[str, str] = {}
    for name, dtype, shape in _tensors(folder):
        shapes[name], dtypes[name], sizes[name] = shape, dtype, prod(shape) * _BYTES[dtype]
    head_dim = int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])
    layers = []
    for layer in range(config["num_hidden_layers"]):
        own = f"model.layers.{layer}."
        query, key, gate = (
            shapes[f"{own}{name}.weight"][0] for name in ("self_attn.q_proj", "self_attn.k_proj", "mlp.gate_proj")
        )
        held = sum(size for name, size in sizes.items() if name.startswith(own))
        layers.append(WrittenLayer(query // head_dim, key // head_dim, gate, held))
    kind = next((name for name in ("masked", "uniform") if record.get(name)), "hf")
    dtype = dtypes["model.layers.0.self_attn.q_proj.weight"]
    totals = (sum(map(prod, shapes.values())), sum(sizes.values()))
    return WrittenExport(kind, record, _NAMES[dtype], head_dim, tuple(layers), *totals, _BYTES[dtype])


def _tensors(folder: Path) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """Name, dtype and shape of every tensor."""
    paths = weight_files(folder, "model.safetensors")
    if not paths:
        raise GispError(f"{folder} has no weights: copy the whole folder of the export")
    for path in paths:
        try:
            with safe_open(path, framework="np") as file:
                for name in file.keys():  # noqa: SIM118 - no mapping
                    part = file.get_slice(name)
                    yield name, str(part.get_dtype()), tuple(part.get_shape())
        except (SafetensorError, OSError) as error:
            raise corrupt(path, error) from None


def _gguf(path: Path) -> WrittenExport | None:
    """An export for llama.cpp; ``None`` for a file of other origin."""
    reader: Any = require_gguf().GGUFReader(path, "r")
    record: dict[str, Any] = {}
    for key, field in reader.fields.items():
        if key.startswith("gisp."):
            *inside, name = key.split(".")[1:]
            place = record
            for part in inside:
                place = place.setdefault(part, {})
            place[name] = field.contents()
    if "base_fingerprint" not in record:
        return None
    _check(record)
    heads, kv_heads, channels, head_dim = (
        reader.fields[f"{ARCHITECTURE}.{key}"].contents()
        for key in ("attention.head_count", "attention.head_count_kv", "feed_forward_length", "attention.key_length")
    )
    parameters, sizes, dtype = tensor_sizes(reader)
    layers = tuple(
        WrittenLayer(*counts, sum(size for name, size in sizes.items() if name.startswith(f"blk.{layer}.")))
        for layer, counts in enumerate(zip(heads, kv_heads, channels, strict=True))
    )
    return WrittenExport("gguf", record, dtype, int(head_dim), layers, parameters, sum(sizes.values()), 2)
