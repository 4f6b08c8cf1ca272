"""What a compensation does, and its checks."""

from __future__ import annotations

import math
from dataclasses import dataclass

from gisp.errors import GispError, quoted

METHODS = ("bias", "affine", "rescale", "lsq", "kfac")
# Methods an option is for, where it is not for all.
ONLY = {"damping": ("lsq", "kfac"), "steps": ("kfac",)}
TARGETS = ("local", "dense")
# By method, as measured after GISP's scores (docs/compensation.md): a mean or a slope gains nothing reliable from the
# dense stream, a scale helps only towards it.
DEFAULT_TARGET = {"bias": "local", "affine": "local", "rescale": "dense", "lsq": "dense", "kfac": "dense"}
DEFAULT_DAMPING = 0.5
DEFAULT_TOKENS = 131072
DEFAULT_STEPS = 4
_FLAGS = {"method": "--compensate", "tokens": "--calibration-tokens", "steps": "--compensation-steps"}


def flag(option: str) -> str:
    """An option as the command line calls it."""
    return _FLAGS.get(option, f"--{option}")


@dataclass(frozen=True)
class CompensationOptions:
    """Options of one compensation.

    Attributes:
        method: ``bias``, ``affine``, ``rescale`` or ``lsq``, see :mod:`gisp.compensation.fits`; or ``kfac``, steps on
            the loss after ``lsq``, see :mod:`gisp.compensation.kfac`.
        target: output every block is fitted to: ``local``, that of the unpruned block on the same input; ``dense``,
            the one that brings the residual stream back to the dense model's, so that errors do not add up. ``None``
            is ``local`` for ``bias`` and ``affine``, ``dense`` for the others.
        damping: of ``lsq`` and ``kfac``: multiple of the mean diagonal of a Gram matrix added to its diagonal.
        tokens: calibration tokens used, the first of the data; a step of ``kfac`` uses as many of those behind them.
        intercept: whether output biases are fitted. ``None`` is no for ``lsq``, which gains next to nothing by them and
            so fits every format, and for ``rescale`` and ``kfac``, which have none; yes for the others.
        steps: of ``kfac``.

    Raises:
        GispError: a value that is not one of these.
    """

    method: str = "lsq"
    target: str | None = None
    damping: float = DEFAULT_DAMPING
    tokens: int = DEFAULT_TOKENS
    intercept: bool | None = None
    steps: int = DEFAULT_STEPS

    def __post_init__(self) -> None:
        for name, choices in (("method", METHODS), ("target", (None, *TARGETS))):
            if getattr(self, name) not in choices:
                known = ", ".join(filter(None, choices))
                raise GispError(f"{flag(name)} is {quoted(getattr(self, name))}: choose one of {known}")
        if not (isinstance(self.damping, (int, float)) and math.isfinite(self.damping) and self.damping >= 0):
            raise GispError(f"--damping is {self.damping}: give a number of at least 0")
        for name in ("tokens", "steps"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                least = "at least 1" if isinstance(value, int) else "a whole number"
                raise GispError(f"{flag(name)} is {quoted(value)}: give {least}")
        if self.target is None:
            object.__setattr__(self, "target", DEFAULT_TARGET[self.method])
        if self.intercept is None:
            object.__setattr__(self, "intercept", self.method in ("bias", "affine"))
        if self.method == "bias" and not self.intercept:
            raise GispError("--compensate bias fits output biases alone: choose affine or lsq where they have no place")
        if self.method in ("rescale", "kfac") and self.intercept:
            raise GispError(
                f"--compensate {self.method} fits no output biases: choose affine or lsq, or leave intercept out"
            )
