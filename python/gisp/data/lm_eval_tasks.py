"""Rows of lm-eval tasks, built from lm-eval's own task definitions.

SPEC ``lm-eval:NAME[,NAME…]`` names tasks (or groups and tags) that come with lm-eval, ``lm-eval:NAME@FOLDER`` those of
a folder of task files. Several tasks take turns, so that the first rows hold all of them.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

from gisp.errors import GispError, quoted

LM_EVAL = "lm-eval:"
# Short names for lm-eval tasks: those of the LLM-Pruner line of work, which the paper reports.
NAMED_TASKS = {
    "commonsense": ("boolq", "piqa", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "openbookqa"),
}
_LOG = logging.getLogger(__name__)


def task_rows(spec: str, held_out: bool) -> Iterator[dict[str, Any]]:
    """Zero-shot rows of the tasks of a SPEC, see :func:`gisp.data.read_rows`.

    Multiple choice becomes ``context``/``choices``/``answer``, with ``contexts`` where the choices are contexts of one
    continuation (winogrande); generation and log-likelihood tasks become ``prompt``/``completion``, rolling
    log-likelihood becomes ``text``. What is scored begins with the task's delimiter.

    Args:
        held_out: the split lm-eval evaluates on instead of the training split. A task without a training split
            gives its validation or test split, and a warning says so.

    Raises:
        GispError: lm-eval is missing, a task is unknown, its data cannot be loaded, or a row has no sound answer.
    """
    names, folder = _parse(spec)
    tasks = _load(names, folder)
    streams = [_rows_of(name, task, held_out) for name, task in tasks.items()]
    end = object()
    yield from (row for row in chain.from_iterable(zip_longest(*streams, fillvalue=end)) if row is not end)


def _parse(spec: str) -> tuple[list[str], str | None]:
    listed, at, folder = spec.removeprefix(LM_EVAL).partition("@")
    names = [name.strip() for name in listed.split(",")]
    if not all(names) or (at and not folder):
        raise GispError(f"data {quoted(spec)} names no task: give {LM_EVAL}NAME[,NAME] or {LM_EVAL}NAME@FOLDER")
    return [known for name in names for known in NAMED_TASKS.get(name, (name,))], folder or None


def _load(names: list[str], folder: str | None) -> dict[str, Any]:
    """Leaf tasks by name, with their data."""
    try:
        from lm_eval.tasks import TaskManager
    except ImportError:
        raise GispError(f"{LM_EVAL}{','.join(names)} needs lm-eval: pip install 'gisp[eval]'") from None
    if folder is not None and not Path(folder).is_dir():
        raise GispError(f"{folder} is not a folder of lm-eval task files: give {LM_EVAL}NAME@FOLDER")
    manager = TaskManager(include_path=folder, include_defaults=folder is None)
    unknown = next((name for name in names if name not in manager.task_index), None)
    if unknown is not None:
        raise GispError(
            f"lm-eval has no task {quoted(unknown)}{f' in {folder}' if folder else ''}: see lm-eval ls tasks"
        )
    tasks: dict[str, Any] = {}
    for name in names:
        try:
            tasks |= manager.load([name])["tasks"]
        except Exception as error:  # network, hub, template and format failures have no common type
            raise GispError(f"lm-eval task {name} cannot be loaded: {' '.join(str(error).split())[:200]}") from None
    return tasks


def _rows_of(name: str, task: Any, held_out: bool) -> Iterator[dict[str, Any]]:
    for number, doc in enumerate(_docs(name, task, held_out)):
        try:
            row = _row(task, doc)
        except Exception as error:  # templates and a task's functions raise what they like
            reason = " ".join(str(error).split())[:200]
            raise GispError(f"lm-eval task {name}: document {number} gives no row: {reason}") from None
        yield {"task": name, **row}


def _docs(name: str, task: Any, held_out: bool) -> Any:
    if held_out:
        return task.eval_docs
    if task.has_training_docs():
        return task.training_docs()
    split = "validation" if task.has_validation_docs() else "test"
    _LOG.warning("lm-eval task %s has no training split: its %s split is taken, do not evaluate on it", name, split)
    return task.validation_docs() if split == "validation" else task.test_docs()


def _row(task: Any, doc: dict[str, Any]) -> dict[str, Any]:
    kind, text, target = task.OUTPUT_TYPE, task.doc_to_text(doc), task.doc_to_target(doc)
    delimiter = str(task.config.target_delimiter)
    if kind == "loglikelihood_rolling":
        return {"text": str(target)}
    before, prefix = task.resolve_field(doc, task.config.description) or "", task.doc_to_prefix(doc)
    if kind == "multiple_choice":
        choices = [str(choice) for choice in task.doc_to_choice(doc)]
        if isinstance(text, int):
            # Several inputs: the choices are contexts, the text is the number of the right one, the target follows all.
            contexts = [before + _opened(choice, prefix, "") for choice in choices]
            return {"contexts": contexts, "choices": [f"{delimiter}{target}"] * len(choices), "answer": text}
        answers = [f"{delimiter}{choice}" for choice in choices]
        context = before + _opened(text, prefix, delimiter)
        return {"context": context, "choices": answers, "delimiter": delimiter, "answer": _index(target, choices)}
    first = target[0] if isinstance(target, list) else target
    return {"prompt": before + _opened(text, prefix, delimiter), "completion": f"{delimiter}{first}"}


def _opened(text: str, prefix: str | None, delimiter: str) -> str:
    """A prompt with the words the task opens its answer with."""
    if not prefix:
        return text
    return text + ("" if not text or text[-1].isspace() or prefix[0].isspace() else delimiter) + prefix


def _index(gold: Any, choices: list[str]) -> int:
    """Number of the gold choice, from its number or its text; the first of several."""
    if isinstance(gold, (list, tuple)):
        gold = gold[0]
    if isinstance(gold, str):
        gold = choices.index(gold) if gold in choices else int(gold)
    if not 0 <= int(gold) < len(choices):
        raise ValueError(f"answer {gold} is none of {len(choices)} choices")
    return int(gold)
