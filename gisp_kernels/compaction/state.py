"""Optimizer state that moves with its parameter: momentum, the moments of Adam."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

from gisp_kernels.checks import memory_span
from gisp_kernels.compaction.store import Store


class OptimizerState:
    """What optimizers keep for the parameters of stores, as stores of their own.

    Args:
        optimizers: anything with the ``state`` and ``param_groups`` of a ``torch.optim.Optimizer``.
        stores: of the parameters; buffers among them have no state.

    Attributes:
        stores: of the state found by the last :meth:`refresh`.

    Raises:
        TypeError: something else than an optimizer.
        ValueError: an optimizer holds none of the parameters.
    """

    def __init__(self, optimizers: Sequence[Any], stores: Iterable[Store]) -> None:
        self._optimizers = optimizers
        # Every step asks for the state of all of these, which without an optimizer have none.
        followed = stores if optimizers else ()
        self._followed = [store for store in followed if isinstance(store.tensor, torch.nn.Parameter)]
        self._found: dict[tuple[int, str], Store] = {}
        known = {id(store.tensor) for store in self._followed}
        for optimizer in optimizers:
            if not hasattr(optimizer, "param_groups"):
                raise TypeError(f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}")
            if not any(id(p) in known for group in optimizer.param_groups for p in group["params"]):
                raise ValueError(f"the {type(optimizer).__name__} holds no parameter of these groups")

    @property
    def stores(self) -> list[Store]:
        """What of the optimizers' state moves along, as of the last :meth:`refresh`."""
        return list(self._found.values())

    def refresh(self) -> bool:
        """Take over state that is new, loaded or gone since; whether any is.

        Raises:
            ValueError: a state that is not shaped like its parameter; nothing has changed then.
        """
        found: dict[tuple[int, str], Store] = {}
        fresh = []
        for number, store in enumerate(self._followed):
            for state, name in self._entries(store):
                earlier = self._found.get((number, name))
                # Loading a state makes new mappings.
                if earlier is not None and earlier.owners[0][0] is state and earlier.is_shown():
                    found[number, name] = earlier
                else:
                    fresh.append((number, store, state, name, earlier))
        for number, store, state, name, earlier in fresh:
            found[number, name] = store.follower(state, name, earlier)
        changed = bool(fresh) or len(found) < len(self._found)
        self._found = found
        return changed

    def _entries(self, store: Store) -> Iterator[tuple[dict[str, Any], str]]:
        """Tensors kept for a parameter, shaped like it."""
        shape = store.tensor.shape
        for optimizer in self._optimizers:
            state = optimizer.state.get(store.tensor, {})
            for name, value in state.items():
                if isinstance(value, torch.Tensor) and value.shape == shape:
                    yield state, name
                elif any(tensor.numel() > 1 for tensor in _tensors(value)):
                    raise ValueError(
                        f"state {name!r} that {type(optimizer).__name__} keeps for the {store} does not have its shape "
                        f"{tuple(shape)}: it cannot follow; use an optimizer whose state has, or make a new one"
                    )


@cache
def watch_fused_optimizers() -> None:
    """Have ``step()`` of fused optimizers refuse weights with gaps.

    They step over memory from a weight's address on as if it had none: on a CPU what was removed changes in place of
    what is kept.
    """
    register_optimizer_step_pre_hook(_refuse_gaps)


def _refuse_gaps(optimizer: Any, *_: Any) -> None:
    for group in optimizer.param_groups:
        for parameter in group["params"] if group.get("fused") else ():
            if parameter.grad is not None and _has_gaps(parameter):
                raise RuntimeError(
                    f"a fused {type(optimizer).__name__} cannot step a weight {list(parameter.shape)} behind whose "
                    "columns removed ones lie: pass fused=False (Trainer: optim='adamw_torch') or call Compactor.pack()"
                )


def _has_gaps(tensor: torch.Tensor) -> bool:
    if tensor.layout != torch.strided or tensor.is_contiguous():
        return False
    return memory_span(tensor) > tensor.numel() > 0


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))
