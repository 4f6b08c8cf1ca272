"""Outliers of a layer: the part of its weights with ``|W_ij| * ||X_j||`` far above the mean (arXiv 2310.05175)."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from gisp.data.batches import StepBatches
from gisp.model.structures import LayerMap, ModelMap
from gisp.score.forward import forward_pass
from gisp_kernels import record_activations

# How many times the mean an outlier exceeds, OWL's M.
OUTLIER_FACTOR = 5.0


def outlier_ratios(
    model_map: ModelMap, steps: StepBatches, layers: list[int], factor: float = OUTLIER_FACTOR
) -> dict[int, float]:
    """Part of each layer's weights, all seven Linear layers together, with ``A > factor * mean(A)``.

    ``A_ij = |W_ij| * sqrt(mean_t X_tj^2)``, measured on the sequences of step 1; waits for the device.

    Args:
        layers: numbers of the layers.
    """
    readers = {(i, *names): linears for i in layers for names, linears in _inputs(model_map.layers[i]).items()}
    # Layers that read one input are recorded once.
    recorder = record_activations({str(key): linears[0] for key, linears in readers.items()})
    forward_pass(model_map, steps, 1, recorder)
    found = recorder.statistics()
    ratios = {}
    for i in layers:
        weighted = []
        for key, linears in readers.items():
            if key[0] == i:
                statistics = found[str(key)]
                rms = (statistics.sumsq / statistics.count.clamp_min(1)).sqrt().float()
                weighted += [(linear.weight.detach(), rms) for linear in linears]
        ratios[i] = _ratio(weighted, factor)
    return ratios


def _ratio(weighted: list[tuple[torch.Tensor, torch.Tensor]], factor: float) -> float:
    elements = sum(weight.numel() for weight, _ in weighted)
    total = torch.stack([(w.float().abs() * rms).sum(dtype=torch.float64) for w, rms in weighted]).sum()
    limit = (factor * total / elements).float()
    return int(torch.stack([(w.float().abs() * rms > limit).sum() for w, rms in weighted]).sum()) / elements


def _inputs(item: LayerMap) -> dict[tuple[str, ...], list[nn.Linear]]:
    """The layer's Linear layers, those that read one input together."""
    attention, mlp = item.attention, item.layer.mlp
    sharing: list[tuple[Any, tuple[str, ...]]] = [
        (attention, ("q_proj", "k_proj", "v_proj")),
        (attention, ("o_proj",)),
        (mlp, ("gate_proj", "up_proj")),
        (mlp, ("down_proj",)),
    ]
    return {names: [getattr(module, name) for name in names] for module, names in sharing}
