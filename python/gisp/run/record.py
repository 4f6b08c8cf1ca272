"""The two files of a trajectory as they lie on disk, read and checked; numpy alone is needed.

``trajectory.safetensors`` is written before ``trajectory.json``, which commits a step: a run cut between the two has
tensors one step ahead, and what is ahead is left out.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from gisp.errors import GispError

FORMAT = "gisp-trajectory"
VERSION = 1
TENSORS = "trajectory.safetensors"
RECORD = "trajectory.json"
# Kinds of structures, and what in a base model's record counts those of a layer.
STRUCTURES = {"heads": "num_attention_heads", "channels": "intermediate_size"}

_BASE_TEXTS = ("path", "fingerprint", "model_type")
_BASE_INTEGERS = (
    "layers",
    "hidden_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "intermediate_size",
    "decoder_parameters",
    "parameters",
)
_STEP_NUMBERS = (
    "sparsity",
    "target",
    "model_sparsity",
    "removed_parameters",
    "heads_removed",
    "channels_removed",
    "loss",
    "tokens",
    "seconds",
    "kv_bytes_per_token",
)


def read_record(folder: Path) -> dict[str, Any]:
    """``trajectory.json`` of a run folder.

    Raises:
        GispError: no run there, or not one this version understands.
    """
    if not folder.is_dir():
        raise GispError(f"{folder} is not a folder: give the folder that gisp prune --out wrote")
    for name in (RECORD, TENSORS):
        if not (folder / name).is_file():
            raise GispError(f"{folder} holds no run ({name} is missing): give the folder that gisp prune --out wrote")
    record = load_json(folder / RECORD)
    try:
        _check(record)
    except (KeyError, TypeError, ValueError) as error:
        raise corrupt(folder / RECORD, error) from None
    return dict(record)


def read_removed_at(folder: Path, record: dict[str, Any]) -> dict[str, np.ndarray]:
    """``layers.{i}.heads`` and ``layers.{i}.channels`` -> int32 [original count], 0 = kept, t = removed at step t.

    Raises:
        GispError: a tensor is missing or wrong, or the tensors are not those the record speaks of.
    """
    path = folder / TENSORS
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError, ValueError) as error:
        raise corrupt(path, error) from None
    base, steps = record["base_model"], record["steps"]
    found: dict[str, np.ndarray] = {}
    for kind, count_of in STRUCTURES.items():
        width = base[count_of]
        gone = np.zeros(len(steps) + 2, dtype=np.int64)
        for layer in range(base["layers"]):
            name = f"layers.{layer}.{kind}"
            at = tensors.get(f"{name}.removed_at")
            if at is None or at.dtype != np.int32 or at.shape != (width,):
                raise GispError(f"{path} is corrupt: it has no int32 [{width}] tensor {name}.removed_at")
            if at.min() < 0 or at.max() > len(steps) + 1:
                raise GispError(f"{path} is corrupt: {name}.removed_at holds steps outside 0 to {len(steps)}")
            gone += np.bincount(at, minlength=len(gone))
            found[name] = np.where(at > len(steps), 0, at).astype(np.int32)
        totals = np.cumsum(gone[1:-1])
        for step, total in zip(steps, totals, strict=True):
            if total != step[f"{kind}_removed"]:
                raise GispError(
                    f"{path} has {total} {kind} removed by step {step['step']}, {RECORD} says "
                    f"{step[f'{kind}_removed']}: the files are of different runs"
                )
    foreign = next((name for name in tensors if name.removesuffix(".removed_at") not in found), None)
    if foreign:
        raise GispError(f"{path} is corrupt: it holds {foreign}, which a model of {base['layers']} layers has not")
    return found


def load_json(path: Path) -> Any:
    """Any JSON file, or one line about why not."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise corrupt(path, error) from None


def corrupt(path: Path, error: Exception, where: str = "") -> GispError:
    """The error for a file that does not hold what it should."""
    if isinstance(error, KeyError):
        reason = f"{error.args[0]} is missing"
    elif isinstance(error, OSError):
        reason = error.strerror or "it cannot be read"
    else:
        reason = " ".join(str(error).split())
    return GispError(f"{path}{where} is corrupt: {reason}")


def require(condition: bool, message: str) -> None:
    """ValueError unless a condition on file contents holds."""
    if not condition:
        raise ValueError(message)


def is_finite(value: Any) -> bool:
    """Whether a JSON value is a finite number."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _check(record: Any) -> None:
    if not isinstance(record, dict) or (record.get("format"), record.get("version")) != (FORMAT, VERSION):
        raise ValueError(f"it is not {FORMAT} version {VERSION}")
    for name in ("base_model", "config", "data", "versions"):
        require(isinstance(record[name], dict), f"{name} is not an object")
    require(isinstance(record["complete"], bool), "complete is not true or false")
    require(isinstance(record["config"]["preset"], str), "config.preset is not a name")
    base = record["base_model"]
    for name in _BASE_TEXTS:
        require(isinstance(base[name], str), f"base_model.{name} is {base[name]!r}")
    for name in _BASE_INTEGERS:
        require(isinstance(base[name], int) and base[name] > 0, f"base_model.{name} is {base[name]!r}")
    heads, kv_heads = base["num_attention_heads"], base["num_key_value_heads"]
    require(heads % kv_heads == 0, f"{heads} heads do not share {kv_heads} key/value heads evenly")
    steps = record["steps"]
    require(isinstance(steps, list) and len(steps) > 0, "it holds no finished step")
    for number, step in enumerate(steps, start=1):
        require(isinstance(step, dict), f"step {number} is not an object")
        require(step["step"] == number, f"step {number} is numbered {step['step']!r}")
        for name in _STEP_NUMBERS:
            require(is_finite(step[name]), f"{name} of step {number} is {step[name]!r}")
        share = step["removed_parameters"] / base["decoder_parameters"]
        require(
            0 <= share <= 1 and math.isclose(step["sparsity"], share, abs_tol=1e-9),
            f"sparsity of step {number} is {step['sparsity']!r}, its removed parameters are {share!r} of the decoder",
        )
