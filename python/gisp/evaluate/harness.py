"""Tasks of lm-eval (EleutherAI's lm-evaluation-harness) on a model in memory."""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any
from unittest import mock

import torch

from gisp.config.evaluation import LmEvalTasks
from gisp.data.encode import load_tokenizer
from gisp.errors import GispError, is_out_of_memory, quoted
from gisp.evaluate.batches import vocabulary
from gisp.evaluate.memory import generating_bytes, scoring_bytes
from gisp.replicas.errors import ReplicaError
from gisp.replicas.sharing import in_slices, shared_slices, sharers

_BATCH_SIZE = 16
_HIDDEN = ("alias", "name", "sample_len", "sample_count")


class Harness:
    """Tasks found, ready for any number of prunings of one model.

    Args:
        tokenizer_from: model folder or name whose tokenizer the tasks go through.

    Raises:
        GispError: an unknown task, or no tokenizer.
    """

    def __init__(self, tasks: LmEvalTasks, tokenizer_from: str | None) -> None:
        self._tasks = tasks
        with _quiet():
            self._manager = _find(tasks)
            unknown = [name for name in tasks.names if not self._manager.match_tasks([name])]
        if unknown:
            raise GispError(
                f"lm-eval has no task {quoted(unknown[0])}: see `lm-eval ls tasks`, or give --lm-eval-include DIR"
            )
        self._names = self._manager.match_tasks(list(tasks.names))
        self._tokenizer = load_tokenizer(tokenizer_from, "--lm-eval")

    def __call__(self, model: Any) -> dict[str, Any]:
        """``{"lm_eval": {task: {metric: value}}}``; metrics of a filter are named ``metric,filter``.

        Raises:
            GispError: a task whose data cannot be read.
        """
        found = self._run(_wrapped, model)
        # Other processes than the first get none.
        results = found["results"] if found else {}
        return {"lm_eval": {task: _figures(values) for task, values in sorted(results.items())}}

    def working(self, model: Any, device: torch.device) -> int:
        """As of :class:`gisp.evaluate.data.Measure`: the tasks are asked once of a model that answers nothing.

        Raises:
            GispError: a task whose data cannot be read.
        """
        taken: list[int] = []
        try:
            self._run(partial(_asked, taken), model, bootstrap_iters=0)
        except GispError:
            # Figures of no answer may not exist.
            if not taken:
                raise
        return max(taken, default=0)

    def _run(self, wrapper: Callable[[Any, Any, int], Any], model: Any, **options: Any) -> Any:
        """What lm-eval finds of a model in such a wrapper."""
        import lm_eval

        size = self._tasks.batch_size or _BATCH_SIZE
        # lm-eval asks git for the commit of the folder it runs in, and git complains where that is no checkout.
        with _quiet(), mock.patch("lm_eval.evaluator.get_git_commit_hash", return_value=None, create=True):
            try:
                return lm_eval.simple_evaluate(
                    model=wrapper(model, self._tokenizer, size),
                    tasks=self._names,
                    task_manager=self._manager,
                    limit=self._tasks.limit,
                    log_samples=False,
                    **options,
                )
            except ReplicaError:
                raise
            except Exception as error:  # task files, data sets and the network have no common type
                if is_out_of_memory(error):
                    raise
                names = ", ".join(self._tasks.names)
                reason = " ".join(str(error).split())[:300] or type(error).__name__
                raise GispError(f"lm-eval cannot run {names}: {reason}") from None


def _wrapped(model: Any, tokenizer: Any, batch_size: int) -> Any:
    """lm-eval's own wrapper; where processes share, a slice of the requests at a time goes through one of them.

    Every slice is batched by itself, so that figures do not follow the number of processes.
    """
    from lm_eval.models.huggingface import HFLM

    def answered(requests: Sequence[Any], answer: Callable[[Sequence[Any]], list[Any]]) -> list[Any]:
        parts = sharers().each(in_slices(requests), lambda part: answer(part) if part else [])
        return [found for part in parts for found in part]

    class Shared(HFLM):
        def _loglikelihood_tokens(self, requests: Any, *given: Any, **options: Any) -> list[tuple[float, bool]]:
            score = super()._loglikelihood_tokens
            found = answered(requests, lambda part: score(part, *given, **options))
            return [(float(value), bool(greedy)) for value, greedy in found]

        def generate_until(self, requests: Any, *given: Any, **options: Any) -> list[str]:
            generate = super().generate_until
            return answered(requests, lambda part: generate(part, *given, **options))

    kind = HFLM if shared_slices() == 1 else Shared
    return kind(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, trust_remote_code=False)


def _asked(taken: list[int], model: Any, tokenizer: Any, batch_size: int) -> Any:
    """lm-eval's own wrapper of a model that is not run; ``taken`` gets the bytes of the largest batches asked for."""
    from lm_eval.models.huggingface import HFLM
    from lm_eval.models.utils import normalize_gen_kwargs

    class Asked(HFLM):
        def _loglikelihood_tokens(self, requests: Any, *given: Any, **options: Any) -> list[tuple[float, bool]]:
            longest = max((len(context) + len(rest) for _, context, rest in requests), default=0)
            tokens = min(len(requests), batch_size) * min(longest, int(self.max_length))
            # Logarithms are there beside all logits of a batch and wait for those of the next one, in their dtype. The
            # cache is not turned off.
            logarithms = 2 * tokens * vocabulary(model) * next(model.parameters()).element_size()
            taken.append(scoring_bytes(model, tokens, logarithms, cached=True))
            return [(0.0, False)] * len(requests)

        def generate_until(self, requests: Any, *given: Any, **options: Any) -> list[str]:
            for request in requests:
                context, settings = request.args
                new = int(normalize_gen_kwargs(settings, self.max_gen_toks)["max_gen_toks"])
                prompt = min(len(self.tok_encode(context)), int(self.max_length) - new)
                taken.append(generating_bytes(model, min(len(requests), batch_size), prompt, new))
            return [""] * len(requests)

    return Asked(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, trust_remote_code=False)


def _find(tasks: LmEvalTasks) -> Any:
    """lm-eval's index of tasks; its own thousands take seconds to read and are left out where nothing needs them."""
    from lm_eval.tasks import TaskManager

    if tasks.include is None:
        return TaskManager()
    local = TaskManager(include_path=str(tasks.include), include_defaults=False)
    # Groups and tags may reach beyond the folder.
    if set(tasks.names) <= set(local.all_subtasks):
        return local
    return TaskManager(include_path=str(tasks.include))


def _figures(values: dict[str, Any]) -> dict[str, float | None]:
    """Numbers of one task; a standard error that does not exist is ``None``."""
    figures: dict[str, float | None] = {}
    for key, value in values.items():
        if key in _HIDDEN:
            continue
        name = key.removesuffix(",none")
        figures[name] = float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None
    return figures


@contextlib.contextmanager
def _quiet() -> Any:
    """lm-eval's advice stays away and nothing of it reaches standard output; its progress goes to standard error."""
    names: Sequence[str] = ("lm_eval", "lm-eval", "datasets")
    levels = [(logging.getLogger(name), logging.getLogger(name).level) for name in names]
    for logger, _ in levels:
        logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        for logger, level in levels:
            logger.setLevel(level)
