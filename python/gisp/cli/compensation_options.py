"""Options of a compensation, shared by ``gisp export`` and ``gisp eval``."""

from __future__ import annotations

from typing import Annotated

import typer

_PANEL = "Compensation"

Compensate = Annotated[
    str | None, typer.Option(help="Refit output projections: lsq, affine, rescale or bias.", rich_help_panel=_PANEL)
]
Calibration = Annotated[str | None, typer.Option(help="Data to compensate with, as for prune.", rich_help_panel=_PANEL)]
CalibrationTokens = Annotated[
    int | None, typer.Option(help="Calibration tokens, the first of the data (131072).", rich_help_panel=_PANEL)
]
Damping = Annotated[
    float | None, typer.Option(help="Ridge of lsq, relative to the mean diagonal.", rich_help_panel=_PANEL)
]
CompensationTarget = Annotated[
    str | None,
    typer.Option(
        "--target", help="What to fit to: local or dense (default of lsq and rescale).", rich_help_panel=_PANEL
    ),
]
