"""The dense base model of a run where a command wants it: on one device, or with its layers in host memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from gisp.config.memory import check_gpu_memory
from gisp.model.load import resolve_device, skeleton
from gisp.model.structures import ModelMap, map_model
from gisp.offload.host import numbered
from gisp.offload.place import place
from gisp.offload.plan import Advice, Demand, Plan
from gisp.run.resources.placement import told_plan, usable_bytes
from gisp.run.trajectory import Trajectory


@dataclass(frozen=True)
class BasePlace:
    """Where a base model computes.

    Attributes:
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        offload: whether its layers lie in host memory.
        gpu_memory: most memory to take of the GPU, as ``24GB``; only with ``offload``.

    Raises:
        GispError: an amount that is none, or one without ``offload``.
    """

    device: str = "auto"
    offload: bool = False
    gpu_memory: str | None = None

    def __post_init__(self) -> None:
        check_gpu_memory(self.gpu_memory, self.offload)

    def outline(self, trajectory: Trajectory, dtype: str | None = None) -> ModelMap:
        """The shapes of the base model, for a plan; without memory for its weights.

        Args:
            dtype: as for :meth:`Trajectory.load_base`, of the device that computes.
        """
        kind = trajectory.dtype_on(resolve_device(self.device), dtype)
        return map_model(skeleton(trajectory.base_path, kind))

    def plan(self, demand: Demand, advice: Advice) -> Plan:
        """How what is asked of memory fits with all layers in host memory, told to whoever hears of progress.

        Raises:
            GispError: it does not.
        """
        limit = usable_bytes(numbered(resolve_device(self.device)), self.gpu_memory)
        plan = told_plan(demand, limit, everything=True, advice=advice)
        assert plan is not None
        return plan

    def load(self, trajectory: Trajectory, *, dtype: str | None = None, plan: Plan | None = None) -> Any:
        """The base model, checked to be the one the run pruned.

        Args:
            dtype: as for :meth:`Trajectory.load_base`, of the device that computes.
            plan: where layers and what is beside them lie; ``None``: all layers in host memory, if any.
        """
        if not self.offload:
            return trajectory.load_base(device=self.device, dtype=dtype)
        device = numbered(resolve_device(self.device))
        kind = trajectory.dtype_on(device, dtype)
        model = trajectory.load_base(device="cpu", dtype=str(kind).removeprefix("torch."))
        places = {} if plan is None else plan.places
        place(model, tuple(range(trajectory.layers)), device, **places)
        return model
