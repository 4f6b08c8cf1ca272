"""Sums over the sequences of a step that do not depend on how many processes share them.

The sequences of a step are split into a fixed number of slices. Each slice is passed through the model and summed by
itself, by whichever process it falls to. One collective brings the sums of all slices to every process, which adds them
in the order of the slices. So the same numbers are added in the same order whatever the number of processes, and all of
them hold the same bits.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from itertools import pairwise
from typing import Any, TypeVar

import torch
from torch import distributed

from gisp.errors import GispError
from gisp.replicas.errors import ReplicaError
from gisp.replicas.signs import Cells, GpuCells, Signs
from gisp.replicas.watch import Watch

Item = TypeVar("Item")
Result = TypeVar("Result")
# Elements of a tensor that travel at a time: every process holds them once for each process.
_ELEMENTS = 2**26
# How backends say that a collective waited in vain.
_TIMED_OUT = ("timed out", "timeout")


class Replicas:
    """The processes of a run, or the one that it has.

    Args:
        group: of ``torch.distributed``, initialised; ``None`` for one process.

    Attributes:
        rank, size: of this process in the group, and how many there are.
        device: what collectives take and give lies there.
    """

    def __init__(self, group: distributed.ProcessGroup | None = None) -> None:
        self._group = group
        self._watch: Watch | None = None
        self.rank = distributed.get_rank(group) if group else 0
        self.size = distributed.get_world_size(group) if group else 1
        on_gpu = group is not None and "nccl" in str(distributed.get_backend(group))
        self.device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")

    @property
    def first(self) -> bool:
        """Whether this is the process that writes and speaks."""
        return self.rank == 0

    def total(self, slices: int, sums_of: Callable[[int], torch.Tensor]) -> torch.Tensor:
        """The sum over all slices, the same bits in every process and for any number of them.

        Args:
            sums_of: sums of the slice of a number, float64 [n] on one device; called for those that fall to this
                process.
        """
        total, *others = self.parts(slices, sums_of)
        for part in others:
            total = total + part
        return total

    def parts(self, slices: int, sums_of: Callable[[int], torch.Tensor]) -> list[torch.Tensor]:
        """The sums of every slice, in order; arguments as of :meth:`total`."""
        if self.size == 1:
            return [sums_of(i) for i in range(slices)]
        bounds = [rank * slices // self.size for rank in range(self.size + 1)]
        found = torch.stack([sums_of(i) for i in range(bounds[self.rank], bounds[self.rank + 1])])
        counts = [stop - start for start, stop in pairwise(bounds)]
        gathered = self.gather(found, max(counts))
        return list(torch.cat([part[:count] for part, count in zip(gathered, counts, strict=True)]))

    def add_up(
        self, totals: Sequence[torch.Tensor], slices: int, fill: Callable[[int, Sequence[torch.Tensor]], None]
    ) -> None:
        """Add the sums of all slices to totals, the same bits in every process and for any number of them.

        For sums too large to hold those of all slices at once. Memory beside the totals: the sums of one slice, none
        where one process has one slice.

        Args:
            totals: zeros, of any shapes and dtypes on one device.
            fill: adds the sums of the slice of a number to zeros like the totals; called for those that fall to this
                process, in their order.
        """
        if self.size == slices == 1:
            fill(0, totals)
            return
        for first in range(0, slices, self.size):
            sums = [torch.zeros_like(total) for total in totals]
            if first + self.rank < slices:
                fill(first + self.rank, sums)
            for total, found in zip(totals, sums, strict=True):
                if self.size == 1:
                    total += found
                    continue
                flat, whole = found.view(-1), total.view(-1)
                for begin in range(0, len(flat), _ELEMENTS):
                    part = slice(begin, begin + _ELEMENTS)
                    for other in self.gather(flat[None, part], 1)[: slices - first, 0]:
                        whole[part] += other

    def each(
        self, items: Sequence[Item], work: Callable[[Item], Result], done: Callable[[Item], None] | None = None
    ) -> list[Result]:
        """What becomes of every item, in their order; processes take turns, and each gets all results.

        Args:
            items: the same in every process.
            work: makes JSON of an item, called for those that fall to this process; floats keep their bits.
            done: told of every item as about its turn is over, for a count of progress.
        """
        mine = []
        for first in range(0, len(items), self.size):
            if first + self.rank < len(items):
                mine.append(work(items[first + self.rank]))
            if done is not None:
                for item in items[first : first + self.size]:
                    done(item)
        if self.size == 1:
            return mine
        found = [json.loads(data) for data in self.exchange(json.dumps(mine).encode())]
        return [found[number % self.size][number // self.size] for number in range(len(items))]

    def share(self, count: int) -> range:
        """Numbers of so many items, slices too, that fall to this process in :meth:`each` and :meth:`add_up`."""
        return range(self.rank, count, self.size)

    def exchange(self, data: bytes) -> list[bytes]:
        """What every process gives, by rank."""
        if self.size == 1:
            return [data]
        sizes = [int(size) for size in self.gather(torch.tensor([[len(data)]]), 1).flatten()]
        held = torch.zeros(1, max(1, *sizes), dtype=torch.uint8)
        held[0, : len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else 0
        rows = self.gather(held, 1)[:, 0].cpu()
        return [row[:size].numpy().tobytes() for row, size in zip(rows, sizes, strict=True)]

    def from_first(self, data: bytes) -> bytes:
        """What the first process gives; what others give is not read."""
        return self.exchange(data if self.first else b"")[0]

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Watch over one another inside: where one process ends, all do, and the line that says why is told once."""
        if self.size == 1:
            yield
            return
        try:
            cells = GpuCells(self.device) if self.device.type == "cuda" else Cells()
            with Watch(self.rank, self.size, self.exchange, Signs(cells), self._aborts_after) as self._watch:
                yield
                # One that is through must not be taken for lost by others that still work.
                self.exchange(b"")
        finally:
            self._watch = None

    @property
    def timeout(self) -> timedelta | None:
        """Of collectives, as the group was made with; ``None`` for one process or where the backend has none."""
        if self._group is None:
            return None
        options = getattr(self._group._get_backend(self.device), "options", None)
        return getattr(options, "_timeout", None)

    @property
    def _aborts_after(self) -> timedelta | None:
        """When torch ends a process in a collective instead of raising an error, as it does over NCCL."""
        return self.timeout if self.device.type == "cuda" else None

    def waiting(self) -> AbstractContextManager[None]:
        """Around what ends only when other processes have come to it too."""
        return self._watch.signs.waiting() if self._watch else nullcontext()

    def elsewhere(self) -> AbstractContextManager[None]:
        """Around code of the user's, which may stand still for reasons of its own."""
        return self._watch.signs.elsewhere() if self._watch else nullcontext()

    def gather(self, rows: torch.Tensor, most: int) -> torch.Tensor:
        """Rows [R, n] of every process, filled up to ``most`` with zeros; [size, most, n] on their device."""
        padded = torch.zeros(most, rows.shape[1], dtype=rows.dtype, device=self.device)
        padded[: len(rows)] = rows
        out = padded.new_empty(self.size, most, rows.shape[1])
        try:
            with self.waiting():
                distributed.all_gather([*out], padded, group=self._group)
        except RuntimeError as error:
            raise self.lost(error) from None
        return out.to(rows.device)

    def lost(self, error: RuntimeError) -> GispError:
        """What a failed collective means: another process is gone."""
        reason = self._watch.reason() if self._watch else None
        words = _first_line(error)
        if reason is None and self._watch and any(part in words.lower() for part in _TIMED_OUT):
            reason = self._watch.late(self.timeout)
        return ReplicaError(reason or f"the processes of this run lost one another: {words}", told=False)


def _first_line(error: Any) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
