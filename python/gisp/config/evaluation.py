"""Options of an evaluation and their checks, which need no model."""

from __future__ import annotations

import importlib.util
import re
from dataclasses import dataclass
from pathlib import Path

from gisp.errors import GispError, quoted
from gisp.files import as_path

DEFAULT_WINDOW = 128


@dataclass(frozen=True)
class EvalOptions:
    """How to evaluate.

    Attributes:
        window: longest input in tokens; ``None`` = 128 for text and tokens, the model's own limit for choices and
            completions.
        stride: see :func:`gisp.evaluate.perplexity.perplexity`; text and tokens only.
        limit: number of rows to use, the first ones; of text the number of windows, which are the same text with any
            stride; ``None`` = all.
        batch_size: sequences per forward pass; ``None`` = by their number of tokens. Fewer are passed where their
            logits would take too much memory.
        generate: also measure exact match of generated completions.
        until, max_new_tokens, extract: see :class:`gisp.evaluate.completions.ExactMatch`.
    """

    window: int | None = None
    stride: int | None = None
    limit: int | None = None
    batch_size: int | None = None
    generate: bool = False
    until: tuple[str, ...] = ()
    max_new_tokens: int = 256
    extract: str | None = None

    def __post_init__(self) -> None:
        check_stride(DEFAULT_WINDOW if self.window is None else self.window, self.stride)
        _check_counts(self, "limit", "batch_size", "max_new_tokens")
        longest = self.max_new_tokens != type(self).max_new_tokens
        given = {"until": self.until, "extract": self.extract is not None, "max-new-tokens": longest}
        about = next((name for name, value in given.items() if value), None)
        if not self.generate and about:
            raise GispError(f"--{about} belongs to --generate: add it")
        object.__setattr__(self, "until", texts(self.until, "until"))
        if "" in self.until:
            raise GispError("--until is empty: give the text that ends an answer")
        self.pattern()

    def pattern(self) -> re.Pattern[str] | None:
        """``extract`` compiled."""
        try:
            return None if self.extract is None else re.compile(self.extract)
        except re.error as error:
            raise GispError(f"--extract {self.extract!r} is no regular expression: {error}") from None


@dataclass(frozen=True)
class LmEvalTasks:
    """Which tasks of lm-eval to run.

    Attributes:
        names: tasks, groups or tags; ``*`` matches any text.
        include: folder with more task files.
        limit: number of examples of each task, the first ones; ``None`` = all.
        batch_size: sequences per forward pass, ``None`` = 16.
    """

    names: tuple[str, ...]
    include: Path | None = None
    limit: int | None = None
    batch_size: int | None = None

    def __post_init__(self) -> None:
        """Refuse what needs no model to be refused."""
        if importlib.util.find_spec("lm_eval") is None:
            raise GispError("--lm-eval needs lm-eval: pip install 'gisp[eval]'")
        object.__setattr__(self, "names", texts(self.names, "names"))
        if not self.names or not all(self.names):
            raise GispError("--lm-eval names no task: give task names with commas between them")
        if self.include is not None:
            object.__setattr__(self, "include", as_path(self.include, "include"))
            if not self.include.is_dir():
                raise GispError(f"--lm-eval-include {self.include} is no folder: give the folder of the task files")
        _check_counts(self, "limit", "batch_size")


def options_of(options: EvalOptions | None, window: int | None) -> EvalOptions:
    """Options of which the window may be given by itself.

    Raises:
        GispError: both are given, or something else than options.
    """
    if options is not None and not isinstance(options, EvalOptions):
        raise GispError(f"options is {quoted(options)}: give EvalOptions")
    if options is not None and window is not None:
        raise GispError("window and options are both given: set options.window")
    return options or EvalOptions(window=window)


def texts(value: object, what: str) -> tuple[str, ...]:
    """Several texts as callers give them; one text, which holds its letters to Python, is not several.

    Raises:
        GispError: names the argument and its value.
    """
    if isinstance(value, (list, tuple)) and all(isinstance(item, str) for item in value):
        return tuple(value)
    raise GispError(f"{what} is {quoted(value)}: give a tuple of texts")


def _check_counts(options: object, *names: str) -> None:
    for name in names:
        value = getattr(options, name)
        if value is not None and (not is_whole(value) or value < 1):
            raise GispError(f"--{name.replace('_', '-')} is {quoted(value)}: give at least 1")


def is_whole(value: object) -> bool:
    """Whether an option is a whole number."""
    return isinstance(value, int) and not isinstance(value, bool)


def check_stride(window: int, stride: int | None) -> int:
    """The stride, ``window`` for ``None``.

    Raises:
        GispError: a window below 2 tokens, or a stride outside 1 to the window.
    """
    if not is_whole(window) or window < 2:
        raise GispError(f"--window is {quoted(window)}: give at least 2")
    if stride is not None and not (is_whole(stride) and 1 <= stride <= window):
        raise GispError(f"--stride is {quoted(stride)}: give 1 to the window of {window} tokens")
    return window if stride is None else stride
