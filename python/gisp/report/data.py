"""What a run left on disk, read and checked for the report.

Only numpy is needed here: a report can be made where neither the model nor a GPU is at hand.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from gisp.errors import quoted
from gisp.export.sizes.stored import StoredSize, element_bytes, stored_sizes
from gisp.run.evaluations import Evaluation, read_evaluations
from gisp.run.record import INVALID, RECORD, corrupt, is_count, is_finite, read_trajectory, require

METRICS = "metrics.jsonl"

_BINS = 40


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
        evaluations: in the order they were made; empty when none were.
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
        """The record of the last step."""
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
        for removed_at in getattr(self, kind):
            gone = np.bincount(removed_at, minlength=steps + 1)
            gone[0] = 0
            rows.append(1 - np.cumsum(gone) / len(removed_at))
        return np.stack(rows)

    def kept_count(self, kind: str) -> tuple[int, int]:
        """Structures of a kind kept at the end, and in the dense model."""
        layers = getattr(self, kind)
        return sum(int((at == 0).sum()) for at in layers), sum(len(at) for at in layers)

    def stored(self, steps: Sequence[int]) -> list[StoredSize]:
        """What an export of a step (1-based, 0 = dense) stores, for each of ``steps``."""
        return stored_sizes(self.base_model, self.heads, self.channels, steps)

    def stored_kv_bytes(self, step: int) -> int | None:
        """Key/value bytes per token of an export of a step (0 = dense); ``None`` when the dtype is unknown."""
        number_bytes = self._kv_element_bytes()
        return None if number_bytes is None else self.stored([step])[0].kv_bytes_per_token(number_bytes)

    def dense_kv_bytes(self) -> int | None:
        """Key/value bytes per token of the dense model in the run's dtype; None when the dtype is unknown."""
        size = self._kv_element_bytes()
        layers, heads, head_dim = (int(self.base_model[n]) for n in ("layers", "num_key_value_heads", "head_dim"))
        return None if size is None else 2 * layers * heads * head_dim * size

    def _kv_element_bytes(self) -> int | None:
        return element_bytes(self.base_model, self.heads, self.steps, self.config.get("dtype"))


def read_run(path: Path) -> RunData:
    """Read a run folder.

    ``metrics.jsonl`` and ``evaluations.json`` may be absent. The tensors and the metrics of a cut run can be ahead of
    ``trajectory.json``, which commits steps; what is ahead is left out.

    Raises:
        GispError: the folder holds no run, or one of its files is corrupt or belongs to another run.
    """
    record, removed_at = read_trajectory(path)
    steps, layers = record["steps"], range(record["base_model"]["layers"])
    return RunData(
        path=path,
        complete=record["complete"],
        base_model=record["base_model"],
        config=record["config"],
        data=record["data"],
        versions=record["versions"],
        steps=steps,
        heads=[removed_at[f"layers.{layer}.heads"] for layer in layers],
        channels=[removed_at[f"layers.{layer}.channels"] for layer in layers],
        metrics=_load_metrics(path / METRICS, steps),
        evaluations=read_evaluations(path, record["base_model"]["fingerprint"], removed_at),
    )


def _load_metrics(path: Path, steps: list[dict[str, Any]]) -> dict[int, dict[str, Any]]:
    if not path.is_file():
        return {}
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise corrupt(path, error) from None
    metrics: dict[int, dict[str, Any]] = {}
    for number, line in enumerate(lines, start=1):
        try:
            entry = json.loads(line)
            _check_metrics(entry, steps)
        except INVALID as error:
            if number > len(steps) and number == len(lines):
                break  # The line a run was cut in; its step is not committed.
            raise corrupt(path, error, where=f", line {number}") from None
        if 1 <= entry["step"] <= len(steps):
            metrics[entry["step"]] = entry
    return dict(sorted(metrics.items()))


def _check_metrics(entry: Any, steps: list[dict[str, Any]]) -> None:
    require(isinstance(entry, dict) and is_count(entry["step"]), "it is not the record of a step")
    seconds = entry["seconds"]
    require(isinstance(seconds, dict) and _all_numbers(list(seconds.values())), "seconds are not numbers")
    threshold, peak = entry["threshold"], entry.get("peak_bytes")
    require(threshold is None or is_finite(threshold), f"threshold is {quoted(threshold)}")
    require(peak is None or is_finite(peak), f"peak_bytes is {quoted(peak)}")
    histogram = entry["score_histogram"]
    edges = histogram["log10_edges"]
    rising = len(edges) == _BINS + 1 and _all_numbers(edges) and all(np.diff(edges) >= 0)
    require(rising, f"log10_edges are not {_BINS + 1} rising numbers")
    for kind in ("heads", "channels"):
        counts = histogram[kind]
        require(len(counts) == _BINS and _all_numbers(counts), f"{kind} are not {_BINS} counts")
        off = histogram["not_positive"]
        require(isinstance(off, dict) and is_finite(off.get(kind)) and off[kind] >= 0, f"not_positive is {quoted(off)}")
    require(is_finite(entry["sparsity"]), f"sparsity is {quoted(entry['sparsity'])}")
    if 1 <= entry["step"] <= len(steps):
        # The sparsity is the one of the moment: rounds of --regrow correct that of the record.
        value = steps[entry["step"] - 1]["loss"]
        require(entry["loss"] == value, f"loss is {quoted(entry['loss'])}, {RECORD} says {value}")


def _all_numbers(values: Sequence[Any]) -> bool:
    return all(is_finite(value) for value in values)


def basename(path: str) -> str:
    """The last part of a path of any system."""
    return path.replace("\\", "/").rstrip("/").rsplit("/", 1)[-1]
