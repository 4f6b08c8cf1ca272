"""Killed commands lose nothing and leave nothing that the next one does not clear away."""

from __future__ import annotations

from pathlib import Path

from .campaign import run


def test_commands_ended_at_random_moments_lose_nothing(tmp_path: Path) -> None:
    result = run(tmp_path, kills=8, seed=0)
    assert not result.failures, "\n".join(result.failures)
    assert sum(result.ends.values()) == 8
