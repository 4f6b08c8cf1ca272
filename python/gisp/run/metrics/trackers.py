"""The figures of every step to TensorBoard, Weights & Biases or Trackio, through the library's own writer."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gisp.errors import GispError

if TYPE_CHECKING:
    from gisp.run.trajectory import StepRecord

LOGGERS = ("tensorboard", "wandb", "trackio")
_PROJECT = "gisp"
_Write = Callable[[dict[str, float], int], None]


def check_log(name: str) -> None:
    """Refuse a library that is not known or not installed, before anything slow happens.

    Raises:
        GispError: names the library.
    """
    if name not in LOGGERS:
        raise GispError(f"--log is {name!r}: choose one of {', '.join(LOGGERS)}")
    if importlib.util.find_spec(name) is None:
        raise GispError(f"--log {name} needs {name}: pip install 'gisp[{name}]', or leave it out")


@contextmanager
def logged(name: str | None, out: Path) -> Iterator[Callable[[StepRecord, int], None] | None]:
    """What takes the records of the steps of a run (``on_step`` of :func:`gisp.prune`); ``None`` for no log.

    TensorBoard's files go to ``out``/tensorboard; the others take the name of ``out`` as that of the run, in a project
    ``gisp``. Nothing is opened before the first step is done.

    Args:
        name: one of :data:`LOGGERS`.
    """
    opened: list[tuple[_Write, Callable[[], Any]]] = []

    def on_step(record: StepRecord, _steps: int) -> None:
        if not opened:
            opened.append(_tensorboard(out) if name == "tensorboard" else _tracked(str(name), out))
        opened[0][0](figures(record), record.step)

    try:
        yield None if name is None else on_step
    finally:
        for _, close in opened:
            close()


def figures(record: StepRecord) -> dict[str, float]:
    """The figures of a step by name, without its number."""
    values: dict[str, float] = {key: value for key, value in asdict(record).items() if key != "step"}
    return {**values, "tokens_per_second": record.tokens / max(record.seconds, 1e-9)}


def _tensorboard(out: Path) -> tuple[_Write, Callable[[], Any]]:
    from torch.utils.tensorboard import SummaryWriter

    writer: Any = SummaryWriter(str(out / "tensorboard"))

    def write(values: dict[str, float], step: int) -> None:
        for key, value in values.items():
            writer.add_scalar(key, value, step)

    return write, writer.close


def _tracked(name: str, out: Path) -> tuple[_Write, Callable[[], Any]]:
    # Trackio has the interface of wandb.
    library: Any = importlib.import_module(name)
    library.init(project=_PROJECT, name=out.name)
    return lambda values, step: library.log(values, step=step), library.finish
