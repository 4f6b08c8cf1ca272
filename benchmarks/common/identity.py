"""What a result was measured with: commit, machine, versions, time."""

from __future__ import annotations

import os
import platform
import subprocess
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from gisp_kernels import build_info

ROOT = Path(__file__).resolve().parents[2]


def identity(device: torch.device) -> dict[str, Any]:
    """Commit (``GISP_COMMIT`` where git is not at hand), device, driver, versions and UTC time, JSON-ready."""
    import transformers

    core = build_info()
    return {
        "commit": os.environ.get("GISP_COMMIT") or _commit(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "cpu",
        "driver": _driver() if device.type == "cuda" else None,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": core["triton"],
        "transformers": transformers.__version__,
        "core": {name: core[name] for name in ("core", "cuda", "sm90", "nvcc")},
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def _commit() -> str:
    return _line("git", "describe", "--always", "--dirty", "--abbrev=12") or "unknown"


def _driver() -> str | None:
    return _line("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")


def _line(*command: str) -> str | None:
    """First line a program prints, ``None`` where it is missing or fails."""
    try:
        run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    lines = run.stdout.splitlines()
    return lines[0].strip() if run.returncode == 0 and lines else None
