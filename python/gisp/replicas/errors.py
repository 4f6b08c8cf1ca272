"""How a run of several processes ends for all of them, told once."""

from __future__ import annotations

from gisp.errors import GispError


class ReplicaError(GispError):
    """A process of the run failed.

    Attributes:
        told: whether another process has told it, so that this one says nothing more.
    """

    def __init__(self, message: str, *, told: bool) -> None:
        super().__init__(message)
        self.told = told
