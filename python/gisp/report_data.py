"""What a run left on disk, read and checked for the report.

Only numpy is needed here: a report can be made where neither the model nor a GPU is at hand.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from gisp.errors import GispError

RECORD = "trajectory.json"
TENSORS = "trajectory.safetensors"
METRICS = "metrics.jsonl"
EVALUATIONS = "evaluations.json"

_FORMAT = "gisp-trajectory"
_VERSION = 1
_BINS = 40
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
_BASE_INTEGERS = (
    "layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "intermediate_size",
    "decoder_parameters",
    "parameters",
)
_DTYPE_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}


@dataclass(frozen=True)
class Evaluation:
    """Perplexity of one point of one method; ``perplexity`` may be infinite."""

    label: str
    sparsity: float
    perplexity: float
    tokens: int
    window: int
    data: str


@dataclass(frozen=True)
class RunData:
    """A run as the report shows it.

    Attributes:
        path: the run folder.
        complete: whether the last step of the schedule was reached.
        base_model, config, data, versions: as in ``trajectory.json``.
        steps: one record per finished step, at least one.
        heads, channels: per layer int32 [original count]: 0 = kept, t = removed at step t.
        metrics: step -> its line of ``metrics.jsonl``; steps may be missing.
        evaluations: empty when none were made.
    """

    path: Path
    complete: bool
    base_model: dict[str, Any]
    config: dict[str, Any]
    data: dict[str, Any]
    versions: dict[str, str]
    steps: list[dict[str, Any]]
    heads: list[np.ndarray]
    channels: list[np.ndarray]
    metrics: dict[int, dict[str, Any]] = field(default_factory=dict)
    evaluations: list[Evaluation] = field(default_factory=list)

    @property
    def last(self) -> dict[str, Any]:
        return self.steps[-1]

    def column(self, name: str) -> np.ndarray:
        """One quantity of every step, float64 [steps]."""
        return np.array([step[name] for step in self.steps], dtype=np.float64)

    def total(self, name: str) -> float:
        """Sum of a quantity over the steps."""
        return sum(step[name] for step in self.steps)

    def sparsity_before(self) -> np.ndarray:
        """Decoder sparsity of the model each step was scored on, float64 [steps]; 0 for the first."""
        return np.concatenate([[0.0], self.column("sparsity")[:-1]])

    def kept_fraction(self, kind: str) -> np.ndarray:
        """Kept / original structures, float64 [layers, steps + 1]; column 0 is the dense model."""
        steps = len(self.steps)
        rows = []
        for removed_at in self._removed_at(kind):
            gone = np.bincount(removed_at, minlength=steps + 1)
            gone[0] = 0
            rows.append(1 - np.cumsum(gone) / len(removed_at))
        return np.stack(rows)

    def kept_count(self, kind: str) -> tuple[int, int]:
        """Structures of a kind kept at the end, and in the dense model."""
        layers = self._removed_at(kind)
        return sum(int((at == 0).sum()) for at in layers), sum(len(at) for at in layers)

    def dense_kv_bytes(self) -> int | None:
        """Key/value bytes per token of the dense model in the run's dtype; None when the dtype is unknown."""
        size = self._kv_element_bytes()
        base = self.base_model
        heads = int(base["layers"]) * int(base["num_key_value_heads"])
        return None if size is None else 2 * heads * int(base["head_dim"]) * size

    def _kv_element_bytes(self) -> int | None:
        # A run may leave the dtype to the device; the recorded cache size then tells it.
        base = self.base_model
        shared = int(base["num_attention_heads"]) // int(base["num_key_value_heads"])
        for record in self.steps:
            step = record["step"]
            kept = [np.flatnonzero((at == 0) | (at > step)) // shared for at in self.heads]
            elements = 2 * int(base["head_dim"]) * sum(len(np.unique(heads)) for heads in kept)
            if elements and record["kv_bytes_per_token"] in (elements, 2 * elements, 4 * elements):
                return int(record["kv_bytes_per_token"]) // elements
        return _DTYPE_BYTES.get(str(self.config.get("dtype")))

    def _removed_at(self, kind: str) -> list[np.ndarray]:
        return {"heads": self.heads, "channels": self.channels}[kind]


def read_run(path: Path) -> RunData:
    """Read a run folder.

    ``metrics.jsonl`` and ``evaluations.json`` may be absent. The tensors and the metrics of a cut run can be one
    step ahead of ``trajectory.json``, which commits a step; what is ahead is left out.

    Raises:
        GispError: the folder holds no run, or one of its files is corrupt or belongs to another run.
    """
    if not path.is_dir():
        raise GispError(f"{path} is not a folder: give the folder that gisp prune --out wrote")
    if not (path / RECORD).is_file():
        raise GispError(f"{path} holds no run ({RECORD} is missing): give the folder that gisp prune --out wrote")
    record = _load_json(path / RECORD)
    try:
        _check_record(record)
    except (KeyError, TypeError, ValueError) as error:
        raise _corrupt(path / RECORD, error) from None
    steps = record["steps"]
    heads, channels = _load_removed_at(path / TENSORS, record)
    for kind, layers in (("heads", heads), ("channels", channels)):
        found, said = sum(int((at > 0).sum()) for at in layers), steps[-1][f"{kind}_removed"]
        if found != said:
            raise GispError(
                f"{path / TENSORS} has {found} {kind} removed, {RECORD} says {said}: the files are of different runs"
            )
    return RunData(
        path=path,
        complete=record["complete"],
        base_model=record["base_model"],
        config=record["config"],
        data=record.get("data") or {},
        versions=record["versions"],
        steps=steps,
        heads=heads,
        channels=channels,
        metrics=_load_metrics(path / METRICS, len(steps)),
        evaluations=_load_evaluations(path / EVALUATIONS),
    )


def _check_record(record: Any) -> None:
    if not isinstance(record, dict) or (record.get("format"), record.get("version")) != (_FORMAT, _VERSION):
        raise ValueError(f"it is not {_FORMAT} version {_VERSION}")
    for name in ("base_model", "config", "versions"):
        _require(isinstance(record[name], dict), f"{name} is not an object")
    _require(isinstance(record["complete"], bool), "complete is not true or false")
    base = record["base_model"]
    for name in _BASE_INTEGERS:
        _require(isinstance(base[name], int) and base[name] > 0, f"base_model.{name} is {base[name]!r}")
    heads, kv_heads = base["num_attention_heads"], base["num_key_value_heads"]
    _require(heads % kv_heads == 0, f"{heads} heads do not share {kv_heads} key/value heads evenly")
    steps = record["steps"]
    _require(isinstance(steps, list) and len(steps) > 0, "it holds no finished step")
    for number, step in enumerate(steps, start=1):
        _require(step["step"] == number, f"step {number} is numbered {step['step']!r}")
        for name in _STEP_NUMBERS:
            _require(_is_finite(step[name]), f"{name} of step {number} is {step[name]!r}")


def _load_removed_at(path: Path, record: dict[str, Any]) -> tuple[list[np.ndarray], list[np.ndarray]]:
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError, ValueError) as error:
        raise _corrupt(path, error) from None
    base, steps = record["base_model"], len(record["steps"])
    widths = {"heads": base["num_attention_heads"], "channels": base["intermediate_size"]}
    found: dict[str, list[np.ndarray]] = {"heads": [], "channels": []}
    for layer in range(base["layers"]):
        for kind, width in widths.items():
            name = f"layers.{layer}.{kind}.removed_at"
            at = tensors.get(name)
            if at is None or at.dtype != np.int32 or at.shape != (width,) or at.min() < 0 or at.max() > steps + 1:
                raise GispError(f"{path} is corrupt: it has no int32 [{width}] tensor {name} of steps")
            found[kind].append(np.where(at > steps, 0, at))
    return found["heads"], found["channels"]


def _load_metrics(path: Path, steps: int) -> dict[int, dict[str, Any]]:
    if not path.is_file():
        return {}
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise _corrupt(path, error) from None
    metrics: dict[int, dict[str, Any]] = {}
    for number, line in enumerate(lines, start=1):
        try:
            entry = json.loads(line)
            _check_metrics(entry)
        except (KeyError, TypeError, ValueError) as error:
            if number > steps and number == len(lines):
                break  # The line a run was cut in; its step is not committed.
            raise _corrupt(path, error, where=f", line {number}") from None
        if 1 <= entry["step"] <= steps:
            metrics[entry["step"]] = entry
    return dict(sorted(metrics.items()))


def _check_metrics(entry: Any) -> None:
    _require(isinstance(entry, dict) and isinstance(entry["step"], int), "it is not the record of a step")
    seconds = entry["seconds"]
    _require(isinstance(seconds, dict) and _all_numbers(list(seconds.values())), "seconds are not numbers")
    threshold, peak = entry["threshold"], entry.get("peak_bytes")
    _require(threshold is None or _is_finite(threshold), f"threshold is {threshold!r}")
    _require(peak is None or _is_finite(peak), f"peak_bytes is {peak!r}")
    histogram = entry["score_histogram"]
    edges = histogram["log10_edges"]
    rising = len(edges) == _BINS + 1 and _all_numbers(edges) and all(np.diff(edges) >= 0)
    _require(rising, f"log10_edges are not {_BINS + 1} rising numbers")
    for kind in ("heads", "channels"):
        counts = histogram[kind]
        _require(len(counts) == _BINS and _all_numbers(counts), f"{kind} are not {_BINS} counts")


def _load_evaluations(path: Path) -> list[Evaluation]:
    if not path.is_file():
        return []
    entries = _load_json(path)
    try:
        _require(isinstance(entries, list), "it is not a list")
        _require(_all_numbers([entry["sparsity"] for entry in entries]), "a sparsity is not a number")
        return [
            Evaluation(
                label=str(entry["label"]),
                sparsity=float(entry["sparsity"]),
                perplexity=float(entry["perplexity"]),
                tokens=int(entry["tokens"]),
                window=int(entry["window"]),
                data=str(entry["data"]),
            )
            for entry in entries
        ]
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise _corrupt(path, error) from None


def _load_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise _corrupt(path, error) from None


def _corrupt(path: Path, error: Exception, where: str = "") -> GispError:
    if isinstance(error, KeyError):
        reason = f"{error.args[0]} is missing"
    elif isinstance(error, OSError):
        reason = error.strerror or "it cannot be read"
    else:
        reason = " ".join(str(error).split())
    return GispError(f"{path}{where} is corrupt: {reason}")


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _is_finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _all_numbers(values: Sequence[Any]) -> bool:
    return all(_is_finite(value) for value in values)
