"""What studies of whole runs share: options, one trained decoder with its data, a run of preset fast, the result."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.common.command import Parser, check_writable, count, numbers, report
from benchmarks.common.identity import identity
from gisp.data import load_sequences
from gisp.evaluate import perplexity
from gisp.model.load import check_model_path, load_dense, resolve_device, resolve_dtype
from gisp.model.structures import map_model
from gisp.run.prune import prune
from gisp.run.trajectory import Trajectory

if TYPE_CHECKING:
    from _typeshed import DataclassInstance


def parser(command: str, description: str | None) -> argparse.ArgumentParser:
    """Options that all studies of whole runs have."""
    options = Parser(prog=command, description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("model")
    options.add_argument("--calibration", required=True)
    options.add_argument("--evaluation", required=True)
    options.add_argument("--out", type=Path)
    options.add_argument("--sparsities", default="0.2,0.3,0.4,0.5")
    options.add_argument("--steps", type=count, default=200)
    options.add_argument("--batch-tokens", type=count, default=8192)
    options.add_argument("--window", type=count, default=256)
    options.add_argument("--device", default="auto")
    options.add_argument("--dtype")
    return options


class Study:
    """One decoder with its calibration and evaluation tokens.

    Raises:
        GispError: bad options or unreadable files.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        check_writable(args.out)
        check_model_path(args.model)
        self.path, self.out = args.model, args.out
        self.sparsities = numbers("--sparsities", args.sparsities, float)
        self.steps, self.batch_tokens, self.window = args.steps, args.batch_tokens, args.window
        self.device = resolve_device(args.device)
        self.dtype = resolve_dtype(args.dtype, self.device)
        vocab_size = map_model(self.load()).vocab_size
        self.calibration, self.evaluation = (
            load_sequences(spec, vocab_size=vocab_size, seq_len=None if spec.endswith(".safetensors") else args.window,
                           tokenizer_from=args.model, held_out=held_out)
            for spec, held_out in ((args.calibration, False), (args.evaluation, True))
        )  # fmt: skip

    def load(self) -> Any:
        """The dense model, anew."""
        return load_dense(self.path, self.device, self.dtype)

    def run(self, **options: Any) -> Trajectory:
        """A run of preset fast to the highest sparsity, with GISP's scores; ``options`` are those that differ."""
        shared: dict[str, Any] = {"steps": self.steps, "batch_tokens": self.batch_tokens, "criterion": "gisp"}
        return prune(self.load(), self.calibration, sparsity=max(self.sparsities), **shared | options)

    def perplexity(self, trajectory: Trajectory, sparsity: float) -> float:
        """Held-out perplexity of the run's model at a sparsity."""
        return perplexity(trajectory.at(sparsity), self.evaluation, self.window).perplexity

    def report(self, benchmark: str, rows: Sequence[DataclassInstance], **more: Any) -> None:
        """Write the rows, and ``more`` of the setting, where a file was asked for."""
        setting = {"model": Path(self.path).name, "dtype": str(self.dtype), "steps": self.steps, **more}
        setting |= {"batch_tokens": self.batch_tokens, "window": self.window}
        made = {"benchmark": benchmark, "identity": identity(self.device), **setting}
        report(self.out, {**made, "rows": [asdict(row) for row in rows]})
