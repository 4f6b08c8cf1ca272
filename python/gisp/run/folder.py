"""The folder of a run: what a step leaves on disk, and how a cut run is taken up again.

A step is committed by ``trajectory.json``, written last, and with it all steps before it that were not. Everything else
is either written before it and ignored when ahead (removal steps, moving averages) or cut back to it on resume
(``metrics.jsonl``).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from safetensors import SafetensorError

from gisp.config.options import CONFIG_FILE
from gisp.data.sources import located
from gisp.errors import GispError
from gisp.files import disk_message, final_name, one_writer, write_atomic
from gisp.run.record import HELD_OUT, LOCK, RECORD, STATE, TENSORS, earlier_tensors

if TYPE_CHECKING:
    import torch

    from gisp.run.trajectory import Trajectory

METRICS = "metrics.jsonl"


class RunFolder:
    """One run's folder; nothing is created before the first step is committed."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._clean = False
        self._described = False
        # Of steps that are not written yet, with their numbers.
        self._lines: deque[tuple[int, str]] = deque()

    @contextmanager
    def writing(self, resume: bool, *, looking: bool = False) -> Iterator[bool]:
        """Be the only writer of the folder; whether a run is there to resume.

        Args:
            looking: the folder is only looked at.

        Raises:
            GispError: the folder is taken, another process writes it, or it cannot be written.
        """
        if self.path.exists() and not self.path.is_dir():
            raise GispError(f"{self.path} is a file: give a folder for --out")
        above = next(p for p in (self.path, *self.path.absolute().parents) if p.exists())
        if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
            raise GispError(f"cannot write {self.path}: {above} is not a folder this user may write to")
        with one_writer(self.path, self.path / LOCK, looking=looking) as alone:
            self._clean = not alone
            yield self._holds_run(resume)

    def _holds_run(self, resume: bool) -> bool:
        """Whether a run is there to resume.

        Raises:
            GispError: the folder is taken.
        """
        if (self.path / RECORD).exists():
            if resume:
                return True
            raise GispError(f"{self.path} already holds a run: add --resume to continue it or give another --out")
        inside = [path for path in sorted(self.path.iterdir()) if final_name(path) is None]
        foreign = [path.name for path in inside if path.name not in _BEFORE_FIRST_COMMIT]
        if foreign:
            raise GispError(f"{self.path} is not empty and holds no run ({foreign[0]}): give another --out")
        if any(path.name > self._state(1).name for path in (self.path / STATE).glob("step-*.safetensors")):
            raise GispError(
                f"{self.path} holds a run whose {RECORD} is missing: put it back to go on, or give another --out"
            )
        return False

    def commit(
        self,
        trajectory: Trajectory,
        metrics: dict[str, Any],
        state: dict[str, torch.Tensor],
        earlier: bytes | None = None,
    ) -> Callable[[], None]:
        """What writes the steps up to now; later steps change nothing of it.

        Args:
            trajectory: with the record of the step to commit last.
            metrics: of this step, one JSON object for ``metrics.jsonl``; they are kept until a step is written.
            state: tensors a resumed run needs (moving averages).
            earlier: the file of removal steps before this step, where it changed steps before its own; the step before
                is committed then.
        """
        self._lines.append((len(trajectory.steps), json.dumps(metrics) + "\n"))
        state = {name: tensor.clone() for name, tensor in state.items()}
        now = replace(
            trajectory,
            removed_at={name: at.clone() for name, at in trajectory.removed_at.items()},
            steps=[*trajectory.steps],
        )

        def write() -> None:
            self._write(now, state, earlier)
            trajectory.state_sha256 = now.state_sha256

        return write

    def _write(self, trajectory: Trajectory, state: dict[str, torch.Tensor], earlier: bytes | None) -> None:
        from safetensors.numpy import save

        step = len(trajectory.steps)
        try:
            (self.path / STATE).mkdir(parents=True, exist_ok=True)
            if not self._clean:
                self._remove_unfinished()
            stored = save({name: tensor.cpu().numpy() for name, tensor in state.items()})
            write_atomic(self._state(step), stored)
            if step == 1:
                (self.path / METRICS).unlink(missing_ok=True)
                # Of other data perhaps, where a run was cut before its first commit.
                (self.path / HELD_OUT).unlink(missing_ok=True)
            if not self._described:
                # A run that goes on may have its model, its data and its device elsewhere than before.
                write_atomic(self.path / CONFIG_FILE, self._config(trajectory))
                self._described = True
            with (self.path / METRICS).open("a") as file:
                while self._lines and self._lines[0][0] <= step:
                    file.write(self._lines.popleft()[1])
            if earlier is not None:
                write_atomic(earlier_tensors(self.path, step - 1), earlier)
            trajectory.state_sha256 = hashlib.sha256(stored).hexdigest()
            trajectory.save(self.path)
            self._remove_others(step)
        except OSError as error:
            raise GispError(disk_message(self.path, error)) from None

    def committed(self) -> dict[str, bytes]:
        """The files that a resumed run reads, by their path in the folder; no step is being written."""
        paths = [self.path / RECORD, self.path / TENSORS]
        paths += [path for path in sorted((self.path / STATE).iterdir()) if _STATE_FILE.fullmatch(path.name)]
        return {str(path.relative_to(self.path)): path.read_bytes() for path in paths}

    def load_state(self, step: int, sha256: str) -> dict[str, torch.Tensor]:
        """Moving averages as of ``step``, and the metrics cut back to it.

        Args:
            sha256: of the file, as the record of the run has it; empty where it has none.

        Raises:
            GispError: the state is not there or not the one the run wrote.
        """
        from safetensors.torch import load

        try:
            stored = self._state(step).read_bytes()
            state = load(stored)
        except (OSError, SafetensorError) as error:
            reason = " ".join(str(error).split())
            raise GispError(
                f"{self.path} cannot be resumed, the state of step {step} is unreadable: {reason}"
            ) from None
        if sha256 and hashlib.sha256(stored).hexdigest() != sha256:
            raise GispError(
                f"{self._state(step)} is corrupt: its SHA-256 is not the one in {RECORD}, "
                "restore the file or prune again"
            )
        metrics = self.path / METRICS
        lines = metrics.read_text(encoding="utf-8", errors="replace").splitlines() if metrics.is_file() else []
        kept = [line for line in lines if _step_of(line) in range(1, step + 1)]
        write_atomic(metrics, "".join(f"{line}\n" for line in kept).encode())
        self._remove_others(step)
        return state

    def _remove_others(self, step: int) -> None:
        """Drop what is kept of steps other than the one that is committed."""
        for stale in (self.path / STATE).iterdir():
            if _STATE_FILE.fullmatch(stale.name) and stale not in (self._state(step), earlier_tensors(self.path, step)):
                stale.unlink()

    def _remove_unfinished(self) -> None:
        """Drop what a killed run was writing; what others write or left in the folder stays."""
        own = (METRICS, CONFIG_FILE, Path(HELD_OUT).name, RECORD, TENSORS)
        for folder in (self.path, self.path / STATE):
            for path in folder.iterdir() if folder.is_dir() else ():
                name = final_name(path) or ""
                if (name in own or _STATE_FILE.fullmatch(name)) and not path.is_dir():
                    path.unlink(missing_ok=True)
        self._clean = True

    def _state(self, step: int) -> Path:
        return self.path / STATE / f"step-{step:05d}.safetensors"

    def _config(self, trajectory: Trajectory) -> bytes:
        # As the model's path: the file is used from other folders too.
        spec = located(str(trajectory.data["spec"]))
        options = {"model": trajectory.base_model["path"], "data": spec, **trajectory.config}
        given = {name: value for name, value in options.items() if value is not None}
        return yaml.safe_dump(given, sort_keys=False).encode()


# What a run cut before its first commit can leave.
_BEFORE_FIRST_COMMIT = (METRICS, CONFIG_FILE, STATE, TENSORS, LOCK, "tensorboard")
_STATE_FILE = re.compile(r"(?:step|removed)-[0-9]{5,}\.safetensors")


def _step_of(line: str) -> int:
    with contextlib.suppress(ValueError, TypeError, KeyError, RecursionError):
        return int(json.loads(line)["step"])
    return 0
