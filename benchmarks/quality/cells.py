"""What the study runs: cells, each one way of pruning with one seed, listed by the question they answer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from gisp.config.criteria import CRITERIA

Compensations = tuple[dict[str, Any], ...]
BIAS, AFFINE, RESCALE, LSQ, KFAC, GATES, DISTIL = (
    {"method": name} for name in ("bias", "affine", "rescale", "lsq", "kfac", "gates", "distil")
)
FREE: dict[str, Any] = {"protect_first": 0.0, "protect_last": 0}
# Criteria whose published use differs from one shot on text, and what repairs the pruned model in their papers.
OWN_CELLS = ("gisp", "second-order")
PUBLISHED: dict[str, Compensations] = {"wanda-sp": (LSQ, KFAC), "flap": (BIAS, LSQ)}
# Choice tasks to calibrate on, and one that generates.
CHOICE_TASKS = ("piqa", "arc_easy", "arc_challenge", "hellaswag")
GENERATING_TASK = "gsm8k"
TEXT = "text"

Mode = Literal["run", "one shot", "each size"]
"""One run through all sparsities, one scoring pass for all of them, or a run of its own for each."""


@dataclass(frozen=True)
class Sizes:
    """How long the runs of a study are, and what the decoder allows.

    Attributes:
        steps, batch_tokens: of preset fast.
        exact_tokens, exact_steps: of the exact schedules, a step of which sees all of the tokens; steps ``None`` = the
            preset's own.
        exact_seeds: seeds of those, the costliest by far.
        gate_steps: training steps of learned gates; ``None`` = their own.
        gqa: whether the decoder shares key/value heads.
        tasks: names of the prepared tasks.
    """

    steps: int = 200
    batch_tokens: int = 8192
    exact_tokens: int = 163840
    exact_steps: int | None = None
    exact_seeds: int = 3
    gate_steps: int | None = None
    gqa: bool = False
    tasks: tuple[str, ...] = ()

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
        options: of :func:`gisp.prune`, and ``distil``, the share of the divergence from the dense model in the loss.
        mode: how runs and sparsities go together.
        data: what the calibration rows are of: ``text``, or names of tasks, with or without it.
        tokens: calibration tokens to choose from, drawn by the seed; ``None`` = all there are.
        compensate: options of :func:`gisp.compensate`, each measured at every sparsity.
    """

    study: str
    name: str
    options: dict[str, Any]
    seed: int = 0
    mode: Mode = "run"
    data: tuple[str, ...] = (TEXT,)
    tokens: int | None = None
    compensate: Compensations = field(default=())

    @property
    def key(self) -> str:
        """Names the cell in a result."""
        return f"{self.study}/{self.name}/{self.seed}"

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


DENSE = Cell("dense", "dense", {})
"""The decoder as it is; its result stands apart from those of other cells."""


def criteria_cells(seeds: range, sizes: Sizes) -> list[Cell]:
    """Every criterion as it was published, ``fast`` and the exact schedules of the paper and its code."""
    doubled = 2 * sizes.batch_tokens
    changes: list[tuple[str, dict[str, Any], Compensations]] = [
        ("fast", {}, (LSQ, KFAC)),
        ("fast, last layer open", {"protect_last": 0}, ()),
        ("fast, plain", {"first_order": "plain"}, ()),
        ("fast, gisp scores", {"criterion": "gisp"}, (LSQ, KFAC)),
    ]
    if sizes.gqa:
        grouped = {"protect_last": 0, "gqa": "group"}
        changes += [
            ("fast, gqa query", {"gqa": "query"}, ()),
            ("fast, gqa group", {"gqa": "group"}, ()),
            ("fast, gqa group, last layer open", grouped, (LSQ, KFAC)),
            (
                f"fast, gqa group, last layer open, {doubled:,} tokens a step",
                {**grouped, "batch_tokens": doubled},
                (LSQ, KFAC),
            ),
        ]
    cells = []
    for seed in seeds:
        # The longest first: they would end last.
        cells += _exact_cells(seed, sizes) if seed < sizes.exact_seeds else []
        for name, options, compensate in changes:
            cells.append(Cell("criteria", name, {**sizes.fast, "seed": seed, **options}, seed, compensate=compensate))
        cells += _published_cells(seed, sizes, first=seed == seeds[0])
    return cells


def _exact_cells(seed: int, sizes: Sizes) -> list[Cell]:
    steps = {} if sizes.exact_steps is None else {"steps": sizes.exact_steps}
    named = f", {sizes.exact_steps} steps" if steps else ""
    return [
        Cell("criteria", f"{preset}{named}", {"preset": preset, "seed": seed, **steps}, seed, tokens=sizes.exact_tokens)
        for preset in ("paper", "official")
    ]


def _published_cells(seed: int, sizes: Sizes, *, first: bool) -> list[Cell]:
    """Criteria of the registry, in one shot; one that is registered with a single step has a run for each sparsity."""
    ways: list[tuple[str, dict[str, Any], Compensations]] = [
        ("gisp, one shot", {"criterion": "gisp"}, ()),
        ("second-order, one shot", {"criterion": "second-order"}, ()),
        ("owl", {"criterion": "wanda-sp", "allocator": "owl"}, ()),
    ]
    ways += [(name, {"criterion": name}, PUBLISHED.get(name, ())) for name in CRITERIA if name not in OWN_CELLS]
    cells = []
    for name, options, compensate in ways:
        if name == "magnitude" and not first:
            continue  # sees neither data nor seed
        trained = CRITERIA[options["criterion"]].options.get("steps") == 1
        if CRITERIA[options["criterion"]].trains and sizes.gate_steps is not None:
            options = {**options, "gate_steps": sizes.gate_steps}
        mode: Mode = "each size" if trained else "one shot"
        tokens = None if trained else sizes.steps * sizes.batch_tokens
        cells.append(
            Cell("criteria", name, {**options, "seed": seed}, seed, mode, tokens=tokens, compensate=compensate)
        )
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
    exact = {"engine": "exact", "ema": 0.0, "steps": steps // 4}
    for seed in seeds:
        cells.append(Cell("fast", f"exact, {steps // 4} steps", {**exact, "seed": seed}, seed, tokens=exact_tokens))
        for tokens in (exact_tokens // 8, exact_tokens // 2, 2 * exact_tokens):
            few = {**sizes.fast, "seed": seed}
            cells.append(Cell("fast", f"of {tokens:,} calibration tokens", few, seed, tokens=tokens))
    return cells


def default_cells(seeds: range, sizes: Sizes) -> list[Cell]:
    """Candidates for the defaults of ``fast``: how tokens are spread over steps, and rounds of regrowth."""
    few, many = sizes.steps // 2, sizes.steps
    tokens = sizes.batch_tokens
    grouped: dict[str, Any] = {"protect_last": 0, **({"gqa": "group"} if sizes.gqa else {})}
    ways: dict[str, dict[str, Any]] = {
        f"{few} x {4 * tokens:,}, 8 rounds": {"steps": few, "batch_tokens": 4 * tokens, "regrow": 8},
        f"{few} x {2 * tokens:,}, 8 rounds": {"steps": few, "batch_tokens": 2 * tokens, "regrow": 8},
        f"{few} x {4 * tokens:,}": {"steps": few, "batch_tokens": 4 * tokens},
        f"{many} x {2 * tokens:,}": {"steps": many, "batch_tokens": 2 * tokens},
        f"{few} x {2 * tokens:,}": {"steps": few, "batch_tokens": 2 * tokens},
        f"{many} x {tokens:,}": {"steps": many, "batch_tokens": tokens},
    }
    return [
        Cell("defaults", name, {"seed": seed, **grouped, **options}, seed)
        for seed in seeds
        for name, options in ways.items()
    ]


def compensation_cells(seeds: range, sizes: Sizes) -> list[Cell]:
    """Methods, targets, damping and calibration size of compensation, all on one run of ``fast``."""
    variants: list[dict[str, Any]] = [BIAS, AFFINE, RESCALE, LSQ, KFAC, GATES, DISTIL]
    variants += [{"method": method} for method in ("gates+kfac", "kfac+distil")]
    variants += [{"method": method, "target": "dense"} for method in ("bias", "affine", "rescale", "lsq", "kfac")]
    variants += [{"method": "lsq", "intercept": True}]
    variants += [{"method": "lsq", "damping": damping} for damping in (0.0, 0.001, 0.1)]
    variants += [{"method": "lsq", "tokens": tokens} for tokens in (8192, 32768, 524288)]
    variants += [{"method": "kfac", "steps": steps} for steps in (1, 2, 8)]
    variants += [{"method": "kfac", "tokens": tokens} for tokens in (8192, 32768)]
    variants += [{"method": "kfac", "damping": damping} for damping in (0.1, 2.0)]
    return [Cell("compensation", "fast", {**sizes.fast, "seed": s}, s, compensate=tuple(variants)) for s in seeds]


def task_cells(seeds: range, sizes: Sizes) -> list[Cell]:
    """Calibration on tasks: right against wrong choices, the right ones alone, plain text, and tasks with text."""
    choices = tuple(name for name in CHOICE_TASKS if name in sizes.tasks)
    kinds: list[tuple[str, str, tuple[str, ...]]] = [("lm on text", "lm", (TEXT,))]
    if choices:
        for objective in ("choice", "margin", "lm"):
            named = "lm on right answers" if objective == "lm" else objective
            kinds += [(named, objective, choices), (f"{named}, and text", objective, (*choices, TEXT))]
    if GENERATING_TASK in sizes.tasks:
        solutions = (GENERATING_TASK,)
        kinds += [("lm on solutions", "lm", solutions), ("lm on solutions, and text", "lm", (*solutions, TEXT))]
    return [
        Cell("task", name, {**sizes.fast, "seed": seed, "objective": objective}, seed, data=data)
        for seed in seeds
        for name, objective, data in kinds
    ]


STUDIES: dict[str, Callable[[range, Sizes], list[Cell]]] = {
    "criteria": criteria_cells,
    "fast": fast_cells,
    "defaults": default_cells,
    "compensation": compensation_cells,
    "task": task_cells,
}
"""The studies by name, in the order they run and are shown."""
