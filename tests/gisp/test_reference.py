"""The reference of Python names shows what users may call, and each of these says what it does."""

from __future__ import annotations

import inspect
import re
from functools import cached_property
from pathlib import Path
from pydoc import locate

import pytest

import gisp

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "reference" / "api.md").read_text(encoding="utf-8")
SHOWN = re.findall(r"^::: (\S+)$", PAGE, re.MULTILINE)


def test_every_public_name_is_on_the_page() -> None:
    assert {f"gisp.{name}" for name in gisp.__all__} <= set(SHOWN)


@pytest.mark.parametrize("path", SHOWN)
def test_what_the_page_shows_has_a_docstring(path: str) -> None:
    shown = locate(path)
    assert shown is not None
    assert inspect.getdoc(shown)
    if inspect.isclass(shown):
        kinds = (property, cached_property, classmethod, staticmethod)
        members = {
            name: member
            for name, member in vars(shown).items()
            if not name.startswith("_") and (inspect.isfunction(member) or isinstance(member, kinds))
        }
        assert [name for name, member in members.items() if not inspect.getdoc(member)] == []
