"""Criteria that read what enters o_proj and down_proj (Wanda-sp, FLAP), and the outliers that OWL shares by.

A head, or a key/value head with its query heads, owns several columns of o_proj, a channel one of down_proj.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import nn

from gisp.model.structures import LayerMap
from gisp.score.base import StepScores, standardised
from gisp.score.context import Context
from gisp_kernels import ActivationStatistics, record_activations
from gisp_kernels.groups import StructureGroup, projections_of
from gisp_kernels.record.gates import gate_projection

# How many times the mean an outlier exceeds, OWL's M.
OUTLIER_FACTOR = 5.0


class ActivationScorer(ABC):
    """Scores columns of the projections that structures leave through, from the statistics of their inputs."""

    def __init__(self, context: Context) -> None:
        self._context = context

    def score(self, step: int, groups: list[StructureGroup]) -> StepScores:
        """Scores of ``groups`` at a step."""
        outputs = {group.name: gate_projection(group) for group in groups}
        loss, tokens, found = self._context.statistics(step, {name: output.linear for name, output in outputs.items()})
        scores = {
            name: self._scores(output.linear.weight.detach(), found[name], output.block)
            for name, output in outputs.items()
        }
        return StepScores.of(scores, loss, tokens)

    @abstractmethod
    def _scores(self, weight: torch.Tensor, inputs: ActivationStatistics, block: int) -> torch.Tensor:
        """float32 [structures] of ``block`` columns of ``weight`` each."""


class WandaSP(ActivationScorer):
    """``S_j = mean_i |W_ij| * sqrt(mean_t X_tj^2)``, summed over the columns of a structure.

    A baseline of FLAP (arXiv 2312.11983), after Wanda (arXiv 2306.11695).
    """

    def _scores(self, weight: torch.Tensor, inputs: ActivationStatistics, block: int) -> torch.Tensor:
        mean = weight.abs().sum(0, dtype=torch.float64) / weight.shape[0]
        return (mean * _rms(inputs)).view(-1, block).sum(1).float()


class FLAP(ActivationScorer):
    """``S_j = Var_t(X_tj) * ||W_:j||^2`` (WIFV), the mean over the columns of a structure (arXiv 2312.11983, Eq. 5).

    With ``norm`` "zscore" first standardised over all columns of the layer and module (Eq. 6). Columns, not heads: the
    mean over a head then spreads less than a channel does, as published.
    """

    def _scores(self, weight: torch.Tensor, inputs: ActivationStatistics, block: int) -> torch.Tensor:
        columns = inputs.variance * weight.double().square().sum(0)
        if self._context.config.norm == "zscore":
            columns = standardised(columns)
        return columns.view(-1, block).mean(1).float()


def outlier_ratios(context: Context, layers: list[int], factor: float = OUTLIER_FACTOR) -> dict[int, float]:
    """Part of each layer's weights, all seven Linear layers together, with ``A > factor * mean(A)`` (arXiv 2310.05175).

    ``A_ij = |W_ij| * sqrt(mean_t X_tj^2)``, measured on the sequences of step 1; waits for the device.

    Args:
        layers: numbers of the layers.
    """
    readers = {i: _readers(context.map.layers[i]) for i in layers}
    # Layers that read one input are recorded once.
    recorder = record_activations({f"{i}.{n}": read[0] for i in layers for n, read in enumerate(readers[i])})
    context.forward_pass(1, recorder)
    found = recorder.statistics()
    return {
        i: _outliers(
            [(linear, _rms(found[f"{i}.{n}"]).float()) for n, read in enumerate(readers[i]) for linear in read], factor
        )
        for i in layers
    }


def _outliers(weighted: list[tuple[nn.Linear, torch.Tensor]], factor: float) -> float:
    sizes = [linear.weight.detach().float().abs() * rms for linear, rms in weighted]
    elements = sum(size.numel() for size in sizes)
    total = torch.stack([size.sum(dtype=torch.float64) for size in sizes]).sum()
    limit = (factor * total / elements).float()
    return int(torch.stack([(size > limit).sum() for size in sizes]).sum()) / elements


def _rms(inputs: ActivationStatistics) -> torch.Tensor:
    """Root mean square of every column, float64."""
    return (inputs.sumsq / inputs.count.clamp_min(1)).sqrt()


def _readers(item: LayerMap) -> list[list[nn.Linear]]:
    """The layer's Linear layers, those that read one input together."""
    modules = {"self_attn": item.attention, "mlp": item.layer.mlp}
    return [
        [getattr(module, projection.name) for projection in projections_of(name) if projection.axis == axis]
        for name, module in modules.items()
        for axis in ("row", "column")
    ]
