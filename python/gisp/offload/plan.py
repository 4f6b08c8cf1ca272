"""Where layers and their inputs lie during a run, decided from sizes before anything is loaded."""

from __future__ import annotations

from dataclasses import dataclass

from gisp.config.memory import gigabytes
from gisp.errors import GispError

# Share of the device's memory that is planned with; the rest is for fragments and for what libraries take.
_USABLE = 0.92


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
    """

    layers: tuple[int, ...]
    rest: int
    largest: int
    inputs: int
    working: int
    loading: int = 0


@dataclass(frozen=True)
class Plan:
    """A placement.

    Attributes:
        streamed: numbers of the layers that lie in host memory.
        inputs_on_host: whether inputs of layers wait for the backward pass in host memory.
        host, device: bytes at the fullest moment.
        limit: bytes of the device that may be used, ``None`` where nothing limits them.
    """

    demand: Demand
    streamed: tuple[int, ...]
    inputs_on_host: bool
    limit: int | None

    @property
    def device(self) -> int:
        return _device_bytes(self.demand, self.streamed, self.inputs_on_host)

    @property
    def host(self) -> int:
        demand = self.demand
        inputs = demand.inputs * len(demand.layers) if self.inputs_on_host else 0
        return max(demand.loading, sum(demand.layers[i] for i in self.streamed) + inputs)

    def lines(self) -> list[str]:
        """The plan in words."""
        layers, streamed = self.demand.layers, len(self.streamed)
        weights = sum(layers[i] for i in self.streamed)
        kept = f", {len(layers) - streamed} on the device ({gigabytes(sum(layers) - weights)})"
        inputs = gigabytes(self.demand.inputs * len(layers))
        most = "" if self.limit is None else f" of {gigabytes(self.limit)}"
        return [
            f"offload: {streamed} of {len(layers)} layers in host memory ({gigabytes(weights)})"
            + (kept if streamed < len(layers) else ""),
            f"  inputs of layers {'in host memory' if self.inputs_on_host else 'on the device'} ({inputs}), "
            f"device peak {gigabytes(self.device)}{most}, host {gigabytes(self.host)}",
        ]


def make_plan(demand: Demand, *, everything: bool, limit: int | None, host: int | None) -> Plan | None:
    """How a run of this demand fits; ``None`` if it does without host memory.

    Args:
        everything: stream all layers, also those that would fit on the device.
        limit: bytes of the device, ``None`` for no limit.
        host: bytes of host memory that may be taken, ``None`` where that is not known.

    Raises:
        GispError: it does not fit, or the host has too little memory.
    """
    usable = None if limit is None else int(limit * _USABLE)
    for on_host in (False, True):
        plan = _with_inputs(demand, on_host, everything, usable)
        if plan is None:
            continue
        if not plan.streamed:
            return None
        plan = Plan(demand, plan.streamed, on_host, limit)
        if host is not None and plan.host > host:
            raise GispError(
                f"--offload needs {gigabytes(plan.host)} of host memory, {gigabytes(host)} are free: "
                "free some, or give --offload auto, which leaves on the GPU what fits there"
            )
        return plan
    least = _device_bytes(demand, tuple(range(len(demand.layers))), True) / _USABLE
    raise GispError(
        f"--offload needs {gigabytes(least)} on the GPU for embeddings, two layers and their work, "
        f"{gigabytes(limit or 0)} may be used: give a smaller --batch-tokens or --batch-size, or more --gpu-memory"
    )


def _with_inputs(demand: Demand, on_host: bool, everything: bool, usable: int | None) -> Plan | None:
    """As many layers on the device as fit, with their inputs in one place or the other."""
    count = len(demand.layers)
    for resident in (0,) if everything else range(count, -1, -1):
        if resident == count and on_host:
            continue
        # Evenly spread, so that there is always a layer that computes while the next one comes.
        streamed = tuple(i for i in range(count) if (i + 1) * resident // count == i * resident // count)
        if usable is None or _device_bytes(demand, streamed, on_host) <= usable:
            return Plan(demand, streamed, on_host, usable)
    return None


def _device_bytes(demand: Demand, streamed: tuple[int, ...], inputs_on_host: bool) -> int:
    away = set(streamed)
    resident = sum(size for i, size in enumerate(demand.layers) if i not in away)
    slots = 2 * max((demand.layers[i] for i in streamed), default=0) + (demand.largest if streamed else 0)
    # Of inputs in host memory those of a layer and of the next one are here, beside what is on its way out.
    inputs = demand.inputs * (3 if inputs_on_host else len(demand.layers))
    return demand.rest + resident + slots + inputs + demand.working
