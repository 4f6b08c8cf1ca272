"""Calls of a process group's store that always end."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from functools import partial
from typing import Any

Answer = queue.SimpleQueue[tuple[Any, Exception | None]]


class StoreCalls:
    """A store that is called by a thread of its own.

    One whose process is stopped takes a call and never answers it, whatever the store's time-out.

    Args:
        store: a ``torch.distributed.Store``.
        limit: seconds within which it answers.
    """

    def __init__(self, store: Any, limit: float) -> None:
        self._store, self._limit = store, limit
        self._calls: queue.SimpleQueue[tuple[Callable[[], Any], Answer] | None] = queue.SimpleQueue()
        threading.Thread(target=self._make, daemon=True).start()

    def set(self, key: str, value: str) -> None:
        """As of the store, like those below; a ``RuntimeError`` also where it does not answer."""
        self._ask(partial(self._store.set, key, value))

    def multi_get(self, keys: list[str]) -> list[bytes]:
        """Values of several keys."""
        found: list[bytes] = self._ask(partial(self._store.multi_get, keys))
        return found

    def add(self, key: str, amount: int) -> int:
        """What a counter is after it was raised."""
        return int(self._ask(partial(self._store.add, key, amount)))

    def end(self) -> None:
        """No call follows."""
        self._calls.put(None)

    def _ask(self, call: Callable[[], Any]) -> Any:
        answer: Answer = queue.SimpleQueue()
        self._calls.put((call, answer))
        try:
            found, error = answer.get(timeout=self._limit)
        except queue.Empty:
            raise RuntimeError(f"the store has not answered for {self._limit:.0f} s") from None
        if error is not None:
            raise error
        return found

    def _make(self) -> None:
        while (asked := self._calls.get()) is not None:
            call, answer = asked
            try:
                answer.put((call(), None))
            except Exception as error:
                answer.put((None, error))
