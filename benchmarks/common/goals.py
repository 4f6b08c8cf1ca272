"""What the project set out to reach on one H200, and by how much a result meets or misses it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from benchmarks.common.command import table


@dataclass(frozen=True)
class Goal:
    """One goal and what was measured.

    Attributes:
        what: the quantity.
        target, unit: to be reached.
        worst: measured on the worst shape; ``None`` where it was not measured.
        at_least: whether more is better.
        where: the worst shape.
        median: over all shapes.
    """

    what: str
    target: float
    unit: str
    worst: float | None
    at_least: bool = True
    where: str = ""
    median: float | None = None

    @property
    def met(self) -> bool | None:
        if self.worst is None:
            return None
        return self.worst >= self.target if self.at_least else self.worst <= self.target

    @property
    def margin(self) -> float | None:
        """By how much it is met (positive) or missed (negative), as a fraction of a target that is not 0."""
        if self.worst is None or not self.target:
            return None
        return (self.worst - self.target) / self.target * (1 if self.at_least else -1)


def goal_table(goals: Iterable[Goal]) -> str:
    """One line per goal."""
    lines = []
    for goal in goals:
        sign = ">=" if goal.at_least else "<="
        state = "not measured"
        if goal.met is not None:
            state = "met" if goal.met else "MISSED"
            if goal.margin is not None:
                state += f" by {100 * abs(goal.margin):.0f} %"
        lines.append(
            [
                goal.what,
                f"{sign} {goal.target:g} {goal.unit}",
                "-" if goal.worst is None else f"{goal.worst:.3g}",
                "-" if goal.median is None else f"{goal.median:.3g}",
                state,
                goal.where,
            ]
        )
    return table(("goal", "target", "worst", "median", "", "worst at"), lines)
