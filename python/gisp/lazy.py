"""Public names of a package, imported on first use: torch and transformers take seconds."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any


def lazy(package: str, homes: Mapping[str, str]) -> Callable[[str], Any]:
    """The module ``__getattr__`` of a package (PEP 562).

    Args:
        homes: public name -> module it is defined in.

    Returns:
        A function of a name that imports its home, and raises ``AttributeError`` for names without one.
    """

    def get(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(import_module(homes[name]), name)

    return get
