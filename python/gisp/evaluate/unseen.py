"""One figure on calibration sequences that no step of a run has seen: accuracy of choices, else perplexity."""

from __future__ import annotations

from typing import Any

from gisp.data import Sequences
from gisp.data.sequences import IGNORED
from gisp.evaluate.pairs import Request, log_likelihoods
from gisp.evaluate.perplexity import perplexity


def measure_unseen(model: Any, data: Sequences) -> tuple[str, float]:
    """Name and value of the figure: ``accuracy`` of the likeliest answer where wrong ones are there, ``perplexity``.

    Args:
        data: of one task; the answers of a question are the sequences of an example.
    """
    if min(data.signs) > 0:
        longest = max(len(ids) for ids, _ in data.rows)
        return "perplexity", perplexity(model, data, longest).perplexity
    requests = [
        Request(tuple(ids[:-1].tolist()), tuple(labels[labels != IGNORED].tolist()), False) for ids, labels in data.rows
    ]
    values = log_likelihoods(model, requests)
    hits = [data.signs[max(example, key=values.__getitem__)] > 0 for example in data.examples]
    return "accuracy", sum(hits) / len(hits)


def some(data: Sequences, tokens: int) -> Sequences:
    """Examples spread over the data, about so many tokens of them and at least one."""
    total = sum(map(data.tokens_of, range(len(data.examples))))
    count = max(1, min(len(data.examples), len(data.examples) * tokens // max(total, 1)))
    return data.chosen([number * len(data.examples) // count for number in range(count)])
