"""What a criterion is built from: a model, data, the options of the run and a forward pass over the data of a step."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field
from functools import cached_property, reduce
from typing import Any, Protocol

import torch
from torch import nn

from gisp.config.criteria import CRITERIA
from gisp.config.options import PruneConfig
from gisp.data import Sequences
from gisp.data.batches import StepBatches
from gisp.model.modes import deterministic, evaluation_mode
from gisp.model.shrink import ShrinkableModel
from gisp.model.structures import ModelMap
from gisp.replicas.group import Replicas
from gisp.score.objectives import SequenceLoss, sequence_nll
from gisp.stages.group import Stages
from gisp_kernels import ActivationStatistics, record_activations


class MaskedRecorder(Protocol):
    """A context manager that counts the tokens its ``mask`` allows; bool [B, S]."""

    mask: torch.Tensor | None

    def __enter__(self) -> object: ...

    def __exit__(self, *exception: object) -> None: ...


@dataclass(frozen=True, eq=False)
class Context:
    """What a criterion is built from.

    Attributes:
        shrinkable: the model, at the widths that the steps so far have left.
        data: calibration sequences.
        config: resolved options of the run.
        loss: a user's own loss per sequence instead of the mean NLL.
        replicas: the processes that score together; with ``slices`` alone.
        stages: where the model's layers lie, ``None`` where all are in this process.
    """

    shrinkable: ShrinkableModel
    data: Sequences
    config: PruneConfig
    loss: SequenceLoss | None = None
    replicas: Replicas = field(default_factory=Replicas)
    stages: Stages | None = None

    @property
    def map(self) -> ModelMap:
        """Layers and groups of the model."""
        return self.shrinkable.map

    @property
    def model(self) -> Any:
        """The model, a causal language model of transformers."""
        return self.map.model

    @property
    def device(self) -> torch.device:
        """Where scores are expected; layers may lie in host memory."""
        return self.weight.device

    @property
    def weight(self) -> torch.Tensor:
        """A weight of the model, for its device and dtype."""
        return self.map.weight

    @cached_property
    def steps(self) -> StepBatches:
        """Which sequences every step sees."""
        config = self.config
        return StepBatches(
            self.map,
            self.data,
            kind=str(config.engine),
            batch_size=config.batch_size,
            tokens=config.batch_tokens,
            seed=config.seed,
            parts=CRITERIA[config.criterion].gradient == "second-order",
        )

    def forward_pass(self, step: int, recorder: MaskedRecorder | None = None) -> tuple[torch.Tensor, int]:
        """Pass the sequences of a step (1-based) through the model without gradients.

        Args:
            recorder: entered for the passes, which are not shared with other processes then; its mask leaves out
                padding, and nothing else.

        Returns:
            The mean NLL of the sequences by their weights, 0-dim float64 on the device, and the tokens passed.
        """
        numbers, weights = self.steps.numbers(step), self.steps.weights(step)
        slices = self.config.slices
        if slices is None or recorder is not None:
            batches = list(self.steps.batches(numbers))
            return self._nll(numbers, weights, batches, recorder), self._tokens(numbers, batches)
        stretches = self._stretches(step, slices)
        loss = self.replicas.total(slices, lambda i: self._nll(*stretches[i], None)[None])[0]
        return loss, sum(self._tokens(own, batches) for own, _, batches in stretches)

    def statistics(
        self, step: int, linears: dict[str, nn.Linear]
    ) -> tuple[torch.Tensor, int, dict[str, ActivationStatistics]]:
        """What :meth:`forward_pass` returns, and statistics of what enters layers, merged slice by slice where split.

        Args:
            linears: layers on one device, by names of the caller.
        """
        if self.config.slices is None:
            recorder = record_activations(linears)
            return *self.forward_pass(step, recorder), recorder.statistics()
        stretches = self._stretches(step, self.config.slices)

        def sums_of(number: int) -> torch.Tensor:
            recorder = record_activations(linears)
            nll = self._nll(*stretches[number], recorder)
            found = recorder.statistics().values()
            return torch.cat([nll[None], *(p for s in found for p in (s.count[None], s.mean, s.deviation))])

        widths = [linear.weight.shape[1] for linear in linears.values()]
        sizes = [1, *(size for width in widths for size in (1, width, width))]
        parts = [part.split(sizes) for part in self.replicas.parts(len(stretches), sums_of)]
        merged = {}
        for number, name in enumerate(linears):
            own = [ActivationStatistics(p[1 + 3 * number][0], *p[2 + 3 * number : 4 + 3 * number]) for p in parts]
            merged[name] = reduce(ActivationStatistics.merged, own)
        loss = reduce(torch.add, [part[0][0] for part in parts])
        return loss, sum(self._tokens(own, batches) for own, _, batches in stretches), merged

    def _stretches(self, step: int, slices: int) -> list[tuple[list[int], list[float], list[tuple[int, int]]]]:
        """Numbers, weights and batches of every slice of a step."""
        numbers, weights = self.steps.numbers(step), self.steps.weights(step)
        parts = [(numbers[start:stop], weights[start:stop]) for start, stop in self.steps.slices(step, slices)]
        return [(own, of, list(self.steps.batches(own)) if own else []) for own, of in parts]

    def _nll(
        self,
        numbers: list[int],
        weights: list[float],
        batches: list[tuple[int, int]],
        recorder: MaskedRecorder | None,
    ) -> torch.Tensor:
        """The weighted sum of the NLL of sequences, 0-dim float64 on the device."""
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        active: contextlib.AbstractContextManager[object] = recorder or contextlib.nullcontext()
        with deterministic(self.device), evaluation_mode(self.model), torch.no_grad(), active:
            for start, stop in batches:
                ids, labels = self.data.batch(numbers[start:stop])
                if recorder is not None:
                    lengths = torch.tensor([len(self.data.rows[i][0]) for i in numbers[start:stop]])
                    recorder.mask = (torch.arange(ids.shape[1]) < lengths[:, None]).to(self.device)
                nll = sequence_nll(self.model, ids.to(self.device), labels.to(self.device))
                total += (nll * torch.tensor(weights[start:stop], device=self.device)).sum()
        return total

    def _tokens(self, numbers: list[int], batches: list[tuple[int, int]]) -> int:
        """Tokens of passes, padding included."""
        lengths = [len(self.data.rows[i][0]) for i in numbers]
        return sum((stop - start) * max(lengths[start:stop]) for start, stop in batches)
