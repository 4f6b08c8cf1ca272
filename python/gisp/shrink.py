"""Physical shrinking of a whole model: weights, attention bookkeeping, and the way back."""

from __future__ import annotations

import contextlib
from collections.abc import Container, Iterator, Mapping

import torch
from torch import nn

from gisp.attention import NoHeads, set_kv_index, use_indexed_attention
from gisp.errors import GispError
from gisp.structures import LayerMap, ModelMap, fingerprint
from gisp_kernels import Compactor

Removal = Mapping[str, torch.Tensor]
"""Group name -> original indices (int64) of the structures a step removes; absent = none."""


class ShrinkableModel:
    """A dense model that can be pruned step by step and moved back.

    Every call of :meth:`remove` is one step; weights keep their storage (see :class:`gisp_kernels.Compactor`).

    Attributes:
        map: the structure map made from the dense model.
        fingerprint: of the dense model.
        history: what each step removed, as applied and not rolled back.
    """

    _ATTRIBUTE = "gisp_shrinkable"

    def __init__(self, model_map: ModelMap) -> None:
        self.map = model_map
        self.fingerprint = fingerprint(model_map.model)
        self.history: list[Removal] = []
        self._compactor = Compactor(model_map.groups)
        if model_map.shares_kv:
            use_indexed_attention(model_map.model)
        setattr(model_map.model, self._ATTRIBUTE, self)

    @classmethod
    def of(cls, model: nn.Module) -> ShrinkableModel | None:
        """The live instance of a model, if it has one."""
        return getattr(model, cls._ATTRIBUTE, None)

    def kept(self, name: str) -> int:
        """Structures kept in a group."""
        return self._compactor.kept(name)

    def order(self, name: str) -> torch.Tensor:
        """Original index of every kept structure, by current position; int64 CPU tensor [kept]."""
        return self._compactor.order(name)[: self.kept(name)]

    def remove(self, removal: Removal) -> None:
        """Apply one step (also when it removes nothing)."""
        with self._weights_in_place():
            self._compactor.remove({name: index for name, index in removal.items() if index.numel()})
        self.history.append(removal)
        self._refresh(removal)

    def rollback(self, steps: int = 1) -> None:
        """Undo the last steps exactly.

        Raises:
            GispError: these steps were packed away.
        """
        if steps > self._compactor.depth:
            raise GispError(
                f"{steps} steps cannot be undone, {self._compactor.depth} are left after pack(): reload the base"
            )
        with self._weights_in_place():
            self._compactor.rollback(steps)
        undone = self.history[len(self.history) - steps :]
        del self.history[len(self.history) - steps :]
        self._refresh({name for removal in undone for name in removal})

    def pack(self) -> None:
        """Give the memory of removed weights back; earlier steps can no longer be rolled back."""
        self._compactor.pack()

    @contextlib.contextmanager
    def _weights_in_place(self) -> Iterator[None]:
        try:
            yield
        except ValueError as error:
            raise GispError(f"this model can no longer be moved, load its base model anew: {error}") from None

    def _refresh(self, changed: Container[str]) -> None:
        for item in self.map.layers:
            if item.heads.name in changed:
                self._refresh_layer(item)

    def _refresh_layer(self, item: LayerMap) -> None:
        kept = self.kept(item.heads.name)
        current = item.layer.self_attn
        if kept == 0 and current is item.attention:
            item.layer.self_attn = NoHeads(item.attention)
        elif kept and current is not item.attention:
            item.layer.self_attn = item.attention
        if self.map.shares_kv:
            groups = self.map.num_heads // self.map.num_kv_heads
            index = None
            if kept < self.map.num_heads:
                device = item.heads.projections[0].linear.weight.device
                index = (self.order(item.heads.name) // groups).to(device)
            set_kv_index(item.attention, index)
