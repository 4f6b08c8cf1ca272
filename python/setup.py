"""Version and dependencies of the driver; everything else is in pyproject.toml.

The driver and the kernels are one repository with one version, in ``gisp_kernels/_version.py``. The driver needs the
kernels of exactly its own version. A source distribution holds the driver alone and reads the version from its own
metadata.
"""

from __future__ import annotations

import re
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).resolve().parent
PLACES = (
    (ROOT.parent / "gisp_kernels" / "_version.py", r'__version__ = "([^"]+)"'),
    (ROOT / "PKG-INFO", r"(?m)^Version: (\S+)$"),
)


def read_version() -> str:
    for path, pattern in PLACES:
        if path.is_file() and (match := re.search(pattern, path.read_text(encoding="utf-8"))):
            return match[1]
    raise SystemExit(f"no version of gisp in {' or '.join(str(path) for path, _ in PLACES)}")


if __name__ == "__main__":
    version = read_version()
    setup(
        version=version,
        install_requires=[
            f"gisp-kernels=={version}",
            "torch>=2.8",
            "transformers>=5.14",
            "safetensors>=0.5",
            "huggingface_hub",
            "numpy",
            "pyyaml",
            "typer>=0.15",
            "rich>=13",
            "matplotlib>=3.8",
        ],
    )
