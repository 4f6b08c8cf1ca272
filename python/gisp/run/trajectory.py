"""The result of a run: at which step every structure went, and what each step cost.

A trajectory and its base model give every sparsity passed on the way.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.numpy import save
from torch import nn

from gisp.data import Sequences
from gisp.data.held_out import remember_run_text
from gisp.data.token_files import stored_sequences
from gisp.errors import GispError
from gisp.files import as_path, one_writer, write_atomic
from gisp.model.keep import Keep, Removal
from gisp.model.modes import default_device
from gisp.model.shrink import ShrinkableModel
from gisp.model.structures import fingerprint, map_model
from gisp.run.record import (
    FORMAT,
    HELD_OUT,
    LOCK,
    RECORD,
    STRUCTURES,
    TENSORS,
    VERSION,
    corrupt,
    read_trajectory,
    removed_at_digest,
)
from gisp.select.schedule import goal_of, nearest_step


@dataclass(frozen=True)
class StepRecord:
    """One step of a run.

    Attributes:
        sparsity: removed / all parameters of the decoder layers after the step.
        target: what the schedule allowed (sparsity, or ratio of structures).
        model_sparsity: removed / all parameters of the model.
        heads_removed, channels_removed: totals after the step.
        loss: calibration loss before the step's removal.
        tokens: tokens the step was scored on.
        seconds: wall time of the step.
        kv_bytes_per_token: key/value cache of the pruned model in its dtype.
    """

    step: int
    sparsity: float
    target: float
    model_sparsity: float
    removed_parameters: int
    heads_removed: int
    channels_removed: int
    loss: float
    tokens: int
    seconds: float
    kv_bytes_per_token: int


@dataclass(repr=False, eq=False)
class Trajectory:
    """A run: at which step every structure was removed, and what each step measured. It may be unfinished.

    Attributes:
        removed_at: ``layers.{i}.heads`` and ``layers.{i}.channels`` -> int32 [original count]: 0 = kept, t = removed
            at step t.
        steps: one record for every finished step.
        base_model: path, fingerprint and shape of the dense model.
        config: the resolved options.
        data: calibration data: spec, number of sequences and SHA-256.
        versions: versions of the libraries that made the run.
        complete: whether the last step of the schedule was reached.
        state_sha256: SHA-256 of the file that a resumed run needs beside the trajectory; empty if there is none.
        model: the model that the run pruned; ``None`` for a run that was loaded.
        unseen: calibration sequences that no step has seen; ``None`` if there are none, for a mixture, and for a run
            that was loaded.
        held_out: part of the calibration text on which compensations are checked, or the file with it; ``None`` if
            there was too little text.
    """

    removed_at: dict[str, torch.Tensor]
    base_model: dict[str, Any]
    config: dict[str, Any]
    data: dict[str, Any]
    versions: dict[str, str]
    steps: list[StepRecord] = field(default_factory=list)
    complete: bool = False
    state_sha256: str = ""
    model: nn.Module | None = field(default=None, repr=False, compare=False)
    unseen: Sequences | None = field(default=None, repr=False, compare=False)
    held_out: Sequences | Path | None = field(default=None, repr=False, compare=False)

    def __repr__(self) -> str:
        """One line: base model, steps and end."""
        name = Path(str(self.base_model.get("path") or "model in memory")).name
        end = f"sparsity {self.steps[-1].sparsity:.4f}" if self.steps else "dense"
        state = "" if self.complete else ", unfinished"
        return f"<Trajectory of {name}: {len(self.steps)} steps to {end}, {self.config.get('criterion')}{state}>"

    @property
    def layers(self) -> int:
        """Number of decoder layers."""
        return int(self.base_model["layers"])

    def step_for(self, sparsity: float | None) -> int:
        """The step whose sparsity is nearest (the smaller of two equally near); 0 is dense, None the last step."""
        if sparsity is None:
            return len(self.steps)
        points = [0.0] + [record.sparsity for record in self.steps]
        return nearest_step(points, sparsity, goal=self.goal)

    @property
    def goal(self) -> float | None:
        """Sparsity that the run asked for, once it is done; it names the last step."""
        return goal_of(self.config, len(self.steps))

    def sparsity_at(self, step: int) -> float:
        """Removed / all parameters of the decoder layers after ``step``; 0 is dense."""
        return self.steps[step - 1].sparsity if step else 0.0

    def model_sparsity_at(self, step: int) -> float:
        """Removed / all parameters of the model after ``step``; 0 is dense."""
        return self.steps[step - 1].model_sparsity if step else 0.0

    def keep(self, step: int) -> Keep:
        """What stays after ``step``; 0 is the dense model."""
        return Keep.of({n: torch.nonzero((at == 0) | (at > step)).flatten() for n, at in self.removed_at.items()})

    def removal(self, step: int) -> dict[str, torch.Tensor]:
        """Original indices every group loses at ``step``."""
        gone = {name: torch.nonzero(at == step).flatten() for name, at in self.removed_at.items()}
        return {name: index for name, index in gone.items() if index.numel()}

    @default_device()
    def at(self, sparsity: float | None = None, model: nn.Module | None = None) -> Any:
        """Prune a model in place to the step whose sparsity is nearest, or restore it to that step.

        Args:
            sparsity: in [0, 1), up to the end of the run; 0 is dense, ``None`` the end of the run.
            model: the dense base model, or a model that this method or ``prune`` pruned along the same run. ``None``
                takes the model of this trajectory, or loads the base model if it has none.

        Returns:
            The model.

        Raises:
            GispError: the model is not this trajectory's base model, or its steps were packed away.
        """
        step = self.step_for(sparsity)
        model = model if model is not None else self.model
        if model is None:
            model = self.load_base()
            shrinkable = self.shrinkable(model)
        else:
            shrinkable = self._attach(model)
        move_to(shrinkable, self, step)
        remember_run_text(model, self.held_out)
        self.model = model
        return model

    @property
    def base_path(self) -> str:
        """Where the dense base model is.

        Raises:
            GispError: it was in memory alone, or is not there any more.
        """
        path = str(self.base_model["path"])
        if not path:
            raise GispError(
                "this trajectory was made from a model in memory: Trajectory.at(sparsity, model) moves it, "
                "gisp.export_model(model, DIR) exports it"
            )
        if Path(path).is_absolute() and not Path(path).exists():
            raise GispError(
                f"the base model of this run, {path}, is not there: put it back or correct base_model.path in {RECORD}"
            )
        return path

    @default_device()
    def load_base(self, *, device: str = "auto", dtype: str | None = None) -> Any:
        """The dense base model, checked to be the one the run pruned.

        Args:
            dtype: ``bfloat16`` or ``float32``, ``auto`` for the checkpoint's own, ``None`` for the run's.
        """
        from gisp.model.load import load_dense, resolve_device

        place, path = resolve_device(device), self.base_path
        model = load_dense(path, place, self.dtype_on(place, dtype))
        self._check_base(model, path)
        remember_run_text(model, self.held_out)
        return model

    def dtype_on(self, device: torch.device, dtype: str | None = None) -> torch.dtype | str:
        """The dtype to load the base model in.

        Args:
            device: that computes.
            dtype: as for :meth:`load_base`.

        Returns:
            A dtype, or ``"auto"`` for the checkpoint's own.
        """
        from gisp.model.load import resolve_dtype

        return resolve_dtype(dtype or self.config.get("dtype"), device)

    def shrinkable(self, model: nn.Module) -> ShrinkableModel:
        """A dense model made ready for this trajectory's steps."""
        return ShrinkableModel(map_model(model, self._gqa))

    @property
    def _gqa(self) -> str:
        return str(self.config.get("gqa") or "query")

    def _attach(self, model: nn.Module) -> ShrinkableModel:
        shrinkable = ShrinkableModel.of(model)
        if shrinkable is None:
            self._check_base(model, "the given model")
            return self.shrinkable(model)
        if shrinkable.fingerprint != self.base_model["fingerprint"]:
            raise GispError("this model was pruned from another base model than the trajectory's")
        if (shrinkable.map.gqa == "group") != (self._gqa == "group") and shrinkable.map.shares_kv:
            # Its structures are others than this trajectory's: whole key/value heads, or single query heads.
            shrinkable.rollback(len(shrinkable.history))
            return self.shrinkable(model)
        return shrinkable

    def _check_base(self, model: nn.Module, where: str) -> None:
        model_map = map_model(model)
        for key, value in model_map.describe().items():
            if self.base_model.get(key) != value:
                raise GispError(
                    f"{where} has {key} {value}, the trajectory was made from a model with {self.base_model.get(key)}: "
                    "give its base model"
                )
        if fingerprint(model) != self.base_model["fingerprint"]:
            raise GispError(f"{where} holds other weights than the trajectory's base model: give its base model")

    def tensors(self) -> bytes:
        """The safetensors file of the removal steps."""
        return save(
            # torch tensors would take three times as long, from a thread that the one that launches kernels waits for.
            {f"{name}.removed_at": at.to(torch.int32).cpu().numpy() for name, at in self.removed_at.items()},
            # One entry: several would be written in an order that changes from process to process.
            metadata={"format": f"{FORMAT} {VERSION}"},
        )

    def record(self) -> dict[str, Any]:
        """The JSON side of the trajectory."""
        return {
            "format": FORMAT,
            "version": VERSION,
            "complete": self.complete,
            "base_model": self.base_model,
            "config": self.config,
            "data": self.data,
            "structures": {kind: self.layers * self.base_model[count] for kind, count in STRUCTURES.items()},
            "steps": [dict(vars(record)) for record in self.steps],
            "removed_at_sha256": removed_at_digest(
                {name: at.to(torch.int32).cpu().numpy() for name, at in self.removed_at.items()}
            ),
            "state_sha256": self.state_sha256,
            "versions": self.versions,
        }

    def save(self, folder: str | Path) -> None:
        """Write the trajectory files into ``folder``; each appears whole or not at all, the JSON last.

        Held-out text that is there already stays.

        Raises:
            GispError: another process writes the folder, or it cannot be written.
        """
        path = as_path(folder, "folder")
        with one_writer(path, path / LOCK):
            if isinstance(self.held_out, Sequences) and not (path / HELD_OUT).exists():
                (path / HELD_OUT).parent.mkdir(exist_ok=True)
                write_atomic(path / HELD_OUT, stored_sequences(self.held_out))
            write_atomic(path / TENSORS, self.tensors())
            write_atomic(path / RECORD, self._record_text().encode())

    def _record_text(self) -> str:
        """:meth:`record` with a line for every entry and every step.

        A run writes it after every step; Python's own indentation takes ten times as long, ever more with the steps.
        """
        entries = {name: json.dumps(value) for name, value in self.record().items() if name != "steps"}
        steps = ",\n  ".join(json.dumps(vars(record)) for record in self.steps)
        entries["steps"] = f"[\n  {steps}\n ]"
        return "{\n " + ",\n ".join(f"{json.dumps(name)}: {text}" for name, text in entries.items()) + "\n}"

    @classmethod
    @default_device()
    def load(cls, folder: str | Path) -> Trajectory:
        """Read a run folder.

        Raises:
            GispError: no run there, or a corrupt one.
        """
        path = as_path(folder, "folder")
        record, removed_at = read_trajectory(path)
        try:
            steps = [StepRecord(**step) for step in record["steps"]]
        except TypeError as error:
            raise corrupt(path / RECORD, error) from None
        return cls(
            removed_at={name: torch.from_numpy(at) for name, at in removed_at.items()},
            base_model=record["base_model"],
            config=record["config"],
            data=record["data"],
            versions=record["versions"],
            steps=steps,
            complete=record["complete"],
            state_sha256=record.get("state_sha256", ""),
            held_out=path.absolute() / HELD_OUT,
        )


def move_to(shrinkable: ShrinkableModel, trajectory: Trajectory, step: int) -> None:
    """Take a model to the state after ``step`` by undoing and applying whole steps."""
    shared = 0
    for applied in shrinkable.history[:step]:
        if not _same(applied, trajectory.removal(shared + 1)):
            break
        shared += 1
    shrinkable.rollback(len(shrinkable.history) - shared)
    for next_step in range(shared + 1, step + 1):
        shrinkable.remove(trajectory.removal(next_step))


def _same(a: Removal, b: Removal) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
