"""How long the GPU itself works on an importance pass: what a step takes beyond that, the host or the disk take."""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks.prune.measure import Setting
from gisp.config.criteria import CRITERIA
from gisp.model.modes import deterministic
from gisp.model.structures import ModelMap
from gisp.score.fused import ImportancePass, MicroBatch


def pass_gpu_time(model_map: ModelMap, tokens: torch.Tensor, setting: Setting) -> dict[str, Any]:
    """Seconds of all kernels of one pass over a step's tokens, and their number.

    Args:
        model_map: of a model on a GPU, at the widths it has.
        tokens: int64 [N, S] on the CPU.
    """
    ids = tokens[: max(1, setting.batch_tokens // tokens.shape[1])]
    batch = MicroBatch(ids, ids, [1 / len(ids)] * len(ids))
    scored = [(group.name, group.count) for group in model_map.groups if group.count]
    fused = ImportancePass(model_map)
    run = fused.gate_sums if CRITERIA[setting.criterion].gradient == "second-order" else fused.score
    with deterministic(model_map.weight.device):
        run([batch], scored)
        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CUDA]) as found:
            run([batch], scored)
            torch.cuda.synchronize()
    kernels = [event for event in found.key_averages() if event.device_type == DeviceType.CUDA]
    microseconds = sum(event.self_device_time_total for event in kernels)
    return {"seconds": microseconds / 1e6, "kernels": sum(event.count for event in kernels)}
