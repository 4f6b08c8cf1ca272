"""The two files of a trajectory as they lie on disk, read and checked; numpy alone is needed.

``trajectory.safetensors`` is written before ``trajectory.json``, which commits steps: a run cut between the two has
tensors that are ahead, and what is ahead is left out. A step that changes earlier steps leaves the file of before in
``state`` until it is committed.
"""

from __future__ import annotations

import hashlib
import json
import math
import platform
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from gisp.config.options import OPTIONS
from gisp.errors import GispError, quoted

FORMAT = "gisp-trajectory"
VERSION = 1
TENSORS = "trajectory.safetensors"
RECORD = "trajectory.json"
# Held by the one process that writes a run folder.
LOCK = ".lock"
STATE = "state"
# Part of the calibration text that compensations are held against.
HELD_OUT = f"{STATE}/held-out.safetensors"
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
_STEP_NUMBERS = ("sparsity", "target", "model_sparsity", "loss", "seconds")
_STEP_COUNTS = ("removed_parameters", "heads_removed", "channels_removed", "tokens", "kv_bytes_per_token")
# What never falls from step to step.
_RISING = ("removed_parameters", "heads_removed", "channels_removed")
_DIGESTS = ("removed_at_sha256", "state_sha256")
# Far above any model and below what overflows arithmetic on it.
_MOST = 2**60
_READS = 5


def read_trajectory(folder: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """``trajectory.json`` and the tensors of one moment, also while the run is being written.

    Raises:
        GispError: no run there, or a corrupt one.
    """
    for _ in range(_READS):
        record = read_record(folder)
        try:
            return record, read_removed_at(folder, record)
        except GispError as error:
            # A run that went on between the two reads has other tensors than its record spoke of.
            failed = error
            if len(read_record(folder)["steps"]) == len(record["steps"]):
                break
    raise failed


def removed_at_digest(removed_at: Mapping[str, np.ndarray]) -> str:
    """SHA-256 over names and values, by name; values as little-endian int32.

    Args:
        removed_at: group name -> [original count], steps that are not committed taken as 0.
    """
    digest = hashlib.sha256()
    for name in sorted(removed_at):
        digest.update(name.encode() + b"\0" + removed_at[name].astype("<i4").tobytes())
    return digest.hexdigest()


def point_digest(removed_at: Mapping[str, np.ndarray], step: int) -> str:
    """SHA-256 of which structures are gone at ``step``: two points of equal digest are one pruned model.

    Args:
        removed_at: group name -> [original count], 0 = kept.
    """
    return removed_at_digest({name: (at > 0) & (at <= step) for name, at in removed_at.items()})


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
    except INVALID as error:
        raise corrupt(folder / RECORD, error) from None
    return dict(record)


def read_removed_at(folder: Path, record: dict[str, Any]) -> dict[str, np.ndarray]:
    """``layers.{i}.heads`` and ``layers.{i}.channels`` -> int32 [original count], 0 = kept, t = removed at step t.

    Raises:
        GispError: a tensor is missing or wrong, or the tensors are not those the record speaks of.
    """
    earlier = earlier_tensors(folder, len(record["steps"]))
    path = earlier if earlier.is_file() else folder / TENSORS
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError, *INVALID) as error:
        # Among them dtypes that numpy has not.
        raise corrupt(path, error) from None
    base, steps = record["base_model"], record["steps"]
    # What was being written as the record was read, or when the run was cut.
    last = len(steps) if record["complete"] else _planned(record["config"])
    found: dict[str, np.ndarray] = {}
    for kind, count_of in STRUCTURES.items():
        width = base[count_of]
        gone = np.zeros(last + 1, dtype=np.int64)
        for layer in range(base["layers"]):
            name = f"layers.{layer}.{kind}"
            at = tensors.get(f"{name}.removed_at")
            if at is None or at.dtype != np.int32 or at.shape != (width,):
                raise GispError(f"{path} is corrupt: it has no int32 [{width}] tensor {name}.removed_at")
            if at.min() < 0 or at.max() > last:
                raise GispError(f"{path} is corrupt: {name}.removed_at holds steps outside 0 to {last}")
            gone += np.bincount(at, minlength=len(gone))
            found[name] = np.where(at > len(steps), 0, at).astype(np.int32)
        totals = np.cumsum(gone[1 : len(steps) + 1])
        for step, total in zip(steps, totals, strict=True):
            if total != step[f"{kind}_removed"]:
                raise GispError(
                    f"{path} has {total} {kind} removed by step {step['step']}, {RECORD} says "
                    f"{step[f'{kind}_removed']}: the files are of different runs"
                )
    foreign = next((name for name in tensors if name.removesuffix(".removed_at") not in found), None)
    if foreign:
        raise GispError(f"{path} is corrupt: it holds {foreign}, which a model of {base['layers']} layers has not")
    if record.get("removed_at_sha256", "") not in ("", removed_at_digest(found)):
        raise GispError(f"{path} is corrupt: the SHA-256 of its values is not the one in {RECORD}")
    return found


def earlier_tensors(folder: Path, step: int) -> Path:
    """Where the tensors as of ``step`` are while the next one, which changes them, is being committed."""
    return folder / STATE / f"removed-{step:05d}.safetensors"


def load_json(path: Path) -> Any:
    """Any JSON file, or one line about why not.

    Raises:
        GispError: a file that cannot be read or is no JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise corrupt(path, error) from None


# What reading a value of another type, or one out of range, from a file can raise.
INVALID = (KeyError, IndexError, TypeError, ValueError, AttributeError, ArithmeticError, RecursionError)


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
    """Whether a JSON value is a finite number that a float holds."""
    try:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:
        return False


def is_count(value: Any, least: int = 0) -> bool:
    """Whether a JSON value is a whole number of at least ``least``, and one arithmetic is safe on."""
    return type(value) is int and least <= value <= _MOST


def library_versions() -> dict[str, str]:
    """Name and version of what a figure may depend on; what is not installed is left out."""
    versions = {"python": platform.python_version()}
    for name in ("gisp-kernels", "torch", "transformers", "triton", "safetensors", "numpy"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return versions


def _check(record: Any) -> None:
    if not isinstance(record, dict) or (record.get("format"), record.get("version")) != (FORMAT, VERSION):
        raise ValueError(f"it is not {FORMAT} version {VERSION}")
    for name in ("base_model", "config", "data", "versions"):
        require(isinstance(record[name], dict), f"{name} is not an object")
    for name in _DIGESTS:
        require(isinstance(record.get(name, ""), str), f"{name} is {quoted(record.get(name))}")
    _check_base(record["base_model"], record.get("structures"))
    _check_config(record["config"])
    _check_data(record["data"])
    steps = record["steps"]
    require(isinstance(steps, list) and len(steps) > 0, "it holds no finished step")
    for number, step in enumerate(steps, start=1):
        require(isinstance(step, dict), f"step {number} is not an object")
        _check_step(number, step, record["base_model"])
    for before, after in pairwise(steps):
        for name in _RISING:
            require(before[name] <= after[name], f"{name} falls from step {before['step']} to {after['step']}")
    _check_end(record["complete"], steps, record["config"])


def _check_base(base: dict[str, Any], structures: Any) -> None:
    for name in _BASE_TEXTS:
        require(isinstance(base[name], str), f"base_model.{name} is {quoted(base[name])}")
    for name in _BASE_INTEGERS:
        require(is_count(base[name], 1), f"base_model.{name} is {quoted(base[name])}")
    biases = base.get("biases", [])
    named = isinstance(biases, list) and all(isinstance(name, str) for name in biases)
    require(named, f"base_model.biases is {quoted(biases)}")
    heads, kv_heads = base["num_attention_heads"], base["num_key_value_heads"]
    require(heads % kv_heads == 0, f"{heads} heads do not share {kv_heads} key/value heads evenly")
    whole, decoder = base["parameters"], base["decoder_parameters"]
    require(decoder <= whole, f"base_model has {decoder} parameters in its decoder and {whole} in all")
    counts = {kind: base["layers"] * base[count] for kind, count in STRUCTURES.items()}
    require(structures is None or structures == counts, f"structures are {quoted(structures)}, the model has {counts}")


def _check_config(config: dict[str, Any]) -> None:
    require(isinstance(config["preset"], str), "config.preset is not a name")
    for name in sorted(config.keys() & OPTIONS.keys()):
        value, option = config[name], OPTIONS[name]
        if option.choices:
            # A criterion may be one that only the program that made the run knows.
            require(value is None or isinstance(value, str), f"config.{name} is {quoted(value)}")
        elif value is not None:
            option.check(value)
    require(is_count(config["steps"], 1), f"config.steps is {quoted(config['steps'])}")


def _check_data(data: dict[str, Any]) -> None:
    require(isinstance(data["spec"], str), f"data.spec is {quoted(data['spec'])}")
    require(is_count(data["sequences"], 1), f"data.sequences is {quoted(data['sequences'])}")
    require(isinstance(data["sha256"], str), f"data.sha256 is {quoted(data['sha256'])}")
    tasks = data.get("tasks", [])
    sound = isinstance(tasks, list) and all(isinstance(task, dict) for task in tasks)
    require(sound and all(isinstance(task["objective"], str) for task in tasks), f"data.tasks is {quoted(tasks)}")


def _check_step(number: int, step: dict[str, Any], base: dict[str, Any]) -> None:
    require(type(step["step"]) is int and step["step"] == number, f"step {number} is numbered {quoted(step['step'])}")
    for name in _STEP_NUMBERS:
        require(is_finite(step[name]), f"{name} of step {number} is {quoted(step[name])}")
    for name in _STEP_COUNTS:
        require(is_count(step[name]), f"{name} of step {number} is {quoted(step[name])}")
    removed = step["removed_parameters"]
    for name, whole in (("sparsity", "decoder_parameters"), ("model_sparsity", "parameters")):
        share = removed / base[whole]
        require(
            0 <= share <= 1 and math.isclose(step[name], share, abs_tol=1e-9),
            f"{name} of step {number} is {step[name]!r}, its removed parameters are {share!r} of {whole}",
        )


def _planned(config: dict[str, Any]) -> int:
    """Steps of a whole run."""
    return int(config["steps"] + (config.get("regrow") or 0))


def _check_end(complete: Any, steps: list[dict[str, Any]], config: dict[str, Any]) -> None:
    """Whether a run is finished follows from its steps and what it was to do."""
    require(isinstance(complete, bool), "complete is not true or false")
    done, planned, goal = len(steps), _planned(config), config.get("sparsity")
    require(done <= planned, f"it holds {done} steps of a run of {planned}")
    reached = config.get("schedule") == "structures" and goal is not None and steps[-1]["sparsity"] >= goal
    ended = done == planned or reached
    require(complete == ended, f"complete is {str(complete).lower()} after {done} of {planned} steps")
