"""What a compensation does, and its checks."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any, Literal

from gisp.config.declare import plain
from gisp.errors import GispError, quoted


@dataclass(frozen=True)
class Method:
    """What a method is.

    Attributes:
        kind: ``fit``: least squares, block by block; ``steps``: steps of its own on the divergence; ``training``: Adam.
        options: those of :class:`CompensationOptions` that it reads.
        biases: whether it fits output biases where ``intercept`` is not given; ``None``: it has none to fit.
        steps, rate: how many steps it takes, and at which highest learning rate, where that is not given.
    """

    kind: Literal["fit", "steps", "training"]
    options: tuple[str, ...]
    biases: bool | None = None
    steps: int = 0
    rate: float = 0.0


_TRAINING = ("steps", "learning_rate", "batch_tokens")
METHODS = {
    "bias": Method("fit", ("target", "tokens", "intercept"), biases=True),
    "affine": Method("fit", ("target", "tokens", "intercept"), biases=True),
    "rescale": Method("fit", ("target", "tokens")),
    "lsq": Method("fit", ("target", "damping", "tokens", "intercept"), biases=False),
    "kfac": Method("steps", ("damping", "tokens", "steps"), steps=4),
    "gates": Method("training", _TRAINING, steps=150, rate=1e-2),
    "distil": Method("training", _TRAINING, steps=300, rate=1e-3),
}
# What differs from method to method can be given for one.
SINGLE = ("steps", "learning_rate")
TARGETS = ("local", "dense")
DEFAULTS = {"target": "local", "damping": 0.5, "tokens": 131072, "batch_tokens": 8192}
_FLAGS = {
    "method": "--compensate",
    "tokens": "--calibration-tokens",
    "steps": "--compensation-steps",
    "batch_tokens": "--compensation-batch-tokens",
    "learning_rate": "--learning-rate",
}


def flag(option: str) -> str:
    """An option as the command line calls it."""
    return _FLAGS.get(option, f"--{option}")


@dataclass(frozen=True)
class CompensationOptions:
    """Options of one compensation; one that changes nothing in its method is refused.

    Attributes:
        method: one of :data:`METHODS`, or several joined by ``+``, which follow each other; see ``fits``, ``kfac`` and
            ``train`` of :mod:`gisp.compensation.methods`. A ``kfac`` that comes first begins with ``lsq``.
        target: output a block is fitted to: ``local`` (the default), that of the unpruned block on the same input;
            ``dense``, the one that brings the residual stream back to the dense model's.
        damping: of ``lsq`` and ``kfac``: multiple of the mean diagonal of a Gram matrix added to its diagonal (0.5).
        tokens: calibration tokens of fits, the first of the data (131,072); a step of ``kfac`` uses as many further
            ones.
        intercept: whether output biases are fitted. ``None`` is yes for ``bias`` and ``affine``, and no for ``lsq``,
            which gains next to nothing by them and so fits every format.
        steps: of ``kfac`` (4), ``gates`` (150) or ``distil`` (300), where the method has one of them.
        learning_rate: highest one of ``gates`` (0.01) or of the weights of ``distil`` (0.001).
        batch_tokens: calibration tokens of a step of ``gates`` and ``distil`` (8,192).

    Raises:
        GispError: a value that is not one of these, or an option for other methods.
    """

    method: str = "lsq"
    target: str | None = None
    damping: float | None = None
    tokens: int | None = None
    intercept: bool | None = None
    steps: int | None = None
    learning_rate: float | None = None
    batch_tokens: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.method, str) or not set(self.method.split("+")) <= set(METHODS):
            known = ", ".join(METHODS)
            raise GispError(f"--compensate is {quoted(self.method)}: choose one of {known}, or several joined by +")
        self._check_values()
        self._check_use()
        for name, value in DEFAULTS.items():
            if getattr(self, name) is None and self._users(name):
                object.__setattr__(self, name, value)

    @property
    def methods(self) -> tuple[str, ...]:
        """What is done in turn."""
        names = tuple(self.method.split("+"))
        return ("lsq", *names) if names[0] == "kfac" else names

    def biases(self, method: str) -> bool:
        """Whether a method fits output biases."""
        usual = METHODS[method].biases
        if usual is None:
            return False
        return usual if self.intercept is None else self.intercept

    def steps_of(self, method: str) -> int:
        """Steps of a method that has some."""
        return METHODS[method].steps if self.steps is None else self.steps

    def rate_of(self, method: str) -> float:
        """Highest learning rate of a method that trains."""
        return METHODS[method].rate if self.learning_rate is None else self.learning_rate

    def check_streamed(self) -> None:
        """Refuse what layers in host memory do not go with: training, and biases, which they have no place for.

        Raises:
            GispError: a method that trains or fits biases.
        """
        what = self._unstreamed()
        if what:
            raise GispError(
                f"--compensate {self.method} {what} layers that --offload leaves in host memory: choose lsq, "
                "rescale or kfac, or leave --offload out"
            )

    def check_stages(self, stages: int) -> None:
        """Refuse more than one stage, each of which holds a part of the layers.

        Raises:
            GispError: names the way that there is.
        """
        if stages > 1:
            instead = "give --offload in place of --stages"
            if self._unstreamed():
                instead = "leave --stages out, on a GPU that holds the model or with --device cpu"
            raise GispError(
                f"--stages {stages} splits the model, --compensate {self.method} needs all of it: {instead}"
            )

    def _unstreamed(self) -> str | None:
        """What of the method layers in host memory do not go with."""
        for method in self.methods:
            trains = METHODS[method].kind == "training"
            if trains or self.biases(method):
                return "trains" if trains else "adds biases to"
        return None

    def _users(self, option: str) -> list[str]:
        return sorted({method for method in self.methods if option in METHODS[method].options})

    def _check_values(self) -> None:
        if self.target not in (None, *TARGETS):
            raise GispError(f"--target is {quoted(self.target)}: choose one of {', '.join(TARGETS)}")
        for name, positive in (("damping", False), ("learning_rate", True)):
            value = getattr(self, name)
            if value is None:
                continue
            is_number = isinstance(value, (int, float)) and math.isfinite(value)
            if not is_number or value < 0 or (positive and value == 0):
                least = "above 0" if positive else "of at least 0"
                raise GispError(f"{flag(name)} is {value}: give a number {least}")
        for name in ("tokens", "steps", "batch_tokens"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value < 1):
                least = "at least 1" if isinstance(value, int) else "a whole number"
                raise GispError(f"{flag(name)} is {quoted(value)}: give {least}")

    def _check_use(self) -> None:
        for name in (field.name for field in fields(self) if field.name != "method"):
            value = getattr(self, name)
            if value is None or (name == "intercept" and not value and "bias" not in self.methods):
                continue
            users = self._users(name)
            if name == "intercept" and not value:
                raise GispError(
                    "--compensate bias fits output biases alone: choose affine or lsq where they have no place"
                )
            if not users:
                others = " or ".join(method for method, what in METHODS.items() if name in what.options)
                raise GispError(
                    f"{flag(name)} {value} changes nothing in --compensate {self.method}: leave it out, or use {others}"
                )
            if name in SINGLE and len(users) > 1:
                raise GispError(
                    f"{flag(name)} {value} would be for {' and '.join(users)} of --compensate {self.method} alike: "
                    "leave it out, or compensate with one of them"
                )


def make_options(**options: Any) -> CompensationOptions:
    """Checked options.

    Raises:
        GispError: an unknown option or value.
    """
    known = CompensationOptions.__dataclass_fields__
    unknown = next((name for name in options if name not in known), None)
    if unknown:
        raise GispError(f"unknown option {unknown}: compensation has {', '.join(known)}")
    return CompensationOptions(**{name: plain(value) for name, value in options.items()})
