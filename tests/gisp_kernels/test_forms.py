"""Launches by compiled forms pass what Triton's JIT passes, to the same code, and can be compiled ahead."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
ROOT = Path(__file__).resolve().parents[2]
SUPPORT = ROOT / "tests" / "support"


def test_forms_launch_what_the_jit_launches(triton_cache: Path) -> None:
    paths = os.pathsep.join(map(str, (ROOT, ROOT / "python", SUPPORT)))
    environ = {**os.environ, "PYTHONPATH": paths, "TRITON_CACHE_DIR": str(triton_cache), "GISP_BACKEND": "triton"}
    environ.pop("TRITON_INTERPRET", None)
    done = subprocess.run(
        [sys.executable, SUPPORT / "launch_forms.py"], env=environ, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["differing"] == []
    # Nothing runs while forms are compiled, and nothing is left to compile.
    assert found["launched_ahead"] == found["compiled_later"] == 0 < found["compiled_ahead"]
