"""A compensation asked for by name: options and calibration data, and what a format can carry of it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gisp.compensation.options import CompensationOptions, flag, make_options
from gisp.errors import GispError

if TYPE_CHECKING:
    from gisp.compensation.result import Compensation
    from gisp.model.structures import ModelMap


@dataclass(frozen=True)
class CompensationRequest:
    """Options and calibration data (a SPEC) of a compensation."""

    options: CompensationOptions
    calibration: str

    def for_format(self, format: str, model_map: ModelMap, *, adds_biases: bool) -> CompensationOptions:
        """The options as far as an export of the model can hold what they fit.

        Args:
            format: its name, for the message.
            adds_biases: whether the format holds output biases that the base model has not.

        Raises:
            GispError: ``bias``, where output biases have no place.
        """
        has_biases = all(linear.bias is not None for linear, _ in model_map.outputs.values())
        options = self.options
        if adds_biases or has_biases or not any(map(options.biases, options.methods)):
            return options
        if "bias" in options.methods:
            raise GispError(
                f"--compensate {options.method} needs output biases, which format {format} of this model has not: "
                "give --compensate lsq, or --format hf"
            )
        return replace(options, intercept=False)

    def describe(self, done: Compensation) -> str:
        """What was done with which data, in one line; a path is told by its last part."""
        data = Path(self.calibration).name if Path(self.calibration).exists() else self.calibration
        return f"{done.describe()}; calibration {data}"


def make_request(method: str | None, calibration: str | None, **given: Any) -> CompensationRequest | None:
    """The request that options of the command line make up, None for none.

    Args:
        given: further options of :class:`CompensationOptions`, None where not given.

    Raises:
        GispError: a bad value, an option without ``--compensate`` or for other methods, or no calibration data.
    """
    given = {name: value for name, value in given.items() if value is not None}
    if method is None:
        for name, value in {"calibration": calibration, **given}.items():
            if value is not None:
                raise GispError(f"{flag(name)} {value} is for --compensate METHOD: give both or leave it out")
        return None
    options = make_options(method=method, **given)
    if calibration is None:
        raise GispError(f"--compensate {method} needs --calibration DATA, as for gisp prune --data")
    return CompensationRequest(options, calibration)
