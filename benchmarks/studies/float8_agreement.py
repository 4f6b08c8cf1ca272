"""Whether 8-bit products choose the structures that 16-bit ones choose, on a trained decoder.

    python -m benchmarks.studies.float8_agreement MODEL --calibration C --evaluation E --out R.json

Two readings. *One step*: the dense model, one batch, the structures a one-shot cut to each sparsity would take. *Run*:
whole runs of preset fast with GISP's scores that differ in nothing else, and how far another data order alone moves the
choice. Agreement is the number of structures both chose over the mean number each chose; chance is what two random
choices would share.
On a CPU 8-bit products are emulated: operands are rounded to 8 bits and multiplied in float32.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.common.command import Parser, check_writable, count, exit_code, table, write_json
from benchmarks.common.identity import identity
from gisp.config.options import make_config
from gisp.data import load_sequences
from gisp.errors import GispError
from gisp.evaluate import perplexity
from gisp.model.load import check_model_path, load_dense, resolve_device, resolve_dtype
from gisp.model.shrink import ShrinkableModel
from gisp.model.structures import map_model, protected_layers
from gisp.run.average import in_original_numbering
from gisp.run.loop import prune
from gisp.score.gradient import Engine
from gisp.select.selector import Selector

NAME = "python -m benchmarks.studies.float8_agreement"


@dataclass(frozen=True)
class Agreement:
    """Two choices compared at one sparsity.

    Attributes:
        reading: ``one step`` or ``run``.
        pair: what differs.
        agreement: structures both chose over the mean number each chose.
        chance: the same for random choices.
        perplexities: of both models; ``None`` for one step.
    """

    reading: str
    pair: str
    sparsity: float
    agreement: float
    chance: float
    perplexities: tuple[float, float] | None = None


def shared(one: torch.Tensor, other: torch.Tensor) -> float:
    """Number chosen by both over the mean number chosen; bool [structures] each."""
    both, each = int((one & other).sum()), (int(one.sum()) + int(other.sum())) / 2
    return both / each if each else 1.0


class Study:
    """One decoder with its calibration and evaluation tokens."""

    def __init__(self, args: argparse.Namespace) -> None:
        check_model_path(args.model)
        self.path = args.model
        self.device = resolve_device(args.device)
        self.dtype = resolve_dtype(args.dtype, self.device)
        self.steps, self.batch_tokens, self.window = args.steps, args.batch_tokens, args.window
        vocab_size = map_model(self._load()).vocab_size
        self.calibration, self.evaluation = (
            load_sequences(spec, vocab_size=vocab_size, seq_len=None if spec.endswith(".safetensors") else args.window,
                           tokenizer_from=args.model, held_out=held_out)
            for spec, held_out in ((args.calibration, False), (args.evaluation, True))
        )  # fmt: skip

    def _load(self) -> Any:
        return load_dense(self.path, self.device, self.dtype)

    def one_step(self, sparsities: list[float]) -> list[Agreement]:
        """Choices of one batch on the dense model."""
        chosen = [self._first_choice(sparsities, fp8) for fp8 in (False, True)]
        return [
            Agreement("one step", "8-bit products", sparsity, shared(one, other), float(one.float().mean()))
            for sparsity, one, other in zip(sparsities, *chosen, strict=True)
        ]

    def _first_choice(self, sparsities: list[float], fp8: bool) -> list[torch.Tensor]:
        config = make_config()
        model_map = map_model(self._load(), config.gqa)
        protected = protected_layers(len(model_map.layers), config.protect_first, config.protect_last)
        selector = Selector(model_map, norm="params", protected=protected, align=1, keep_minimum=True)
        engine = Engine(
            model_map,
            self.calibration,
            kind="stream",
            batch_size=None,
            batch_tokens=self.batch_tokens,
            seed=0,
            fp8=fp8,
        )
        live = {block.name for block in selector.blocks if not block.protected}
        scored = engine.score(1, [group for group in model_map.groups if group.name in live])
        spread = in_original_numbering(scored.scores, ShrinkableModel(model_map), len(selector.removed))
        ranking = selector.rank(spread)
        targets = [sparsity * model_map.decoder_parameters for sparsity in sparsities]
        return [selector.within_target(ranking, target).removed.cpu() for target in targets]

    def runs(self, sparsities: list[float]) -> list[Agreement]:
        """Whole runs: 16 and 8 bits with the same data order, and 16 bits with another."""
        plain, rounded, other = (
            self._run(sparsities, seed=seed, fp8=fp8) for seed, fp8 in ((0, False), (0, True), (1, False))
        )
        return [
            Agreement("run", pair, sparsity, shared(a[0], b[0]), float(a[0].float().mean()), (a[1], b[1]))
            for pair, found in (("8-bit products", rounded), ("another data order", other))
            for sparsity, a, b in zip(sparsities, plain, found, strict=True)
        ]

    def _run(self, sparsities: list[float], *, seed: int, fp8: bool) -> list[tuple[torch.Tensor, float]]:
        """What is removed at every sparsity, and the perplexity there."""
        options = {
            "steps": self.steps,
            "batch_tokens": self.batch_tokens,
            "seed": seed,
            "fp8": fp8,
            "criterion": "gisp",
        }
        trajectory = prune(self._load(), self.calibration, sparsity=max(sparsities), **options)
        found = []
        for sparsity in sparsities:
            step = trajectory.step_for(sparsity)
            gone = torch.cat([(at > 0) & (at <= step) for at in trajectory.removed_at.values()])
            found.append((gone, perplexity(trajectory.at(sparsity), self.evaluation, self.window).perplexity))
        return found


def show(rows: list[dict[str, Any]]) -> str:
    """The table of a result."""
    lines = []
    for row in rows:
        found = row["perplexities"]
        pair = [f"{value:.2f}" for value in found] if found else ["-", "-"]
        shares = [f"{100 * row[key]:.1f}" for key in ("sparsity", "agreement", "chance")]
        lines.append([row["reading"], row["pair"], *shares, *pair])
    header = ("reading", "what differs", "sparsity %", "agreement %", "chance %", "perplexity", "of the other")
    return table(header, lines)


def main(argv: list[str] | None = None) -> int:
    """Run the command.

    Raises:
        GispError: bad options.
    """
    options = Parser(prog=NAME, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
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
    args = options.parse_args(argv)
    check_writable(args.out)
    try:
        sparsities = [float(value) for value in args.sparsities.split(",")]
    except ValueError:
        raise GispError(f"--sparsities is {args.sparsities!r}: give numbers separated by commas") from None
    study = Study(args)
    rows = [asdict(row) for row in (*study.one_step(sparsities), *study.runs(sparsities))]
    print(show(rows))
    if args.out:
        setting = {"model": Path(study.path).name, "dtype": str(study.dtype), "steps": study.steps}
        setting |= {"batch_tokens": study.batch_tokens, "window": study.window}
        write_json(args.out, {"benchmark": "float8", "identity": identity(study.device), **setting, "rows": rows})
        print(f"wrote {args.out}")
    return 0


if __name__ == "__main__":
    raise SystemExit(exit_code(main))
