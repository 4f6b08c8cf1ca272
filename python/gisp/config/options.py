"""Options of a pruning run, the presets that name sets of them, and their YAML form."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from gisp.config.criteria import ALLOCATORS, CRITERIA, names_with
from gisp.errors import GispError

PRESETS: dict[str, dict[str, Any]] = {
    # One fresh batch a step, smoothed over steps; widths that keep GEMMs fast. Scores to second order, without a weight
    # gradient: what the quality study found best at every size (benchmarks/RESULTS.md).
    "fast": {
        "criterion": "second-order",
        "engine": "stream",
        "norm": "params",
        "schedule": "parameters",
        "steps": 200,
        "align": 16,
        "ema": 0.9,
        "keep_minimum": True,
    },
    # Algorithm 1 and Eq. 7-10 of the paper, read as removed parameters.
    "paper": {
        "criterion": "gisp",
        "engine": "exact",
        "norm": "params",
        "schedule": "parameters",
        "steps": 50,
        "align": 1,
        "ema": 0.0,
        "keep_minimum": False,
    },
    # What the released code does: its normaliser, its schedule over structure counts, its threshold.
    "official": {
        "criterion": "gisp",
        "engine": "exact",
        "norm": "official",
        "schedule": "structures",
        "steps": 112,
        "align": 1,
        "ema": 0.0,
        "keep_minimum": False,
    },
}

# What goes where query heads share key/value heads. ``query``: any query head on its own; ``balanced``: query heads,
# equally many of every key/value head of a layer; ``group``: a key/value head with all query heads that share it.
GQA_MODES = ("query", "balanced", "group")

# lm: every token, or the completion's alone; completion: a completion's, plain text is refused; margin: gold against
# wrong answers; choice: how likely the gold one is among them.
OBJECTIVES = ("lm", "completion", "margin", "choice")
# Those that see wrong answers.
CHOOSING = ("margin", "choice")

CHOICES: dict[str, Collection[str]] = {
    "preset": tuple(PRESETS),
    "objective": OBJECTIVES,
    # A view: users register criteria of their own.
    "criterion": CRITERIA.keys(),
    "allocator": ALLOCATORS,
    "first_order": ("plain", "shrunk"),
    "norm": ("params", "official", "none", "zscore"),
    "engine": ("stream", "exact"),
    "gqa": GQA_MODES,
    "schedule": ("parameters", "structures"),
    "dtype": ("bfloat16", "float32"),
}
OFFICIAL_RATIO = 0.7
# Far above any sensible count and far below what overflows a tensor of them.
_LARGEST = 2**31 - 1
# Options that say where and how fast a run is computed, not what it computes.
PLACE_OPTIONS = ("device",)
# What a run did that is older than an option whose default depends on others.
_UNRECORDED = {"criterion": "gisp", "allocator": "global", "first_order": "plain"}
# What --one-shot sets where an option is not given.
# A shrunk first-order term measured worse in one shot (benchmarks/RESULTS.md).
_ONE_SHOT = {"engine": "exact", "steps": 1, "ema": 0.0, "first_order": "plain"}


@dataclass(frozen=True)
class PruneConfig:
    """Resolved options of one run; ``None`` on input means the preset's or the library's default.

    Attributes:
        preset: ``fast``, ``paper`` or ``official``.
        sparsity: removed / all parameters of the decoder layers at the end; for ``official`` without
            a given value the ratio alone ends the run (``None``).
        steps: number of pruning steps.
        ratio: final fraction of the number of structures (``official`` only); with a sparsity instead, the schedule of
            the released code's default ratio runs until that sparsity is passed.
        samples: calibration sequences used (``None`` = all).
        criterion: where scores come from, one of :data:`gisp.config.criteria.CRITERIA`; ``None`` = the preset's.
        allocator: how blocks compete: ``global`` by their scores, ``uniform`` the same fraction of every block, ``owl``
            a fraction per layer by its outliers; ``None`` = as the criterion was published.
        first_order: of second-order scores: ``shrunk`` by its noise (see :mod:`gisp.score.first_order`), their default
            but in one shot, or ``plain``.
        one_shot: everything goes in one step, scored once over all calibration data.
        seq_len: tokens per sequence; ``None`` = 256 for text, the row length for token files.
        batch_size: sequences per backward pass (``stream``: per microbatch), ``None`` = chosen.
        batch_tokens: tokens of one step of the ``stream`` engine.
        objective: ``lm``, ``completion``, ``margin`` or ``choice``, or the qualified name (with a dot) of a user's own
            loss.
        protect_first: fraction of the layers protected at the input end, ``int(fraction * layers)``.
        protect_last: number of layers protected at the output end.
        align: width multiple for MLP channels.
        ema: weight of the past in the moving average of scores over steps.
        gqa: one of ``GQA_MODES``; where no key/value head is shared they are all the same.
        fp8: 8-bit products of the decoder layers in the importance pass (weight gradients and the sums of scores stay
            as they are); ``stream`` only but for second-order scores.
    """

    preset: str = "fast"
    sparsity: float | None = None
    steps: int | None = None
    ratio: float | None = None
    samples: int | None = None
    seq_len: int | None = None
    batch_size: int | None = None
    batch_tokens: int = 8192
    objective: str = "lm"
    criterion: str | None = None
    allocator: str | None = None
    first_order: str | None = None
    one_shot: bool = False
    norm: str | None = None
    engine: str | None = None
    schedule: str | None = None
    protect_first: float = 0.1
    protect_last: int = 1
    align: int | None = None
    keep_minimum: bool | None = None
    ema: float | None = None
    gqa: str = "query"
    seed: int = 0
    device: str = "auto"
    dtype: str | None = None
    fp8: bool = False

    def resolve(self) -> PruneConfig:
        """Fill in the preset's values and check every option.

        Raises:
            GispError: an unknown choice or a value out of range, naming option and value.
        """
        if self.preset not in PRESETS:
            raise GispError(_unknown("preset", self.preset))
        preset = PRESETS[self.preset]
        criterion = preset["criterion"] if self.criterion is None else self.criterion
        if criterion not in CRITERIA:
            raise GispError(_unknown("criterion", criterion))
        filled = _defaults(self.preset, criterion, self.one_shot)
        filled.update({k: v for k, v in dataclasses.asdict(self).items() if v is not None})
        if filled["schedule"] == "structures":
            # A sparsity given alone is where the ratio schedule stops, a ratio given alone never stops early.
            if filled.get("ratio") is not None:
                filled["sparsity"] = None
            elif filled.get("sparsity") is None:
                filled["ratio"] = OFFICIAL_RATIO
        else:
            if filled.get("ratio") is not None:
                raise GispError(f"--ratio is {filled['ratio']}: it belongs to --preset official, give --sparsity")
            filled.setdefault("sparsity", 0.5)
        config = dataclasses.replace(self, **filled)
        config._check()
        return config

    def _check(self) -> None:
        for name, allowed in CHOICES.items():
            value = getattr(self, name)
            if value is not None and value not in allowed and not (name == "objective" and "." in value):
                raise GispError(_unknown(name, value))
        self._check_criterion()
        _between("sparsity", self.sparsity, 0, 1)
        _between("ratio", self.ratio, 0, 1)
        _at_least("steps", self.steps, 1)
        _at_least("samples", self.samples, 1)
        _at_least("seq-len", self.seq_len, 2)
        _at_least("batch-size", self.batch_size, 1)
        _at_least("batch-tokens", self.batch_tokens, 2)
        _at_least("align", self.align, 1)
        _at_least("protect-last", self.protect_last, 0)
        if self.fp8 and self.engine == "exact" and self.criterion != "second-order":
            raise GispError("--fp8 goes with one batch a step: give --engine stream, or leave it out")
        if not 0 <= self.seed < 2**31:
            raise GispError(f"--seed is {self.seed}: give a number from 0 to {2**31 - 1}")
        if not 0 <= self.protect_first < 1:
            raise GispError(f"--protect-first is {self.protect_first}: give a fraction in [0, 1)")
        if self.ema is not None and not 0 <= self.ema < 1:
            raise GispError(f"--ema is {self.ema}: give a weight in [0, 1)")

    def _check_criterion(self) -> None:
        """What does not go together with a criterion or with one shot."""
        what, criterion = CRITERIA[str(self.criterion)], f"--criterion {self.criterion}"
        if (self.objective in CHOOSING or "." in self.objective) and not what.sees_loss:
            raise GispError(
                f"{criterion} sees no loss: --objective {self.objective} needs one of {names_with('sees_loss')}"
            )
        if self.first_order != "plain" and what.gradient != "second-order":
            raise GispError(
                f"--first-order {self.first_order} belongs to --criterion second-order, not {self.criterion}"
            )
        if self.fp8 and not what.fp8:
            raise GispError(f"--fp8 goes with --criterion {names_with('fp8')}: leave it out")
        if what.whole_layers:
            if self.allocator != "global" or self.norm != "none":
                raise GispError(f"{criterion} ranks whole layers: leave --allocator and --norm out")
            if self.keep_minimum:
                raise GispError(f"{criterion} removes whole layers: keep_minimum cannot be true")
        if self.one_shot and (self.steps != 1 or self.ema):
            raise GispError(f"--one-shot is one step: leave --steps ({self.steps}) and --ema ({self.ema}) out")

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def _unknown(name: str, value: object) -> str:
    return f"unknown {name} {value!r}: choose one of {', '.join(CHOICES[name])}"


def _between(name: str, value: float | None, low: float, high: float) -> None:
    if value is not None and not (math.isfinite(value) and low < value < high):
        raise GispError(f"--{name} is {value}: give a value between {low} and {high}")


def _at_least(name: str, value: int | None, low: int) -> None:
    if value is not None and value < low:
        raise GispError(f"--{name} is {value}: give at least {low}")
    if value is not None and value > _LARGEST:
        raise GispError(f"--{name} is {value}: give at most {_LARGEST}")


FIELDS = {field.name: field for field in dataclasses.fields(PruneConfig)}
_TYPES: dict[str, tuple[type, ...]] = {
    "float": (int, float),
    "int": (int,),
    "str": (str,),
    "bool": (bool,),
}


def make_config(**options: Any) -> PruneConfig:
    """A resolved config from keyword options (``None`` = not given).

    Raises:
        GispError: unknown option, wrong type or value.
    """
    # Plain numbers: what a run stores is JSON and YAML.
    options = {name: value.item() if isinstance(value, np.generic) else value for name, value in options.items()}
    for name, value in options.items():
        if name not in FIELDS:
            raise GispError(f"unknown option {name!r}: choose one of {', '.join(FIELDS)}")
        kind = str(FIELDS[name].type).split(" ")[0]
        right = isinstance(value, _TYPES[kind]) and (kind == "bool") == isinstance(value, bool)
        if value is not None and not right:
            raise GispError(f"option {name} is {value!r}: give a {kind}")
    given = {name: value for name, value in options.items() if value is not None}
    return PruneConfig(**given).resolve()


def recorded(options: dict[str, Any], name: str) -> Any:
    """An option of a run as it was recorded; a run older than the option did what is its default now."""
    return options.get(name, _UNRECORDED.get(name, getattr(PruneConfig, name)))


def criterion_text(options: dict[str, Any]) -> str:
    """A recorded run's criterion in words, with what second-order scores did with their first-order term."""
    criterion = str(recorded(options, "criterion"))
    if criterion != "second-order":
        return criterion
    return f"{criterion}, first-order term {recorded(options, 'first_order')}"


def _defaults(preset: str, criterion: str, one_shot: bool) -> dict[str, Any]:
    """What a preset, a criterion (an unknown one nothing) and one shot set where an option is not given."""
    shots = _ONE_SHOT if one_shot else {}
    own = CRITERIA[criterion].defaults if criterion in CRITERIA else {}
    return {**PRESETS[preset], "first_order": "plain", **own, **shots}


def without_defaults(stored: dict[str, Any], asked: dict[str, Any]) -> dict[str, Any]:
    """A file's options, less the defaults of its preset, criterion and number of shots where others are asked for.

    The config of a run holds every resolved option, whether or not anyone asked for it.
    """
    preset = str(stored.get("preset", PruneConfig.preset))
    if preset not in PRESETS:
        return stored
    kind = {"preset": PruneConfig.preset, "criterion": PRESETS[preset]["criterion"], "one_shot": False}
    kind |= {name: stored[name] for name in kind if name in stored}
    if {**kind, **{name: asked[name] for name in kind if name in asked}} == kind:
        return stored
    defaults = _defaults(preset, str(kind["criterion"]), bool(kind["one_shot"]))
    return {name: value for name, value in stored.items() if name not in defaults or defaults[name] != value}


def read_yaml(path: Path) -> dict[str, Any]:
    """Options from a YAML file of ``option: value`` lines (dashes and underscores are the same)."""
    try:
        loaded = yaml.safe_load(path.read_text())
    except OSError as error:
        raise GispError(f"cannot read config {path}: {error.strerror or error}") from None
    except (yaml.YAMLError, ValueError, AttributeError, RecursionError) as error:
        # Beside its own errors PyYAML lets those of converting tagged values and of deep nesting through.
        where = " ".join(str(error).split())
        raise GispError(f"config {path} is not valid YAML: {where}") from None
    if not isinstance(loaded, dict):
        raise GispError(f"config {path} must map options to values, it holds {type(loaded).__name__}")
    return {str(key).replace("-", "_"): value for key, value in loaded.items()}
