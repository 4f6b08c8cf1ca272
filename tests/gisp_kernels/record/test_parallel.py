"""Recording in two processes over gloo: data parallelism, sharded weights and sums of scores."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from ranks import run_ranks
from recorder_oracle import Block, true_scores
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from gisp_kernels import record_importance, record_lines
from gisp_kernels.groups import Axis
from gisp_kernels.record.targets import Mode

RANKS = 2
AXES: tuple[Axis, ...] = ("row", "column")


def setting() -> tuple[Block, torch.Tensor]:
    """The same model everywhere, and two passes of every rank's own batch."""
    torch.manual_seed(7)
    model = Block()
    return model, torch.randn(RANKS, 2, 3, 5, 16)


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def assert_scores(scores: dict[str, torch.Tensor], truth: dict[str, torch.Tensor]) -> None:
    for name, expected in truth.items():
        found = scores[name.removeprefix("module.")] if name in scores else scores[f"module.{name}"]
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6 * float(expected.abs().max()))


def train(model: nn.Module, batches: torch.Tensor) -> dict[str, torch.Tensor]:
    """Two accumulated passes, one step of SGD, and a third pass; gradients by name."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for batch in batches:
        model(batch).pow(2).mean().backward()
    optimizer.step()
    model(batches[0]).pow(2).mean().backward()
    return {name: whole(p.grad).clone() for name, p in model.named_parameters() if p.grad is not None}


def truths(model: Block, batches: torch.Tensor, mode: Mode) -> dict[str, torch.Tensor]:
    """Scores of all ranks' passes together."""
    if mode == "second-order":
        alone = copy.deepcopy(model)
        with record_importance(alone, mode=mode) as recorder:
            for batch in batches.flatten(0, 1):
                alone.loss(batch).backward()
        return {name: scores.double() for name, scores in recorder.scores().items()}
    return true_scores(model, *batches.flatten(0, 1), exact=mode == "exact")


def data_parallel(mode: Mode) -> None:
    model, batches = setting()
    mine, truth = batches[distributed.get_rank()], truths(model, batches, mode)
    plain = train(DistributedDataParallel(copy.deepcopy(model)), mine)
    own = copy.deepcopy(model)
    wrapped = DistributedDataParallel(own)
    recorder = record_importance(wrapped, mode=mode, keep_grad=True, reduce_group=distributed.group.WORLD)
    with recorder:
        optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.1)
        for batch in mine:
            wrapped(batch).pow(2).mean().backward()
        scores = recorder.scores()
        assert_scores(scores, truth)
        assert_scores(recorder.scores(), truth)
        optimizer.step()
        wrapped(mine[0]).pow(2).mean().backward()
    found = {name: p.grad for name, p in wrapped.named_parameters()}
    assert found.keys() == plain.keys()
    assert all(torch.equal(found[name], grad) for name, grad in plain.items())  # type: ignore[arg-type]


def data_parallel_refuses() -> None:
    model, batches = setting()
    wrapped = DistributedDataParallel(model)
    with pytest.raises(RuntimeError, match=r"waits for the weight gradients .* pass keep_grad=True"):
        record_importance(wrapped)
    for target in (model, [model.mlp.up_proj]):
        with record_importance(target), pytest.raises(RuntimeError, match="inside DistributedDataParallel"):
            wrapped(batches[0, 0])
    forgiving = DistributedDataParallel(copy.deepcopy(model), find_unused_parameters=True)
    with record_importance(forgiving) as recorder:
        forgiving(batches[0, 0]).pow(2).mean().backward()
    assert_scores(recorder.scores(), true_scores(model, batches[0, 0]))


def sums_over_ranks() -> None:
    model, batches = setting()
    mine = batches[distributed.get_rank()]
    for mode in ("signed", "second-order"):
        found = {}
        for given, group in ((mine, distributed.group.WORLD), (batches.flatten(0, 1), None)):
            with record_importance(model, mode=mode, reduce_group=group) as recorder:
                for batch in given:
                    model.loss(batch).backward()
            found[group is None] = recorder.scores()
            if mode == "second-order":
                found[group is None] |= {f"sums of {name}": sums for name, sums in recorder.gate_sums().items()}
        for name, expected in found[True].items():
            torch.testing.assert_close(found[False][name], expected, rtol=1e-5, atol=1e-7)


def fully_sharded(mode: Mode) -> None:
    model, batches = setting()
    mine, truth = batches[distributed.get_rank()], truths(model, batches, mode)
    mesh = init_device_mesh("cpu", (RANKS,))
    found: dict[bool, dict[str, torch.Tensor]] = {}
    for recorded in (False, True):
        own = copy.deepcopy(model)
        for part in (own.attn, own.mlp, own):
            fully_shard(part, mesh=mesh)
        if not recorded:
            found[recorded] = train(own, mine)
            continue
        with pytest.raises(TypeError, match=r"is sharded .* pass keep_grad=True"):
            record_importance(own)
        recorder = record_importance(own, mode=mode, keep_grad=True, reduce_group=distributed.group.WORLD)
        local = record_importance(own, mode=mode, keep_grad=True)
        with recorder:
            for batch in mine:
                own(batch).pow(2).mean().backward()
            assert not recorder.coverage().unreached
            assert_scores(recorder.scores(), truth)
        own.zero_grad()
        with local:
            found[recorded] = train(own, mine)
            local.reset()
            own.zero_grad()
        assert all(not p._backward_hooks for p in own.parameters())
    assert found[True].keys() == found[False].keys()
    assert all(torch.equal(found[True][name], grad) for name, grad in found[False].items())


def fully_sharded_and_compiled(mode: Mode) -> None:
    """Compiled code must meet the parameter that a layer shows while it runs, whenever it was compiled."""
    model, batches = setting()
    mine, truth = batches[distributed.get_rank()], truths(model, batches, mode)
    mesh = init_device_mesh("cpu", (RANKS,))
    for when in ("before sharding", "before recording", "inside"):
        torch._dynamo.reset()
        own = copy.deepcopy(model)
        parts = (own.attn, own.mlp)
        if when == "before sharding":
            for part in parts:
                part.compile(backend="aot_eager")
        for module in (*parts, own):
            fully_shard(module, mesh=mesh)
        if when == "before recording":
            for part in parts:
                part.compile(backend="aot_eager")
            own(mine[0]).pow(2).mean().backward()
        with record_importance(own, mode=mode, keep_grad=True, reduce_group=distributed.group.WORLD) as recorder:
            if when == "inside":
                for part in parts:
                    part.compile(backend="aot_eager")
            for batch in mine:
                own(batch).pow(2).mean().backward()
            assert not recorder.coverage().unreached
            assert_scores(recorder.scores(), truth)
        assert all("forward" not in module.__dict__ for module in own.modules())


def flattened_refuses() -> None:
    for original in (False, True):
        wrapped = FullyShardedDataParallel(Block(), device_id=torch.device("cpu"), use_orig_params=original)
        for target in (wrapped, wrapped.module):
            for record in (record_importance, record_lines):
                with pytest.raises(RuntimeError, match="flattened and split: use fully_shard or ZeRO-2"):
                    record(target, keep_grad=True)


def tensor_parallel(mode: Mode) -> None:
    model, (batches, _) = Block(width=22), setting()[1]
    for parameter in model.parameters():
        distributed.broadcast(parameter.detach(), 0)
    truth = true_scores(model, *batches, exact=mode == "exact")
    lines = copy.deepcopy(model)
    with record_lines(lines, mode=mode) as alone:
        for batch in batches:
            lines.mlp(batch).pow(2).mean().backward()
    mesh = init_device_mesh("cpu", (RANKS,))
    plan = {"mlp.gate_proj": ColwiseParallel(), "mlp.up_proj": ColwiseParallel(), "mlp.down_proj": RowwiseParallel()}
    own = parallelize_module(copy.deepcopy(model), mesh, plan)
    with pytest.raises(TypeError, match=r"is sharded .* pass keep_grad=True"):
        record_importance(own)
    with (
        record_importance(own, mode="second-order", keep_grad=True),
        pytest.raises(RuntimeError, match="second-order scores do not read a layer split over processes"),
    ):
        own(batches[0])
    with record_importance(own, mode=mode, keep_grad=True) as recorder:
        for batch in batches:
            own(batch).pow(2).mean().backward()
    assert_scores(recorder.scores(), truth)
    with record_lines(own, mode=mode, keep_grad=True) as along:
        for batch in batches:
            own.get_submodule("mlp")(batch).pow(2).mean().backward()
    for name in ("gate_proj", "up_proj", "down_proj"):
        for axis in AXES:
            found = along.scores_of(own.get_submodule(f"mlp.{name}"), axis)
            torch.testing.assert_close(found, alone.scores_of(lines.get_submodule(f"mlp.{name}"), axis))


@pytest.mark.parametrize(
    ("work", "mode"),
    [
        *((work, mode) for work in (data_parallel, fully_sharded) for mode in ("stream", "exact", "second-order")),
        (fully_sharded_and_compiled, "exact"),
        (fully_sharded_and_compiled, "second-order"),
        (tensor_parallel, "stream"),
        (tensor_parallel, "exact"),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_training_in_parallel(tmp_path: Path, work: Callable[[Mode], None], mode: Mode) -> None:
    run_ranks(RANKS, tmp_path / "ranks", work, mode)


@pytest.mark.parametrize(
    "work", [data_parallel_refuses, sums_over_ranks, flattened_refuses], ids=lambda work: work.__name__
)
def test_ranks(tmp_path: Path, work: Callable[[], None]) -> None:
    run_ranks(RANKS, tmp_path / "ranks", work)
