"""What was measured on the points of a run: ``evaluations.json`` in its folder, read, checked and added to.

The file is a list of objects. An object holds the figures of one point as ``gisp eval --json`` prints them, beside
what they were measured under. torch is not needed.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gisp.errors import quoted
from gisp.files import write_atomic
from gisp.run.record import corrupt, is_count, is_finite, load_json, point_digest, require

try:
    import fcntl
except ImportError:  # pragma: no cover
    fcntl = None  # type: ignore[assignment]

EVALUATIONS = "evaluations.json"
THIS_RUN = "gisp"
"""Label of the points of the run itself; any other label is a method it is compared with."""
STRUCTURES = "structures_sha256"
"""What of an entry says which structures were gone, by :func:`gisp.run.record.point_digest`."""

# As a compensation's line begins each of its methods.
_METHOD = re.compile(r"(?:^|; )([a-z]+) \(")
_METRICS = ("perplexity", "acc", "acc_norm", "exact_match")
_TEXTS = ("data", "compensation", "fingerprint")
_COUNTS = ("step", "window", "stride", "tokens", "examples")
# What makes two entries one: measured again under these, the new figures replace the old ones.
_CONDITIONS = ("label", "fingerprint", "step", "sparsity", "data", "window", "stride", "protocol", "compensation")


class Figure(NamedTuple):
    """One number of an evaluation; ``value`` is ``None`` where it is not finite, ``stderr`` where it has none."""

    name: str
    value: float | None
    stderr: float | None = None


@dataclass(frozen=True)
class Evaluation:
    """What was measured at one point of a run, or of a method it is compared with.

    Attributes:
        label: ``gisp`` for the run itself, else the method's name.
        sparsity: removed / all parameters of the decoder layers.
        figures: at least one, in the order of the file.
        data: file or name of the data; empty where lm-eval's tasks alone were run.
        step: of the run; ``None`` where it is not known.
        window, stride, tokens, examples: of the data, where they apply.
        compensation: what was done to the pruned model first; empty for nothing.
        protocol: further options of the evaluation by name, those that were given.
        place: end of the data's path that tells it from other data of the run with the same last part; else empty.
    """

    label: str
    sparsity: float
    figures: tuple[Figure, ...]
    data: str = ""
    step: int | None = None
    window: int | None = None
    stride: int | None = None
    tokens: int | None = None
    examples: int | None = None
    compensation: str = ""
    protocol: tuple[tuple[str, str], ...] = ()
    place: str = ""

    @property
    def source(self) -> str:
        """The data in a word, one for each: the last part of a path, or a name."""
        return self.place or _end(self.data, 1) or "lm-eval"

    @property
    def method(self) -> str:
        """The compensation's methods, joined by ``+``; the first word of a text that tells none."""
        methods, _, _ = self.compensation.partition("; divergence")
        found = _METHOD.findall(methods) or self.compensation.split(maxsplit=1)[:1]
        return "+".join(found).rstrip(",:")

    @property
    def conditions(self) -> str:
        """Window, stride and further options in one line; two evaluations that differ here are not compared."""
        parts = [] if self.window is None else [f"window {self.window:,}"]
        if self.stride not in (None, self.window):
            parts.append(f"stride {self.stride:,}")
        return ", ".join([*parts, *(f"{name} {value}" for name, value in self.protocol)])


def figures(point: dict[str, Any]) -> Iterator[Figure]:
    """Everything measured at a point that is to be shown.

    Args:
        point: as ``gisp eval --json`` prints it.
    """
    for name in _METRICS:
        if name in point:
            yield Figure(name, point[name], point.get(f"{name}_stderr"))
    for task, metrics in point.get("lm_eval", {}).items():
        for name, value in metrics.items():
            if "_stderr" not in name:
                metric, comma, filter_name = name.partition(",")
                yield Figure(f"{task} {name}", value, metrics.get(f"{metric}_stderr{comma}{filter_name}"))


def method_text(evaluation: Evaluation) -> str:
    """The method, with the compensation where there was one."""
    return evaluation.label + (f" + {evaluation.method}" if evaluation.method else "")


def figure_text(figure: Figure) -> str:
    """Value and standard error."""
    if figure.value is None:
        return "not finite"
    return f"{figure.value:,.4f}" if figure.stderr is None else f"{figure.value:,.4f} ± {figure.stderr:.4f}"


def amount_text(evaluation: Evaluation) -> str:
    """The data and how much of it."""
    counts = [("examples", evaluation.examples), ("tokens", evaluation.tokens)]
    return ", ".join([evaluation.source, *(f"{count:,} {what}" for what, count in counts if count is not None)])


def read_evaluations(run: Path, fingerprint: str, removed_at: Mapping[str, np.ndarray]) -> list[Evaluation]:
    """The evaluations of a run, in the order they were made; empty where there are none.

    What was measured on a step that has lost other structures since, in a round of ``--regrow``, is left out.

    Args:
        fingerprint: of the run's base model.
        removed_at: of the run, group name -> int32 [original count].

    Raises:
        GispError: the file is corrupt, or holds evaluations of another model.
    """
    path = run / EVALUATIONS
    now: dict[int, str] = {}
    found = []
    for number, entry in enumerate(_entries(path), start=1):
        evaluation = _evaluation(path, number, entry, fingerprint)
        measured, step = entry.get(STRUCTURES), evaluation.step
        if measured is not None and step is not None:
            now[step] = now.get(step) or point_digest(removed_at, step)
            if measured != now[step]:
                continue
        found.append(evaluation)
    return [replace(item, place=place) for item, place in zip(found, _places([e.data for e in found]), strict=True)]


def add_evaluations(run: Path, entries: Sequence[dict[str, Any]]) -> None:
    """Add entries to the run's file, which appears whole; one measured under equal conditions is replaced.

    Args:
        entries: ``label``, ``sparsity`` and figures, with as much of the conditions as is known.

    Raises:
        GispError: the file is corrupt or cannot be written; it stays as it was.
    """
    path = run / EVALUATIONS
    plain = [finite_json(entry) for entry in entries]
    with _one_at_a_time(run):
        replaced = [_identity(entry) for entry in plain]
        kept = [entry for entry in _entries(path) if _identity(entry) not in replaced]
        write_atomic(path, (json.dumps([*kept, *plain], indent=1) + "\n").encode())


def finite_json(value: Any) -> Any:
    """JSON has neither infinity nor NaN: ``null`` stands for both."""
    if isinstance(value, dict):
        return {key: finite_json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite_json(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _end(data: str, parts: int) -> str:
    """So many last parts of a path; a name, of the hub too, whole."""
    if not data.startswith("/") and "\\" not in data:
        return data
    return "/".join(data.replace("\\", "/").rstrip("/").split("/")[-parts:])


def _places(data: Sequence[str]) -> list[str]:
    """Ends of paths that differ where the paths do; empty where the last part alone tells them apart."""

    def alone(path: str, parts: int) -> bool:
        return all(_end(other, parts) != _end(path, parts) for other in several - {path})

    several = set(data)
    ends = {path: range(1, len(Path(path).parts) + 1) for path in several}
    parts = {path: next((count for count in ends[path] if alone(path, count)), len(ends[path])) for path in several}
    return [_end(path, parts[path]) if parts[path] > 1 else "" for path in data]


def _entries(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    found = load_json(path)
    if not isinstance(found, list):
        raise corrupt(path, ValueError("it is not a list"))
    for number, entry in enumerate(found, start=1):
        if not isinstance(entry, dict):
            raise corrupt(path, ValueError(f"entry {number} is not an object"))
    return found


def _evaluation(path: Path, number: int, entry: dict[str, Any], fingerprint: str) -> Evaluation:
    try:
        require(
            is_finite(entry["sparsity"]) and 0 <= entry["sparsity"] <= 1, f"sparsity is {quoted(entry['sparsity'])}"
        )
        require(isinstance(entry["label"], str), f"label is {quoted(entry['label'])}")
        for name in _TEXTS:
            require(isinstance(entry.get(name), (str, type(None))), f"{name} is {quoted(entry.get(name))}")
        counts: dict[str, Any] = {name: entry.get(name) for name in _COUNTS}
        for name, value in counts.items():
            require(value is None or is_count(value), f"{name} is {quoted(value)}")
        given = entry.get("fingerprint")
        require(given in (None, fingerprint), "it holds evaluations of another base model")
        protocol = entry.get("protocol") or {}
        require(isinstance(protocol, dict), f"protocol is {quoted(protocol)}")
        return Evaluation(
            label=entry["label"],
            sparsity=float(entry["sparsity"]),
            figures=_checked_figures(entry),
            data=entry.get("data") or "",
            compensation=entry.get("compensation") or "",
            protocol=tuple((str(name), str(value)) for name, value in protocol.items()),
            **counts,
        )
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise corrupt(path, error, where=f", entry {number},") from None


def _checked_figures(entry: dict[str, Any]) -> tuple[Figure, ...]:
    found = tuple(figures(entry))
    require(bool(found), "it holds no figure")
    for figure in found:
        for value in (figure.value, figure.stderr):
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            require(value is None or number, f"{figure.name} is {quoted(value)}")
    return tuple(Figure(f.name, _finite(f.value), _finite(f.stderr)) for f in found)


def _finite(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else float(value)


def _identity(entry: dict[str, Any]) -> str:
    return json.dumps([entry.get(name) for name in _CONDITIONS], sort_keys=True)


@contextmanager
def _one_at_a_time(run: Path) -> Iterator[None]:
    """Let evaluations that end together add one after the other; file systems without locks go without."""
    if fcntl is None:
        yield
        return
    descriptor = os.open(run, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
