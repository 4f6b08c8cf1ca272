"""Whether 8-bit products choose the structures that 16-bit ones choose, on a trained decoder.

    python -m benchmarks.studies.float8 MODEL --calibration C --evaluation E [--criterion gisp] --out R.json

Two readings. *One step*: the dense model, one batch, the structures a one-shot cut to each sparsity would take. *Run*:
whole runs of preset fast that differ in nothing else, and how far another data order alone moves the choice. Scores are
second-order, as the preset has them, or GISP's. Agreement is the number of structures both chose over the mean number
each chose; chance is what two random choices would share.
On a CPU 8-bit products are emulated: operands are rounded to 8 bits and multiplied in float32.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch

from benchmarks.common.command import exit_code, table
from benchmarks.studies.study import Study, parser
from gisp.config.options import make_config
from gisp.model.shrink import ShrinkableModel
from gisp.model.structures import map_model, protected_layers
from gisp.score.average import in_original_numbering
from gisp.score.base import make_scorer
from gisp.score.context import Context
from gisp.select.selector import Selector

NAME = "python -m benchmarks.studies.float8"
SCORES = ("second-order", "gisp")


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


def one_step(study: Study, criterion: str) -> list[Agreement]:
    """Choices of one batch on the dense model."""
    chosen = [_first_choice(study, criterion, fp8) for fp8 in (False, True)]
    return [
        Agreement("one step", "8-bit products", sparsity, shared(one, other), float(one.float().mean()))
        for sparsity, one, other in zip(study.sparsities, *chosen, strict=True)
    ]


def _first_choice(study: Study, criterion: str, fp8: bool) -> list[torch.Tensor]:
    """What a one-shot cut to each sparsity takes, bool [structures]."""
    config = make_config(criterion=criterion, batch_tokens=study.batch_tokens, fp8=fp8)
    model_map = map_model(study.load(), config.gqa)
    protected = protected_layers(len(model_map.layers), config.protect_first, config.protect_last)
    selector = Selector(model_map, norm="params", protected=protected, align=1, keep_minimum=True)
    shrinkable = ShrinkableModel(model_map)
    live = {group.name for group in selector.groups if not group.protected}
    scorer = make_scorer(Context(shrinkable, study.calibration, config))
    scored = scorer.score(1, [group for group in model_map.groups if group.name in live])
    spread = in_original_numbering(scored.scores, shrinkable, len(selector.removed))
    ranking = selector.rank(spread)
    targets = [sparsity * model_map.decoder_parameters for sparsity in study.sparsities]
    return [selector.within_target(ranking, target).removed.cpu() for target in targets]


def runs(study: Study, criterion: str) -> list[Agreement]:
    """Whole runs: 16 and 8 bits with the same data order, and 16 bits with another."""
    plain, rounded, other = (
        _run(study, criterion=criterion, seed=seed, fp8=fp8) for seed, fp8 in ((0, False), (0, True), (1, False))
    )
    return [
        Agreement("run", pair, sparsity, shared(a[0], b[0]), float(a[0].float().mean()), (a[1], b[1]))
        for pair, found in (("8-bit products", rounded), ("another data order", other))
        for sparsity, a, b in zip(study.sparsities, plain, found, strict=True)
    ]


def _run(study: Study, **options: Any) -> list[tuple[torch.Tensor, float]]:
    """What is removed at every sparsity, and the perplexity there."""
    trajectory = study.run(**options)
    found = []
    for sparsity in study.sparsities:
        step = trajectory.step_for(sparsity)
        gone = torch.cat([(at > 0) & (at <= step) for at in trajectory.removed_at.values()])
        found.append((gone, study.perplexity(trajectory, sparsity)))
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
    options = parser(NAME, __doc__)
    options.add_argument("--criterion", choices=SCORES, default=SCORES[0])
    args = options.parse_args(argv)
    study = Study(args)
    rows = [*one_step(study, args.criterion), *runs(study, args.criterion)]
    print(show([asdict(row) for row in rows]))
    study.report("float8", rows, criterion=args.criterion)
    return 0


if __name__ == "__main__":
    raise SystemExit(exit_code(main))
