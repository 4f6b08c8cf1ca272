"""Token sequences grouped into examples, and the weight of each in the loss."""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, islice, pairwise
from pathlib import Path

import torch

from gisp.data.lm_eval_tasks import LM_EVAL
from gisp.errors import GispError

Row = tuple[torch.Tensor, torch.Tensor]
# Label of a token that is not scored.
IGNORED = -100


@dataclass(frozen=True)
class Task:
    """The examples of one task of a mixture, consecutive ones.

    Attributes:
        name: SPEC of the task.
        objective: its objective.
        weight: its share of the loss; the shares of a mixture sum to 1.
        examples: how many examples it has.
    """

    name: str
    objective: str
    weight: float
    examples: int


@dataclass(frozen=True, repr=False)
class Sequences:
    """Token sequences of any lengths, grouped into examples.

    Attributes:
        rows: per sequence (input_ids int64 [S], labels int64 [S], -100 = not scored).
        signs: per sequence +1, or -1 for a wrong answer of a choice example.
        examples: per example the sequence numbers it holds (the pieces of a row, or the gold and the wrong answers of
            a choice).
        tasks: those of a mixture, in the order of their examples; empty where there is one task.
        compared: objective ``choice``, of the only task: an example's answers are compared with one another.
        kinds: per example the kind of text it is of, by name; empty where all are of one. It changes no loss and no
            digest: it says which held-out text is watched by itself.
    """

    rows: tuple[Row, ...]
    signs: tuple[int, ...]
    examples: tuple[tuple[int, ...], ...]
    tasks: tuple[Task, ...] = ()
    compared: bool = False
    kinds: tuple[str, ...] = ()

    def __repr__(self) -> str:
        tokens = sum(len(ids) for ids, _ in self.rows)
        tasks = f", {len(self.tasks)} tasks" if self.tasks else ""
        return f"<Sequences: {len(self.rows):,} of {tokens:,} tokens, {len(self.examples):,} examples{tasks}>"

    @classmethod
    def plain(cls, rows: list[Row]) -> Sequences:
        """One example per sequence."""
        return cls.grouped([[row] for row in rows])

    @classmethod
    def grouped(
        cls,
        groups: Sequence[Sequence[Row]],
        signs: Sequence[int] | None = None,
        compared: bool = False,
        kinds: Sequence[str] = (),
    ) -> Sequences:
        """The sequences of one example after the other; every sign is +1 where none are given."""
        rows = tuple(row for group in groups for row in group)
        ends = accumulate(map(len, groups), initial=0)
        examples = tuple(tuple(range(start, end)) for start, end in pairwise(ends))
        return cls(
            rows, (1,) * len(rows) if signs is None else tuple(signs), examples, compared=compared, kinds=tuple(kinds)
        )

    @classmethod
    def mixture(cls, tasks: Sequence[tuple[Task, Sequences]]) -> Sequences:
        """Tasks one after the other; each task's ``examples`` must be the number of its sequences' examples.

        A task is a kind of text, where its sequences do not name their own.
        """
        rows: list[Row] = []
        signs: list[int] = []
        examples: list[tuple[int, ...]] = []
        kinds: list[str] = []
        names = [task.name for task, _ in tasks]
        for name, (_, own) in zip(short_names(names), tasks, strict=True):
            kinds += own.kinds or [name] * len(own.examples)
            examples += [tuple(len(rows) + number for number in example) for example in own.examples]
            rows += own.rows
            signs += own.signs
        return cls(tuple(rows), tuple(signs), tuple(examples), tuple(task for task, _ in tasks), kinds=tuple(kinds))

    def checked(self, vocab_size: int) -> Sequences:
        """Itself, where it holds what its attributes say.

        Raises:
            GispError: nothing to score, tensors of other types or shapes, tokens outside the vocabulary.
        """
        numbers = sorted(number for example in self.examples for number in example)
        if not self.rows or numbers != list(range(len(self.rows))) or len(self.signs) != len(self.rows):
            raise GispError(
                f"Sequences of {len(self.rows)} rows have {len(self.signs)} signs and examples of {len(numbers)} rows: "
                "give at least one row, a sign each, and every row in one example"
            )
        for number, (ids, labels) in enumerate(self.rows):
            if ids.dtype != torch.int64 or labels.dtype != torch.int64 or ids.ndim != 1 or ids.shape != labels.shape:
                raise GispError(f"row {number} of the Sequences has no int64 ids and labels of one shape [S]")
            if len(ids) < 2 or int(ids.min()) < 0 or int(ids.max()) >= vocab_size:
                raise GispError(
                    f"row {number} of the Sequences has {len(ids)} tokens from {int(ids.min()) if len(ids) else None} "
                    f"to {int(ids.max()) if len(ids) else None}: give at least 2 below the vocabulary of {vocab_size}"
                )
        return self

    def __len__(self) -> int:
        return len(self.rows)

    def first(self, examples: int | None) -> Sequences:
        """The first examples in order, all for ``None``.

        Raises:
            GispError: of a mixture, whose first examples are all of one task.
        """
        if examples is None:
            return self
        if self.tasks:
            raise GispError(f"--samples {examples} does not go with a mixture: give its tasks samples or tokens")
        return self if examples >= len(self.examples) else self.chosen(range(examples))

    def chosen(self, examples: Sequence[int]) -> Sequences:
        """Examples by number, in the given order, without what is not chosen."""
        numbers = [self.examples[example] for example in examples]
        groups = [[self.rows[i] for i in group] for group in numbers]
        signs = [self.signs[i] for group in numbers for i in group]
        kinds = [self.kinds[example] for example in examples] if self.kinds else ()
        return Sequences.grouped(groups, signs, self.compared, kinds)

    def compares(self, example: int) -> bool:
        """Whether the answers of an example are compared with one another."""
        if not self.tasks:
            return self.compared
        return self.tasks[bisect_right(self._ends, example)].objective == "choice"

    def leaders(self, example: int) -> tuple[int, ...]:
        """For every sequence of an example the one, by its place in the example, whose pass it shares.

        Answers of one token behind the same context take one pass together where answers are compared: the model reads
        the same for all of them.
        """
        return self._leaders[example] if self.compares(example) else tuple(range(len(self.examples[example])))

    def tokens_of(self, example: int) -> int:
        """Tokens of an example that pass through the model, shared ones once."""
        own = self.examples[example]
        if self.compares(example):
            own = tuple(own[i] for i in set(self._leaders[example]))
        return sum(len(self.rows[i][0]) for i in own)

    def digest(self) -> str:
        """SHA-256 over all tokens, labels and signs, and the shares of a mixture's tasks."""
        digest = hashlib.sha256()
        for (ids, labels), sign in zip(self.rows, self.signs, strict=True):
            digest.update(f"{len(ids)},{sign};".encode())
            digest.update(ids.numpy().tobytes())
            digest.update(labels.numpy().tobytes())
        for task in self.tasks:
            digest.update(f"{task.weight!r},{task.examples};".encode())
        return digest.hexdigest()

    def batch(self, numbers: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Sequences by number as (input_ids, labels), int64 [B, S], padded on the right with token 0 and -100."""
        rows = [self.rows[i] for i in numbers]
        ids = torch.nn.utils.rnn.pad_sequence([row[0] for row in rows], batch_first=True)
        labels = torch.nn.utils.rnn.pad_sequence([row[1] for row in rows], batch_first=True, padding_value=IGNORED)
        return ids, labels

    def weights(self, examples: Sequence[int]) -> list[float]:
        """Weight in the loss of every sequence of ``examples``, in their order.

        One task: :func:`row_weights` of the batch. A mixture: the weights of the whole set, scaled by how many of its
        task's examples are in the batch (Horvitz and Thompson 1952), so that the expected loss of a random batch of
        every task is the loss of the whole mixture, also where examples hold different numbers of sequences.
        """
        if not self.tasks:
            return row_weights([self.signs[i] for example in examples for i in self.examples[example]])
        task_of = [bisect_right(self._ends, example) for example in examples]
        drawn, totals = Counter(task_of), self._signs_of_tasks
        weights = []
        for k, example in zip(task_of, examples, strict=True):
            task = self.tasks[k]
            scale = task.weight * (task.examples / drawn[k])
            weights += [scale * self.signs[i] / totals[k][self.signs[i]] for i in self.examples[example]]
        return weights

    @cached_property
    def scored(self) -> tuple[int, ...]:
        """Scored tokens of every sequence; the first one of a sequence never is."""
        return tuple(int((labels[1:] != IGNORED).sum()) for _, labels in self.rows)

    @cached_property
    def _leaders(self) -> dict[int, tuple[int, ...]]:
        """Leaders of the examples whose answers are compared."""
        compared = (number for number in range(len(self.examples)) if self.compares(number))
        return {number: _sharing([self.rows[i] for i in self.examples[number]]) for number in compared}

    @cached_property
    def _ends(self) -> list[int]:
        """Number of the example behind each task."""
        return list(accumulate(task.examples for task in self.tasks))

    @cached_property
    def _signs_of_tasks(self) -> list[Counter[int]]:
        """How many sequences of either sign each task has."""
        examples = iter(self.examples)
        return [
            Counter(self.signs[i] for example in islice(examples, task.examples) for i in example)
            for task in self.tasks
        ]


def _sharing(rows: Sequence[Row]) -> tuple[int, ...]:
    """For every row the first one that the model reads the same of, where the last token alone is scored."""
    found: dict[bytes, int] = {}
    leaders = []
    for number, (ids, labels) in enumerate(rows):
        if len(ids) < 2 or int((labels != IGNORED).sum()) != 1 or int(labels[-1]) == IGNORED:
            leaders.append(number)
        else:
            leaders.append(found.setdefault(ids[:-1].numpy().tobytes(), number))
    return tuple(leaders)


def short_names(specs: Sequence[str]) -> list[str]:
    """Names of files without their folders, where these do not tell them apart."""
    short = [spec if spec.startswith(LM_EVAL) else Path(spec).name for spec in specs]
    meant = {name: {spec for spec, other in zip(specs, short, strict=True) if other == name} for name in short}
    return [name if len(meant[name]) == 1 else spec for spec, name in zip(specs, short, strict=True)]


def row_weights(signs: Sequence[int]) -> list[float]:
    """Weight of each sequence in the loss of a set.

    Positive sequences share weight +1, negative ones -1. Without negative ones this is the mean (objective ``lm``);
    with both it is the mean over gold answers minus the mean over wrong ones (``margin``, paper Eq. 6), which is
    linear in the gradient and so needs one backward pass and one buffer.
    """
    positive = sum(1 for sign in signs if sign > 0)
    negative = len(signs) - positive
    return [1.0 / positive if sign > 0 else -1.0 / negative for sign in signs]
