"""Where a Compactor's weights lie: packed, packed in place, or in another process."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from functools import partial

import pytest
import torch
from narrow_block import Block, assert_kept, assert_same, dense_of, state
from partition_cases import BACKENDS

from gisp_kernels.compaction.compactor import Compactor
from gisp_kernels.groups import Projection, StructureGroup


def test_pack_frees_the_tail_and_ends_the_way_back() -> None:
    block = Block(dtype=torch.bfloat16)
    groups = block.groups()
    dense = dense_of(block)
    compactor = Compactor(groups)
    total = compactor.bytes_storage()
    assert total == compactor.bytes_packed()
    compactor.remove({"heads": [0], "channels": list(range(10))})
    # 2 bytes: a head owns 4 rows of q, k, v with biases and 4 columns of o, a channel 2 rows with biases and a column.
    assert total - compactor.bytes_packed() == 2 * (4 * (3 * 18 + 17) + 10 * (2 * 18 + 17))
    assert compactor.bytes_storage() == total
    weight = block.down_proj.weight
    compactor.pack()
    assert block.down_proj.weight is weight
    assert weight.is_contiguous()
    assert weight.untyped_storage().nbytes() == weight.numel() * 2
    assert compactor.bytes_storage() == compactor.bytes_packed()
    assert compactor.depth == 0
    with pytest.raises(RuntimeError, match=r"1 steps cannot be rolled back: only 0 were taken since pack\(\)"):
        compactor.rollback()
    for group in groups:
        assert_kept(compactor, group, dense)
    compactor.remove({"channels": [20]})
    for group in groups:
        assert_kept(compactor, group, dense)
    compactor.rollback()
    assert compactor.kept("channels") == 27
    pointer = weight.data_ptr()
    compactor.pack()
    assert weight.data_ptr() == pointer, "tight storage is not copied again"


@pytest.mark.parametrize("moved", [1, 200, 2**26])
def test_pack_in_place_leaves_every_weight_where_it_is(moved: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gisp_kernels.compaction.store._MOVED", moved)
    block = Block(dtype=torch.bfloat16)
    groups = block.groups()
    dense = dense_of(block)
    places = {name: p.data_ptr() for name, p in block.named_parameters()}
    compactor = Compactor(groups)
    for removed in ({"heads": [0, 3], "channels": list(range(10))}, {"channels": [11, 30]}, {"heads": [1, 2, 4, 5]}):
        compactor.remove(removed)
        version = block.down_proj.weight._version
        compactor.pack(in_place=True)
        assert compactor.bytes_storage() == compactor.bytes_packed()
        for name, parameter in block.named_parameters():
            assert parameter.is_contiguous() and (parameter.data_ptr() == places[name] or not parameter.numel())
        assert ("channels" in removed) == (block.down_proj.weight._version > version), "autograd must notice"
        for group in groups:
            assert_kept(compactor, group, dense)
    with pytest.raises(RuntimeError, match=r"since pack\(\)"):
        compactor.rollback()


def test_pack_in_place_closes_gaps_of_optimizer_state_that_was_loaded_since() -> None:
    block = Block()
    optimizer = torch.optim.Adam(block.parameters())
    for parameter in block.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    compactor = Compactor(block.groups(), optimizer=optimizer)
    compactor.remove({"channels": [1, 5]})
    optimizer.load_state_dict(optimizer.state_dict())
    compactor.pack(in_place=True)
    moment = optimizer.state[block.down_proj.weight]["exp_avg"]
    assert block.down_proj.weight.is_contiguous() and moment.is_contiguous()


def test_pack_in_place_leaves_the_strides_of_other_groups() -> None:
    block = Block(dtype=torch.bfloat16)
    groups = block.groups()
    dense = dense_of(block)
    before = {name: (p.data_ptr(), p.stride()) for name, p in block.named_parameters()}
    compactor = Compactor(groups)
    for removed in ({"heads": [0, 3], "channels": [1, 5]}, {"heads": [2], "channels": [7, 30]}):
        compactor.remove(removed)
        compactor.pack(in_place=True, groups=["heads"])
        assert compactor.bytes_storage() == compactor.bytes_packed()
        for name, parameter in block.named_parameters():
            in_mlp = any(part in name for part in ("gate", "up", "down"))
            stays = (parameter.data_ptr(), parameter.stride()) == before[name]
            assert stays if in_mlp else parameter.is_contiguous()
        for group in groups:
            assert_kept(compactor, group, dense)
    assert not block.down_proj.weight.is_contiguous() and block.o_proj.weight.is_contiguous()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    ("kept", "offset", "pitch"), [(16, 0, 32), (16, 3, 32), (13, 0, 32), (16, 0, 33), (4, 4, 24), (1, 0, 16)]
)
def test_pack_keeps_bits_whatever_words_a_prefix_is_made_of(
    kept: int, offset: int, pitch: int, dtype: torch.dtype
) -> None:
    memory = torch.randn(offset + 5 * pitch).to(dtype)
    linear = torch.nn.Linear(1, 1, bias=False)
    linear.weight = torch.nn.Parameter(memory.as_strided((5, 24 if pitch > 16 else 16), (pitch, 1), offset), False)
    linear.in_features, linear.out_features = linear.weight.shape[1], 5
    linear.weight.data[0, 0] = float("nan")
    compactor = Compactor([StructureGroup("g", (Projection(linear, "column", 1),))])
    compactor.remove({"g": list(range(kept, linear.in_features))})
    before = linear.weight.detach().clone()
    compactor.pack()
    assert linear.weight.dtype == dtype and linear.weight.is_contiguous()
    assert linear.weight.untyped_storage().nbytes() == before.numel() * before.element_size()
    assert torch.equal(linear.weight.detach().view(torch.uint8), before.view(torch.uint8))


def elsewhere(block: Block, groups: Iterable[str]) -> Block:
    """The block with the weights of some groups on meta."""
    for group in block.groups():
        if group.name in groups:
            for projection in group.projections:
                projection.linear.to("meta")
    return block


@pytest.mark.parametrize("backend", BACKENDS)
def test_groups_that_lie_elsewhere_follow_every_step(backend: str) -> None:
    steps: list[dict[str, list[int]]] = [{"heads": [1], "channels": [0, 9]}, {"heads": [0, 5]}, {"channels": [36, 3]}]
    torch.manual_seed(0)
    whole = Block()
    parts = [elsewhere(copy.deepcopy(whole), [name]) for name in ("channels", "heads")]
    made = [Compactor(block.groups(), backend=backend) for block in (whole, *parts)]
    removals: list[Callable[[Compactor], None]] = [partial(Compactor.remove, removals=step) for step in steps]
    for action in (*removals, Compactor.rollback):
        for compactor in made:
            action(compactor)
        for part, compactor in zip(parts, made[1:], strict=True):
            assert torch.equal(compactor.numbers, made[0].numbers)
            for name, parameter in part.named_parameters():
                expected = whole.get_parameter(name)
                assert parameter.shape == expected.shape, name
                assert parameter.is_meta or torch.equal(parameter, expected), name


def test_a_group_moves_with_what_was_removed() -> None:
    torch.manual_seed(0)
    whole = Block()
    expected = copy.deepcopy(whole)
    here, there = elsewhere(copy.deepcopy(whole), ["heads"]), elsewhere(copy.deepcopy(whole), ["channels"])
    compactors = [Compactor(here.groups()), Compactor(there.groups())]
    for compactor in compactors:
        compactor.remove({"heads": [2], "channels": [4, 30]})
    moved = [tensor.clone() for tensor in compactors[0].storage("channels")]
    compactors[0].remove({"channels": [7]})
    compactors[0].rollback()
    compactors[1].house("channels", moved)
    with pytest.raises(ValueError, match="storage of group 'channels' must be contiguous, of its shapes"):
        compactors[1].house("channels", moved[:-1])
    compactors[1].remove({"channels": [0]})
    assert there.gate_proj.weight.shape[0] == there.gate_proj.out_features == 34
    compactors[1].rollback(2)
    for name, parameter in there.named_parameters():
        # The bias of an output projection is no structure's.
        assert name == "down_proj.bias" or torch.equal(parameter, expected.get_parameter(name)), name
    away = [torch.empty_like(tensor, device="meta") for tensor in moved]
    compactors[1].house("channels", away)
    compactors[1].remove({"channels": [0], "heads": [3]})
    assert there.down_proj.weight.is_meta and there.down_proj.weight.shape[1] == there.down_proj.in_features == 36
    assert there.q_proj.weight.shape[0] == 20


@pytest.mark.parametrize("packed", [False, True], ids=["reversible", "packed"])
def test_a_copy_cuts_its_own_layers(packed: bool) -> None:
    block = Block(dtype=torch.bfloat16)
    groups = block.groups()
    optimizer = torch.optim.AdamW(block.parameters())
    torch.stack([p.float().square().sum() for p in block.parameters()]).sum().backward()
    optimizer.step()
    compactor = Compactor(groups, optimizer=optimizer)
    compactor.remove({"heads": [0], "channels": list(range(10))})
    if packed:
        compactor.pack()
    other, groups_of_other, cut, steps = copy.deepcopy((block, groups, compactor, optimizer))
    before, moments = state(block), {n: s["exp_avg"].clone() for n, s in optimizer.state_dict()["state"].items()}
    cut.remove({"heads": [1], "channels": [20]})
    assert [group.count for group in groups_of_other] == [4, 26]
    assert all(s["exp_avg"].shape == p.shape for p, s in steps.state.items())
    cut.rollback()
    compactor.remove({"heads": [1], "channels": [20]})
    compactor.rollback()
    for mine, theirs in ((block, optimizer), (other, steps)):
        assert_same(mine, before)
        found = theirs.state_dict()["state"]
        assert all(torch.equal(found[n]["exp_avg"], moment) for n, moment in moments.items())
    assert not {p.data_ptr() for p in block.parameters()} & {p.data_ptr() for p in other.parameters()}
