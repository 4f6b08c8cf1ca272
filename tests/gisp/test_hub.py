"""The hub is asked once; without an answer the cache alone counts, and what it lacks is one line."""

from __future__ import annotations

import time

import pytest
from huggingface_hub import constants, utils

import gisp
from gisp import hub
from gisp.errors import GispError


class Session:
    """Answers, fails or counts."""

    def __init__(self, error: Exception | None) -> None:
        self.error, self.asked = error, 0

    def head(self, url: str, timeout: float) -> None:
        self.asked += 1
        if self.error:
            raise self.error


@pytest.fixture(autouse=True)
def unasked():
    hub.is_reachable.cache_clear()
    yield
    hub.is_reachable.cache_clear()


@pytest.mark.parametrize("error", [None, OSError("no network")])
def test_the_hub_is_asked_once(monkeypatch, tmp_path, error):
    session = Session(error)
    monkeypatch.setattr(utils, "get_session", lambda: session)
    assert hub.hub_options(tmp_path) == {} and session.asked == 0
    for _ in range(3):
        assert hub.hub_options("org/name") == ({} if error is None else {"local_files_only": True})
    assert session.asked == 1


def test_offline_mode_asks_nothing(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(utils, "get_session", lambda: pytest.fail("the hub was asked"))
    assert hub.hub_options("org/name") == {}


def test_a_name_that_is_not_cached_is_one_line(monkeypatch):
    monkeypatch.setattr(utils, "get_session", lambda: Session(OSError("no network")))
    # Without a network every file is asked for again and again, after longer and longer waits.
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    with pytest.raises(GispError, match=r"model org/name is not in the cache and .* cannot be reached"):
        gisp.load("org/name")
