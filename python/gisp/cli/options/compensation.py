"""Flags of a compensation, which ``gisp export`` and ``gisp eval`` take as ``**keywords``."""

from __future__ import annotations

from functools import partial
from typing import Any

from gisp.cli.flags import flag
from gisp.compensation.request import CompensationRequest, make_request

_flag = partial(flag, panel="Compensation")
COMPENSATION = (
    _flag("compensate", "Refit output projections: bias, affine, rescale, lsq, kfac, gates, distil, or A+B in turn."),
    _flag("calibration", "Data to compensate with, as for prune."),
    _flag("calibration_tokens", "Calibration tokens of fits and of a step of kfac (131072).", kind=int),
    _flag("damping", "Ridge of lsq and kfac, relative to the mean diagonal (0.5).", kind=float),
    _flag("compensation_target", "What fits aim at: local (default) or dense.", names=("--target",)),
    _flag("compensation_steps", "Steps of kfac (4), gates (150) or distil (300).", kind=int),
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
