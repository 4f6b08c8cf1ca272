"""Which processes share the evaluation or the compensation that runs.

A loop deep inside an evaluation has items to share, the command far above knows with whom. Between them stands a
context variable, as for progress: no function in between passes anything on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from typing import TypeVar

from gisp.progress import reporting
from gisp.replicas.agreement import agree
from gisp.replicas.group import Replicas

Item = TypeVar("Item")
# Parts of sums over sequences, whatever the number of processes; more of these find nothing to do.
_PARTS = 8
_sharing: ContextVar[Replicas | None] = ContextVar("gisp_sharing", default=None)


@contextmanager
def sharing(replicas: Replicas | None) -> Iterator[Replicas]:
    """Share what is evaluated or compensated inside; all processes do the same and watch over one another.

    Args:
        replicas: the processes, or the one that makes the figures of several; ``None`` for one on its own.
    """
    if replicas is None:
        yield Replicas()
        return
    with replicas.watched(), nullcontext() if replicas.first else reporting(False):
        before = _sharing.set(replicas)
        try:
            yield replicas
        finally:
            _sharing.reset(before)


def alone() -> AbstractContextManager[None]:
    """Nobody to share with."""
    return nullcontext()


def sharers() -> Replicas:
    """The processes that share, this one alone where nothing is shared."""
    return _sharing.get() or Replicas()


def agree_on(what: str, content: Callable[[], str], among: Replicas | None = None) -> None:
    """Require that all who share hold the same.

    Args:
        what: as a message calls it.
        content: a text or a digest, made where several processes share.
        among: processes that do the same otherwise than by sharing items.

    Raises:
        GispError: one has something else.
    """
    replicas = among or sharers()
    if replicas.size > 1:
        agree(replicas, {what: content()})


def shared_slices() -> int:
    """Parts that sums over sequences are made of: one where nothing is shared, so many for any number of processes."""
    return 1 if _sharing.get() is None else _PARTS


def in_slices(items: Sequence[Item]) -> list[Sequence[Item]]:
    """The items in that many consecutive parts of about equally many; fewer items leave some empty."""
    count = shared_slices()
    return [items[i * len(items) // count : (i + 1) * len(items) // count] for i in range(count)]
