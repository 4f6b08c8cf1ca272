"""The stages of a run as processes: who holds what part of the model, and what neighbours send one another."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import distributed

from gisp.errors import GispError
from gisp.replicas.agreement import agree
from gisp.replicas.group import Replicas
from gisp.stages.placement import Placement
from gisp.stages.rules import Sharing, check_sharing


class Stages:
    """The processes of a run as replicas of so many stages each; a row of ranks in a row is one replica.

    Args:
        replicas: the processes of the run.
        count: stages of a replica.

    Attributes:
        stage, replica: of this process.
        replicas: how many there are.
        processes: all of them.
        placement: which layers lie where, once that is known.

    Raises:
        GispError: the processes do not make whole rows.
    """

    def __init__(self, replicas: Replicas, count: int) -> None:
        check_sharing(Sharing(replicas.size, count))
        if count > 1 and replicas.size != distributed.get_world_size():
            raise GispError(
                f"process_group has {replicas.size} of {distributed.get_world_size()} processes: "
                "stages need the group of all, torch.distributed.group.WORLD"
            )
        self.processes, self.count = replicas, count
        self.replica, self.stage = divmod(replicas.rank, count)
        self.replicas = replicas.size // count
        self.placement: Placement | None = None
        self._lines: dict[tuple[int, int], Any] = {}

    @contextmanager
    def connected(self) -> Iterator[None]:
        """Lines between neighbours inside.

        Every direction between two stages is a group of its own: what two stages send one another at the same time must
        not wait for each other.

        Raises:
            GispError: other processes have other numbers of stages.
        """
        # Before lines are made: processes of other stages would wait for lines that nobody makes.
        agree(self.processes, {"stages": self.count})
        pairs = sorted({(s, (s + by) % self.count) for s in range(self.count) for by in (1, -1)})
        made = []
        for replica in range(self.replicas):
            for source, target in pairs:
                if source == target:
                    continue
                ranks = [replica * self.count + stage for stage in (source, target)]
                # All processes make all groups: it is a collective.
                with self.processes.waiting():
                    line = distributed.new_group(sorted(ranks), timeout=self.processes.timeout)
                if self.processes.rank in ranks:
                    self._lines[source, target] = line
                    made.append(line)
                    # The first message makes the connection: in one order everywhere, nobody waits for ever.
                    greeting = torch.zeros(1, device=self.processes.device)
                    if source == self.stage:
                        self.wait(self.send(greeting, target))
                    else:
                        self.wait(self.receive(greeting, source))
        yield
        for line in made:
            distributed.destroy_process_group(line)

    @property
    def device(self) -> torch.device:
        """Where messages are sent from and to."""
        return self.processes.device

    def send(self, tensor: torch.Tensor, stage: int) -> Any:
        """Begin to send a contiguous tensor to a stage of the same replica; what to wait for."""
        line = self._lines[self.stage, stage]
        return self._tried(lambda: distributed.isend(tensor, self._rank(stage), group=line))

    def receive(self, into: torch.Tensor, stage: int) -> Any:
        """Begin to fill a tensor with the next one of a stage; what to wait for."""
        line = self._lines[stage, self.stage]
        return self._tried(lambda: distributed.irecv(into, self._rank(stage), group=line))

    def _rank(self, stage: int) -> int:
        return self.replica * self.count + stage

    def wait(self, work: Any) -> None:
        """Wait for a message, on a GPU without holding up this process.

        Raises:
            ReplicaError: the other process is gone.
        """
        with self.processes.waiting():
            self._tried(work.wait)

    def _tried(self, communicate: Callable[[], Any]) -> Any:
        try:
            return communicate()
        except RuntimeError as error:
            raise self.processes.lost(error) from None


class Mail:
    """The messages of one step: each is taken by name, whatever the order in which they come.

    A line carries messages one after the other. So receipts are begun in the order of sending, up to the one that is
    needed.

    Args:
        arrivals: by sending stage the names of what comes, in its order.
        empty: a tensor for the message of a name.
    """

    def __init__(
        self, stages: Stages, arrivals: Mapping[int, Sequence[Any]], empty: Callable[[Any], torch.Tensor]
    ) -> None:
        self._stages, self._empty = stages, empty
        self._awaited = {source: [*names] for source, names in arrivals.items()}
        self._source = {name: source for source, names in arrivals.items() for name in names}
        self._begun: dict[Any, tuple[Any, torch.Tensor]] = {}
        self._sent: list[tuple[Any, torch.Tensor]] = []

    def send(self, tensor: torch.Tensor, stage: int) -> None:
        """Begin to send; the tensor must not change any more."""
        self._sent = [(work, held) for work, held in self._sent if not work.is_completed()]
        self._sent.append((self._stages.send(tensor, stage), tensor))

    def take(self, name: Any) -> torch.Tensor:
        """The message of a name, waited for."""
        queue = self._awaited[self._source[name]]
        while name not in self._begun:
            coming = queue.pop(0)
            tensor = self._empty(coming)
            self._begun[coming] = self._stages.receive(tensor, self._source[coming]), tensor
        work, tensor = self._begun.pop(name)
        self._stages.wait(work)
        return tensor

    def finish(self) -> None:
        """Wait until all that was sent has left."""
        for work, _ in self._sent:
            self._stages.wait(work)
        self._sent.clear()
