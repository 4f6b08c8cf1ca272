"""Options of a compensation, shared by ``gisp export`` and ``gisp eval``."""

from __future__ import annotations

from typing import Annotated

import typer

_PANEL = "Compensation"

Compensate = Annotated[
    str | None,
    typer.Option(help="Refit output projections: kfac, lsq, affine, rescale or bias.", rich_help_panel=_PANEL),
]
Calibration = Annotated[str | None, typer.Option(help="Data to compensate with, as for prune.", rich_help_panel=_PANEL)]
CalibrationTokens = Annotated[
    int | None, typer.Option(help="Calibration tokens, the first of the data (131072).", rich_help_panel=_PANEL)
]
Damping = Annotated[
    float | None, typer.Option(help="Ridge of lsq and kfac, relative to the mean diagonal.", rich_help_panel=_PANEL)
]
CompensationTarget = Annotated[
    str | None,
    typer.Option(
        "--target", help="What to fit to: local (default of affine and bias) or dense.", rich_help_panel=_PANEL
    ),
]
CompensationSteps = Annotated[int | None, typer.Option(help="Steps of kfac (4).", rich_help_panel=_PANEL)]
