"""Where layers and their inputs lie during a run, decided from sizes before anything is loaded."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from gisp.config.memory import gigabytes
from gisp.errors import GispError

# Share of the device's memory that is planned with; the rest is for fragments and for what libraries take. torch takes
# memory in segments of up to 20 MiB, a few of which are used in part: next to nothing, but not of a few hundred MB.
_USABLE = 0.92
_SEGMENTS = 48 * 2**20


@dataclass(frozen=True)
class Demand:
    """What a run asks of memory, in bytes.

    Attributes:
        layers: weights of every decoder layer.
        rest: all other weights: embeddings, final norm and output projection.
        largest: the largest matrix of a layer.
        inputs: of one layer, for all tokens of a step.
        working: at the busiest moment of one layer or of the loss, for the tokens of one pass, beside its weights.
        loading: in host memory while the model is read; 0 for a model in memory.
        embedding, head: of the rest what may lie in host memory, too: token embedding and output projection; 0 where
            they are one.
        beside: in host memory beside the layers.
        mapped: whether layers are read from their files whenever they visit, so that host memory holds none.
    """

    layers: tuple[int, ...]
    rest: int
    largest: int
    inputs: int
    working: int
    loading: int = 0
    embedding: int = 0
    head: int = 0
    beside: int = 0
    mapped: bool = False


@dataclass(frozen=True)
class Advice:
    """What to do about a plan that cannot be, in words.

    Attributes:
        device, host: where the device or the host has too little memory.
    """

    device: str = "give a smaller --batch-tokens or --batch-size, or more --gpu-memory"
    host: str = "free some, or give --offload auto, which leaves on the GPU what fits there"


PRUNING = Advice()


@dataclass(frozen=True)
class Plan:
    """A placement.

    Attributes:
        streamed: numbers of the layers that lie in host memory.
        inputs_on_host: whether inputs of layers wait for the backward pass in host memory.
        ends_on_host: whether token embedding and output projection lie in host memory.
        host, device: bytes at the fullest moment.
        limit: bytes of the device that may be used, ``None`` where nothing limits them.
    """

    demand: Demand
    streamed: tuple[int, ...]
    inputs_on_host: bool
    limit: int | None
    ends_on_host: bool = False

    @property
    def device(self) -> int:
        """Bytes on the device at the peak."""
        demand, away = self.demand, set(self.streamed)
        resident = sum(size for i, size in enumerate(demand.layers) if i not in away)
        slots = 2 * max([*(demand.layers[i] for i in away), self.ends_on_host * demand.head], default=0)
        slots += demand.largest if away else 0
        # Of inputs in host memory those of a layer and of the next one are here, beside what is on its way out.
        inputs = demand.inputs * (3 if self.inputs_on_host else len(demand.layers))
        return demand.rest - self._ends + resident + slots + inputs + demand.working

    @property
    def host(self) -> int:
        """Bytes of host memory at the peak, while loading or after it."""
        demand = self.demand
        inputs = demand.inputs * len(demand.layers) if self.inputs_on_host else 0
        layers = 0 if demand.mapped else sum(demand.layers[i] for i in self.streamed)
        return max(demand.loading, layers + self._ends + inputs + demand.beside)

    @property
    def places(self) -> dict[str, Any]:
        """Options of :func:`gisp.offload.place.place`."""
        of_demand = {"mapped": self.demand.mapped}
        return {"inputs_on_host": self.inputs_on_host, "ends_on_host": self.ends_on_host, **of_demand}

    @property
    def crossing(self) -> int:
        """Bytes between host and device in a step: layers come twice, inputs go and come, the projection comes once,
        and of the embedding what the tokens read."""
        demand = self.demand
        inputs = 2 * demand.inputs * len(demand.layers) if self.inputs_on_host else 0
        ends = demand.head + demand.inputs if self.ends_on_host else 0
        return 2 * sum(demand.layers[i] for i in self.streamed) + inputs + ends

    @property
    def _ends(self) -> int:
        return self.demand.embedding + self.demand.head if self.ends_on_host else 0

    def lines(self) -> list[str]:
        """The plan in words."""
        layers, streamed = self.demand.layers, len(self.streamed)
        weights = sum(layers[i] for i in self.streamed)
        kept = f", {len(layers) - streamed} on the device ({gigabytes(sum(layers) - weights)})"
        inputs = self.demand.inputs * len(layers)
        beside = [
            f"inputs of layers {'in host memory' if self.inputs_on_host else 'on the device'} ({gigabytes(inputs)})"
        ]
        beside = beside if inputs else []
        beside += [f"embedding and output projection in host memory ({gigabytes(self._ends)})"] if self._ends else []
        most = "" if self.limit is None else f" of {gigabytes(self.limit)}"
        where = "read from their files" if self.demand.mapped else "in host memory"
        return [
            f"offload: {streamed} of {len(layers)} layers {where} ({gigabytes(weights)})"
            + (kept if streamed < len(layers) else ""),
            *([f"  {', '.join(beside)}"] if beside else []),
            f"  device peak {gigabytes(self.device)}{most}, host {gigabytes(self.host)}",
        ]


def make_plan(
    demand: Demand, *, everything: bool, limit: int | None, host: int | None, advice: Advice = PRUNING
) -> Plan | None:
    """How a run of this demand fits, with the least that crosses the bus; ``None`` if it does without host memory.

    Args:
        everything: stream all layers, also those that would fit on the device.
        limit: bytes of the device, ``None`` for no limit.
        host: bytes of host memory that may be taken, ``None`` where that is not known.
        advice: what to do where it cannot be.

    Raises:
        GispError: it does not fit, or the host has too little memory.
    """
    usable = None if limit is None else int(limit * _USABLE) - _SEGMENTS
    ends = (False, True) if demand.embedding + demand.head else (False,)
    places = [Plan(demand, (), on_host, limit, away) for on_host in (False, True) for away in ends]
    plans = [plan for place in places if (plan := _largest(place, everything, usable)) is not None]
    plan = min(plans, key=lambda plan: plan.crossing, default=None)
    if plan is None:
        least = min(Plan(demand, (*range(len(demand.layers)),), True, limit, away).device for away in ends)
        least = int((least + _SEGMENTS) / _USABLE)
        raise GispError(
            f"--offload needs {gigabytes(least)} on the GPU for two layers and their work, "
            f"{gigabytes(limit or 0)} may be used: {advice.device}"
        )
    if not plan.crossing:
        return None
    if host is not None and plan.host > host:
        raise GispError(
            f"--offload needs {gigabytes(plan.host)} of host memory, {gigabytes(host)} are free: {advice.host}"
        )
    return plan


def _largest(plan: Plan, everything: bool, usable: int | None) -> Plan | None:
    """The plan with as many layers on the device as fit, ``None`` where not even none does."""
    count = len(plan.demand.layers)
    for resident in (0,) if everything else range(count, -1, -1):
        # Evenly spread, so that there is always a layer that computes while the next one comes.
        streamed = tuple(i for i in range(count) if (i + 1) * resident // count == i * resident // count)
        found = replace(plan, streamed=streamed)
        if usable is None or found.device <= usable:
            return found
    return None
