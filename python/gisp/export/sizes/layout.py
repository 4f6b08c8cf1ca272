"""Exact re-layout of attention whose query heads are spread unevenly over key/value heads.

Attention code repeats every key/value head the same number of times. A pruned layer is brought into that form by
storing a surviving key/value head once per ``group`` of its query heads and filling the last group with zeroed query
slots, whose columns of o_proj are zero as well: the output is the same, only some weights are stored twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from gisp.errors import GispError

ZEROED = -1
"""Index of a slot that stores zeros instead of an original structure."""


@dataclass(frozen=True)
class AttentionLayout:
    """Heads one layer stores.

    Attributes:
        group: query slots per key/value slot.
        query: original query head of every query slot, or ``ZEROED``; slot ``s`` reads key/value slot ``s // group``.
        kv: original key/value head of every key/value slot, or ``ZEROED``.
    """

    group: int
    query: tuple[int, ...]
    kv: tuple[int, ...]


def plan_attention(
    heads: Sequence[int], num_heads: int, num_kv_heads: int, *, align: int = 1, minimum: int = 1
) -> AttentionLayout:
    """The smallest uniform layout that holds the kept query heads.

    Key/value heads no kept query head reads are dropped. A layer without heads gets one zeroed head.

    Args:
        heads: kept original query heads, ascending.
        num_heads: query heads of the dense layer.
        num_kv_heads: key/value heads of the dense layer.
        align: the number of query slots is a multiple of it, and the number of key/value slots a multiple or a
            divisor: what tensor parallelism over ``align`` devices needs.
        minimum: smallest number of query slots.

    Raises:
        GispError: ``align`` or ``minimum`` below 1.
    """
    for name, value in (("align_heads", align), ("min_heads", minimum)):
        if value < 1:
            raise GispError(f"{name} is {value}: an exported layer has at least one head, give 1 or more")
    per_kv = num_heads // num_kv_heads
    shared: dict[int, list[int]] = {}
    for head in heads:
        shared.setdefault(head // per_kv, []).append(head)

    def slots(group: int) -> int:
        count = max(sum(-(-len(members) // group) for members in shared.values()), -(-minimum // group), 1)
        while count * group % align or (count % align and align % count):
            count += 1
        return count

    # q and o hold `group` blocks per key/value slot, k and v one each; of equally small layouts the one with the
    # smallest key/value cache is taken.
    group = min(range(1, per_kv + 1), key=lambda g: ((2 * g + 2) * slots(g), slots(g)))
    query: list[int] = []
    kv: list[int] = []
    for kv_head, members in shared.items():
        for start in range(0, len(members), group):
            part = members[start : start + group]
            query += part + [ZEROED] * (group - len(part))
            kv.append(kv_head)
    spare = slots(group) - len(kv)
    return AttentionLayout(group, (*query, *[ZEROED] * (spare * group)), (*kv, *[ZEROED] * spare))
