"""Flags of a compensation, which ``gisp export`` and ``gisp eval`` take as ``**keywords``."""

from __future__ import annotations

from functools import partial
from typing import Any

from gisp.cli.flags import flag
from gisp.compensation.options import METHODS
from gisp.compensation.request import CompensationRequest, make_request

_flag = partial(flag, panel="Compensation")


def _defaults(option: str) -> str:
    """Methods that have an option, with their defaults of it."""
    found = [f"{name} ({getattr(method, option)})" for name, method in METHODS.items() if getattr(method, option)]
    return " or ".join([", ".join(found[:-1]), found[-1]])


COMPENSATION = (
    _flag("compensate", f"Change output projections: {', '.join(METHODS)}, or A+B in turn."),
    _flag("calibration", "Data to compensate with, as for prune."),
    _flag("calibration_tokens", "Calibration tokens of fits and of a step of kfac (131072).", kind=int),
    _flag("damping", "Ridge of lsq and kfac, relative to the mean diagonal (0.5).", kind=float),
    _flag("compensation_target", "What fits aim at: local (default) or dense.", names=("--target",)),
    _flag("compensation_steps", f"Steps of {_defaults('steps')}.", kind=int),
    _flag("learning_rate", "Highest rate of gates (0.01) or of distil's weights (0.001).", kind=float),
    _flag("compensation_batch_tokens", "Tokens of a step of gates and distil (8192).", kind=int),
)


def compensation_request(flags: dict[str, Any]) -> CompensationRequest | None:
    """What the flags ask for, ``None`` for none.

    Raises:
        GispError: a bad value, or flags that do not go together.
    """
    return make_request(
        flags["compensate"],
        flags["calibration"],
        tokens=flags["calibration_tokens"],
        damping=flags["damping"],
        target=flags["compensation_target"],
        steps=flags["compensation_steps"],
        learning_rate=flags["learning_rate"],
        batch_tokens=flags["compensation_batch_tokens"],
    )
