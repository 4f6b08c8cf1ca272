"""Triton kernels compile for GPUs that are not there, and fit their shared memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
ROOT = Path(__file__).resolve().parents[3]
SCRIPT = ROOT / "tests" / "support" / "compile_kernels.py"
# Shared memory a block may take, in bytes: A100, and Blackwell of data centres (CUDA C++ Programming Guide, "Technical
# Specifications per Compute Capability").
SHARED_MEMORY = {80: 163 * 1024, 100: 227 * 1024}
# Chosen by capability, as their instructions are.
NEWER = {80: {"float8._quantize_rows_kernel", "float8._quantize_transposed_kernel", "wgrad_tma._wgrad_tma_kernel"}}


@pytest.mark.parametrize("capability", SHARED_MEMORY)
def test_kernels_compile(capability: int, triton_cache: Path) -> None:
    environ = {**os.environ, "PYTHONPATH": str(ROOT), "TRITON_CACHE_DIR": str(triton_cache)}
    environ.pop("TRITON_INTERPRET", None)
    done = subprocess.run(
        [sys.executable, SCRIPT, str(capability)], env=environ, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert set(found["shared"]) == set(found["kernels"]) - NEWER.get(capability, set())
    assert all(size <= SHARED_MEMORY[capability] for size in found["shared"].values()), found["shared"]
