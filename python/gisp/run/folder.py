"""The folder of a run: what a step leaves on disk, and how a cut run is taken up again.

A step is committed by ``trajectory.json``, written last. Everything else is either written before it and ignored when
one step ahead (removal steps, moving averages) or cut back to it on resume (``metrics.jsonl``).
"""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from gisp.errors import GispError
from gisp.files import disk_message, is_unfinished, write_atomic
from gisp.run.record import RECORD
from gisp.run.trajectory import Trajectory

METRICS = "metrics.jsonl"
CONFIG = "config.yaml"
STATE = "state"


class RunFolder:
    """One run's folder; nothing is created before the first step is committed."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._clean = False

    def check_free(self, resume: bool) -> bool:
        """Whether a run is there to resume.

        Raises:
            GispError: the folder is taken.
        """
        if self.path.exists() and not self.path.is_dir():
            raise GispError(f"{self.path} is a file: give a folder for --out")
        if (self.path / RECORD).exists():
            if resume:
                return True
            raise GispError(f"{self.path} already holds a run: add --resume to continue it or give another --out")
        inside = sorted(self.path.iterdir()) if self.path.is_dir() else []
        foreign = [p.name for p in inside if p.name not in _BEFORE_FIRST_COMMIT and not is_unfinished(p)]
        if foreign:
            raise GispError(f"{self.path} is not empty and holds no run ({foreign[0]}): give another --out")
        if any(path.name > self._state(1).name for path in (self.path / STATE).glob("step-*.safetensors")):
            raise GispError(
                f"{self.path} holds a run whose {RECORD} is missing: put it back to go on, or give another --out"
            )
        above = next(p for p in (self.path, *self.path.absolute().parents) if p.exists())
        if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
            raise GispError(f"cannot write {self.path}: {above} is not a folder this user may write to")
        return False

    def commit(self, trajectory: Trajectory, metrics: dict[str, Any], state: dict[str, torch.Tensor]) -> None:
        """Write one finished step.

        Args:
            trajectory: with this step's record last.
            metrics: one JSON object for ``metrics.jsonl``.
            state: tensors a resumed run needs (moving averages).
        """
        step = len(trajectory.steps)
        try:
            (self.path / STATE).mkdir(parents=True, exist_ok=True)
            if not self._clean:
                self._remove_unfinished()
            write_atomic(self._state(step), save(state))
            if step == 1:
                (self.path / METRICS).unlink(missing_ok=True)
                write_atomic(self.path / CONFIG, self._config(trajectory))
            with (self.path / METRICS).open("a") as file:
                file.write(json.dumps(metrics) + "\n")
            trajectory.save(self.path)
            self._state(step - 1).unlink(missing_ok=True)
        except OSError as error:
            raise GispError(disk_message(self.path, error)) from None

    def load_state(self, step: int) -> dict[str, torch.Tensor]:
        """Moving averages as of ``step``, and the metrics cut back to it."""
        try:
            state = load_file(self._state(step))
        except (OSError, SafetensorError) as error:
            reason = " ".join(str(error).split())
            raise GispError(
                f"{self.path} cannot be resumed, the state of step {step} is unreadable: {reason}"
            ) from None
        metrics = self.path / METRICS
        lines = metrics.read_text(encoding="utf-8", errors="replace").splitlines() if metrics.is_file() else []
        kept = [line for line in lines if _step_of(line) in range(1, step + 1)]
        write_atomic(metrics, "".join(f"{line}\n" for line in kept).encode())
        for stale in (self.path / STATE).iterdir():
            if stale != self._state(step):
                stale.unlink()
        return state

    def _remove_unfinished(self) -> None:
        """Drop what a killed run was writing."""
        for folder in (self.path, self.path / STATE):
            for path in folder.iterdir():
                if is_unfinished(path):
                    path.unlink()
        self._clean = True

    def _state(self, step: int) -> Path:
        return self.path / STATE / f"step-{step:05d}.safetensors"

    def _config(self, trajectory: Trajectory) -> bytes:
        data = Path(str(trajectory.data["spec"]))
        # As the model's path: the file is used from other folders too. What has no suffix may be a dataset's name.
        spec = str(data.resolve()) if data.suffix and data.is_file() else trajectory.data["spec"]
        options = {"model": trajectory.base_model["path"], "data": spec, **trajectory.config}
        given = {name: value for name, value in options.items() if value is not None}
        return yaml.safe_dump(given, sort_keys=False).encode()


# What a run cut before its first commit can leave.
_BEFORE_FIRST_COMMIT = (METRICS, CONFIG, STATE, "trajectory.safetensors")


def _step_of(line: str) -> int:
    with contextlib.suppress(ValueError, TypeError, KeyError, RecursionError):
        return int(json.loads(line)["step"])
    return 0
