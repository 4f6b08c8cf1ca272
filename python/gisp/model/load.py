"""Loading dense models from folders or the hub, with one clear line when that fails."""

from __future__ import annotations

import contextlib
import json
import logging
import os
from pathlib import Path
from typing import Any

import torch

from gisp.errors import GispError, is_out_of_memory, quoted
from gisp.hub import hub_options, unreachable
from gisp.model.checks import other_attention
from gisp.model.gguf import dense_options, made_dense, pretrained
from gisp.model.paths import HUB_NAME, check_model_path
from gisp.model.structures import first_bad_parameter
from gisp.model.weight_files import check_unquantised, left_out
from gisp.progress import task


def resolve_device(device: str) -> torch.device:
    """``auto`` is the GPU where there is one.

    Raises:
        GispError: another device than ``auto``, ``cpu``, ``cuda`` and ``cuda:N``, or a GPU that is not there.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        result = torch.device(device)
    except RuntimeError:
        raise GispError(f"unknown device {quoted(device)}: give auto, cpu, cuda or cuda:N") from None
    if result.type not in ("cpu", "cuda"):
        raise GispError(f"device {quoted(device)} is not supported: give auto, cpu, cuda or cuda:N")
    if result.type == "cuda" and (not torch.cuda.is_available() or (result.index or 0) >= torch.cuda.device_count()):
        raise GispError(
            f"device {quoted(device)} is not there: {torch.cuda.device_count()} CUDA devices, use --device cpu"
        )
    return result


def resolve_dtype(dtype: str | None, device: torch.device) -> torch.dtype | str:
    """The given dtype, ``"auto"`` for the checkpoint's own, else bfloat16 on a GPU and float32 on a CPU.

    Raises:
        GispError: no dtype of that name.
    """
    if dtype == "auto":
        return dtype
    if dtype is not None and dtype not in ("bfloat16", "float32"):
        raise GispError(f"unknown dtype {quoted(dtype)}: choose one of bfloat16, float32")
    return getattr(torch, dtype) if dtype else (torch.bfloat16 if device.type == "cuda" else torch.float32)


def load_dense(path: str, device: torch.device, dtype: torch.dtype | str) -> Any:
    """A dense causal language model, complete and finite.

    Raises:
        GispError: missing, foreign, incomplete or broken model.
    """
    kind = _check_dense(path)
    from transformers import AutoModelForCausalLM

    limits = hub_options(path)
    try:
        source, options = pretrained(path)
        # A hub that does not answer ends in one line; nothing is said before it.
        with contextlib.nullcontext() if limits else task(f"loading {Path(path).name}"):
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                source,
                dtype=dtype,
                attn_implementation="sdpa",
                # A config.json that names another one would have its way.
                _attn_implementation="sdpa",
                output_loading_info=True,
                # Told below, by name.
                ignore_mismatched_sizes=True,
                trust_remote_code=False,
                **options,
                **dense_options(path),
                **limits,
            )
    except Exception as error:  # transformers raises many types for folders it cannot read
        if is_out_of_memory(error):
            raise
        if limits and isinstance(error, OSError):
            raise GispError(unreachable(f"model {path}")) from None
        if "scaled_dot_product_attention" in str(error):
            raise GispError(other_attention(kind)) from None
        raise GispError(f"model {path} cannot be loaded: {_one_line(error)}") from None
    model, info = loaded
    folder = None if Path(path).exists() else snapshot(path)
    if folder is not None:
        # Of a hub name the files are known now.
        check_unquantised(folder, path, stored_config(str(folder)))
    for problem in ("missing_keys", "mismatched_keys", "unexpected_keys"):
        keys = sorted(map(str, info.get(problem) or ()))
        if problem == "unexpected_keys":
            keys = left_out(keys)
        if keys:
            raise GispError(f"model {path} does not fit its config.json: {problem.replace('_', ' ')}, first {keys[0]}")
    made_dense(model, path)
    bad = first_bad_parameter(model)
    if bad is not None:
        raise GispError(f"model {path} holds NaN or infinite weights in {bad}: give a sound checkpoint")
    return model.to(device).eval()


def skeleton(path: str, dtype: torch.dtype | str) -> Any:
    """A causal language model of the shapes that a folder or hub name has, without memory for its weights.

    Args:
        dtype: as :func:`resolve_dtype` gives it.

    Raises:
        GispError: no model there, or one whose configuration cannot be read.
    """
    _check_dense(path)
    limits = hub_options(path)
    try:
        source, options = pretrained(path)
        return on_meta(source, dtype, **options, **limits)
    except Exception as error:  # transformers raises many types for folders it cannot read
        if limits and isinstance(error, OSError):
            raise GispError(unreachable(f"model {path}")) from None
        raise GispError(f"model {path} cannot be loaded: {_one_line(error)}") from None


def on_meta(source: Any, dtype: torch.dtype | str, attention: str | None = None, **options: Any) -> Any:
    """A causal language model whose parameters have shapes and no memory, as transformers reads its configuration.

    Args:
        attention: implementation, ``None`` for that of transformers.
        options: of ``AutoConfig.from_pretrained``, whose errors pass.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(source, trust_remote_code=False, **options)
    if dtype == "auto":
        dtype = getattr(config, "dtype", None) or torch.float32
    chosen = {} if attention is None else {"attn_implementation": attention}
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False, **chosen)


def _check_dense(path: str) -> str:
    """Refuse what is no dense model, by its files; the model type that they name."""
    check_model_path(path)
    quiet()
    from transformers import CONFIG_MAPPING

    stored = stored_config(path)
    kind = str(stored.get("model_type"))
    if kind.startswith("gisp_") and kind not in CONFIG_MAPPING:
        raise GispError(f"model {path} is already pruned ({kind}): give its dense base model")
    check_unquantised(Path(path), path, stored)
    return kind


def snapshot(name: str) -> Path | None:
    """The folder in the cache with the files of a hub name that were read before; ``None`` if there is none."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(name, "config.json") if HUB_NAME.fullmatch(name) else None
    return Path(found).parent if isinstance(found, str) else None


def stored_config(path: str) -> dict[str, Any]:
    """A model folder's config.json; empty where it is unreadable, which is left to the loader."""
    with contextlib.suppress(OSError, ValueError, RecursionError):
        found = json.loads((Path(path) / "config.json").read_text(encoding="utf-8"))
        return found if isinstance(found, dict) else {}
    return {}


def shape_of(path: str) -> dict[str, Any]:
    """``layers`` and ``model_type`` of a model folder or of a hub name that was read before, where its config says."""
    folder = Path(path) if Path(path).is_dir() else snapshot(path)
    config = {} if folder is None else stored_config(str(folder))
    layers, kind = config.get("num_hidden_layers"), config.get("model_type")
    return {
        "layers": layers if isinstance(layers, int) else None,
        "model_type": kind if isinstance(kind, str) else None,
    }


def quiet() -> None:
    """Loading says nothing but errors: progress bars and advice would bury the one line that matters."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    for name in ("transformers", "huggingface_hub"):
        logging.getLogger(name).setLevel(logging.CRITICAL)


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return (text[:240] + " ...") if len(text) > 240 else text or type(error).__name__
