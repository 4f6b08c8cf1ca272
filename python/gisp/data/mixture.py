"""Mixtures: several tasks in one sweep, the loss the weighted sum of their own.

::

    tokens: 200000          # for all tasks together, split evenly; a task's own tokens or samples override its share
    tasks:
      - {data: piqa.jsonl, objective: margin, weight: 1.0, tokens: 50000}
      - {data: wiki.txt, objective: lm, weight: 0.5, samples: 100, seq_len: 256}

``data`` is any SPEC but a mixture, paths relative to the file. Weights are divided by their sum.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from gisp.config.declare import LARGEST
from gisp.config.options import OBJECTIVES
from gisp.data.lm_eval_tasks import LM_EVAL
from gisp.errors import GispError, quoted
from gisp.files import check_names

if TYPE_CHECKING:
    from gisp.data.sequences import Sequences

MIXTURE_FILES = (".yaml", ".yml")
_TASK_KEYS = ("data", "objective", "weight", "tokens", "samples", "seq_len")
_KEYS = ("tasks", "tokens")
# Seeds of the tasks' shuffles lie this far apart, so that no two tasks are shuffled alike.
_SEED_STRIDE = 1_000_003


@dataclass(frozen=True)
class Entry:
    """A task as the file of a mixture lists it.

    Attributes:
        data: its SPEC; paths are relative to the working folder.
        objective: its own, or the run's.
        weight: its share of the loss, in whatever unit; above 0.
        tokens, samples: how much of it is taken; ``None`` = all.
        seq_len: its longest sequence; ``None`` = the run's.
    """

    data: str
    objective: str
    weight: float
    tokens: int | None
    samples: int | None
    seq_len: int | None

    def sample(self, sequences: Sequences, number: int, seed: int) -> Sequences:
        """What of its sequences the task takes: all, or a limited number of examples in a seeded random order.

        As many are taken as fit into its tokens (at least one), and no more than its samples.

        Args:
            number: place of the task in the mixture.
        """
        if self.tokens is None and self.samples is None:
            return sequences
        import torch

        generator = torch.Generator().manual_seed(seed * _SEED_STRIDE + number)
        order = torch.randperm(len(sequences.examples), generator=generator).tolist()[: self.samples]
        if self.tokens is not None:
            lengths = (sum(len(sequences.rows[i][0]) for i in sequences.examples[example]) for example in order)
            fitting = sum(spent <= self.tokens for spent in accumulate(lengths))
            order = order[: max(1, fitting)]
        return sequences.chosen(order)


def read_mixture(path: Path, objective: str) -> list[Entry]:
    """The tasks of a mixture's file.

    Args:
        objective: of tasks that name none.

    Raises:
        GispError: the file or one of its tasks is not sound.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise GispError(f"cannot read mixture {path}: {error.strerror or error}") from None
    except (yaml.YAMLError, ValueError, TypeError, AttributeError, ArithmeticError, RecursionError) as error:
        # Values that look like dates or numbers and are none fail in their own ways.
        raise GispError(f"mixture {path} is not valid YAML: {' '.join(str(error).split())[:200]}") from None
    listed = content.get("tasks") if isinstance(content, dict) else None
    if not isinstance(listed, list) or not listed:
        raise GispError(f"mixture {path} lists no tasks: give tasks: [{{data: SPEC, objective: lm, weight: 1.0}}, …]")
    _check_keys(content, _KEYS, str(path))
    budget = _count(content, "tokens", str(path), 1)
    if budget is not None and budget < len(listed):
        raise GispError(f"{path}: tokens is {budget} for {len(listed)} tasks: give more")
    share = None if budget is None else budget // len(listed)
    entries = [_task(item, path, f"{path} task {number}", objective, share) for number, item in enumerate(listed, 1)]
    total = sum(entry.weight for entry in entries)
    if not all(0 < entry.weight / total <= 1 for entry in entries):
        given = ", ".join(f"{entry.weight:g}" for entry in entries)
        raise GispError(f"{path}: weights {given} leave a task no share of the loss: give weights of similar size")
    return entries


def _task(item: Any, path: Path, where: str, objective: str, share: int | None) -> Entry:
    if not isinstance(item, dict) or not isinstance(item.get("data"), str) or not item["data"]:
        raise GispError(f"{where} is {quoted(item)}: give it data, a file or the name of a dataset")
    _check_keys(item, _TASK_KEYS, where)
    own = item.get("objective", objective)
    if not isinstance(own, str) or own not in OBJECTIVES:
        raise GispError(f"{where} has objective {quoted(own)}: choose one of {', '.join(OBJECTIVES)}")
    weight = item.get("weight", 1.0)
    if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 < weight <= sys.float_info.max:
        raise GispError(f"{where} has weight {quoted(weight)}: give a finite number above 0")
    tokens, samples = (_count(item, key, where, 1) for key in ("tokens", "samples"))
    if tokens is None and samples is None:
        tokens = share
    return Entry(
        data=_located(item["data"], path, where),
        objective=own,
        weight=float(weight),
        tokens=tokens,
        samples=samples,
        seq_len=_count(item, "seq_len", where, 2),
    )


def _located(data: str, path: Path, where: str) -> str:
    """A task's SPEC with paths relative to the mixture's folder made paths from here."""
    if Path(data).suffix in MIXTURE_FILES:
        raise GispError(f"{where} has data {data}: a mixture holds no mixtures, list its tasks here")
    if data.startswith(LM_EVAL):
        names, at, folder = data.partition("@")
        return f"{names}@{path.parent / folder}" if at else data
    check_names(data, f"{where}: data")
    beside = path.parent / data
    # A file that is missing is looked for, and reported, where it should be; anything else may be a dataset's name.
    return str(beside) if beside.exists() or beside.suffix else data


def _check_keys(given: dict[Any, Any], known: tuple[str, ...], where: str) -> None:
    unknown = next((key for key in given if key not in known), None)
    if unknown is not None:
        raise GispError(f"{where} has {quoted(unknown)}: choose among {', '.join(known)}")


def _count(given: dict[Any, Any], key: str, where: str, least: int) -> int | None:
    value = given.get(key)
    if value is not None and (type(value) is not int or not least <= value <= LARGEST):
        raise GispError(f"{where} has {key} {quoted(value)}: give a whole number from {least} to {LARGEST}")
    return value
