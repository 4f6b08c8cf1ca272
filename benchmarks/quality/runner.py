"""One cell: a model pruned, and what it reaches at every sparsity, with and without compensation."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from benchmarks.quality.cells import DENSE, TEXT, Cell
from benchmarks.quality.distillation import Distillation
from benchmarks.quality.tasks import PreparedTask, TaskCalibration, TaskMeasures, drawn, read_tasks
from benchmarks.quality.texts import read_calibration, read_evaluation
from gisp.compensation import compensate
from gisp.config.options import make_config
from gisp.data import Sequences
from gisp.data.encode import load_tokenizer
from gisp.evaluate import perplexity
from gisp.evaluate.data import max_length
from gisp.evaluate.pairs import RequestEncoder
from gisp.model.load import load_dense, resolve_dtype
from gisp.model.structures import map_model
from gisp.run.one_shot import one_shot
from gisp.run.prune import prune

Point = dict[str, Any]
# Logits of the divergence are kept for the backward pass, float32, several times over.
_DISTILLED_LOGITS = 2**27


@dataclass(frozen=True)
class Bench:
    """What all cells of a study share.

    Attributes:
        model: folder or name of the dense decoder.
        calibration, evaluation: text or token files.
        seq_len: tokens of a calibration row.
        windows: tokens per window of the evaluation; the first one's perplexity is the main figure.
        evaluation_rows: windows evaluated, ``None`` = all.
        tasks: file of prepared tasks.
        task_rows, generated_rows: questions evaluated of each task, and of tasks that generate.
        halves: calibrate and evaluate on different rows of the tasks.
    """

    model: str
    calibration: tuple[str, ...]
    evaluation: tuple[str, ...]
    sparsities: tuple[float, ...]
    windows: tuple[int, ...] = (1024,)
    seq_len: int = 512
    evaluation_rows: int | None = None
    tasks: Path | None = None
    task_rows: int | None = None
    generated_rows: int = 0
    halves: bool = False
    device: str = "cpu"
    dtype: str | None = None

    def describe(self) -> dict[str, Any]:
        """What figures depend on, JSON-ready; paths by their last part."""
        named = {key: value for key, value in asdict(self).items() if key not in ("device", "dtype", "sparsities")}
        for key in ("calibration", "evaluation"):
            named[key] = [Path(value).name for value in named[key]]
        named |= {"model": Path(self.model).name, "windows": list(self.windows)}
        named["tasks"] = None if self.tasks is None else self.tasks.name
        return {**named, "dtype": str(resolve_dtype(self.dtype, torch.device(self.device))).removeprefix("torch.")}


class Runner:
    """Runs cells one after another in one process; model and data are read once.

    Raises:
        GispError: an unreadable model, text or task.
    """

    def __init__(self, bench: Bench) -> None:
        self.bench = bench
        self.device = torch.device(bench.device)
        self._pristine = self._load(None)
        self.vocab_size = map_model(self._pristine).vocab_size
        self.calibration = read_calibration(bench.calibration, bench.model, self.vocab_size, bench.seq_len)
        self.texts = read_evaluation(
            bench.evaluation, bench.model, self.vocab_size, bench.windows, bench.evaluation_rows
        )
        self._tasks: dict[str, PreparedTask] = {} if bench.tasks is None else read_tasks(bench.tasks)
        self.measures = None if bench.tasks is None else self._measures()

    @cached_property
    def _encoder(self) -> RequestEncoder:
        tokenizer = load_tokenizer(self.bench.model, str(self.bench.tasks))
        return RequestEncoder(tokenizer, max_length(self._pristine), self.vocab_size)

    def _measures(self) -> TaskMeasures:
        bench = self.bench
        return TaskMeasures(
            self._tasks, self._encoder, rows=bench.task_rows, generated=bench.generated_rows, halves=bench.halves
        )

    @cached_property
    def _task_calibration(self) -> TaskCalibration:
        return TaskCalibration(self._tasks, self.calibration, self._encoder, self.bench.seq_len)

    def run(self, cell: Cell) -> dict[str, Any]:
        """A cell's points, JSON-ready, or its error; of :data:`DENSE` the figures of the dense decoder."""
        started = time.perf_counter()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        try:
            found = self._dense() if cell == DENSE else {"points": list(self._points(cell))}
        except (RuntimeError, ValueError, MemoryError) as error:
            return {**cell.to_dict(), "error": " ".join(str(error).split())[:300] or type(error).__name__}
        finally:
            if self.device.type == "cuda":
                # Other processes need what this one's allocator keeps.
                torch.cuda.empty_cache()
        peak = torch.cuda.max_memory_allocated() if self.device.type == "cuda" else None
        return {**cell.to_dict(), "seconds": time.perf_counter() - started, "peak_memory_bytes": peak, **found}

    def _dense(self) -> dict[str, Any]:
        chance = self.measures.describe() if self.measures else {}
        return {**map_model(self._pristine).describe(), **chance, **self._measure(self._pristine)}

    def _points(self, cell: Cell) -> Iterator[Point]:
        options = dict(cell.options)
        data = self._calibration(cell)
        distilled = options.pop("distil", None)
        if distilled is not None:
            options["objective"] = Distillation(self._copy(options.get("dtype")), distilled)
            options["batch_size"] = max(1, _DISTILLED_LOGITS // (self.vocab_size * len(data.rows[0][0])))
        if cell.mode == "one shot":
            yield from self._one_shot(cell, data, options)
            return
        if cell.mode == "each size":
            for asked in self.bench.sparsities:
                yield from self._run(cell, data, (asked,), options)
            return
        yield from self._run(cell, data, self.bench.sparsities, options)

    def _one_shot(self, cell: Cell, data: Sequences, options: dict[str, Any]) -> Iterator[Point]:
        model = self._copy(options.get("dtype"))
        seen = sum(len(ids) for ids, _ in data.rows)
        config = make_config(one_shot=True, **options)
        began, sizes = time.perf_counter(), self.bench.sparsities
        for asked, (reached, pruned) in zip(sizes, one_shot(model, data, sizes, config), strict=True):
            yield from self._measured(cell, pruned, asked, reached, seen, time.perf_counter() - began)

    def _run(self, cell: Cell, data: Sequences, sizes: tuple[float, ...], options: dict[str, Any]) -> Iterator[Point]:
        model = self._copy(options.get("dtype"))
        began = time.perf_counter()
        trajectory = prune(model, data, sparsity=max(sizes), device=self.bench.device, **options)
        seconds = time.perf_counter() - began
        for asked in sizes:
            step = trajectory.step_for(asked)
            spent = sum(record.tokens for record in trajectory.steps[:step])
            pruned = trajectory.at(asked, model)
            share = seconds * step / len(trajectory.steps)
            yield from self._measured(cell, pruned, asked, trajectory.sparsity_at(step), spent, share)

    def _measured(
        self, cell: Cell, model: Any, asked: float, reached: float, tokens: int, seconds: float
    ) -> Iterator[Point]:
        point: Point = {"asked": asked, "sparsity": reached, "tokens": tokens, "seconds": seconds}
        yield {**point, "compensation": None, **self._measure(model)}
        for options in cell.compensate:
            began = time.perf_counter()
            done = compensate(model, drawn(self.calibration, None, cell.seed), **options)
            cost = {
                "compensation_tokens": done.seen,
                "compensation_seconds": time.perf_counter() - began,
                "compensation_told": done.describe(),
            }
            yield {**point, "compensation": options, **cost, **self._measure(model)}

    def _measure(self, model: Any) -> dict[str, Any]:
        found = {text.label: perplexity(model, text.sequences, text.window).perplexity for text in self.texts}
        tasks = self.measures(model) if self.measures else {}
        return {"perplexity": next(iter(found.values())), **found, **tasks}

    def _calibration(self, cell: Cell) -> Sequences:
        if cell.data != (TEXT,):
            return self._task_calibration.sequences(cell.data, cell.options["objective"])
        if cell.tokens is None:
            # Loops draw by their own seed.
            return self.calibration
        # Half of the set at most: seeds that draw all of it would be one seed.
        most = sum(len(ids) for ids, _ in self.calibration.rows) // 2
        return drawn(self.calibration, min(cell.tokens, most), cell.seed)

    def _copy(self, dtype: str | None) -> Any:
        """The dense model, to be changed; one of another dtype is read anew."""
        return copy.deepcopy(self._pristine) if dtype in (None, self.bench.dtype) else self._load(dtype)

    def _load(self, dtype: str | None) -> Any:
        wanted = resolve_dtype(dtype or self.bench.dtype, self.device)
        return load_dense(self.bench.model, self.device, wanted)
