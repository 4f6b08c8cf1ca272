"""How a pruned block computes inside the dense model what its output projection reads.

The projections before the output projection make only the rows that the kept columns read. The fused pass reads these
from the modules, which show them meanwhile. Where a graph is kept the modules have other forwards instead; query heads
that share a key/value head and do not all stay then have attention run whole and their columns gathered.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn
from torch.nn import functional

from gisp.model.attention import KV_INDEX, set_head_counts, set_kv_index
from gisp.model.keep import block_columns, kv_heads
from gisp.model.modes import replaced_forward
from gisp.model.structures import LayerMap, ModelMap
from gisp_kernels.alignment import aligned

Rows = tuple[tuple[nn.Linear, torch.Tensor], ...]


@dataclass(frozen=True)
class Block:
    """How a pruned block computes what its output projection reads.

    Attributes:
        rows: projections before the output projection, and which of their rows make that, int64.
        index: int64 [query heads], the key/value head among those made that each reads; None for even groups.
        replaced: rows as well, but for other forwards: a whole group of heads at least, or nothing is replaced.
        gathered: int64 [K], which of what is made by these forwards is read; None for all of it.
        places: int64 [width of what is made], where each stands among the gathered; K for what is not read.
        heads: of an attention: itself, numbers of query and key/value heads that ``replaced`` makes, and of all.
    """

    rows: Rows
    index: torch.Tensor | None
    replaced: Rows
    gathered: torch.Tensor | None
    places: torch.Tensor | None
    heads: tuple[nn.Module, tuple[int, int], tuple[int, int]] | None = None

    @contextmanager
    def computing(self) -> Iterator[None]:
        """The projections before the output projection have forwards that make what is read; for graphs."""
        with ExitStack() as stack:
            for linear, rows in self.replaced:
                bias = None if linear.bias is None else linear.bias.index_select(0, rows)
                forward = partial(functional.linear, weight=linear.weight.index_select(0, rows), bias=bias)
                stack.enter_context(replaced_forward(linear, forward))
            if self.heads is not None:
                attention, fewer, every = self.heads
                stack.callback(set_head_counts, attention, *every)
                set_head_counts(attention, *fewer)
            yield

    @contextmanager
    def showing(self) -> Iterator[None]:
        """The projections before the output projection show the rows that make what is read; for the fused pass."""
        with ExitStack() as stack:
            for linear, rows in self.rows:
                for parameter in (linear.weight, linear.bias):
                    if parameter is not None:
                        stack.enter_context(shown(parameter, parameter.detach().index_select(0, rows)))
            if self.index is not None and self.heads is not None:
                attention = self.heads[0]
                stack.callback(set_kv_index, attention, getattr(attention, KV_INDEX, None))
                set_kv_index(attention, self.index)
            yield


def mlp_block(model_map: ModelMap, item: LayerMap, columns: torch.Tensor, device: torch.device) -> Block:
    """Of a layer's MLP that keeps these columns of down_proj, int64 [K]; ``device`` computes."""
    mlp = item.layer.mlp
    rows = tuple((linear, columns.to(device)) for linear in (mlp.gate_proj, mlp.up_proj))
    if _fast(len(columns), device):
        return Block(rows, None, rows, None, None)
    return Block(rows, None, (), *_gathered(columns, mlp.down_proj.in_features, device))


def attention_block(model_map: ModelMap, item: LayerMap, columns: torch.Tensor, device: torch.device) -> Block:
    """Of a layer's attention that keeps these columns of o_proj, int64 [K]; ``device`` computes."""
    attention, share, width = item.attention, model_map.heads_per_kv, model_map.head_dim
    heads = (columns[::width] // width).tolist()
    shared = kv_heads(heads, share)

    def rows(queries: list[int], keys: list[int]) -> Rows:
        of = [block_columns(torch.tensor(index, dtype=torch.int64), width).to(device) for index in (queries, keys)]
        return (attention.q_proj, of[0]), (attention.k_proj, of[1]), (attention.v_proj, of[1])

    every = model_map.num_heads, model_map.num_kv_heads
    if not heads:
        # A plain attention without heads has no shape: one group of heads is made, and nothing of it is read.
        gathered = _gathered(columns, share * width, device)
        counts = attention, (share, 1), every
        return Block(rows([], []), None, rows([*range(share)], [0]), *gathered, counts)
    if len(heads) == share * len(shared) and _fast(len(columns), device):
        exact = rows(heads, shared)
        return Block(exact, None, exact, None, None, (attention, (len(heads), len(shared)), every))
    index = None
    if len(heads) != share * len(shared):
        index = torch.tensor([shared.index(head // share) for head in heads], device=device)
    gathered = _gathered(columns, attention.o_proj.in_features, device)
    return Block(rows(heads, shared), index, (), *gathered, (attention, every, every))


def _gathered(columns: torch.Tensor, width: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    places = torch.full((width,), len(columns))
    places[columns] = torch.arange(len(columns))
    return columns.to(device), places.to(device)


def _fast(width: int, device: torch.device) -> bool:
    """Whether products of that width are fast: narrower ones that tensor cores wait for are slower than whole ones."""
    return device.type != "cuda" or aligned(width)


@contextmanager
def shown(parameter: torch.Tensor, tensor: torch.Tensor) -> Iterator[None]:
    """Another tensor in a parameter's place for a while; what it holds is not touched."""
    own = parameter.data
    parameter.data = tensor
    try:
        yield
    finally:
        parameter.data = own
