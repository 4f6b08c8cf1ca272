"""A small block whose heads and channels go, and what is expected of its layers then."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from gisp_kernels.compaction.compactor import Compactor
from gisp_kernels.groups import StructureGroup, attention_group, mlp_group


class Block(nn.Module):
    """Attention of 6 heads (3 shared key/value heads optional) of size 4 and 37 channels."""

    def __init__(self, bias: bool = True, shared_kv: bool = False, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.head_dim = 4
        kv = 12 if shared_kv else 24

        def linear(fan_in: int, fan_out: int) -> nn.Linear:
            return nn.Linear(fan_in, fan_out, bias=bias, dtype=dtype)

        self.q_proj, self.k_proj, self.v_proj = linear(17, 24), linear(17, kv), linear(17, kv)
        self.o_proj = linear(24, 17)
        self.gate_proj, self.up_proj, self.down_proj = linear(17, 37), linear(17, 37), linear(37, 17)

    def groups(self) -> list[StructureGroup]:
        return [attention_group("heads", self), mlp_group("channels", self)]


def state(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in module.named_parameters()}


def assert_same(module: nn.Module, expected: dict[str, torch.Tensor]) -> None:
    for name, parameter in module.named_parameters():
        assert torch.equal(parameter, expected[name]), name


def assert_kept(compactor: Compactor, group: StructureGroup, dense: Callable[[nn.Linear], tuple]) -> None:
    """Every projection shows the structures of ``order``, gathered from its dense weight."""
    kept = compactor.order(group.name)[: compactor.kept(group.name)]
    for projection in group.projections:
        linear, block = projection.linear, projection.block
        lines = (kept[:, None] * block + torch.arange(block)).flatten()
        weight, bias = dense(linear)
        dim = 0 if projection.axis == "row" else 1
        assert torch.equal(linear.weight, weight.index_select(dim, lines))
        if bias is not None:
            assert torch.equal(linear.bias, bias[lines] if projection.axis == "row" else bias)
        assert (linear.out_features, linear.in_features) == tuple(linear.weight.shape)


def dense_of(module: nn.Module) -> Callable[[nn.Linear], tuple]:
    saved = {
        id(linear): (linear.weight.detach().clone(), None if linear.bias is None else linear.bias.detach().clone())
        for linear in module.modules()
        if isinstance(linear, nn.Linear)
    }
    return lambda linear: saved[id(linear)]
