"""Processes of one run watch over one another.

A collective whose partner has died may wait for ever: over NCCL nothing tells. So a thread of every process writes a
beat into the store of the process group and reads those of the others. A beat says what its process is at, and whether
it waits for others. One whose beats end was killed, was stopped, or its host is gone. One that fails says so as its
beat, and so does one that sees itself stuck (:mod:`gisp.replicas.signs`) while others wait for it. One that works is
never ended, however long the others wait. A process that cannot end by itself, because it waits for a collective, is
ended, and so is a silent one that the same launcher started.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
import warnings
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from types import TracebackType
from typing import Any

from torch import distributed

from gisp.errors import GispError, is_out_of_memory
from gisp.progress import doing
from gisp.replicas import signs
from gisp.replicas.errors import ReplicaError
from gisp.replicas.siblings import end_sibling, state_of, this_process
from gisp.replicas.signs import Sight, Signs
from gisp.replicas.store_calls import StoreCalls

# Seconds between beats, of silence until a process counts as lost, and for others to end by themselves then.
BEAT, SILENCE, GRACE = 1.0, 15.0, 5.0
# Seconds that processes wait until it is told who works that long, and until what connects them counts as broken.
LATE = 600.0
EXIT_CODE = 2
# A failed process says why by itself; of one that left another one has to.
_FAILED, _LEFT, _TOLD = "failed:", "left:", "told"


class Watch:
    """Entered by all processes of a run at once, left when the run ends.

    Args:
        exchange: as :meth:`gisp.replicas.group.Replicas.exchange`.
        signs: of the thread that enters.
        aborts_after: when a backend that cannot raise an error aborts a process that waits.
    """

    def __init__(
        self,
        rank: int,
        size: int,
        exchange: Callable[[bytes], list[bytes]],
        signs: Signs,
        aborts_after: timedelta | None = None,
    ) -> None:
        self._rank, self._size, self._exchange = rank, size, exchange
        self.signs, self._aborts_after = signs, aborts_after
        self._names: list[str] = []
        self._processes: list[dict[str, Any]] = []
        # What every process said of itself last.
        self._beats: list[dict[str, Any]] = []
        self._ended, self._found = threading.Event(), threading.Event()
        self._reason: str | None = None
        self._looks = 0
        self._other_tells = self._warned = self._store_gone = False
        self._thread = threading.Thread(target=self._look, daemon=True)

    def __enter__(self) -> Watch:
        # Its own connection: the main thread may wait inside another one.
        default: Any = distributed.distributed_c10d._get_default_store()
        store = default.clone()
        store.set_timeout(timedelta(seconds=SILENCE))
        here = {**this_process(), "run": os.urandom(8).hex()}
        self._processes = found = [json.loads(data) for data in self._exchange(json.dumps(here).encode())]
        self._names = [f"rank {rank} ({item['host']}, process {item['pid']})" for rank, item in enumerate(found)]
        self._beats = [_beat(0, Sight(None)) for _ in found]
        # A program may prune several times in one process group.
        self._store = StoreCalls(distributed.PrefixStore(f"gisp/{found[0]['run']}", store), SILENCE + BEAT)
        self._store.set(f"{self._rank}", json.dumps(self._beats[self._rank]))
        self._exchange(b"")
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join()
        self.signs.end()
        try:
            if error is not None:
                self._leave(error)
        finally:
            self._store.end()

    def _leave(self, error: BaseException) -> None:
        """Tell the others of an error; a :class:`ReplicaError` where it does not tell the user by itself."""
        tells = isinstance(error, Exception) or not self._rank
        self._write(f"{_FAILED if tells else _LEFT}failed: {_words(error)}")
        first = tells and self._first_to_tell()
        self._linger(first)
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
        # As long as the thread beside takes to find one that has just ended.
        last = self._looks + SILENCE / BEAT + 3
        while self._looks < last and self._thread.is_alive() and not self._found.wait(BEAT):
            pass
        return self._reason

    def late(self, timeout: timedelta | None) -> str:
        """Who has not come to a collective within its time-out, and what each was last seen doing."""
        absent = [rank for rank, beat in enumerate(self._beats) if beat["waits"] is None and rank != self._rank]
        limit = f" of {timeout.total_seconds():.0f} s" if timeout else ""
        passed = f"the time-out{limit} of the process group has passed"
        if not absent:
            return f"{passed} while all processes waited for one another: {self._hosts()}"
        told = ", ".join(f"{self._names[rank]} {_last_at(self._beats[rank])}" for rank in absent)
        return f"{passed} while others waited: {told}"

    def _look(self) -> None:
        """Beat, and read the beats of the others."""
        others = [rank for rank in range(self._size) if rank != self._rank]
        last = dict.fromkeys(others, "")
        heard = dict.fromkeys(others, 0)
        while self._reason is None and not self._ended.wait(BEAT):
            # Silence is counted in beats of this process, which it has slept through too where all were stopped.
            self._looks = looks = self._looks + 1
            sight = self.signs.look()
            self._beats[self._rank] = _beat(looks, sight)
            try:
                self._store.set(f"{self._rank}", json.dumps(self._beats[self._rank]))
                found = [value.decode() for value in self._store.multi_get([str(rank) for rank in others])]
            except RuntimeError:
                self._reason = self._without_store()
                break
            for rank, beat in zip(others, found, strict=True):
                if beat != last[rank]:
                    last[rank], heard[rank] = beat, looks
                self._hear(rank, beat)
            for rank in others:
                self._judge(rank, {other: BEAT * (looks - heard[other]) for other in others})
            self._reason = self._reason or self._among_all(sight)
        if self._reason is not None:
            self._found.set()
            # One that is stuck itself leaves it to others to tell.
            if not self._ended.wait(GRACE if not self._beats[self._rank]["stuck"] else 2 * GRACE):
                self._end()

    def _hear(self, rank: int, beat: str) -> None:
        if not beat.startswith((_FAILED, _LEFT)):
            self._beats[rank] = json.loads(beat)
        elif self._reason is None:
            self._other_tells = beat.startswith(_FAILED)
            self._reason = f"{self._names[rank]} {beat.partition(':')[2]}"

    def _judge(self, rank: int, silent: dict[int, float]) -> None:
        """Whether a process is lost.

        Args:
            silent: seconds since every other one was heard.
        """
        if self._reason is not None or silent[rank] <= SILENCE:
            return
        seen = state_of(self._processes[rank])
        # One that lives may hold the interpreter over one long call, or its pages are on the disk.
        unsure = seen == "runs" or (not seen and self._is_heard_beside(rank, silent))
        if unsure and silent[rank] <= signs.STILL:
            return
        words = {
            "gone": "ended without a word, as one that Linux kills where the memory of the host runs out",
            "stopped": "was stopped by a signal",
            "runs": f"lives but did not come to run for {signs.STILL:.0f} s",
        }.get(seen, f"was silent for {SILENCE:.0f} s, it or its host is gone")
        self._reason = f"{self._names[rank]} {words}; it {_last_at(self._beats[rank])}"
        # Later than this process ends, which tells why.
        end_sibling(self._processes[rank], GRACE + 1)

    def _is_heard_beside(self, rank: int, silent: dict[int, float]) -> bool:
        """Whether a process of the same host beats, which can see more."""
        host = self._processes[rank]["host"]
        return any(self._processes[other]["host"] == host and silent[other] <= SILENCE for other in silent)

    def _among_all(self, sight: Sight) -> str | None:
        """Why the run cannot go on although all processes beat; ``None`` if it can."""
        waits = [beat["waits"] for beat in self._beats]
        waiting = [seconds for seconds in waits if seconds is not None]
        if sight.stuck and (waiting or all(beat["stuck"] for beat in self._beats)):
            words = f"is stuck, {sight.stuck}; it {_last_at(self._beats[self._rank])}"
            self._write(f"{_LEFT}{words}")
            return f"{self._names[self._rank]} {words}"
        limit = self._aborts_after and self._aborts_after.total_seconds()
        if limit and sight.waits and sight.waits > limit - min(3 * (BEAT + GRACE), limit / 2):
            return self.late(self._aborts_after)
        if len(waiting) == self._size and min(waiting) > LATE:
            return (
                f"all processes have waited for one another for {LATE:.0f} s, what connects them has failed: "
                f"{self._hosts()}"
            )
        is_late = max(waiting, default=0.0) > LATE
        if is_late and not self._warned and not self._rank:
            told = ", ".join(
                f"{self._names[rank]} {_last_at(self._beats[rank])}" for rank, w in enumerate(waits) if w is None
            )
            # Where warnings are errors this thread must live on.
            with suppress(UserWarning):
                warnings.warn(f"other processes have waited for {LATE:.0f} s: {told}", stacklevel=2)
        self._warned = is_late
        return None

    def _hosts(self) -> str:
        hosts = ", ".join(dict.fromkeys(str(process["host"]) for process in self._processes))
        return f"look at the network of {hosts}, NCCL_DEBUG=INFO says more"

    def _without_store(self) -> str:
        """What it means that the store cannot be reached, which lives in the first process or its launcher."""
        self._store_gone = True
        # Nobody can be asked who tells it: the first one that lives does.
        self._other_tells = any(state_of(before) == "runs" for before in self._processes[: self._rank])
        if self._rank and state_of(self._processes[0]) == "stopped":
            return f"{self._names[0]} was stopped by a signal; it {_last_at(self._beats[0])}"
        return "the store of this run is gone: the process of rank 0, or its launcher, has ended or was stopped"

    def _end(self) -> None:
        """End the process; its main thread waits for what never comes."""
        if self._first_to_tell():
            print(f"error: {self._reason}", file=sys.stderr, flush=True)
        os._exit(EXIT_CODE)

    def _write(self, beat: str) -> None:
        if self._store_gone:
            return
        try:
            self._store.set(f"{self._rank}", beat)
        except RuntimeError:
            # Whoever held the store is gone, and nobody reads this.
            return

    def _first_to_tell(self) -> bool:
        """Whether no other process tells that the run failed."""
        if self._store_gone:
            return not self._other_tells
        try:
            return self._store.add(_TOLD, 1) == 1 and not self._other_tells
        except RuntimeError:
            return not self._other_tells

    def _linger(self, first: bool) -> None:
        """Stay while others still ask who tells: the store, where it lives here, or whether this process runs."""
        if self._store_gone and first:
            # One that looks only after this process has ended would tell the same once more.
            end = time.monotonic() + GRACE
            while time.monotonic() < end and any(
                state_of(other) == "runs" for other in self._processes[self._rank + 1 :]
            ):
                time.sleep(BEAT / 10)
            return
        if self._rank or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            return
        end = time.monotonic() + 3 * BEAT
        while time.monotonic() < end and self._store.add(_TOLD, 0) < self._size:
            time.sleep(BEAT / 10)


def _beat(number: int, sight: Sight) -> dict[str, Any]:
    return {"beat": number, "waits": sight.waits, "stuck": sight.stuck, "doing": doing()}


def _last_at(beat: dict[str, Any]) -> str:
    """What a process was last seen doing."""
    words = f" ({beat['doing']})" if beat["doing"] else ""
    return f"was last seen {'waiting for others' if beat['waits'] is not None else 'at work'}{words}"


def _words(error: BaseException) -> str:
    """An error in one line."""
    if isinstance(error, KeyboardInterrupt):
        return "it was interrupted"
    return " ".join(str(error).split())[:400] or type(error).__name__
