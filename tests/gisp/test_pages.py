"""Pages name what tables of the code hold, so that users find a new criterion, method or format."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

import pytest

from gisp.compensation.options import METHODS
from gisp.config.criteria import ALLOCATORS, CRITERIA
from gisp.config.options import OBJECTIVES, PRESETS
from gisp.export.sizes.options import FORMATS

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("page", "names"),
    [
        ("docs/criteria.md", (*CRITERIA, *ALLOCATORS)),
        ("docs/choosing.md", PRESETS),
        ("docs/data.md", OBJECTIVES),
        ("docs/compensation.md", METHODS),
        ("docs/compensation.md", FORMATS),
        ("docs/files.md", FORMATS),
        ("docs/serving.md", FORMATS),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_page_names_all(page: str, names: Iterable[str]) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    # Tables of criteria and allocators set some names in bold.
    found = set(re.findall(r"`([^`\n]+)`|\*\*([a-z-]+)\*\*", text))
    shown = {word for code, bold in found for word in re.split(r"[^a-z0-9-]+", code or bold)}
    assert set(names) - shown == set()


def test_environment_variables_are_listed() -> None:
    listed = set(re.findall(r"^\| `(GISP_\w+)`", (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"), re.MULTILINE))
    read = re.compile(r"(?:environ(?:\.get\(|\[)|getenv\()\s*\"(GISP_\w+)\"")
    folders = [ROOT / part for part in ("python", "gisp_kernels", "benchmarks", "tests")]
    sources = [ROOT / "setup.py", *(path for folder in folders for path in folder.rglob("*.py"))]
    used = {name for path in sources for name in read.findall(path.read_text(encoding="utf-8"))}
    assert listed == used
