"""Tasks prepared by ``benchmarks.quality.prepare``: what is measured on them, and calibration rows from them."""

from __future__ import annotations

import json
import lzma
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from benchmarks.quality.answers import Extraction, GeneratedAnswers
from gisp.data import Sequences, Task
from gisp.data.rows import kind_of_rows
from gisp.data.tokenise import tokenise
from gisp.errors import GispError
from gisp.evaluate.choices import ChoiceAccuracy, read_question
from gisp.evaluate.pairs import RequestEncoder

FORMAT = 1
METRICS = ("acc", "acc_norm")
TEXT = "text"

Row = dict[str, Any]


@dataclass(frozen=True)
class PreparedTask:
    """Rows of one task.

    Attributes:
        rows: what lm-eval asks, in its order: ``context``/``choices``/``answer`` and its forms, or ``prompt`` and
            ``target`` of a task that generates.
        train: rows of a training split, to calibrate on; empty where there is none.
        generation: of a task that generates ``until``, ``max_new_tokens`` and how answers are compared.
    """

    rows: tuple[Row, ...]
    train: tuple[Row, ...] = ()
    generation: dict[str, Any] | None = None

    @property
    def calibration(self) -> tuple[Row, ...]:
        """The training split, or the first half of the rows."""
        return self.train or self.rows[: len(self.rows) // 2]

    @property
    def held_out(self) -> tuple[Row, ...]:
        """What calibration has not seen."""
        return self.rows if self.train else self.rows[len(self.rows) // 2 :]


def write_tasks(path: Path, tasks: dict[str, PreparedTask]) -> None:
    """Write prepared tasks, compressed for a name that ends in ``.xz``."""
    made = {name: {"rows": t.rows, "train": t.train, "generation": t.generation} for name, t in tasks.items()}
    data = json.dumps({"format": FORMAT, "tasks": made}, ensure_ascii=False).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(lzma.compress(data) if path.suffix == ".xz" else data)


def read_tasks(path: Path) -> dict[str, PreparedTask]:
    """Prepared tasks by name.

    Raises:
        GispError: no such file, or one of another form.
    """
    try:
        data = path.read_bytes()
        found = json.loads(lzma.decompress(data) if path.suffix == ".xz" else data)
        if found["format"] != FORMAT:
            raise ValueError(f"format {found['format']!r}")
        return {
            name: PreparedTask(tuple(task["rows"]), tuple(task["train"]), task["generation"])
            for name, task in found["tasks"].items()
        }
    except (OSError, lzma.LZMAError, ValueError, KeyError, TypeError) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())[:120]
        raise GispError(
            f"{path} holds no prepared tasks ({reason}): make them with benchmarks.quality.prepare"
        ) from None


class TaskMeasures:
    """Accuracy on prepared tasks, tokenised once for any number of models of one tokenizer.

    Args:
        rows: questions of each task, the first ones; ``None`` = all.
        generated: the same of tasks that generate; 0 leaves them out.
        halves: measure on rows that :class:`TaskCalibration` does not use.
    """

    def __init__(
        self,
        tasks: dict[str, PreparedTask],
        encoder: RequestEncoder,
        *,
        rows: int | None,
        generated: int,
        halves: bool,
    ) -> None:
        self.chance: dict[str, float] = {}
        self._choices: dict[str, ChoiceAccuracy] = {}
        self._answers: dict[str, GeneratedAnswers] = {}
        for name, task in tasks.items():
            asked = list(islice(task.held_out if halves else task.rows, generated if task.generation else rows))
            if not asked:
                continue
            if task.generation:
                self.chance[name] = 0.0
                self._answers[name] = GeneratedAnswers(asked, encoder, Extraction(**task.generation), name)
                continue
            questions = [read_question(row, encoder, f"{name}: row {number}") for number, row in enumerate(asked)]
            self.chance[name] = statistics.mean(1 / len(question.requests) for question in questions)
            self._choices[name] = ChoiceAccuracy(questions, encoder.max_length)

    def __call__(self, model: Any) -> dict[str, float]:
        """``acc TASK`` of every task, ``acc_norm TASK`` of choices, and ``lead kept`` with :meth:`lead`'s help."""
        found: dict[str, float] = {}
        for name, measure in self._choices.items():
            values = measure(model)
            found |= {f"{metric} {name}": values[metric] for metric in METRICS}
            found[f"acc {name} stderr"] = values["acc_stderr"]
        for name, answers in self._answers.items():
            found |= {f"{metric} {name}": value for metric, value in answers(model).items()}
        return found

    def describe(self) -> dict[str, float]:
        """``chance TASK``: accuracy of guessing."""
        return {f"chance {name}": value for name, value in self.chance.items()}


class TaskCalibration:
    """Calibration sequences from tasks, and from text beside them.

    Args:
        text: the calibration text.
    """

    def __init__(self, tasks: dict[str, PreparedTask], text: Sequences, encoder: RequestEncoder, seq_len: int) -> None:
        self._tasks, self._text, self._encoder, self._seq_len = tasks, text, encoder, seq_len
        self._made: dict[tuple[str, str], Sequences] = {}

    def sequences(self, names: Sequence[str], objective: str) -> Sequences:
        """A mixture of equal shares of the tasks; ``text`` among the names has half of it, under objective ``lm``.

        Raises:
            GispError: a task that was not prepared.
        """
        tasks = [name for name in names if name != TEXT]
        missing = next((name for name in tasks if name not in self._tasks), None)
        if missing is not None:
            raise GispError(f"task {missing} is not among the prepared ones: {', '.join(self._tasks) or 'none'}")
        share = (0.5 if TEXT in names else 1.0) / max(1, len(tasks))
        parts = [(name, objective, share, self._of(name, objective)) for name in tasks]
        if TEXT in names:
            parts.append((TEXT, "lm", 1 - share * len(tasks), self._text))
        return Sequences.mixture(
            [(Task(name, own, weight, len(data.examples)), data) for name, own, weight, data in parts]
        )

    def _of(self, name: str, objective: str) -> Sequences:
        if (name, objective) not in self._made:
            rows = list(self._tasks[name].calibration)
            kind = kind_of_rows(rows, name)
            self._made[name, objective] = tokenise(rows, kind, self._encoder, self._seq_len, objective, name)
        return self._made[name, objective]


def drawn(data: Sequences, tokens: int | None, seed: int) -> Sequences:
    """Rows of about ``tokens`` tokens in all, drawn by the seed; all rows in the seed's order for ``None``."""
    order = torch.randperm(len(data.rows), generator=torch.Generator().manual_seed(1000 + seed)).tolist()
    count = len(order) if tokens is None else max(1, tokens // len(data.rows[0][0]))
    return Sequences.plain([data.rows[i] for i in order[:count]])
