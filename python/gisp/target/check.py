"""What a path names and whether it has the asked points, found without torch: bad input is refused at once."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gisp.compensation.request import CompensationRequest
from gisp.errors import GispError
from gisp.export.nested.place import RECORD as NESTED
from gisp.export.nested.place import is_nested
from gisp.model.paths import check_model_path
from gisp.run.record import RECORD, load_json, read_record
from gisp.select.schedule import goal_of, nearest_step


def is_run(target: str) -> bool:
    """Whether a path is a run folder (or a folder that is no model either, so the error speaks of runs)."""
    path = Path(target)
    return path.is_dir() and ((path / RECORD).exists() or not (path / "config.json").exists())


def run_points(folder: Path) -> tuple[list[float], float | None]:
    """Sparsity of the dense model and after every step of a run, and its goal once it is reached.

    Raises:
        GispError: no run there, or a corrupt one.
    """
    record = read_record(folder)
    points = [0.0, *(float(step["sparsity"]) for step in record["steps"])]
    return points, goal_of(record["config"], len(record["steps"]))


def _nested_points(folder: Path) -> tuple[list[float], float | None]:
    """The same of a nested checkpoint; nothing where its record is not sound, which is refused where it is opened."""
    with contextlib.suppress(GispError, KeyError, TypeError, ValueError):
        record = load_json(folder / NESTED)
        points = [float(step["sparsity"]) for step in record["steps"]]
        return points, goal_of(record["run"]["config"], len(points) - 1)
    return [], None


def check_target(target: str, sparsity: float | None = None, given: str = "sparsity is") -> None:
    """Refuse a path that names neither model, nested checkpoint nor run, or has no such point.

    Args:
        given: begins the error about a sparsity, which goes on with its value.

    Raises:
        GispError: names the path or the sparsity.
    """
    points: Sequence[float] = ()
    goal = None
    if is_run(target):
        points, goal = run_points(Path(target))
    elif is_nested(target):
        points, goal = _nested_points(Path(target))
    elif sparsity is not None:
        raise GispError(
            f"--sparsity {sparsity} needs a run folder or a nested checkpoint, {target} is a model: leave it out"
        )
    else:
        check_model_path(target)
    if sparsity is not None and points:
        nearest_step(points, sparsity, given, goal)


def check_run(folder: Path, sparsity: float | None = None) -> None:
    """Refuse a folder that holds no run, or none that has such a point.

    Raises:
        GispError: names the folder or the sparsity.
    """
    points, goal = run_points(folder)
    if sparsity is not None:
        nearest_step(points, sparsity, goal=goal)


def check_along(target: str, sparsities: Sequence[Any] = ()) -> None:
    """Refuse a path that holds one size only, or lacks one of these points.

    Raises:
        GispError: names the path or the sparsity.
    """
    if not is_run(target) and not is_nested(target):
        check_model_path(target)
        raise GispError(f"--sparsities needs a run folder or a nested checkpoint, {target} is a model: leave it out")
    for sparsity in sparsities:
        check_target(target, sparsity, "--sparsities holds")


def check_stages(
    stages: int, lm_eval: object, compensation: CompensationRequest | None, offload: bool, generate: bool
) -> None:
    """Refuse what needs the whole model in one process, where its layers are split.

    Args:
        lm_eval, compensation: ``None`` where none is asked for.

    Raises:
        GispError: names the option.
    """
    if stages > 1 and compensation is not None:
        compensation.options.check_stages(stages)
    asked = {"--offload": offload, "--lm-eval": lm_eval, "--generate": generate}
    given = next((name for name, value in asked.items() if value), None)
    if stages > 1 and given:
        instead = "leave one out" if offload else "give --offload in place of --stages"
        raise GispError(f"--stages {stages} splits the model over processes, {given} needs all of it: {instead}")
