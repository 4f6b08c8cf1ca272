"""What an evaluation of a run leaves in the run's folder."""

from __future__ import annotations

import warnings
from dataclasses import fields
from pathlib import Path
from typing import Any

from gisp.config.evaluation import EvalOptions, LmEvalTasks
from gisp.errors import GispError
from gisp.run.evaluations import STRUCTURES, THIS_RUN, add_evaluations, read_evaluations
from gisp.run.record import library_versions, point_digest
from gisp.run.trajectory import Trajectory

# Stated by every measure itself, or without influence on a figure.
_NOT_PROTOCOL = ("window", "stride", "batch_size")


class EvaluationRecorder:
    """Writes every measured point of a run into its ``evaluations.json``.

    Args:
        run: the run folder.
        trajectory: the run as it is measured; its folder may go on meanwhile.
        data, options, lm_eval: what is measured, and how.
        dtype: of the weights.

    Raises:
        GispError: the folder's evaluations are corrupt; nothing has been measured yet.
    """

    def __init__(
        self,
        run: Path,
        trajectory: Trajectory,
        data: str | None,
        options: EvalOptions,
        lm_eval: LmEvalTasks | None,
        dtype: str,
    ) -> None:
        fingerprint = str(trajectory.base_model["fingerprint"])
        self._removed_at = {name: at.numpy() for name, at in trajectory.removed_at.items()}
        read_evaluations(run, fingerprint, self._removed_at)
        given = {field.name: getattr(options, field.name) for field in fields(options) if data is not None}
        defaults = {field.name: field.default for field in fields(options)}
        protocol = {n: v for n, v in given.items() if n not in _NOT_PROTOCOL and v != defaults[n]}
        if lm_eval is not None:
            protocol["lm_eval"] = ",".join(lm_eval.names)
            protocol |= {} if lm_eval.limit is None else {"limit": lm_eval.limit}
        self._run = run
        self._conditions = {
            "label": THIS_RUN,
            "fingerprint": fingerprint,
            "data": None if data is None else _source(data),
            "protocol": {**protocol, "dtype": dtype},
            "versions": library_versions(),
        }

    def add(self, point: dict[str, Any]) -> None:
        """Record one point as :func:`gisp.target.evaluate_target` returns it; figures are worth more than their record.

        A folder that cannot be written to is a warning.
        """
        structures = point_digest(self._removed_at, int(point["step"]))
        try:
            add_evaluations(self._run, [{**point, **self._conditions, STRUCTURES: structures}])
        except GispError as error:
            warnings.warn(f"the figures are not recorded: {error}", stacklevel=3)


def _source(data: str) -> str:
    """As a run records its data: files by their whole path, what else there is by its name."""
    return str(Path(data).resolve()) if Path(data).exists() else data
