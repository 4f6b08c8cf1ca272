"""One step's partition of a whole model, and giving back what a run to one half removed."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from benchmarks.common.measure import Ceilings, summarised
from benchmarks.common.registry import MODELS, REAL, Model
from benchmarks.common.task import AUTO, Row, Task, rates, with_speedups
from gisp_kernels import Compactor, StructureGroup, attention_group, mlp_group

STEP_SHARE = 0.0025
HALF_SHARE = 0.5
GATHER = "gather all"
_REPETITIONS = 15
_PACKS = 3
# Layers whose weights are compared bit for bit.
_WATCHED = (0, -1)

Removals = dict[str, torch.Tensor]


def tasks(quick: bool) -> list[Task]:
    """Tasks of this file."""
    models = REAL[:1] if quick else REAL
    return [
        Task(op, {"model": name, "share": share}, measure_itself=partial(run, MODELS[name], share))
        for name in models
        for op, share, run in (("partition_step", STEP_SHARE, _time_step), ("pack", HALF_SHARE, _time_pack))
    ]


def build_groups(model: Model, device: str = "cuda", dtype: torch.dtype = torch.bfloat16) -> list[StructureGroup]:
    """Heads and channels of a model of real shape with random weights, without the rest of the model."""
    groups = []

    def linear(out_features: int, in_features: int) -> nn.Linear:
        layer = nn.Linear(1, 1, bias=False, device="meta")
        weight = torch.randn(out_features, in_features, device=device, dtype=dtype)
        layer.weight = nn.Parameter(weight, requires_grad=False)
        layer.out_features, layer.in_features = out_features, in_features
        return layer

    rows, kv_rows = model.heads * model.head_dim, model.kv_heads * model.head_dim
    for number in range(model.layers):
        attention = SimpleNamespace(
            head_dim=model.head_dim,
            num_key_value_groups=model.heads // model.kv_heads,
            q_proj=linear(rows, model.hidden),
            k_proj=linear(kv_rows, model.hidden),
            v_proj=linear(kv_rows, model.hidden),
            o_proj=linear(model.hidden, rows),
        )
        mlp = SimpleNamespace(
            gate_proj=linear(model.channels, model.hidden),
            up_proj=linear(model.channels, model.hidden),
            down_proj=linear(model.hidden, model.channels),
        )
        groups += [attention_group(f"{number}.heads", attention), mlp_group(f"{number}.channels", mlp)]
    return groups


def choose(groups: Sequence[StructureGroup], share: float, seed: int) -> Removals:
    """A random share of all structures together, by group."""
    counts = [group.count for group in groups]
    total = sum(counts)
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(total, generator=generator)[: round(share * total)].sort().values
    removals, start = {}, 0
    for group, count in zip(groups, counts, strict=True):
        own = chosen[(chosen >= start) & (chosen < start + count)] - start
        # A group that lost everything would not be partitioned but emptied.
        removals[group.name] = own[: count - 1]
        start += count
    return {name: index for name, index in removals.items() if len(index)}


class Watch:
    """Copies of a few groups' dense weights, to compare with what a step leaves."""

    def __init__(self, groups: Sequence[StructureGroup]) -> None:
        self._groups = [group for layer in _WATCHED for group in groups[2 * layer :][:2]]
        self._dense = [[p.linear.weight.detach().clone() for p in group.projections] for group in self._groups]

    def check(self, compactor: Compactor) -> None:
        """Raises AssertionError unless the kept structures are there, bit for bit, in the order the compactor tells."""
        for group, dense in zip(self._groups, self._dense, strict=True):
            kept = compactor.order(group.name)[: compactor.kept(group.name)]
            for projection, weight in zip(group.projections, dense, strict=True):
                expected = _gather(weight, kept, projection.axis, projection.block)
                assert torch.equal(projection.linear.weight, expected), f"{group.name}: kept weights differ"


def _gather(weight: torch.Tensor, kept: torch.Tensor, axis: str, block: int) -> torch.Tensor:
    index = (kept[:, None] * block + torch.arange(block)).flatten().to(weight.device)
    return weight.index_select(0 if axis == "row" else 1, index)


def _time_step(model: Model, share: float, peak: Ceilings) -> list[Row]:
    """Wall and device time of one step, host planning included; the baseline writes all kept weights anew."""
    groups = build_groups(model)
    watch, compactor = Watch(groups), Compactor(groups)
    removals = choose(groups, share, 0)
    structures = sum(len(index) for index in removals.values())
    try:
        compactor.remove(removals)
        watch.check(compactor)
        compactor.rollback()
        watch.check(compactor)
    except (AssertionError, RuntimeError) as error:
        return [{"implementation": AUTO, "red": str(error)}]
    moved = _pair_bytes(groups, removals)
    step = _wall(lambda: compactor.remove(removals), compactor.rollback, _REPETITIONS)
    indices = [_kept_indices(group, removals.get(group.name)) for group in groups]
    gather = _wall(lambda: _gather_all(groups, indices), lambda: None, _REPETITIONS)
    row = {"implementation": AUTO, "structures": structures, "bytes_moved": moved, **step}
    return with_speedups([row, {"implementation": GATHER, **gather}], GATHER)


def _time_pack(model: Model, share: float, peak: Ceilings) -> list[Row]:
    """Wall time of pack() after a share of all structures is gone; every repetition is a model of its own."""
    packs: list[Row] = []
    gather: Row = {}
    moved = 0
    for number in range(_PACKS):
        groups = build_groups(model)
        watch, compactor = Watch(groups), Compactor(groups)
        removals = choose(groups, share, number)
        if not gather:
            indices = [_kept_indices(group, removals.get(group.name)) for group in groups]
            gather = _wall(partial(_gather_all, groups, indices), lambda: None, 5)
            del indices
        compactor.remove(removals)
        moved = 2 * compactor.bytes_packed()
        packs.append(_wall(compactor.pack, lambda: None, 1, warm=False))
        try:
            watch.check(compactor)
        except AssertionError as error:
            return [{"implementation": AUTO, "red": str(error)}]
        del groups, watch, compactor
    times = [pack["median_ms"] for pack in packs]
    extra = max(pack["extra_bytes"] for pack in packs)
    row = {"implementation": AUTO, **summarised(times), "extra_bytes": extra, "bytes_moved": moved}
    row |= rates(0, moved, row["median_ms"], peak)
    gather |= rates(0, moved, gather["median_ms"], peak)
    return with_speedups([row, {"implementation": GATHER, **gather}], GATHER)


def _wall(run: Callable[[], Any], undo: Callable[[], Any], repetitions: int, *, warm: bool = True) -> Row:
    """Wall milliseconds of ``run`` until the GPU is done, and milliseconds of the GPU; ``undo`` is not timed."""
    if warm:
        run()
        undo()
    torch.cuda.synchronize()
    wall, device, extra = [], [], 0
    for _ in range(repetitions):
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start = time.perf_counter()
        begin.record()
        run()
        end.record()
        torch.cuda.synchronize()
        wall.append(1000 * (time.perf_counter() - start))
        device.append(begin.elapsed_time(end))
        extra = max(extra, torch.cuda.max_memory_allocated() - before)
        undo()
        torch.cuda.synchronize()
    return {
        **summarised(wall),
        "device_ms": statistics.median(device),
        "extra_bytes": extra,
    }


def _kept_indices(group: StructureGroup, removed: torch.Tensor | None) -> list[tuple[torch.Tensor, int]]:
    """For every projection of a group the rows or columns that stay, int64 on the device, and their dimension."""
    keep = torch.ones(group.count, dtype=torch.bool)
    if removed is not None:
        keep[removed] = False
    kept = keep.nonzero().flatten()
    found = []
    for projection in group.projections:
        index = (kept[:, None] * projection.block + torch.arange(projection.block)).flatten()
        found.append((index.to(projection.linear.weight.device), 0 if projection.axis == "row" else 1))
    return found


def _gather_all(groups: Sequence[StructureGroup], indices: Sequence[Sequence[tuple[torch.Tensor, int]]]) -> None:
    """What plain PyTorch does: every kept weight written anew, one at a time."""
    for group, own in zip(groups, indices, strict=True):
        for projection, (index, dim) in zip(group.projections, own, strict=True):
            projection.linear.weight.detach().index_select(dim, index)


def _pair_bytes(groups: Sequence[StructureGroup], removals: Removals) -> int:
    """Bytes a partition reads and writes at most: every removed structure trades places with one that is kept."""
    total = 0
    for group in groups:
        count = len(removals.get(group.name, ()))
        for projection in group.projections:
            weight = projection.linear.weight
            total += 4 * count * projection.block * weight.numel() // projection.width * weight.element_size()
    return total
