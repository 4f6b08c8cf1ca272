"""Which processes, stages, slices and layers in host memory go together: one table, read before a process starts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from gisp.config.criteria import CRITERIA
from gisp.config.options import PruneConfig
from gisp.errors import GispError, quoted
from gisp.model.probe import PROVEN


@dataclass(frozen=True)
class Sharing:
    """What is asked of processes, and what of a run bears on that.

    Attributes:
        processes, stages: how many processes there are, and stages of each replica.
        layers, model_type: of the model, ``None`` where that is not known.
        slices, offload, criterion, objective, allocator, regrow: options of the run.
        own_loss: name of an objective of one's own, empty for none.
    """

    processes: int
    stages: int = 1
    layers: int | None = None
    model_type: str | None = None
    slices: int | None = None
    offload: str = "never"
    criterion: str = "second-order"
    objective: str = "lm"
    allocator: str = "global"
    regrow: int = 0
    own_loss: str = ""

    @classmethod
    def of(cls, config: PruneConfig, processes: int, stages: int, **known: Any) -> Sharing:
        """What a run of these options asks."""
        named = ("offload", "criterion", "objective", "allocator", "regrow")
        return cls(processes, stages, slices=config.slices or 1, **{n: getattr(config, n) for n in named}, **known)

    @property
    def replicas(self) -> int:
        """Whole models that the processes hold."""
        return self.processes // self.stages

    @property
    def fit(self) -> str:
        """Numbers of processes that make whole rows of stages."""
        more = (self.replicas + 1) * self.stages
        return f"--gpus {more - self.stages} or {more}" if self.replicas else f"--gpus {more}"


_PARTS = "--stages {0.stages} splits the model over processes"
# What cannot be, and the line that says so.
RULES: tuple[tuple[Callable[[Sharing], bool], str], ...] = (
    (
        lambda s: s.stages > s.processes == 1,
        "--stages {0.stages} needs as many processes: add --gpus {0.stages}, or start it by torchrun",
    ),
    (
        lambda s: s.processes % s.stages != 0,
        "--stages {0.stages} does not divide {0.processes} processes evenly: give {0.fit}",
    ),
    (
        lambda s: s.layers is not None and s.layers < s.stages,
        "--stages {0.stages} is more than the {0.layers} layers of this model: give at most that many",
    ),
    (
        lambda s: s.stages > 1 and s.model_type is not None and s.model_type not in PROVEN,
        "model type {0.model_type!r} was never tried in stages: leave --stages out",
    ),
    (
        lambda s: s.stages > 1 and CRITERIA[s.criterion].gradient != "second-order",
        _PARTS + ", which goes with --criterion second-order, not {0.criterion}: leave one out",
    ),
    (
        lambda s: s.stages > 1 and bool(s.own_loss),
        _PARTS + ": an objective of your own needs all of it, leave --stages out",
    ),
    (
        lambda s: s.stages > 1 and s.objective == "choice",
        _PARTS + ": --objective choice passes data through all of it, leave one of them out",
    ),
    (
        lambda s: s.stages > 1 and s.allocator == "owl",
        _PARTS + ": --allocator owl passes data through all of it, leave one of them out",
    ),
    (
        lambda s: s.stages > 1 and s.regrow > 0,
        _PARTS + ": --regrow {0.regrow} passes data through all of it, leave one of them out",
    ),
    (
        lambda s: s.stages > 1 and s.offload != "never",
        _PARTS + ", --offload {0.offload} leaves layers in host memory: give one of them",
    ),
    (
        lambda s: s.processes > 1 and s.offload != "never",
        "--offload {0.offload} is for one GPU, {0.processes} processes share this run: leave one of them out",
    ),
    (
        lambda s: bool(s.own_loss) and s.offload != "never",
        "--offload {0.offload} computes the loss in its own way: objective {0.own_loss} needs the whole model on the "
        "GPU",
    ),
    (
        lambda s: s.slices is not None and s.slices < s.replicas,
        "--slices {0.slices} is less than the {0.replicas} replicas of {0.processes} processes: give --slices "
        "{0.replicas} or more, or fewer processes",
    ),
)


def check_count(stages: Any) -> None:
    """Refuse what is no number of stages, from Python.

    Raises:
        GispError: it is no whole number of at least 1.
    """
    if type(stages) is not int or stages < 1:
        raise GispError(f"stages is {quoted(stages)}: give a whole number of at least 1")


def check_sharing(asked: Sharing) -> None:
    """Refuse what cannot be.

    Raises:
        GispError: the first rule that is broken, with the values and what to give.
    """
    for broken, words in RULES:
        if broken(asked):
            raise GispError(words.format(asked))
