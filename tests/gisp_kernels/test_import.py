"""What importing the package does, seen from a fresh process."""

from __future__ import annotations

import importlib
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

import gisp_kernels

ROOT = Path(__file__).resolve().parents[2]

PROBE = """
import sys
import torch
calls = []
torch.cuda._lazy_init = lambda *a, **k: calls.append(1)
import gisp_kernels
loaded = [m for m in ("triton", "transformers", "gisp", "torch._dynamo", "torch._inductor") if m in sys.modules]
missing = [n for n in gisp_kernels.__all__ if not hasattr(gisp_kernels, n)]
assert not calls, "touched CUDA"
assert not torch.cuda.is_initialized()
assert not loaded, f"imported {loaded}"
assert not missing, f"missing {missing}"
w = torch.ones(2, 3)
assert gisp_kernels.abs_weighted_reduce(w, w).tolist() == [3.0, 3.0]
"""


def probe(code: str) -> None:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_import_is_light() -> None:
    probe(PROBE)


def test_import_works_without_triton() -> None:
    probe(
        "import sys; sys.modules['triton'] = None\n"
        "import importlib.util as u; find = u.find_spec\n"
        "u.find_spec = lambda n, *a: None if n == 'triton' else find(n, *a)\n"
        "import torch, gisp_kernels\n"
        "w = torch.ones(2, 3)\n"
        "assert gisp_kernels.abs_weighted_reduce(w, w).tolist() == [3.0, 3.0]\n"
        "try:\n"
        "    gisp_kernels.abs_weighted_reduce(w, w, backend='triton')\n"
        "except RuntimeError as error:\n"
        "    assert 'triton is not installed' in str(error)\n"
        "else:\n"
        "    raise SystemExit('no error')\n"
    )


def documented_modules() -> list[str]:
    page = (ROOT / "docs" / "reference" / "gisp_kernels.md").read_text(encoding="utf-8")
    return re.findall(r"(?m)^::: (\S+)$", page)


def test_the_page_of_the_api_names_the_package() -> None:
    assert "gisp_kernels" in documented_modules()


@pytest.mark.parametrize("name", documented_modules())
def test_public_names_are_listed_and_documented(name: str) -> None:
    """What the page shows is what ``__all__`` lists; every name in it exists and says what it does."""
    module = importlib.import_module(name)
    assert len(set(module.__all__)) == len(module.__all__)
    for public in module.__all__:
        value = getattr(module, public)
        if inspect.isclass(value) or inspect.isfunction(value):
            assert (value.__doc__ or "").strip(), public


def test_the_version_is_semantic() -> None:
    assert re.fullmatch(r"(0|[1-9]\d*)\.(0|[1-9]\d*)\.(0|[1-9]\d*)", gisp_kernels.__version__)
