"""Compaction: kept parts equal an independent gather, steps undo to the bit, Parameters keep their identity."""

from __future__ import annotations

import pytest
import torch
from narrow_block import Block, assert_kept, assert_same, dense_of, state
from partition_cases import BACKENDS
from recorder_oracle import grad_of
from torch import nn

from gisp_kernels.compaction.compactor import Compactor
from gisp_kernels.groups import Projection, StructureGroup, attention_group, mlp_group

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shared_kv", [True, False])
def test_steps_and_way_back(backend: str, dtype: torch.dtype, bias: bool, shared_kv: bool) -> None:
    block = Block(bias, shared_kv, dtype)
    groups = block.groups()
    dense, snapshots = dense_of(block), [state(block)]
    compactor = Compactor(groups, backend=backend)
    orders = [{g.name: compactor.order(g.name) for g in groups}]
    removed: dict[str, set[int]] = {"heads": set(), "channels": set()}
    steps: list[dict[str, torch.Tensor | list[int]]] = [
        {"heads": [4], "channels": [36, 0, 7]},
        {},
        {"channels": list(range(8, 30))},
        {"heads": torch.tensor([0, 5]), "channels": torch.empty(0, dtype=torch.int64)},
        {"heads": [1, 2, 3], "channels": [i for i in range(1, 36) if i not in range(7, 30)]},
    ]
    for step in steps:
        compactor.remove(step)
        for group in groups:
            removed[group.name] |= {int(i) for i in step.get(group.name, [])}
            order = compactor.order(group.name)
            kept = compactor.kept(group.name)
            assert set(order[kept:].tolist()) == removed[group.name]
            assert sorted(order.tolist()) == list(range(order.numel()))
            assert group.count == kept
            assert_kept(compactor, group, dense)
        snapshots.append(state(block))
        orders.append({g.name: compactor.order(g.name) for g in groups})
        # Heads are numbered 0 to 5, channels from 6 on.
        for group, first in zip(groups, (0, 6), strict=True):
            numbers = compactor.numbers[compactor.kept_span(group.name)]
            assert torch.equal(numbers - first, compactor.order(group.name)[: compactor.kept(group.name)])
    assert compactor.depth == len(steps)
    assert compactor.kept("heads") == compactor.kept("channels") == 0
    for back in (1, 2, 2):
        del snapshots[-back:], orders[-back:]
        compactor.rollback(back)
        assert_same(block, snapshots[-1])
        for group in groups:
            assert torch.equal(compactor.order(group.name), orders[-1][group.name])
            assert_kept(compactor, group, dense)
    assert compactor.depth == 0
    assert torch.equal(compactor.numbers, torch.arange(6 + 37))


def test_parameters_keep_their_identity() -> None:
    block = Block()
    block.k_proj.weight.requires_grad_(False)
    names = dict(block.named_parameters())
    pointers = {n: p.untyped_storage().data_ptr() for n, p in names.items()}
    flags = {n: p.requires_grad for n, p in names.items()}
    compactor = Compactor(block.groups())
    compactor.remove({"heads": [1], "channels": [2, 3]})
    after = dict(block.named_parameters())
    assert all(after[n] is p for n, p in names.items())
    assert {n: p.untyped_storage().data_ptr() for n, p in after.items()} == pointers
    assert {n: p.requires_grad for n, p in after.items()} == flags
    assert block.gate_proj.weight.is_contiguous()
    assert block.down_proj.weight.stride() == (37, 1)
    assert block.o_proj.bias.shape == (17,)


def test_backward_runs_on_the_narrow_layers_and_stale_grads_go() -> None:
    block = Block()
    x = torch.randn(3, 17)

    def loss() -> torch.Tensor:
        return block.down_proj(block.gate_proj(x) * block.up_proj(x)).sum()

    loss().backward()
    compactor = Compactor(block.groups())
    compactor.remove({"channels": [0, 5]})
    assert block.gate_proj.weight.grad is None
    loss().backward()
    assert grad_of(block.gate_proj.weight).shape == (35, 17)
    compactor.rollback()
    assert block.gate_proj.weight.grad is None
    loss().backward()
    assert grad_of(block.down_proj.weight).shape == (17, 37)


def test_swaps_are_as_few_as_removals_and_ascending() -> None:
    block = Block()
    compactor = Compactor([mlp_group("channels", block)])
    compactor.remove({"channels": [35, 3, 1]})
    # 34 and 36 were kept behind the new width of 34: they fill the holes 1 and 3 in this order.
    expected = list(range(34))
    expected[1], expected[3] = 34, 36
    assert compactor.order("channels")[:34].tolist() == expected


def test_listing_order_does_not_matter() -> None:
    one, other = Block(), Block()
    other.load_state_dict(one.state_dict())
    Compactor(one.groups()).remove({"channels": [9, 2, 30, 4]})
    Compactor(other.groups()).remove({"channels": [2, 4, 9, 30]})
    assert_same(other, state(one))


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_weights_are_compacted_inside_their_storage(backend: str) -> None:
    poison = torch.full((16, 32), float("nan"))
    linear = nn.Linear(20, 12)
    values = torch.randn(12, 20)
    poison[2:14, 4:24] = values
    linear.weight.data = poison[2:14, 4:24]
    before = poison.clone()
    compactor = Compactor([StructureGroup("g", (Projection(linear, "column", 4),))], backend=backend)
    compactor.remove({"g": [1, 3]})
    assert torch.equal(linear.weight, values.view(12, 5, 4)[:, [0, 4, 2]].flatten(1))
    outside = torch.ones(16, 32, dtype=torch.bool)
    outside[2:14, 4:24] = False
    assert poison[outside].isnan().all()
    compactor.rollback()
    assert torch.equal(poison.view(torch.int32), before.view(torch.int32))


def test_numbers_are_where_the_caller_wants_them() -> None:
    compactor = Compactor(Block().groups(), device=torch.device("cpu"))
    compactor.remove({"channels": [3]})
    assert compactor.numbers.device.type == "cpu" and compactor.numbers[compactor.kept_span("channels")].tolist() == [
        6 + i for i in compactor.order("channels")[:36].tolist()
    ]


def test_rollback_limits() -> None:
    compactor = Compactor(Block().groups())
    compactor.remove({"heads": [0]})
    with pytest.raises(RuntimeError, match=r"2 steps cannot be rolled back: only 1 were taken$"):
        compactor.rollback(2)
    with pytest.raises(ValueError, match="must not be negative, got -1"):
        compactor.rollback(-1)
    compactor.rollback(0)
    assert compactor.kept("heads") == 5


@pytest.mark.parametrize(
    ("removal", "message"),
    [
        ({"heads": [6]}, "group 'heads' has 6 structures, got index 6"),
        ({"heads": [-1]}, "got index -1"),
        ({"heads": [3, 2, 3]}, "structure 3 of group 'heads' is given more than once"),
        ({"heads": [1]}, "structure 1 of group 'heads' is already removed"),
        ({"head": [0]}, "no group is named 'head'; there are 2: 'heads', 'channels'"),
        ({"heads": [0.5]}, "must be integers, got torch.float32"),
        ({"heads": torch.tensor([True, False])}, "must be integers, got torch.bool"),
        ({"heads": torch.tensor([[0]])}, r"one dimension, got shape \(1, 1\)"),
    ],
)
def test_bad_removals_change_nothing(removal: dict, message: str) -> None:
    block = Block()
    compactor = Compactor(block.groups())
    compactor.remove({"heads": [1]})
    before, order = state(block), compactor.order("channels")
    with pytest.raises(ValueError, match=message):
        compactor.remove({"channels": [5], **removal})
    assert_same(block, before)
    assert torch.equal(compactor.order("channels"), order)
    assert (compactor.depth, compactor.kept("channels")) == (1, 37)


def test_projections_of_a_group_may_have_blocks_of_different_size() -> None:
    block = Block(shared_kv=True)
    groups = [attention_group("heads", block, whole_kv_groups=True), mlp_group("channels", block)]
    assert [p.block for p in groups[0].projections] == [8, 4, 4, 8]
    dense, before = dense_of(block), state(block)
    compactor = Compactor(groups)
    compactor.remove({"heads": [0]})
    assert_kept(compactor, groups[0], dense)
    compactor.remove({"heads": [2]})
    assert_kept(compactor, groups[0], dense)
    assert [p.linear.weight.shape[0] for p in groups[0].projections[:3]] == [8, 4, 4]
    compactor.rollback(2)
    assert_same(block, before)
    block.q_proj = nn.Linear(17, 20)
    with pytest.raises(ValueError, match="5 query heads do not share 3 key/value heads evenly"):
        attention_group("heads", block, whole_kv_groups=True)


def test_tied_weights_are_cut_once() -> None:
    block = Block()
    block.up_proj.weight = block.gate_proj.weight
    dense, before = dense_of(block), state(block)
    groups = block.groups()
    compactor = Compactor(groups)
    compactor.remove({"channels": [3, 36]})
    assert block.up_proj.weight is block.gate_proj.weight
    assert_kept(compactor, groups[1], dense)
    compactor.rollback()
    assert_same(block, before)


def test_overlapping_weights_are_refused() -> None:
    block = Block()
    block.up_proj.weight = nn.Parameter(block.gate_proj.weight.detach()[:])
    with pytest.raises(ValueError, match=r"projection 0 .* and projection 1 of group 'channels' share memory"):
        Compactor(block.groups())
    with pytest.raises(ValueError, match="two groups are named 'channels'"):
        Compactor([mlp_group("channels", Block()), mlp_group("channels", Block())])


def test_layouts_that_cannot_be_swapped_are_refused() -> None:
    block = Block()
    block.gate_proj.weight.data = torch.randn(17, 37).t()
    with pytest.raises(ValueError, match=r"rows of the weight of projection 0 .* must be contiguous"):
        Compactor(block.groups())
    with pytest.raises(ValueError, match="dense tensor with memory"):
        Compactor(Block().to("meta").groups())
    half = Block()
    half.gate_proj.to("meta")
    with pytest.raises(ValueError, match="dense tensor with memory"):
        Compactor(half.groups())


def test_a_replaced_weight_is_noticed() -> None:
    block = Block()
    compactor = Compactor(block.groups())
    compactor.remove({"channels": [0]})
    block.to(torch.float16)
    for action in (lambda: compactor.remove({"channels": [1]}), compactor.rollback, compactor.pack):
        with pytest.raises(ValueError, match=r"projection 0 of group '\w+' was replaced from outside"):
            action()
    assert compactor.depth == 1
    assert compactor.kept("channels") == 36


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_removed_channel_no_longer_contributes(backend: str) -> None:
    block = Block(dtype=torch.float32).double()
    x = torch.randn(5, 17, dtype=torch.float64)

    def forward() -> torch.Tensor:
        return block.down_proj(torch.nn.functional.silu(block.gate_proj(x)) * block.up_proj(x))

    gone = [3, 36, 14]
    with torch.no_grad():
        block.down_proj.weight[:, gone] = 0
        masked = forward()
        Compactor(block.groups(), backend=backend).remove({"channels": gone})
        torch.testing.assert_close(forward(), masked, rtol=1e-12, atol=1e-12)
