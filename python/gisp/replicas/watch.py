"""Processes of one run watch over one another.

A collective whose partner has died may wait for ever: over NCCL nothing tells. So a thread of every process writes a
beat into the store of the process group and reads those of the others. Who is silent for too long was killed or hangs;
who fails says so as its beat. A process that cannot end by itself, because it waits for a collective, is ended, and so
is a silent one that the same launcher started.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from types import TracebackType
from typing import Any

from torch import distributed

from gisp.errors import GispError, is_out_of_memory
from gisp.replicas.errors import ReplicaError
from gisp.replicas.siblings import end_sibling, this_process

# Seconds between beats, of silence until a process counts as lost, and for others to end by themselves then.
BEAT, SILENCE, GRACE = 1.0, 15.0, 5.0
EXIT_CODE = 2
# A failed process says why by itself; of one that left another one has to.
_FAILED, _LEFT, _TOLD = "failed:", "left:", "told"


class Watch:
    """Entered by all processes of a run at once, left when the run ends.

    Args:
        exchange: as :meth:`gisp.replicas.group.Replicas.exchange`.
    """

    def __init__(self, rank: int, size: int, exchange: Callable[[bytes], list[bytes]]) -> None:
        self._rank, self._size, self._exchange = rank, size, exchange
        self._names: list[str] = []
        self._processes: list[dict[str, Any]] = []
        self._ended, self._found = threading.Event(), threading.Event()
        self._reason: str | None = None
        self._other_tells = False
        self._thread = threading.Thread(target=self._look, daemon=True)

    def __enter__(self) -> Watch:
        # Its own connection: the main thread may wait inside another one.
        default: Any = distributed.distributed_c10d._get_default_store()
        store = default.clone()
        store.set_timeout(timedelta(seconds=SILENCE))
        here = {**this_process(), "run": os.urandom(8).hex()}
        self._processes = found = [json.loads(data) for data in self._exchange(json.dumps(here).encode())]
        self._names = [f"rank {rank} ({item['host']}, process {item['pid']})" for rank, item in enumerate(found)]
        # A program may prune several times in one process group.
        self._store = distributed.PrefixStore(f"gisp/{found[0]['run']}", store)
        self._store.set(f"{self._rank}", "0")
        self._exchange(b"")
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join()
        if error is None:
            return
        tells = isinstance(error, Exception) or not self._rank
        self._write(f"{_FAILED if tells else _LEFT}{_words(error)}")
        first = tells and self._first_to_tell()
        self._linger()
        if not isinstance(error, Exception):
            return
        if not first:
            raise ReplicaError(self._reason or f"another process of this run failed before: {error}", told=True)
        if self._rank and isinstance(error, GispError):
            raise ReplicaError(str(error), told=False)
        if self._rank and is_out_of_memory(error):
            raise ReplicaError(
                f"{self._names[self._rank]} is out of memory ({_words(error)}): give a smaller --batch-tokens or "
                "--batch-size",
                told=False,
            )

    def reason(self) -> str | None:
        """Why a collective failed, once it is known; ``None`` if no process turns out to be gone."""
        self._found.wait(SILENCE + BEAT)
        return self._reason

    def _look(self) -> None:
        """Beat, and read the beats of the others."""
        last = dict.fromkeys((r for r in range(self._size) if r != self._rank), "")
        heard = dict.fromkeys(last, time.monotonic())
        beats = 0
        while self._reason is None and not self._ended.wait(BEAT):
            beats += 1
            try:
                self._store.set(f"{self._rank}", str(beats))
                found = [value.decode() for value in self._store.multi_get([str(rank) for rank in last])]
            except RuntimeError:
                self._reason = "the store of this run is gone: the process of rank 0, or its launcher, has ended"
                break
            now = time.monotonic()
            for rank, beat in zip(list(last), found, strict=True):
                if beat != last[rank]:
                    last[rank], heard[rank] = beat, now
                if beat.startswith((_FAILED, _LEFT)):
                    self._other_tells = beat.startswith(_FAILED)
                    self._reason = f"{self._names[rank]} failed: {beat.partition(':')[2]}"
                elif now - heard[rank] > SILENCE:
                    self._reason = f"{self._names[rank]} was silent for {SILENCE:.0f} s: it was killed or hangs"
                    # Later than this process ends, which tells why.
                    end_sibling(self._processes[rank], GRACE + 1)
        if self._reason is not None:
            self._found.set()
            if not self._ended.wait(GRACE):
                self._end()

    def _end(self) -> None:
        """End the process; its main thread waits for what never comes."""
        if self._first_to_tell():
            print(f"error: {self._reason}", file=sys.stderr, flush=True)
        os._exit(EXIT_CODE)

    def _write(self, beat: str) -> None:
        try:
            self._store.set(f"{self._rank}", beat)
        except RuntimeError:
            # Whoever held the store is gone, and nobody reads this.
            return

    def _first_to_tell(self) -> bool:
        """Whether no other process tells that the run failed."""
        try:
            return int(self._store.add(_TOLD, 1)) == 1 and not self._other_tells
        except RuntimeError:
            return not self._other_tells

    def _linger(self) -> None:
        """Keep the store while others still ask it who tells, where it lives in this process."""
        if self._rank or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            return
        end = time.monotonic() + 3 * BEAT
        while time.monotonic() < end and int(self._store.add(_TOLD, 0)) < self._size:
            time.sleep(BEAT / 10)


def _words(error: BaseException) -> str:
    """An error in one line."""
    if isinstance(error, KeyboardInterrupt):
        return "it was interrupted"
    return " ".join(str(error).split())[:400] or type(error).__name__
