"""Which removed structures come back where as many parameters go, and at which step the others then count as removed.

Both keep to the limits of a removal: widths are multiples, and what comes back of a group comes by whole multiples.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from gisp.select.selector import Selector

Mask = npt.NDArray[np.bool_]


def returning(selector: Selector, worth: npt.NDArray[np.float64], budget: float) -> Mask:
    """Structures to bring back, those of the highest worth a parameter first; bool [structures].

    One comes back as long as it is worth more a parameter than what would go for it, the present structures of the
    lowest worth that hold as many parameters. Ties go to the lowest number.

    Args:
        selector: of single structures (``gqa`` "query" or "group").
        worth: [structures]; those of protected groups do not matter.
        budget: parameters that may come back.
    """
    groups = selector.groups
    sizes = np.array([group.size for group in groups])
    group_of = np.arange(len(groups)).repeat(sizes)
    cost, divisor, shut = (
        np.array([getattr(group, name) for group in groups])[group_of] for name in ("cost", "divisor", "protected")
    )
    value = worth / divisor
    present = np.flatnonzero(~selector.removed & ~shut)
    present = present[np.argsort(value[present], kind="stable")]
    spent_by = cost[present].cumsum()
    gone = np.flatnonzero(selector.removed)
    back = np.zeros(len(worth), dtype=bool)
    waiting: dict[int, list[int]] = {}
    spent = 0
    for structure in gone[np.argsort(-value[gone], kind="stable")].tolist():
        group = int(group_of[structure])
        block = waiting.setdefault(group, [])
        block.append(structure)
        if len(block) < groups[group].multiple:
            continue
        price = spent + len(block) * groups[group].cost
        rival = np.searchsorted(spent_by, price)
        if price > budget or rival >= len(present) or value[structure] <= value[present[rival]]:
            break
        back[waiting.pop(group)] = True
        spent = price
    return back


def resequenced(removed_at: npt.NDArray[np.int32], multiple: int) -> npt.NDArray[np.int32]:
    """Steps at which a group's removals count as made so that its width is a multiple after every step.

    What a step would leave over waits for a later one, in the order of steps and numbers; the width at the end must be
    a multiple, or the whole one.

    Args:
        removed_at: int32 [units], 0 = kept.
    """
    gone = np.flatnonzero(removed_at)
    gone = gone[np.argsort(removed_at[gone], kind="stable")]
    wanted = np.bincount(removed_at[gone]).cumsum()
    kept = -((wanted - len(removed_at)) // multiple) * multiple
    allowed = len(removed_at) - np.minimum(kept, len(removed_at))
    found = np.zeros_like(removed_at)
    found[gone] = np.searchsorted(allowed, np.arange(1, len(gone) + 1))
    return found
