"""The decoder, calibration text and held-out text that ship with the package."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path


@dataclass(frozen=True)
class DemoFiles:
    """Paths of the shipped demo.

    Attributes:
        model: folder of a Llama checkpoint with its tokenizer.
        calibration: ``.jsonl`` of ``{"path", "text"}`` rows, from files the decoder was trained on.
        heldout: ``.jsonl`` of such rows, from files it never saw.
    """

    model: Path
    calibration: Path
    heldout: Path


def demo_files() -> DemoFiles:
    """Where the demo lies in this installation.

    Raises:
        RuntimeError: a part is missing, with the command that makes it.
    """
    root = Path(str(files(__name__)))
    demo = DemoFiles(root / "decoder", root / "calibration.jsonl", root / "heldout.jsonl")
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        if not (demo.model / name).is_file():
            raise RuntimeError(
                f"the demo decoder is incomplete, {demo.model / name} is missing: reinstall the "
                f"package, or train it in a source checkout with python -m benchmarks.decoders.train --out {demo.model}"
            )
    for path in (demo.calibration, demo.heldout):
        if not path.is_file():
            raise RuntimeError(
                f"the demo text {path} is missing: reinstall the package, or make it in a source checkout with "
                f"python -m benchmarks.decoders.corpus --samples {root}"
            )
    return demo
