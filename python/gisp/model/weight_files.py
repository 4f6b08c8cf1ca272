"""What the weight files of a model folder hold: quantised weights are told by the files, whatever config.json says.

A loader that knows nothing of the quantiser reads such weights as numbers, converts them, and nothing fails.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from gisp.errors import GispError

_FLOATS = ("F64", "F32", "F16", "BF16")
# Written by GPTQ, AWQ and ModelOpt beside the weights.
_SIDE_FILES = ("quantize_config.json", "quant_config.json", "hf_quant_config.json")
# Keys of config.json; a model of several parts has one in the part.
_CONFIG_KEYS = ("quantization_config", "compression_config", "quantization")
# Last parts of the names under which quantisers store scales, zero points and packed weights.
_QUANTISER = re.compile(
    r"(weight_scale\w*|input_scale|activation_scale|scales|scale_inv|weight_scale_inv|qzeros|zero_points?|qweight|g_idx|"
    r"weight_zero_point|absmax|quant_map|quant_state|SCB|weight_packed)([._]|$)"
)
# Buffers of older checkpoints, which are computed anew.
_BUFFERS = re.compile(r"(inv_freq|masked_bias|position_ids|(attn|attention|self_attn)\.bias)$")


def check_unquantised(folder: Path, shown: str, config: dict[str, Any]) -> None:
    """Refuse a folder of quantised weights.

    Args:
        shown: how the model was named.
        config: its config.json.

    Raises:
        GispError: names what says so.
    """
    found = _quantisation(config)
    side = next((name for name in _SIDE_FILES if (folder / name).is_file()), None)
    if found is None and side is not None:
        found = f"it has {side}"
    if found is None:
        found = next((f"{name} is {dtype}" for name, dtype in _tensors(folder) if _is_quantised(name, dtype)), None)
    if found is not None:
        raise GispError(f"model {shown} is quantised ({found}): give its unquantised weights")


def left_out(names: list[str]) -> list[str]:
    """Those of a checkpoint's tensors with no place in the model that are more than buffers of older checkpoints."""
    return [name for name in names if not _BUFFERS.search(name)]


def _quantisation(config: dict[str, Any]) -> str | None:
    """The quantisation a configuration or one of its parts names."""
    for key in _CONFIG_KEYS:
        found = config.get(key)
        if isinstance(found, dict) and found:
            return str(found.get("quant_method", "unknown method"))
    parts = (part for part in config.values() if isinstance(part, dict))
    return next((found for part in parts if (found := _quantisation(part)) is not None), None)


def _is_quantised(name: str, dtype: str) -> bool:
    if _BUFFERS.search(name):
        return False
    return dtype not in _FLOATS or _QUANTISER.search(name) is not None


def _tensors(folder: Path) -> Iterator[tuple[str, str]]:
    """Name and dtype of every tensor of the weight files that transformers reads; unreadable ones are left to it."""
    for path in weight_files(folder, "model.safetensors"):
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 - no mapping
                    yield name, str(file.get_slice(name).get_dtype())
        except (SafetensorError, OSError):
            continue
    if weight_files(folder, "model.safetensors"):
        return
    dtypes = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
    for path in weight_files(folder, "pytorch_model.bin"):
        try:
            state = torch.load(path, map_location="meta", weights_only=True)
        except Exception:  # whatever is wrong with the file, the loader tells
            continue
        for name, tensor in state.items():
            if isinstance(tensor, torch.Tensor):
                yield str(name), dtypes.get(tensor.dtype, str(tensor.dtype).removeprefix("torch."))


def weight_files(folder: Path, name: str) -> list[Path]:
    """The single file, or the shards its index names."""
    if (folder / name).is_file():
        return [folder / name]
    try:
        index = json.loads((folder / f"{name}.index.json").read_text(encoding="utf-8"))
        shards = {str(shard) for shard in index["weight_map"].values()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return []
    return sorted(folder / Path(shard).name for shard in shards if (folder / Path(shard).name).is_file())
