"""Evaluating a model that is in memory, as it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from gisp.config.evaluation import EvalOptions, LmEvalTasks, options_of
from gisp.errors import GispError, quoted
from gisp.evaluate.data import Measure, Measures, prepare
from gisp.evaluate.harness import Harness
from gisp.evaluate.staged_loss import StagedLoss
from gisp.files import as_text
from gisp.model.modes import default_device
from gisp.progress import reporting


@default_device()
@reporting(None)
def evaluate_model(
    model: nn.Module,
    data: str | Path | None = None,
    *,
    window: int | None = None,
    options: EvalOptions | None = None,
    lm_eval: LmEvalTasks | None = None,
    tokenizer_from: str | Path | None = None,
) -> dict[str, Any]:
    """Figures of a causal language model in memory, dense or pruned, where it lies and in its dtype.

    Args:
        data: evaluation data; its rows decide what is measured (:func:`gisp.evaluate.data.prepare`).
        window: short for ``options=EvalOptions(window=...)``.
        lm_eval: tasks to run beside ``data``, or instead.
        tokenizer_from: model folder or name whose tokenizer reads text; ``None``: where the model was loaded from.

    Returns:
        What was measured, as :func:`gisp.target.evaluate_target` names it.

    Raises:
        GispError: no model, unreadable data, nothing to measure, or options that do not belong together.
    """
    if not isinstance(model, nn.Module):
        raise GispError(f"model is {quoted(model)}: give a model, gisp.target.evaluate_target takes a path")
    spec = None if data is None else as_text(data, "data")
    source = getattr(model, "name_or_path", "") if tokenizer_from is None else as_text(tokenizer_from, "tokenizer_from")
    return prepare_measures(spec, lm_eval, options_of(options, window), model, source or None)(model)


def prepare_measures(
    data: str | None,
    lm_eval: LmEvalTasks | None,
    options: EvalOptions,
    model: Any,
    tokenizer_from: str | None,
    parts: StagedLoss | None = None,
) -> Measure:
    """What to measure on data and on lm-eval tasks; arguments as of :func:`gisp.evaluate.data.prepare`.

    Raises:
        GispError: neither is given, or as :func:`gisp.evaluate.data.prepare` and :class:`Harness`.
    """
    check_given(data, lm_eval)
    # The harness checks its names first: reading data may take long.
    harness = None if lm_eval is None else Harness(lm_eval, tokenizer_from)
    prepared = None if data is None else prepare(data, options, model, tokenizer_from, parts)
    return Measures(tuple(measure for measure in (prepared, harness) if measure is not None))


def check_given(data: str | None, lm_eval: LmEvalTasks | None) -> None:
    """Refuse an evaluation of nothing.

    Raises:
        GispError: neither data nor tasks are given.
    """
    if data is None and lm_eval is None:
        raise GispError("nothing to measure: give --data SPEC or --lm-eval TASKS")
