"""What the study runs: cells, each one way of pruning with one seed, listed by the question they answer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

from benchmarks.quality.choices import TASKS

# Sequences a pass of whole-set scores; never changes a result beyond rounding, and lets many runs share a GPU.
BATCH_SIZE = 64


@dataclass(frozen=True)
class Sizes:
    """How long the runs of a study are, and what the decoder allows.

    Attributes:
        steps, batch_tokens: of preset fast.
        exact_tokens, exact_steps: of the exact schedules; a step of ``paper`` or ``official`` sees all of the tokens.
        exact_seeds: seeds of those, the costliest by far.
        gqa: whether the decoder shares key/value heads.
    """

    steps: int = 200
    batch_tokens: int = 8192
    exact_tokens: int = 163840
    exact_steps: int = 112
    exact_seeds: int = 3
    gqa: bool = False

    @property
    def fast(self) -> dict[str, Any]:
        """Options of a run of preset fast."""
        return {"steps": self.steps, "batch_tokens": self.batch_tokens}


@dataclass(frozen=True)
class Cell:
    """One way of pruning with one seed.

    Attributes:
        study: the question, one of :data:`STUDIES`.
        name: the way; cells of one name differ in their seed alone.
        options: of :func:`gisp.prune`, and ``data``, what the calibration rows are made into, and ``distil``, the share
            of the divergence from the dense model in the loss.
        one_shot: one scoring pass of the dense model for all sparsities.
        tokens: calibration tokens to choose from, drawn by the seed; ``None`` = all there are.
        compensate: options of :func:`gisp.compensate`, each measured at every sparsity.
    """

    study: str
    name: str
    options: dict[str, Any]
    seed: int = 0
    one_shot: bool = False
    tokens: int | None = None
    compensate: tuple[dict[str, Any], ...] = field(default=())

    @property
    def key(self) -> str:
        """Names the cell in a result."""
        return f"{self.study}/{self.name}/{self.seed}"

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


BIAS, AFFINE, RESCALE, LSQ, KFAC = ({"method": name} for name in ("bias", "affine", "rescale", "lsq", "kfac"))
FREE: dict[str, Any] = {"protect_first": 0.0, "protect_last": 0}


def criteria_cells(seeds: range, sizes: Sizes) -> list[Cell]:
    """Every criterion as it was published, ``fast`` and the exact schedules of the paper and its code."""
    doubled = 2 * sizes.batch_tokens
    changes: list[tuple[str, dict[str, Any], tuple[dict[str, Any], ...]]] = [
        ("fast", {}, (BIAS, RESCALE, AFFINE, LSQ, KFAC)),
        ("fast, last layer open", {"protect_last": 0}, (LSQ, KFAC)),
        # What the study of its parts found better, all at once, for twice the tokens.
        (
            f"fast, last layer open, average 0.98, {doubled:,} tokens a step",
            {"protect_last": 0, "ema": 0.98, "batch_tokens": doubled},
            (LSQ, KFAC),
        ),
        ("fast, plain", {"first_order": "plain"}, (LSQ, KFAC)),
        ("fast, gisp scores", {"criterion": "gisp"}, (LSQ, KFAC)),
    ]
    if sizes.gqa:
        changes.append(("fast, gqa group", {"gqa": "group"}, (LSQ,)))
    cells = []
    for seed in seeds:
        for name, options, compensate in changes:
            cells.append(Cell("criteria", name, {**sizes.fast, "seed": seed, **options}, seed, compensate=compensate))
        for preset in ("paper", "official") if seed < sizes.exact_seeds else ():
            exact = {"preset": preset, "steps": sizes.exact_steps, "seed": seed, "batch_size": BATCH_SIZE}
            name = f"{preset}, {sizes.exact_steps} steps"
            cells.append(Cell("criteria", name, exact, seed, tokens=sizes.exact_tokens))
        for name, options, compensate in (
            ("gisp, one shot", {"criterion": "gisp"}, (LSQ,)),
            ("second-order, one shot", {"criterion": "second-order"}, ()),
            ("taylor-local", {"criterion": "taylor-local"}, ()),
            ("signed", {"criterion": "signed"}, ()),
            ("wanda-sp", {"criterion": "wanda-sp"}, (LSQ, KFAC)),
            ("owl", {"criterion": "wanda-sp", "allocator": "owl"}, ()),
            ("flap", {"criterion": "flap"}, (BIAS, LSQ)),
            ("block-influence", {"criterion": "block-influence"}, ()),
            ("random", {"criterion": "random"}, ()),
            ("magnitude", {"criterion": "magnitude"}, ()),
        ):
            if name == "magnitude" and seed != seeds[0]:
                continue  # sees neither data nor seed
            one_shot = {**options, "seed": seed, "batch_size": BATCH_SIZE}
            cells.append(Cell("criteria", name, one_shot, seed, True, sizes.steps * sizes.batch_tokens, compensate))
    return cells


def fast_cells(seeds: range, sizes: Sizes) -> list[Cell]:
    """The parts of ``fast``, one changed at a time."""
    steps, batch_tokens, exact_tokens = sizes.steps, sizes.batch_tokens, sizes.exact_tokens
    batches = (batch_tokens // 4, batch_tokens // 2, 2 * batch_tokens)
    changes: dict[str, dict[str, Any]] = {
        "as it is": {},
        f"{steps // 4} steps": {"steps": steps // 4},
        f"{steps // 2} steps": {"steps": steps // 2},
        f"{2 * steps} steps": {"steps": 2 * steps},
        **{f"{tokens:,} tokens a step": {"batch_tokens": tokens} for tokens in batches},
        "no moving average": {"ema": 0.0},
        "moving average 0.5": {"ema": 0.5},
        "moving average 0.8": {"ema": 0.8},
        "moving average 0.95": {"ema": 0.95},
        "moving average 0.98": {"ema": 0.98},
        "norm official": {"norm": "official"},
        "norm none": {"norm": "none"},
        "norm zscore": {"norm": "zscore"},
        "nothing protected": FREE,
        "last layer protected": {"protect_first": 0.0},
        "first 10 % protected": {"protect_last": 0},
        "first 20 % protected": {"protect_first": 0.2},
        "align 1": {"align": 1},
        "align 64": {"align": 64},
        "float32": {"dtype": "float32"},
        "uniform allocator": {"allocator": "uniform"},
        "owl allocator": {"allocator": "owl"},
        "first-order term as it is": {"first_order": "plain"},
        "first-order term as it is, moving average 0.98": {"first_order": "plain", "ema": 0.98},
        "gisp scores": {"criterion": "gisp"},
        "gisp scores, last layer open": {"criterion": "gisp", "protect_last": 0},
        "gisp scores, owl allocator, last layer open": {"criterion": "gisp", "protect_last": 0, "allocator": "owl"},
        "distillation loss": {"distil": 1.0},
        "half distillation loss": {"distil": 0.5},
        "signed scores": {"criterion": "signed"},
        "wanda-sp scores": {"criterion": "wanda-sp", "allocator": "global"},
        "flap scores": {"criterion": "flap"},
    }
    cells = [
        Cell("fast", name, {**sizes.fast, "seed": seed, **options}, seed)
        for name, options in changes.items()
        for seed in seeds
    ]
    exact = {"engine": "exact", "ema": 0.0, "steps": steps // 4, "batch_size": BATCH_SIZE}
    for seed in seeds:
        cells.append(Cell("fast", f"exact, {steps // 4} steps", {**exact, "seed": seed}, seed, tokens=exact_tokens))
        for tokens in (exact_tokens // 8, exact_tokens // 2, 2 * exact_tokens):
            few = {**sizes.fast, "seed": seed}
            cells.append(Cell("fast", f"of {tokens:,} calibration tokens", few, seed, tokens=tokens))
    return cells


def compensation_cells(seeds: range, sizes: Sizes) -> list[Cell]:
    """Methods, targets, damping and calibration size of compensation, all on one run of ``fast``."""
    variants: list[dict[str, Any]] = [BIAS, AFFINE, RESCALE, LSQ, KFAC]
    variants += [{"method": method, "target": "dense"} for method in ("bias", "affine")]
    variants += [{"method": method, "target": "local"} for method in ("rescale", "lsq")]
    variants += [{"method": "lsq", "intercept": True}]
    variants += [{"method": "lsq", "damping": damping} for damping in (0.0, 0.001, 0.1)]
    variants += [{"method": "lsq", "tokens": tokens} for tokens in (8192, 32768, 524288)]
    variants += [{"method": "kfac", "steps": steps} for steps in (1, 2, 8)]
    variants += [{"method": "kfac", "tokens": tokens} for tokens in (8192, 32768)]
    variants += [{"method": "kfac", "damping": damping} for damping in (0.1, 2.0)]
    return [Cell("compensation", "fast", {**sizes.fast, "seed": s}, s, compensate=tuple(variants)) for s in seeds]


def task_cells(seeds: range, sizes: Sizes) -> list[Cell]:
    """Calibration on choice tasks: right against wrong choices, the right ones alone, and the plain text."""
    kinds = [("lm on text", "lm", "text")]
    for task in TASKS:
        kinds += [(f"{objective}, {task}", objective, task) for objective in ("margin", "choice")]
        kinds += [(f"lm on the right ones, {task}", "lm", task)]
    return [
        Cell(
            "task",
            f"{name}, {scores}",
            {**sizes.fast, "seed": seed, "objective": objective, "data": data, "criterion": scores},
            seed,
        )
        for seed in seeds
        for name, objective, data in kinds
        for scores in ("second-order", "gisp")
    ]


STUDIES: dict[str, Callable[[range, Sizes], list[Cell]]] = {
    "criteria": criteria_cells,
    "fast": fast_cells,
    "compensation": compensation_cells,
    "task": task_cells,
}
"""The studies by name, in the order they run and are shown."""
