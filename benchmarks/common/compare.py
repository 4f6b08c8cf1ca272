"""A guard against regressions: the ratios of a result held against those of an earlier one on the same card."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.common.command import LAST, read_json, reading, table
from benchmarks.common.identity import ROOT
from gisp.errors import GispError


@dataclass(frozen=True)
class Ratio:
    """How many times better something is than its baseline of the same run.

    Attributes:
        value: of the medians; more is better.
        low, high: what the quartiles of the repetitions make of it.
    """

    value: float
    low: float
    high: float


Ratios = dict[str, Ratio]


def of_times(own: Mapping[str, Any], baseline: Mapping[str, Any]) -> Ratio:
    """A speed-up from two rows of :func:`benchmarks.common.measure.summarised`.

    Rows older than quartiles give their fastest and slowest repetition instead.
    """
    first, third = ("q1_ms", "q3_ms") if "q1_ms" in own and "q1_ms" in baseline else ("min_ms", "max_ms")
    return Ratio(baseline["median_ms"] / own["median_ms"], baseline[first] / own[third], baseline[third] / own[first])


def worse(new: Ratio, old: Ratio) -> bool:
    """Whether a ratio fell below the earlier one by more than the noise of both."""
    return new.high < old.low


def comparison(new: Ratios, old: Ratios) -> tuple[str, bool]:
    """The table of all ratios measured both times, and whether one is worse.

    Raises:
        GispError: there is none.
    """
    both = [name for name in old if name in new]
    if not both:
        raise GispError(
            f"nothing to compare: the earlier result has {len(old)} ratios with quartiles, none of them measured now"
        )
    lines = []
    for name in both:
        one, other = old[name], new[name]
        verdict = "WORSE" if worse(other, one) else "better" if worse(one, other) else ""
        change = f"{100 * (other.value / one.value - 1):+.1f}"
        lines.append([name, _shown(one), _shown(other), change, verdict])
    header = ("times the baseline, higher is better", "then (spread)", "now (spread)", "%", "")
    return table(header, lines), any(worse(new[name], old[name]) for name in both)


def _shown(ratio: Ratio) -> str:
    return f"{ratio.value:.2f} ({ratio.low:.2f} to {ratio.high:.2f})"


def card(device: str) -> str:
    """Folder of a card's results: ``h100`` for ``NVIDIA H100 80GB HBM3``, ``cpu`` for what is no GPU of NVIDIA's."""
    found = re.search(r"\b(?:RTX )?[A-Z]{0,3}\d{2,4}[A-Z]?\b", device) if "NVIDIA" in device else None
    return found[0].lower().replace(" ", "-") if found else "cpu"


def earlier(path: Path, benchmark: str, device: str) -> dict[str, Any]:
    """The result that ``--compare`` names; ``last`` is the one kept for this card.

    Raises:
        GispError: it cannot be read, is of another benchmark or of another card.
    """
    if str(path) == LAST:
        path = ROOT / "benchmarks" / "results" / card(device) / f"{benchmark}.json"
    found = read_json(path, benchmark)
    measured = str(found.get("identity", {}).get("device", "an unknown device"))
    if card(measured) != card(device):
        raise GispError(f"{path} was measured on {measured}, not on {device}: ratios differ from card to card")
    return found


def regressed(args: argparse.Namespace, result: dict[str, Any], ratios: Callable[[dict[str, Any]], Ratios]) -> bool:
    """Print the comparison that ``--compare`` asks for, and tell whether a ratio is worse.

    Raises:
        GispError: the earlier result cannot be compared with.
    """
    if args.compare is None:
        return False
    with reading(args.source):
        new, device = ratios(result), result["identity"]["device"]
    found = earlier(args.compare, result["benchmark"], device)
    with reading(args.compare):
        old = ratios(found)
    shown, is_worse = comparison(new, old)
    print(shown)
    return is_worse
