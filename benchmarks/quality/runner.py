"""One cell: a fresh model pruned, and its perplexity (or accuracy) at every sparsity, with and without compensation."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from benchmarks.decoders.decoder import Decoder
from benchmarks.quality.cells import Cell
from benchmarks.quality.choices import TASKS, ChoiceTask
from benchmarks.quality.distillation import Distillation
from gisp.compensation import compensate
from gisp.config.options import CHOOSING, make_config
from gisp.data import Sequences, load_sequences
from gisp.evaluate import perplexity
from gisp.evaluate.choices import ChoiceAccuracy, Question
from gisp.model.load import load_dense, resolve_dtype
from gisp.model.structures import map_model
from gisp.run.one_shot import one_shot
from gisp.run.prune import prune

Point = dict[str, Any]


@dataclass(frozen=True)
class Bench:
    """What all cells of a study share.

    Attributes:
        window: tokens per window of the evaluation.
        evaluation_rows: rows evaluated, ``None`` = all.
    """

    decoder: Decoder
    sparsities: tuple[float, ...]
    window: int
    evaluation_rows: int | None
    device: str
    dtype: str | None = None


class Runner:
    """Runs cells one after another in one process; the data is read once."""

    def __init__(self, bench: Bench) -> None:
        self.bench = bench
        self.device = torch.device(bench.device)
        model = self._load(None)
        vocab_size = map_model(model).vocab_size
        self.calibration = read_tokens(bench.decoder.calibration, vocab_size)
        self.evaluation = read_tokens(bench.decoder.evaluation, vocab_size, bench.evaluation_rows)

    @cached_property
    def tasks(self) -> dict[str, ChoiceTask]:
        """The choice tasks; studies without them need not make them."""
        return {name: ChoiceTask(name, self.calibration) for name in TASKS}

    @cached_property
    def questions(self) -> dict[str, list[Question]]:
        """Questions on the evaluation text by task, of the tasks it has any of."""
        questions = {name: task.questions(self.evaluation) for name, task in self.tasks.items()}
        return {name: found for name, found in questions.items() if found}

    def dense(self, *, choices: bool) -> dict[str, Any]:
        """Figures of the dense decoder, those of the choice tasks too where they are asked for."""
        model = self._load(None)
        found = {**map_model(model).describe(), **self._measure(model)}
        if choices:
            found |= self._choices(model)
            found |= {f"acc {name} by pairs": self.tasks[name].by_pairs(self.evaluation) for name in self.questions}
        return found

    def run(self, cell: Cell) -> dict[str, Any]:
        """A cell's points, JSON-ready; an error becomes the cell's result."""
        started = time.perf_counter()
        try:
            points = list(self._points(cell))
        except (RuntimeError, ValueError) as error:
            return {**cell.to_dict(), "error": " ".join(str(error).split())[:300]}
        finally:
            if self.device.type == "cuda":
                # Other processes need what this one's allocator keeps.
                torch.cuda.empty_cache()
        return {**cell.to_dict(), "seconds": time.perf_counter() - started, "points": points}

    def _points(self, cell: Cell) -> Iterator[Point]:
        options = dict(cell.options)
        model = self._load(options.get("dtype"))
        data = self._calibration(cell, options.pop("data", "text"))
        distilled = options.pop("distil", None)
        if distilled is not None:
            options["objective"] = Distillation(self._load(options.get("dtype")), distilled)
        began = time.perf_counter()
        if cell.one_shot:
            seen = sum(len(ids) for ids, _ in data.rows)
            config = make_config(one_shot=True, **options)
            for asked, (reached, pruned) in zip(
                self.bench.sparsities, one_shot(model, data, self.bench.sparsities, config), strict=True
            ):
                yield from self._compensated(cell, pruned, asked, reached, seen, time.perf_counter() - began)
            return
        trajectory = prune(model, data, sparsity=max(self.bench.sparsities), device=self.bench.device, **options)
        seconds = time.perf_counter() - began
        for asked in self.bench.sparsities:
            step = trajectory.step_for(asked)
            spent = sum(record.tokens for record in trajectory.steps[:step])
            pruned = trajectory.at(asked, model)
            share = seconds * step / len(trajectory.steps)
            yield from self._compensated(cell, pruned, asked, trajectory.sparsity_at(step), spent, share)

    def _compensated(
        self, cell: Cell, model: Any, asked: float, reached: float, tokens: int, seconds: float
    ) -> Iterator[Point]:
        point: Point = {"asked": asked, "sparsity": reached, "tokens": tokens, "seconds": seconds}
        yield {**point, "compensation": None, **self._measure(model, cell)}
        for options in cell.compensate:
            began = time.perf_counter()
            done = compensate(model, drawn(self.calibration, None, cell.seed), **options)
            cost = {
                "compensation_tokens": done.tokens + sum(step.tokens for step in done.steps),
                "compensation_seconds": time.perf_counter() - began,
            }
            yield {**point, "compensation": options, **cost, **self._measure(model, cell)}

    def _measure(self, model: Any, cell: Cell | None = None) -> dict[str, Any]:
        found: dict[str, Any] = {"perplexity": perplexity(model, self.evaluation, self.bench.window).perplexity}
        if cell is not None and cell.study == "task":
            found |= self._choices(model)
        return found

    def _choices(self, model: Any) -> dict[str, Any]:
        """Accuracy of every choice task, its standard error and the number of questions."""
        found: dict[str, Any] = {}
        for task, questions in self.questions.items():
            result = ChoiceAccuracy(questions, self.bench.window)(model)
            found |= {f"acc {task}": result["acc"], f"acc {task} stderr": result["acc_stderr"]}
            found[f"questions {task}"] = len(questions)
        return found

    def _calibration(self, cell: Cell, kind: str) -> Sequences:
        if kind == "text":
            if cell.tokens is None:
                # Loops draw by their own seed.
                return self.calibration
            # Half of the set at most: seeds that draw all of it would be one seed.
            most = sum(len(ids) for ids, _ in self.calibration.rows) // 2
            return drawn(self.calibration, min(cell.tokens, most), cell.seed)
        task = self.tasks[kind]
        return (task.examples if cell.options.get("objective") in CHOOSING else task.right_ones)(self.calibration)

    def _load(self, dtype: str | None) -> Any:
        wanted = resolve_dtype(dtype or self.bench.dtype, self.device)
        return load_dense(str(self.bench.decoder.path), self.device, wanted)


def read_tokens(path: Path, vocab_size: int, rows: int | None = None) -> Sequences:
    """A token file, its first rows."""
    return load_sequences(str(path), vocab_size=vocab_size, seq_len=None).first(rows)


def drawn(data: Sequences, tokens: int | None, seed: int) -> Sequences:
    """Rows of about ``tokens`` tokens in all, drawn by the seed; all rows in the seed's order for ``None``."""
    order = torch.randperm(len(data.rows), generator=torch.Generator().manual_seed(1000 + seed)).tolist()
    count = len(order) if tokens is None else max(1, tokens // len(data.rows[0][0]))
    return Sequences.plain([data.rows[i] for i in order[:count]])
