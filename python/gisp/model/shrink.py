"""Physical shrinking of a whole model: weights, attention bookkeeping, and the way back."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from gisp.errors import GispError
from gisp.model.attention import NoHeads, set_head_counts, set_kv_index, use_indexed_attention
from gisp.model.keep import Keep, Removal, block_columns
from gisp.model.structures import ModelMap, fingerprint
from gisp_kernels import Compactor


class ShrinkableModel:
    """A dense model that can be pruned step by step and moved back.

    Every call of :meth:`remove` is one step; weights keep their storage (see :class:`gisp_kernels.Compactor`).

    Args:
        known_fingerprint: of the dense model, where some of its layers lie in other processes.

    Attributes:
        map: the structure map made from the dense model.
        fingerprint: of the dense model.
        history: what each step removed, as applied and not rolled back.
    """

    _ATTRIBUTE = "gisp_shrinkable"

    def __init__(self, model_map: ModelMap, known_fingerprint: str | None = None) -> None:
        self.map = model_map
        self.fingerprint = known_fingerprint or fingerprint(model_map.model)
        self.history: list[Removal] = []
        # Where the model computes; decoder layers may lie elsewhere.
        try:
            self._compactor = Compactor(model_map.groups, device=model_map.weight.device)
        except ValueError as error:
            raise GispError(f"the weights of this model cannot be moved in place, copy them first: {error}") from None
        self._shares = {group.name: model_map.members(group) for group in model_map.groups}
        self._restore: Callable[[], None] | None = None
        if model_map.shares_kv:
            use_indexed_attention(model_map.model)
        setattr(model_map.model, self._ATTRIBUTE, self)
        if hasattr(model_map.model, "save_pretrained"):
            model_map.model.save_pretrained = partial(_save_pretrained, model_map.model)

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

    def members(self, name: str) -> torch.Tensor:
        """Original query heads or channels of the kept structures, by current position; int64 CPU tensor."""
        return block_columns(self.order(name), self._shares[name])

    def keep(self) -> Keep:
        """What the model keeps now."""
        return Keep.of({name: self.members(name) for name in self._shares})

    def numbers(self, name: str) -> torch.Tensor:
        """Numbers of a group's kept structures, by current position; int64 [kept] on the device.

        Structures are numbered in the order of ``map.groups``. The next step changes the tensor.
        """
        return self._compactor.numbers[self._compactor.kept_span(name)]

    def remove(self, removal: Removal) -> None:
        """Apply one step (also when it removes nothing).

        Raises:
            GispError: a layer was changed from outside, or only some query heads of a key/value head are to go where
                the map has them go together.
        """
        structures = {name: self._structures(name, index) for name, index in removal.items()}
        self._check_layers(removal)
        self._settle()
        with self._weights_in_place():
            self._compactor.remove(structures)
        self.history.append(removal)
        self._refresh(removal)

    def rollback(self, steps: int = 1) -> None:
        """Undo the last steps exactly.

        Raises:
            GispError: these steps were packed away, or a layer was changed from outside.
        """
        if steps > self._compactor.depth:
            raise GispError(
                f"{steps} steps cannot be undone, {self._compactor.depth} are left after pack(): reload the base"
            )
        self._check_layers({name for removal in self.history[len(self.history) - steps :] for name in removal})
        self._settle()
        with self._weights_in_place():
            self._compactor.rollback(steps)
        undone = self.history[len(self.history) - steps :]
        del self.history[len(self.history) - steps :]
        self._refresh({name for removal in undone for name in removal})

    def pack(self, *, in_place: bool = False, groups: Iterable[str] | None = None) -> None:
        """Give the memory of removed weights back; earlier steps can no longer be rolled back.

        Weights written in place since the last step (:meth:`until_moved`) stay.

        Args:
            in_place, groups: as for :meth:`gisp_kernels.Compactor.pack`.
        """
        self._compactor.pack(in_place=in_place, groups=groups)
        self._restore = None

    @property
    def slack(self) -> float:
        """Part of the memory that structures own that what is kept leaves unused."""
        return 1 - self._compactor.bytes_packed() / max(1, self._compactor.bytes_storage())

    def storage(self, name: str) -> list[torch.Tensor]:
        """As :meth:`gisp_kernels.Compactor.storage`."""
        return self._compactor.storage(name)

    def house(self, name: str, storage: Sequence[torch.Tensor]) -> None:
        """As :meth:`gisp_kernels.Compactor.house`."""
        self._compactor.house(name, storage)

    def until_moved(self, restore: Callable[[], None]) -> None:
        """Call ``restore`` before the next step or rollback.

        For weights written into the pruned model in place: with it steps stay exactly reversible.

        Args:
            restore: a ``partial`` rather than a closure, which a copy of the model would share.
        """
        self._settle()
        self._restore = restore

    @property
    def compensated(self) -> bool:
        """Whether weights were written into the pruned model, to be taken back before it moves."""
        return self._restore is not None

    def _check_layers(self, names: Container[str]) -> None:
        """Require that the layers whose weights are to move are those that the model calls.

        Raises:
            GispError: adapters or others stand in for one.
        """
        for item in self.map.layers:
            for group, block in ((item.heads, item.attention), (item.channels, item.layer.mlp)):
                if group.name in names:
                    called = set(block.children())
                    if any(projection.linear not in called for projection in group.projections):
                        raise GispError(
                            f"a layer of {group.name} was replaced: take that back before the model is moved, adapters "
                            "of peft by model.merge_and_unload()"
                        )

    def _settle(self) -> None:
        if self._restore is not None:
            restore, self._restore = self._restore, None
            restore()

    @contextlib.contextmanager
    def _weights_in_place(self) -> Iterator[None]:
        try:
            yield
        except ValueError as error:
            raise GispError(f"this model can no longer be moved, load its base model anew: {error}") from None

    def _structures(self, name: str, index: torch.Tensor) -> torch.Tensor:
        """Structures of a group that given heads or channels make up."""
        share = self._shares[name]
        if share == 1:
            return index
        heads = index.sort().values
        structures = heads[::share] // share
        if not torch.equal(heads, block_columns(structures, share)):
            raise GispError(
                f"{name} cannot lose heads {heads.tolist()}: the {share} heads of a key/value head go together"
            )
        return structures

    def _refresh(self, changed: Container[str]) -> None:
        layers = [item for item in self.map.layers if item.heads.name in changed]
        for item in layers:
            current = item.layer.self_attn
            kept = self.kept(item.heads.name)
            widths = (getattr(item.attention, name).out_features for name in ("q_proj", "k_proj"))
            set_head_counts(item.attention, *(width // self.map.head_dim for width in widths))
            if kept == 0 and current is item.attention:
                item.layer.self_attn = NoHeads(item.attention)
            elif kept and current is not item.attention:
                item.layer.self_attn = item.attention
        if layers and self.map.shares_kv and self.map.gqa != "group":
            # Heads are numbered before everything else. One division for all layers: each costs a launch.
            heads = self._compactor.numbers[: len(self.map.layers) * self.map.num_heads]
            shared = heads % self.map.num_heads // self.map.heads_per_kv
            for item in layers:
                whole = self.kept(item.heads.name) == self.map.num_heads
                index = None if whole else shared[self._compactor.kept_span(item.heads.name)]
                set_kv_index(item.attention, index)


def _save_pretrained(model: Any, *args: Any, **kwargs: Any) -> None:
    """Save a model as its class does, unless it is pruned: its configuration is the dense one's, and would not load.

    Raises:
        GispError: the model is pruned.
    """
    shrinkable = ShrinkableModel.of(model)
    if shrinkable is not None and shrinkable.history:
        raise GispError("a pruned model is not saved by save_pretrained: use gisp.export_model(model, DIR)")
    type(model).save_pretrained(model, *args, **kwargs)
