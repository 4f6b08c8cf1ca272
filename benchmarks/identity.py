"""What a result was measured with: commit, machine, versions, time."""

from __future__ import annotations

import os
import platform
import subprocess
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch


def identity(device: torch.device) -> dict[str, Any]:
    """Commit (``GISP_COMMIT`` where git is not at hand), device, versions and UTC time."""
    import transformers

    return {
        "commit": os.environ.get("GISP_COMMIT") or _commit(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "cpu",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _triton(),
        "transformers": transformers.__version__,
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def _commit() -> str:
    root = Path(__file__).resolve().parent.parent
    run = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=12"], cwd=root, capture_output=True, text=True, check=False
    )
    return run.stdout.strip() or "unknown"


def _triton() -> str | None:
    try:
        import triton
    except ImportError:
        return None
    return str(triton.__version__)
