"""The exact re-layout of uneven grouped-query attention, against head-by-head attention and exhaustive search."""

from __future__ import annotations

from collections import Counter
from itertools import chain, combinations

import pytest
import torch

from gisp.errors import GispError
from gisp.export.relayout import take_blocks
from gisp.export.sizes.layout import ZEROED, AttentionLayout, plan_attention

HEADS = 8
SUBSETS = list(chain.from_iterable(combinations(range(HEADS), n) for n in range(HEADS + 1)))


def _slots_needed(heads: tuple[int, ...], per_kv: int, group: int) -> int:
    """Key/value slots when each serves up to ``group`` heads of one original group, counted by filling them."""
    slots = 0
    for _, members in sorted(Counter(head // per_kv for head in heads).items()):
        while members > 0:
            slots, members = slots + 1, members - group
    return max(slots, 1)


def _check_holds(layout: AttentionLayout, heads: tuple[int, ...], per_kv: int) -> None:
    assert sorted(head for head in layout.query if head != ZEROED) == list(heads)
    assert len(layout.query) == layout.group * len(layout.kv)
    for slot, head in enumerate(layout.query):
        if head != ZEROED:
            assert layout.kv[slot // layout.group] == head // per_kv


@pytest.mark.parametrize("kv_heads", [1, 2, 4, 8])
def test_every_subset_gets_the_cheapest_layout(kv_heads: int) -> None:
    per_kv = HEADS // kv_heads
    for heads in SUBSETS:
        layout = plan_attention(heads, HEADS, kv_heads)
        _check_holds(layout, heads, per_kv)
        costs = {g: (2 * g + 2) * _slots_needed(heads, per_kv, g) for g in range(1, per_kv + 1)}
        cost = 2 * len(layout.query) + 2 * len(layout.kv)
        assert cost == min(costs.values())
        fewest = min(_slots_needed(heads, per_kv, g) for g, c in costs.items() if c == cost)
        assert len(layout.kv) == fewest
        assert {kv for kv in layout.kv if kv != ZEROED} == {head // per_kv for head in heads}


@pytest.mark.parametrize("align", [2, 3, 4, 8])
@pytest.mark.parametrize("kv_heads", [2, 8])
def test_aligned_layouts_split_over_devices(align: int, kv_heads: int) -> None:
    for heads in SUBSETS:
        layout = plan_attention(heads, HEADS, kv_heads, align=align)
        _check_holds(layout, heads, HEADS // kv_heads)
        assert len(layout.query) % align == 0
        assert len(layout.kv) % align == 0 or align % len(layout.kv) == 0


@pytest.mark.parametrize("minimum", [1, 2, 5])
def test_minimum_is_filled_with_zeroed_heads(minimum: int) -> None:
    for heads in SUBSETS:
        layout = plan_attention(heads, HEADS, 2, minimum=minimum)
        _check_holds(layout, heads, HEADS // 2)
        assert len(layout.query) >= minimum


def test_multi_head_attention_is_sliced_and_an_empty_layer_keeps_one_zeroed_head() -> None:
    assert plan_attention((1, 4, 6), 8, 8) == AttentionLayout(1, (1, 4, 6), (1, 4, 6))
    assert plan_attention((), 8, 8) == AttentionLayout(1, (ZEROED,), (ZEROED,))
    assert plan_attention((), 8, 2) == AttentionLayout(1, (ZEROED,), (ZEROED,))


@pytest.mark.parametrize("options", [{"align": 0}, {"minimum": 0}, {"minimum": -1}])
def test_a_layer_without_any_head_is_refused(options: dict[str, int]) -> None:
    with pytest.raises(GispError, match=r"is (0|-1): "):
        plan_attention((1,), 8, 8, **options)


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("block", [1, 3])
def test_take_blocks(dim: int, block: int) -> None:
    weight = torch.randn(12, 12)
    index = (2, ZEROED, 0, 2)
    parts = [
        torch.zeros_like(weight.narrow(dim, 0, block)) if i == ZEROED else weight.narrow(dim, i * block, block)
        for i in index
    ]
    assert torch.equal(take_blocks(weight, index, block, dim), torch.cat(parts, dim))


@pytest.mark.parametrize("align", [1, 4])
@pytest.mark.parametrize("kv_heads", [1, 2, 4, 8])
def test_attention_output_equals_head_by_head_attention(kv_heads: int, align: int) -> None:
    """Uniformly repeated key/value heads over the new layout give what each kept head gives with its own."""
    width, hidden, length = 4, 16, 5
    x = torch.randn(length, hidden, dtype=torch.float64)
    q, o = torch.randn(2, HEADS * width, hidden, dtype=torch.float64)
    k, v = torch.randn(2, kv_heads * width, hidden, dtype=torch.float64)

    def heads_of(weight: torch.Tensor) -> torch.Tensor:
        return (x @ weight.T).unflatten(1, (-1, width)).transpose(0, 1)

    def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return torch.softmax(query @ key.transpose(-1, -2), dim=-1) @ value

    every_query, every_key, every_value = heads_of(q), heads_of(k), heads_of(v)
    for heads in SUBSETS[:: 5 if kv_heads == 8 else 3]:
        wanted = torch.zeros(length, hidden, dtype=torch.float64)
        for head in heads:
            kv = head // (HEADS // kv_heads)
            wanted += attend(every_query[head], every_key[kv], every_value[kv]) @ o[head * width : (head + 1) * width]
        layout = plan_attention(heads, HEADS, kv_heads, align=align)
        key, value = (heads_of(take_blocks(w, layout.kv, width)).repeat_interleave(layout.group, 0) for w in (k, v))
        mixed = attend(heads_of(take_blocks(q, layout.query, width)), key, value).transpose(0, 1).flatten(1)
        torch.testing.assert_close(mixed @ take_blocks(o, layout.query, width), wanted, rtol=0, atol=1e-12)
