"""Every reader takes a damaged file for what it is."""

from __future__ import annotations

from pathlib import Path

import pytest

from . import campaign
from .targets import TARGETS, Target


def test_damaged_files_end_in_the_sound_result_or_one_line(tmp_path: Path) -> None:
    result = campaign.run(tmp_path, 1500, seed=0)
    assert not result.failures, "\n".join(result.failures)
    assert set(result.outcomes) == {target.name for target in TARGETS}
    # Damage that no reader notices would test nothing; a cache is made anew, a card is for people.
    lenient = ("cache", "export card")
    assert all(counts["refused"] for name, counts in result.outcomes.items() if name not in lenient)


@pytest.mark.parametrize(
    ("read", "outcome"),
    [
        (lambda folder: (folder / "trajectory.json").read_bytes(), "changed"),
        (lambda folder: {}[(folder / "trajectory.json").read_text(errors="replace")[:40]], "KeyError"),
    ],
)
def test_a_reader_that_lets_damage_through_is_found(tmp_path, monkeypatch, read, outcome):
    calls = []

    def sound_first(folder: Path) -> object:
        calls.append(folder)
        return b"" if len(calls) % 2 and outcome == "KeyError" else read(folder)

    target = Target("x", "run/trajectory.json", (), sound_first)
    monkeypatch.setattr(campaign, "TARGETS", (target,))
    result = campaign.run(tmp_path, 5, seed=0)
    assert len(result.failures) == 5 and all(outcome in line for line in result.failures)
