"""Options of a pruning run: their declarations, the presets that name sets of them, and what does not go together."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from gisp.config.criteria import ALLOCATORS, CRITERIA, GATE_DEFAULTS, names_with
from gisp.config.declare import declared_options, option, plain
from gisp.config.memory import amount_problem
from gisp.errors import GispError, quoted

DEFAULT_PRESET = "fast"
# The file in a run folder that holds its options, and what it calls data that have no name.
CONFIG_FILE = "config.yaml"
IN_MEMORY = "tokens in memory"
PRESETS: dict[str, dict[str, Any]] = {
    # One fresh batch a step, smoothed over steps; widths that keep GEMMs fast. Scores to second order, without a weight
    # gradient: what the quality study found best at every size, and no last layer is left out (benchmarks/RESULTS.md).
    "fast": {
        "criterion": "second-order",
        "engine": "stream",
        "norm": "params",
        "schedule": "parameters",
        "steps": 200,
        "protect_last": 0,
        "align": 16,
        "ema": 0.9,
        "gqa": "group",
        "keep_minimum": True,
    },
    # Algorithm 1 and Eq. 7-10 of the paper, read as removed parameters.
    "paper": {
        "criterion": "gisp",
        "engine": "exact",
        "norm": "params",
        "schedule": "parameters",
        "steps": 50,
        "protect_last": 1,
        "align": 1,
        "ema": 0.0,
        "gqa": "query",
        "keep_minimum": False,
    },
    # What the released code does: its normaliser, its schedule over structure counts, its threshold.
    "official": {
        "criterion": "gisp",
        "engine": "exact",
        "norm": "official",
        "schedule": "structures",
        "steps": 112,
        "protect_last": 1,
        "align": 1,
        "ema": 0.0,
        "gqa": "query",
        "keep_minimum": False,
    },
}
# What one shot sets where an option is not given. A shrunk first-order term measured worse in one shot
# (benchmarks/RESULTS.md).
_ONE_SHOT = {"engine": "exact", "steps": 1, "ema": 0.0, "first_order": "plain"}

GQA_MODES = {
    "query": "single query heads",
    "balanced": "equally many query heads of each key/value head",
    "group": "whole key/value heads, so that the cache shrinks",
}
OBJECTIVES = {
    "lm": "all tokens, or those of the completions",
    "completion": "tokens of completions; plain text is refused",
    "margin": "right against wrong answers",
    "choice": "likelihood of the right answer among all answers",
}
NORMS = {
    "params": "the parameters of a structure",
    "official": "the numbers of the released code",
    "zscore": "their standard deviation within a block, after the mean is subtracted",
    "none": "",
}
ENGINES = {"stream": "a fresh batch", "exact": "all data"}
SCHEDULES = {"parameters": "by parameters", "structures": "by the number of structures"}
DTYPES = ("bfloat16", "float32")
# Those that see wrong answers.
CHOOSING = ("margin", "choice")
OFFICIAL_RATIO = 0.7
# Parts of a step on several GPUs that hold the whole model: passes of 2,048 tokens of the default step keep a GPU busy,
# shorter ones wait for the host. In stages they are what passes through at the same time: fewer leave stages idle.
SLICES, STAGE_SLICES = 4, 8
# Options that say where a run is computed, not what it computes.
PLACE_OPTIONS = ("device", "offload", "gpu_memory")
OFFLOAD = {"never": "", "auto": "those that do not fit on the GPU", "always": "all"}

# What rounds of --regrow go with: they compare structures by second-order scores a parameter, on fresh batches.
_REGROWING = {
    "criterion": ("second-order",),
    "engine": ("stream",),
    "norm": ("params",),
    "allocator": ("global",),
    "schedule": ("parameters",),
    "gqa": ("query", "group"),
    "objective": ("lm", "completion"),
}

_SCORES = "Scores"
_LIMITS = "What may be removed"
_COMPUTE = "Compute"


@dataclass(frozen=True, kw_only=True)
class PruneConfig:
    """Resolved options of one run, made by :func:`make_config`; what is ``None`` the data or the device decide.

    ``python -m gisp.config.reference`` prints what each option means.
    """

    preset: str = option("Named set of defaults", DEFAULT_PRESET, choices=PRESETS)
    sparsity: float | None = option(
        "Share of the decoder layers' parameters to remove", None, unset="0.5, official: by its ratio", above=0, below=1
    )
    steps: int = option("Number of pruning steps", least=1)
    ratio: float | None = option(
        "Share of the number of structures to remove; only with schedule structures",
        None,
        unset=f"official: {OFFICIAL_RATIO}",
        above=0,
        below=1,
    )
    samples: int | None = option("Number of calibration sequences to use, the first ones", None, unset="all", least=1)
    seq_len: int | None = option("Tokens per sequence", None, unset="256; rows of token files as they are", least=2)
    batch_size: int | None = option("Sequences per backward pass", None, auto=True, unset="auto", least=1)
    batch_tokens: int = option("Tokens per step; only with engine stream", 8192, least=2, group=_COMPUTE)
    slices: int | None = option(
        "Parts of a step that are summed separately; any number of GPUs up to this gives the same run",
        None,
        unset=f"the step as a whole; {SLICES} on several GPUs, {STAGE_SLICES} with stages",
        least=1,
        below=1025,
        group=_COMPUTE,
    )
    objective: str = option("Loss that the scores refer to", "lm", choices=OBJECTIVES, open=True, group=_SCORES)
    criterion: str = option("Scores of structures", choices=CRITERIA, group=_SCORES)
    allocator: str = option(
        "How much each layer loses", choices=ALLOCATORS, unset="as published with the criterion", group=_SCORES
    )
    first_order: str = option(
        "First-order term of second-order scores",
        choices={"plain": "as it is", "shrunk": "weighed down by its noise"},
        unset="shrunk, in one shot plain",
        group=_SCORES,
    )
    gate_steps: int | None = option(
        "Training steps of the gates; only with criterion learned-gates",
        None,
        unset=f"{GATE_DEFAULTS['gate_steps']}",
        least=1,
        group=_SCORES,
    )
    gate_rate: float | None = option(
        "Learning rate of the gates; only with criterion learned-gates",
        None,
        unset=f"{GATE_DEFAULTS['gate_rate']}",
        above=0,
        group=_SCORES,
    )
    one_shot: bool = option(
        "Score once, on all calibration data, and remove everything in one step", False, group=_SCORES
    )
    norm: str = option("What scores are divided by", choices=NORMS, group=_SCORES)
    engine: str = option("Calibration data of each step", choices=ENGINES, group=_SCORES)
    regrow: int = option(
        "Rounds after the last step that exchange removed structures for present ones", 0, least=0, group=_SCORES
    )
    schedule: str = option("How equal steps are counted", choices=SCHEDULES, group=_LIMITS)
    protect_first: float = option("Share of the layers to protect at the input", 0.1, least=0, below=1, group=_LIMITS)
    protect_last: int = option("Number of layers to protect at the output", least=0, group=_LIMITS)
    align: int = option("Keep MLP widths at multiples of this", least=1, group=_LIMITS)
    keep_minimum: bool = option("Keep at least one head and one aligned MLP width in every layer", group=_LIMITS)
    ema: float = option("Weight of earlier steps in the moving average of scores", least=0, below=1, group=_SCORES)
    gqa: str = option("What is removed where query heads share key/value heads", choices=GQA_MODES, group=_LIMITS)
    seed: int = option("Seed of the order of the data", 0, least=0, group=_COMPUTE)
    device: str = option("Device: auto, cpu or cuda", "auto", group=_COMPUTE)
    dtype: str | None = option(
        "Dtype of weights and products",
        None,
        choices=DTYPES,
        unset="bfloat16 on a GPU, float32 on a CPU",
        group=_COMPUTE,
    )
    fp8: bool = option("Use 8-bit products when scoring", False, group=_COMPUTE)
    offload: str = option(
        "Decoder layers to keep in host memory and copy to the GPU in turn; without a value: always",
        "never",
        choices=OFFLOAD,
        bare="always",
        group=_COMPUTE,
    )
    gpu_memory: str | None = option(
        "Most GPU memory to take, as 24GB; only with offload", None, unset="all that is free", group=_COMPUTE
    )

    def to_dict(self) -> dict[str, Any]:
        """All options by name, as run folders keep them; :func:`make_config` takes them back."""
        return dataclasses.asdict(self)

    def conflicts(self) -> Iterator[str]:
        """One line for everything that does not go together."""
        what, criterion = CRITERIA[self.criterion], f"--criterion {self.criterion}"
        if self.ratio is not None and self.schedule != "structures":
            yield f"--ratio is {self.ratio}: it belongs to --schedule structures (preset official), give --sparsity"
        if self.batch_tokens != OPTIONS["batch_tokens"].default and self.engine != "stream":
            yield f"--batch-tokens {self.batch_tokens} belongs to --engine stream, not {self.engine}"
        if (self.objective in CHOOSING or "." in self.objective) and not what.sees_loss:
            yield f"{criterion} sees no loss: --objective {self.objective} needs one of {names_with('sees_loss')}"
        if self.first_order != "plain" and what.gradient != "second-order":
            yield f"--first-order {self.first_order} belongs to --criterion second-order, not {self.criterion}"
        if self.slices is not None and not what.adds_up:
            yield (
                f"--slices {self.slices}, which several GPUs need, goes with --criterion {names_with('adds_up')}, "
                f"not {self.criterion}: leave it and --gpus out"
            )
        if self.fp8 and not what.fp8:
            yield f"--fp8 goes with --criterion {names_with('fp8')}: leave it out"
        if self.fp8 and self.engine != "stream" and what.gradient != "second-order":
            yield "--fp8 goes with one batch a step: give --engine stream, or leave it out"
        yield from self._offload_conflicts()
        if what.whole_layers:
            if self.allocator != "global" or self.norm != "none":
                yield f"{criterion} ranks whole layers: leave --allocator and --norm out"
            if self.keep_minimum:
                yield f"{criterion} removes whole layers: keep_minimum cannot be true"
        if self.regrow:
            rounds = f"--regrow {self.regrow}"
            for name, needed in _REGROWING.items():
                value = getattr(self, name)
                if value not in needed:
                    yield f"{rounds} belongs to --{name} {' or '.join(needed)}, not {value}"
            if self.one_shot:
                yield f"{rounds} follows many steps: leave --one-shot out"
        for name in GATE_DEFAULTS:
            value = getattr(self, name)
            if not what.trains and value is not None:
                yield f"{OPTIONS[name].flag} {value} belongs to --criterion learned-gates, not {self.criterion}"
        if what.trains and self.schedule != "parameters":
            yield f"{criterion} trains to removed parameters: give --schedule parameters, not {self.schedule}"
        if what.trains and self.one_shot:
            yield f"{criterion} is trained, in one step by default: leave --one-shot out"
        if self.one_shot and (self.steps != 1 or self.ema):
            yield f"--one-shot is one step: leave --steps ({self.steps}) and --ema ({self.ema}) out"

    def _offload_conflicts(self) -> Iterator[str]:
        problem = None if self.gpu_memory is None else amount_problem(self.gpu_memory)
        if problem is not None:
            yield problem
        if self.offload == "never":
            if self.gpu_memory is not None:
                yield f"--gpu-memory {self.gpu_memory} belongs to --offload: give --offload auto, or leave it out"
            return
        given = f"--offload {self.offload}"
        if CRITERIA[self.criterion].gradient is None:
            yield f"{given} goes with --criterion {names_with('gradient')}, not {self.criterion}"
        if self.allocator == "owl":
            yield f"{given} does not go with --allocator owl, which watches all layers: give global or uniform"
        if self.regrow:
            yield f"{given} keeps no removed weights for --regrow {self.regrow}: leave one of the two out"


OPTIONS = declared_options(PruneConfig)


def make_config(**options: Any) -> PruneConfig:
    """A resolved config from keyword options (``None`` = not given).

    Raises:
        GispError: an unknown option, a value of another type or out of range, or options that do not go together.
    """
    given = {}
    for name, value in options.items():
        if name not in OPTIONS:
            raise GispError(f"unknown option {quoted(name)}: choose one of {', '.join(OPTIONS)}")
        value = plain(value)
        if value is not None and not (OPTIONS[name].auto and value == "auto"):
            OPTIONS[name].check(value)
            given[name] = value
    preset, one_shot = given.get("preset", DEFAULT_PRESET), given.get("one_shot", False)
    filled = {**_defaults(preset, given.get("criterion", PRESETS[preset]["criterion"]), one_shot), **given}
    if filled["schedule"] != "structures":
        filled.setdefault("sparsity", 0.5)
    elif "ratio" in filled:
        # A sparsity given alone is where the ratio schedule stops, a ratio given alone never stops early.
        filled["sparsity"] = None
    elif "sparsity" not in filled:
        filled["ratio"] = OFFICIAL_RATIO
    config = PruneConfig(**filled)
    for conflict in config.conflicts():
        raise GispError(conflict)
    return config


def criterion_text(options: dict[str, Any]) -> str:
    """A recorded run's criterion in words, with what second-order scores did with their first-order term."""
    criterion = str(options.get("criterion"))
    return f"{criterion}, first-order term {options.get('first_order')}" if criterion == "second-order" else criterion


def _defaults(preset: str, criterion: str, one_shot: bool) -> dict[str, Any]:
    """What a preset, a criterion and one shot set where an option is not given."""
    return {
        **PRESETS[preset],
        "first_order": "plain",
        **CRITERIA[criterion].defaults,
        **(_ONE_SHOT if one_shot else {}),
    }


def without_defaults(stored: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """A file's options, less the defaults of its preset, criterion and number of shots where others are given.

    The config of a run holds every resolved option, whether or not anyone asked for it.
    """
    preset = str(stored.get("preset", DEFAULT_PRESET))
    if preset not in PRESETS:
        return stored
    kind = {"preset": preset, "criterion": PRESETS[preset]["criterion"], "one_shot": False}
    kind |= {name: stored[name] for name in kind if name in stored}
    criterion = str(kind["criterion"])
    if criterion not in CRITERIA or all(given.get(name, value) == value for name, value in kind.items()):
        return stored
    defaults = {**_defaults(preset, criterion, bool(kind["one_shot"])), "ratio": OFFICIAL_RATIO}
    return {name: value for name, value in stored.items() if name not in defaults or defaults[name] != value}


def read_yaml(path: Path) -> dict[str, Any]:
    """Options from a YAML file of ``option: value`` lines (dashes and underscores are the same).

    Raises:
        GispError: a file that cannot be read, or holds something else.
    """
    try:
        loaded = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise GispError(f"cannot read config {path}: {error.strerror or error}") from None
    except (yaml.YAMLError, ValueError, TypeError, AttributeError, ArithmeticError, RecursionError) as error:
        # Beside its own errors PyYAML lets those of converting tagged values and of deep nesting through.
        where = " ".join(str(error).split())
        raise GispError(f"config {path} is not valid YAML: {where}") from None
    if loaded is None:
        return {}
    if not isinstance(loaded, dict):
        raise GispError(f"config {path} must map options to values, it holds {type(loaded).__name__}")
    return {str(key).replace("-", "_"): value for key, value in loaded.items()}
