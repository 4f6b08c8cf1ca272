"""What importing the package does, seen from a fresh process."""

from __future__ import annotations

import subprocess
import sys

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


def test_all_names_are_public() -> None:
    import gisp_kernels

    assert {"record_importance", "Compactor", "build_info", "__version__"} <= set(gisp_kernels.__all__)
