"""Recording on two GPUs over NCCL: gradients as without a recorder, scores as one process has them."""

from __future__ import annotations

import copy
import os
from pathlib import Path

import pytest
import torch
from ranks import run_ranks
from recorder_oracle import Block, true_scores
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DataParallel, DistributedDataParallel

from gisp_kernels import record_importance

pytestmark = pytest.mark.gpu

RANKS = 2


def setting() -> tuple[Block, torch.Tensor, torch.device]:
    device = torch.device("cuda", distributed.get_rank())
    torch.cuda.set_device(device)
    torch.manual_seed(7)
    model = Block(hidden=256, heads=4, head_dim=64, width=640)
    return model.to(device), torch.randn(RANKS, 2, 64, 256).to(device), device


def parallel(kind: str, store: str) -> None:
    rank = distributed.get_rank()
    distributed.destroy_process_group()
    distributed.init_process_group("nccl", init_method=f"file://{store}", rank=rank, world_size=RANKS)
    # Gradients are compared to the bit.
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    torch.use_deterministic_algorithms(True)
    model, batches, device = setting()
    truth = true_scores(model, *batches)
    grads: list[dict[str, torch.Tensor]] = []
    for recorded in (False, True):
        own = copy.deepcopy(model)
        if kind == "ddp":
            run = DistributedDataParallel(own, device_ids=[device.index])
        else:
            mesh = init_device_mesh("cuda", (RANKS,))
            for part in (own.attn, own.mlp, own):
                fully_shard(part, mesh=mesh)
            run = own  # type: ignore[assignment]
        mine = batches[distributed.get_rank()]
        if recorded:
            with record_importance(own, keep_grad=True, reduce_group=distributed.group.WORLD) as recorder:
                run(mine).pow(2).mean().backward()
            for name, expected in truth.items():
                found = recorder.scores()[name].cpu().double()
                torch.testing.assert_close(found, expected, rtol=1e-4, atol=0.0)
        else:
            run(mine).pow(2).mean().backward()
        grads.append({name: p.grad for name, p in own.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    for name, expected in grads[0].items():
        one, other = (getattr(g, "to_local", lambda g=g: g)() for g in (grads[1][name], expected))
        assert torch.equal(one, other), name


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_two_gpus(tmp_path: Path, kind: str) -> None:
    if torch.cuda.device_count() < RANKS:
        pytest.skip("needs two GPUs")
    run_ranks(RANKS, tmp_path / "ranks", parallel, kind, str(tmp_path / "store"))


def test_copies_on_two_gpus() -> None:
    if torch.cuda.device_count() < RANKS:
        pytest.skip("needs two GPUs")
    model = Block(hidden=256, heads=4, head_dim=64, width=640).cuda()
    batch = torch.randn(4, 64, 256, device="cuda")
    truth = true_scores(model, batch)
    with record_importance(model, keep_grad=True) as recorder:
        DataParallel(model, [0, 1])(batch).pow(2).mean().backward()
    for name, expected in truth.items():
        torch.testing.assert_close(recorder.scores()[name].cpu().double(), expected.cpu(), rtol=1e-4, atol=0.0)
