"""A nested checkpoint as it lies on disk: written shard by shard, read prefix by prefix.

``nested.json`` names everything else; ``nested-layout.safetensors`` holds orders and prefixes, ``nested-*.safetensors``
the weights, ``nested-milestone-*.safetensors`` those of single steps. ``config.json`` has a model type of its own, so
that no stock class takes the folder for its model.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from gisp.errors import GispError, quoted
from gisp.export.nested.order import MILESTONES, LayerOrder, Nesting
from gisp.export.nested.place import RECORD, is_nested
from gisp.run.record import INVALID, corrupt, is_count, is_finite, load_json, require
from gisp.select.schedule import goal_of, nearest_step
from gisp_kernels.groups import KINDS

FORMAT = "gisp-nested"
# Without and with milestones: what knows the first alone would load their sizes without compensation.
PLAIN, WITH_MILESTONES = 1, 2
LAYOUT = "nested-layout.safetensors"
MODEL_TYPE = "gisp_nested"
# Layers, and what KINDS count in a dense one.
_BASE_COUNTS = ("layers", "num_attention_heads", "num_key_value_heads", "intermediate_size")
_SHARD_BYTES = 5 * 10**9
_READ_BYTES = 2**24


def write_shards(
    folder: Path,
    tensors: Iterable[tuple[str, torch.Tensor]],
    prefix: str = "nested",
    shard_bytes: int = _SHARD_BYTES,
) -> dict[str, str]:
    """Write tensors to shards as they come; at most one shard is in memory. Returns the file of every tensor.

    Args:
        prefix: the names of files begin with.
    """
    where: dict[str, str] = {}
    held: dict[str, torch.Tensor] = {}
    size = shards = 0

    def flush() -> None:
        nonlocal size, shards
        shards += 1
        name = f"{prefix}-{shards:05d}.safetensors"
        save_file(held, folder / name)
        where.update(dict.fromkeys(held, name))
        held.clear()
        size = 0

    for name, tensor in tensors:
        held[name] = tensor.cpu().contiguous()
        size += tensor.numel() * tensor.element_size()
        if size >= shard_bytes:
            flush()
    if held:
        flush()
    return where


def write_nesting(folder: Path, nesting: Nesting) -> None:
    """Write orders and prefixes."""
    tensors = {"prefixes": nesting.prefixes}
    for i, order in enumerate(nesting.layers):
        for kind in (*KINDS, "kv_of_head"):
            tensors[f"layers.{i}.{kind}"] = getattr(order, kind).to(torch.int32)
    save_file(tensors, folder / LAYOUT)


def write_record(folder: Path, record: dict[str, Any], where: dict[str, str]) -> None:
    """Write ``nested.json``, with size and SHA-256 of every other weight file."""
    files = sorted({LAYOUT, *where.values()})
    described = {name: {"bytes": (folder / name).stat().st_size, "sha256": _digest(folder / name)} for name in files}
    version = WITH_MILESTONES if record.get("milestones") else PLAIN
    whole = {"format": FORMAT, "version": version, **record, "files": described, "tensors": where}
    (folder / RECORD).write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")


@dataclass
class NestedFiles:
    """An opened nested checkpoint. Shards are mapped into memory and stay open.

    Attributes:
        record: ``nested.json``.
        bytes_read: of weights, so far.
    """

    folder: Path
    record: dict[str, Any]
    nesting: Nesting
    bytes_read: int = 0
    _open: dict[str, Any] = field(default_factory=dict)

    def __getstate__(self) -> dict[str, Any]:
        # A copy opens files by itself.
        return {**self.__dict__, "_open": {}}

    @classmethod
    def open(cls, folder: str | Path, *, verify: bool = False) -> NestedFiles:
        """Open a folder and check it.

        Args:
            verify: also read all files and compare their SHA-256.

        Raises:
            GispError: no nested checkpoint, or one that is corrupt or lacks a file.
        """
        path = Path(folder)
        if not is_nested(path):
            raise GispError(
                f"{path} is no nested checkpoint ({RECORD} is missing): give one that gisp export --nested wrote"
            )
        record = load_json(path / RECORD)
        try:
            _check(record)
        except INVALID as error:
            raise corrupt(path / RECORD, error) from None
        for name, described in record["files"].items():
            # Orders and prefixes are small: a wrong one would be another model without a word.
            _check_file(path / name, described, verify or name == LAYOUT)
        return cls(path, record, _read_nesting(path / LAYOUT, record))

    @property
    def sparsities(self) -> list[float]:
        """Sparsity after every step; the first is the dense model's 0."""
        return [float(step["sparsity"]) for step in self.record["steps"]]

    @property
    def record_path(self) -> Path:
        """``nested.json``, for messages."""
        return self.folder / RECORD

    @property
    def milestones(self) -> dict[int, str]:
        """What was done to every step that carries a compensation of its own."""
        return {int(item["step"]): str(item["compensation"]) for item in self.record.get("milestones", ())}

    def held_by(self, step: int) -> int:
        """Number of tensors that a milestone stores."""
        return sum(int(item["tensors"]) for item in self.record.get("milestones", ()) if item["step"] == step)

    def holds(self, name: str) -> bool:
        """Whether there is a stored tensor of a name."""
        return name in self.record["tensors"]

    def step_for(self, sparsity: float | None) -> int:
        """The step whose sparsity is nearest (the smaller of two equally near); ``None`` the last.

        Raises:
            GispError: a sparsity outside [0, 1), or beyond the end of the run.
        """
        points = self.sparsities
        return len(points) - 1 if sparsity is None else nearest_step(points, sparsity, goal=self.goal)

    @property
    def goal(self) -> float | None:
        """Sparsity that the run asked for, see :func:`gisp.select.schedule.goal_of`."""
        config = self.record["run"].get("config")
        return goal_of(config, len(self.record["steps"]) - 1) if isinstance(config, dict) else None

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a stored tensor.

        Raises:
            GispError: there is none of that name.
        """
        return tuple(self._slice(name).get_shape())

    def expect(self, name: str, shape: tuple[int, ...]) -> None:
        """Refuse a stored tensor of another shape.

        Raises:
            GispError: names tensor and shapes.
        """
        if self.shape(name) != shape:
            raise GispError(
                f"{self.folder} is corrupt: {name} is {list(self.shape(name))}, its configuration says {list(shape)}"
            )

    def bytes_of(self, name: str) -> int:
        """Bytes of a stored tensor; nothing of it is read.

        Raises:
            GispError: there is none of that name, or its file cannot be read.
        """
        return math.prod(self.shape(name)) * self.rows(name, 0, 0).element_size()

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows ``start : stop`` of a stored tensor, on the CPU; nothing else of it is read.

        Raises:
            GispError: there is none of that name, or its file cannot be read.
        """
        try:
            found: torch.Tensor = self._slice(name)[start:stop]
        except (SafetensorError, OSError) as error:
            raise corrupt(self.folder / self.record["tensors"][name], error) from None
        self.bytes_read += found.numel() * found.element_size()
        return found

    def _slice(self, name: str) -> Any:
        file = self.record["tensors"].get(name)
        if file is None:
            raise GispError(f"{self.folder / RECORD} is corrupt: it names no file for {name}")
        try:
            if file not in self._open:
                self._open[file] = safe_open(self.folder / file, framework="pt")
            return self._open[file].get_slice(name)
        except (SafetensorError, OSError) as error:
            raise corrupt(self.folder / file, error) from None


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_READ_BYTES):
            digest.update(block)
    return digest.hexdigest()


def _check_file(path: Path, described: dict[str, Any], verify: bool) -> None:
    if not path.is_file():
        raise GispError(f"{path} is missing: copy the whole folder of the nested checkpoint")
    size = path.stat().st_size
    if size != described["bytes"]:
        raise GispError(f"{path} has {size} bytes, not {described['bytes']}: it is cut off or of another checkpoint")
    if verify and _digest(path) != described["sha256"]:
        raise GispError(f"{path} is corrupt: its SHA-256 is not the recorded one, copy or export it again")


def _check(record: Any) -> None:
    known = [(FORMAT, PLAIN), (FORMAT, WITH_MILESTONES)]
    if not isinstance(record, dict) or (record.get("format"), record.get("version")) not in known:
        raise ValueError(f"it is not {FORMAT} version {PLAIN} or {WITH_MILESTONES}")
    for name in ("base_config", "base_model", "files", "tensors", "run"):
        require(isinstance(record[name], dict), f"{name} is not an object")
    require(isinstance(record["base_config"]["model_type"], str), "base_config.model_type is not a name")
    base = record["base_model"]
    require(isinstance(base["fingerprint"], str), "base_model.fingerprint is not a text")
    for name in _BASE_COUNTS:
        require(is_count(base[name], 1) and base[name] < 2**31, f"base_model.{name} is {quoted(base[name])}")
    # Before the model is built: that takes as long as it has layers.
    layers = record["base_config"]["num_hidden_layers"]
    require(layers == base["layers"], f"base_config has {quoted(layers)} layers, base_model {base['layers']}")
    steps = record["steps"]
    require(isinstance(steps, list) and len(steps) > 0, "it holds no steps")
    for name in ("sparsity", "model_sparsity"):
        points = [step[name] for step in steps]
        require(all(map(is_finite, points)), f"a {name} is not a number")
        require(points[0] == 0 and points == sorted(points) and points[-1] < 1, f"{name} does not rise from 0 below 1")
    require(LAYOUT in record["files"], f"files has no {LAYOUT}")
    for name, described in record["files"].items():
        require(Path(name).name == name, f"files names {quoted(name)}, which is not in the folder")
        require(is_count(described["bytes"]) and isinstance(described["sha256"], str), f"files.{name} is incomplete")
    for name, file in record["tensors"].items():
        require(file in record["files"], f"tensor {name} is in {quoted(file)}, which files does not name")
    _check_milestones(record)


def _check_milestones(record: dict[str, Any]) -> None:
    milestones = record.get("milestones", [])
    require(isinstance(milestones, list), "milestones is not a list")
    require((record["version"] == WITH_MILESTONES) == bool(milestones), f"it has {len(milestones)} milestones")
    steps = [item["step"] for item in milestones]
    sound = all(is_count(step, 1) and step < len(record["steps"]) for step in steps)
    require(sound and steps == sorted(set(steps)), f"milestones are at steps {quoted(steps)}")
    for item in milestones:
        require(isinstance(item["compensation"], str), f"milestone {item['step']} does not say what was done")
        require(is_count(item["tensors"]), f"milestone {item['step']} has {quoted(item['tensors'])} tensors")
    held = Counter(name.split(".")[1] for name in record["tensors"] if name.startswith(MILESTONES))
    told = {str(item["step"]): item["tensors"] for item in milestones if item["tensors"]}
    require(dict(held) == told, f"milestones hold {dict(held)} tensors by step, not {told}")


def _read_nesting(path: Path, record: dict[str, Any]) -> Nesting:
    """Orders and prefixes, checked against the base model's shape."""
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise corrupt(path, error) from None
    base = record["base_model"]
    layers, *counts = (base[name] for name in _BASE_COUNTS)
    steps = len(record["steps"])
    prefixes = tensors.get("prefixes")
    if prefixes is None or prefixes.shape != (steps, layers, len(KINDS)) or prefixes.dtype != torch.int32:
        raise GispError(f"{path} is corrupt: it has no int32 [{steps}, {layers}, {len(KINDS)}] tensor prefixes")
    limits = torch.tensor(counts, dtype=torch.int32)
    nested = bool((prefixes.diff(dim=0) <= 0).all()) and bool((prefixes[0] == limits).all())
    if not nested or bool((prefixes < 0).any()):
        raise GispError(f"{path} is corrupt: prefixes do not fall from {counts} step by step")
    orders = []
    for layer in range(layers):
        parts = {kind: tensors.get(f"layers.{layer}.{kind}") for kind in (*KINDS, "kv_of_head")}
        for kind, count in zip(KINDS, counts, strict=True):
            part = parts[kind]
            if (
                part is None
                or part.shape != (count,)
                or not torch.equal(part.sort().values, torch.arange(count, dtype=torch.int32))
            ):
                raise GispError(f"{path} is corrupt: layers.{layer}.{kind} is no order of {count}")
        reads = parts["kv_of_head"]
        if reads is None or reads.shape != (counts[0],) or not 0 <= int(reads.min()) <= int(reads.max()) < counts[1]:
            raise GispError(f"{path} is corrupt: layers.{layer}.kv_of_head does not name key/value heads")
        orders.append(LayerOrder(**{kind: part.long() for kind, part in parts.items() if part is not None}))
    return Nesting(tuple(orders), prefixes)
