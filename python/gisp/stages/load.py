"""Reading a part of a model: its layout from ``config.json``, and of the weights those that are asked for."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from gisp.errors import GispError
from gisp.mapped import give_back
from gisp.model.load import on_meta, quiet, snapshot, stored_config
from gisp.model.paths import check_model_path
from gisp.model.weight_files import check_unquantised, left_out

_WHOLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
# Of every file with weights, to tell it from another one of the same shapes.
_SAMPLES, _SAMPLED_BYTES = 64, 4096


def skeleton(path: str, dtype: torch.dtype | None) -> Any:
    """A causal language model with all parameters on ``meta`` and what is computed from its config on the CPU.

    Args:
        dtype: ``None`` for that of the config.

    Raises:
        GispError: no model there, or one of a kind that is not read in parts.
    """
    check_model_path(path)
    quiet()
    folder = folder_of(path)
    check_unquantised(folder, path, stored_config(str(folder)))
    try:
        model = on_meta(folder, dtype or "auto", attention="sdpa")
    except Exception as error:  # transformers raises many types for folders it cannot read
        raise GispError(f"model {path} cannot be loaded: {' '.join(str(error).split())[:240]}") from None
    return with_tables(model).eval()


def with_tables(model: Any) -> Any:
    """A model on ``meta`` with its rotary tables computed, on the CPU as a model is that is loaded whole.

    Raises:
        GispError: it holds other buffers, whose values nothing tells.
    """
    rotary = getattr(getattr(model, "model", None), "rotary_emb", None)
    if rotary is not None:
        # Its own configuration: that of an export has no number of heads for the whole model.
        model.model.rotary_emb = type(rotary)(config=rotary.config)
    for name, buffer in model.named_buffers():
        if buffer.is_meta:
            raise GispError(
                f"{type(model).__name__} has a buffer {name}: such a model is not split, leave --stages out"
            )
    return model


def folder_of(path: str) -> Path:
    """The folder with the files of a model.

    Raises:
        GispError: a GGUF file, or a hub name that was not downloaded.
    """
    folder = Path(path) if Path(path).is_dir() else snapshot(path)
    if folder is None or Path(path).is_file():
        raise GispError(
            f"model {path} is no folder: --stages reads safetensors of a folder, download or convert it first"
        )
    return folder


def read_weights(model: nn.Module, path: str, names: Collection[str], device: torch.device) -> None:
    """Give parameters of a skeleton the values of a model's safetensors files, in their own dtype, on a device.

    Args:
        names: of :meth:`torch.nn.Module.named_parameters`.

    Raises:
        GispError: files that are missing, broken or of another model; all names and shapes are compared.
    """
    folder = folder_of(path)
    stored = _files(folder, path)
    first = {id(parameter): name for name, parameter in model.named_parameters()}
    # By every name of a parameter the one that it is asked for by.
    tied = {name: first[id(parameter)] for name, parameter in model.named_parameters(remove_duplicate=False)}
    extra = left_out(sorted(set(stored) - set(tied)))
    missing = sorted(set(tied.values()) - {own for name, own in tied.items() if name in stored})
    for problem, found in (("unexpected keys", extra), ("missing keys", missing)):
        if found:
            raise GispError(f"model {path} does not fit its config.json: {problem}, first {found[0]}")
    by_file: dict[Path, list[str]] = {}
    done: set[str] = set()
    for name, own in tied.items():
        if own in names and own not in done and name in stored:
            by_file.setdefault(stored[name], []).append(name)
            done.add(own)
    for file, wanted in by_file.items():
        try:
            with safe_open(file, framework="pt") as tensors:
                for name in wanted:
                    _give(model, name, tensors.get_tensor(name), device, path)
        except (SafetensorError, OSError) as error:
            raise GispError(f"model {path} cannot be loaded: {file.name}: {' '.join(str(error).split())}") from None


def _files(folder: Path, path: str) -> dict[str, Path]:
    """Tensor name to the file that holds it."""
    try:
        if (folder / _WHOLE).is_file():
            with safe_open(folder / _WHOLE, framework="pt") as tensors:
                return dict.fromkeys(tensors.keys(), folder / _WHOLE)
        index = json.loads((folder / _INDEX).read_text(encoding="utf-8"))["weight_map"]
        return {str(name): folder / Path(str(file)).name for name, file in index.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        raise GispError(
            f"model {path} has no safetensors that --stages can read ({type(error).__name__}): convert it first"
        ) from None


def files_digest(path: str) -> str:
    """SHA-256 of samples of all files with weights of a model: parts that processes read must be of one model.

    Raises:
        GispError: as :func:`read_weights`.
    """
    digest = hashlib.sha256()
    for file in sorted({*_files(folder_of(path), path).values()}):
        try:
            size = file.stat().st_size
            digest.update(f"{file.name} {size}\0".encode())
            with file.open("rb") as data:
                for number in range(_SAMPLES):
                    data.seek(number * size // _SAMPLES)
                    digest.update(data.read(_SAMPLED_BYTES))
        except OSError as error:
            raise GispError(f"model {path} cannot be read: {file.name}: {error.strerror or error}") from None
    return digest.hexdigest()


def _give(model: nn.Module, name: str, tensor: torch.Tensor, device: torch.device, path: str) -> None:
    parameter = model.get_parameter(name)
    if tensor.shape != parameter.shape:
        raise GispError(f"model {path} does not fit its config.json: mismatched keys, first {name}")
    put(model, parameter, tensor.to(device, parameter.dtype))
    give_back(tensor)


def put(model: nn.Module, parameter: nn.Parameter, tensor: torch.Tensor) -> None:
    """Let a tensor take the place of a parameter of the same shape, wherever it is tied to."""
    made = nn.Parameter(tensor, requires_grad=parameter.requires_grad)
    for module in model.modules():
        for name, held in module._parameters.items():
            if held is parameter:
                module._parameters[name] = made
