"""The one exception users see."""

from __future__ import annotations


class GispError(ValueError):
    """Bad input or an impossible request; the message is one line: what, which value, what to do."""
