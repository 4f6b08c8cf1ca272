"""A model read from a nested checkpoint: it holds the prefixes of one sparsity and can be moved to another."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import nn

from gisp.errors import GispError
from gisp.export.nested.files import RECORD, NestedFiles
from gisp.export.nested.order import stored_name
from gisp.model.attention import NoHeads, set_head_counts, set_kv_index, use_indexed_attention
from gisp.model.load import quiet
from gisp.model.structures import structure_parameters
from gisp.run.record import corrupt
from gisp_kernels.groups import KINDS


class NestedModelMixin:
    """What a model read from a nested checkpoint has beside its own class."""

    _nested: _Prefixes

    @property
    def sparsity(self) -> float:
        """Removed / all parameters of the decoder layers at present."""
        return self._nested.files.sparsities[self._nested.step]

    def resize(self, sparsity: float, *, keep_memory: bool = False) -> Any:
        """Move the model in place to the sparsity of the run nearest to ``sparsity``, down or up.

        Args:
            keep_memory: do not give back the memory of what is no longer shown; moving up again then reads nothing.

        Returns:
            The model. Its Parameters stay the same objects, their gradients are dropped where the shape changes.

        Raises:
            GispError: no sparsity of the run, or files that have changed; the model is then as it was.
        """
        self._nested.move(self._nested.files.step_for(sparsity), keep_memory)
        return self

    def save_pretrained(self, *_: Any, **__: Any) -> NoReturn:
        """Refused: the stock class would not load layers of different width.

        Raises:
            GispError: always.
        """
        raise GispError("a model of a nested checkpoint is not saved: use gisp export RUN --sparsity S --out DIR")


def load_nested(
    folder: str | Path,
    sparsity: float | None = None,
    *,
    device: torch.device,
    dtype: torch.dtype | None = None,
    verify: bool = False,
) -> Any:
    """A model at one sparsity of a nested checkpoint; only the prefixes it needs are read.

    Args:
        sparsity: the nearest of the run is taken, ``None`` for its end.
        dtype: of the weights; ``None`` keeps the checkpoint's.
        verify: read all files first and compare their SHA-256.

    Returns:
        The model in evaluation mode, an instance of its base class and of :class:`NestedModelMixin`.

    Raises:
        GispError: a folder that is corrupt, incomplete or of a model type transformers does not know.
    """
    files = NestedFiles.open(folder, verify=verify)
    step = files.step_for(sparsity)
    model = _empty_model(files)
    config = model.config
    kind = dtype or config.dtype
    embedding = model.get_input_embeddings().weight
    tied = model.get_output_embeddings().weight is embedding
    pruned = {name for _, name, _ in structure_parameters(len(model.model.layers))}
    for name, parameter in list(model.named_parameters()):
        if name in pruned or (tied and name.startswith("lm_head.")):
            continue
        _expect(files, name, tuple(parameter.shape))
        _set(model, name, files.rows(name, 0, parameter.shape[0]).to(device, kind))
    if tied:
        model.tie_weights()
    model.model.rotary_emb = type(model.model.rotary_emb)(config=config).to(device)
    model.__class__ = type(f"Nested{type(model).__name__}", (NestedModelMixin, type(model)), {})
    model._nested = _Prefixes(model, files, device, kind)
    model._nested.move(step, keep_memory=False)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_meta:
            raise GispError(f"{files.folder / RECORD} is corrupt: it holds no {name}")
    return model.eval()


class _Prefixes:
    """The pruned projections of a model and where their rows come from."""

    def __init__(self, model: Any, files: NestedFiles, device: torch.device, dtype: torch.dtype) -> None:
        self.files = files
        self.step = -1
        self._model = model
        self._layers = list(model.model.layers)
        self._attentions = [layer.self_attn for layer in self._layers]
        self._head_dim = int(self._attentions[0].head_dim)
        self._shown = []
        for layer, name, item in structure_parameters(len(self._layers)):
            owner, _, part = name.rpartition(".")
            linear = model.get_submodule(owner)
            if getattr(linear, part) is None:
                continue
            stored, shape = stored_name(name, item), tuple(getattr(linear, part).shape)
            shape = shape[::-1] if item.dim else shape
            _expect(files, stored, shape)
            shown = _Shown(linear, part, bool(item.dim), stored, torch.empty(0, *shape[1:], dtype=dtype, device=device))
            self._shown.append((layer, KINDS.index(item.kind), item.block(self._head_dim), shown))
        if files.nesting.prefixes[0, 0, 0] != files.nesting.prefixes[0, 0, 1]:
            use_indexed_attention(model)

    def move(self, step: int, keep_memory: bool) -> None:
        """Show what a step keeps; on failure everything is shown as before."""
        before = self.step
        try:
            self._show(step, keep_memory)
        except GispError:
            if before >= 0:
                # What was shown is still there: going back reads nothing.
                self._show(before, keep_memory)
            raise

    def _show(self, step: int, keep_memory: bool) -> None:
        counts = self.files.nesting.prefixes[step].tolist()
        for layer, kind, block, shown in self._shown:
            shown.show(counts[layer][kind] * block, self.files, keep_memory)
        for i, (heads, kv_heads, _) in enumerate(counts):
            self._set_attention(i, heads, kv_heads)
        self.step = step
        record = self.files.record["steps"][step]
        self._model.config.gisp = {
            "step": step,
            **record,
            "base_fingerprint": self.files.record["base_model"]["fingerprint"],
        }

    def _set_attention(self, layer: int, heads: int, kv_heads: int) -> None:
        attention, module = self._attentions[layer], self._layers[layer]
        if heads == 0:
            if module.self_attn is attention:
                module.self_attn = NoHeads(attention)
            return
        module.self_attn = attention
        set_head_counts(attention, heads, kv_heads)
        index = self.files.nesting.layers[layer].kv_of_head[:heads]
        if heads % kv_heads == 0 and torch.equal(index, torch.arange(heads) // (heads // kv_heads)):
            attention.num_key_value_groups = heads // kv_heads
            set_kv_index(attention, None)
        else:
            set_kv_index(attention, index.to(attention.q_proj.weight.device))


class _Shown:
    """One weight or bias of which the layer shows a prefix.

    Rows of storage are structures' rows; a weight whose columns belong to structures is shown transposed.
    """

    def __init__(self, linear: nn.Linear, part: str, columns: bool, stored: str, nothing: torch.Tensor) -> None:
        """
        Args:
            columns: whether structures lie along the columns of the weight.
            nothing: no rows of storage, of its dtype and on its device.
        """
        self._linear, self._part, self._columns, self._stored = linear, part, columns, stored
        self._rest = nothing.shape[1:]
        # Rows in memory, and where they are; a parameter found elsewhere was moved by somebody and is tight.
        self._set(nothing)

    def show(self, rows: int, files: NestedFiles, keep_memory: bool) -> None:
        """Show the first ``rows`` rows of storage, reading those not in memory."""
        held = self._held()
        if rows > len(held):
            more = files.rows(self._stored, len(held), rows)
            self._set(torch.cat((held, more.to(held.device, held.dtype))))
        elif keep_memory or rows == len(held):
            self._set(held[:rows], len(held))
        else:
            self._set(held[:rows].clone())

    def _held(self) -> torch.Tensor:
        """All rows in memory, shown or not."""
        data = self._linear._parameters[self._part].data  # type: ignore[union-attr]
        shown = data.t() if self._columns else data
        if _place(shown) != self._place:
            return shown
        return shown.as_strided((self._rows, *self._rest), shown.stride())

    def _set(self, shown: torch.Tensor, rows: int | None = None) -> None:
        linear: Any = self._linear
        value = shown.t() if self._columns else shown
        parameter = linear._parameters[self._part]
        if parameter.is_meta:
            parameter = linear._parameters[self._part] = nn.Parameter(value, requires_grad=parameter.requires_grad)
        else:
            if parameter.shape != value.shape:
                parameter.grad = None
            parameter.data = value
        self._rows, self._place = len(shown) if rows is None else rows, _place(shown)
        if self._part == "weight":
            linear.out_features, linear.in_features = value.shape


def _place(tensor: torch.Tensor) -> tuple[int, int]:
    """Address and bytes of the storage; a view without rows has no address of its own."""
    storage = tensor.untyped_storage()
    return storage.data_ptr(), storage.nbytes()


def _empty_model(files: NestedFiles) -> Any:
    """The dense model without memory."""
    quiet()
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    values = dict(files.record["base_config"])
    try:
        config = AutoConfig.for_model(values.pop("model_type"), **values)
        with torch.device("meta"):
            model: Any = AutoModelForCausalLM.from_config(
                config, attn_implementation="sdpa", dtype=config.dtype, trust_remote_code=False
            )
    except Exception as error:  # transformers raises many types for configurations it does not take
        raise corrupt(files.folder / RECORD, ValueError(f"transformers cannot build the model: {error}")) from None
    settings = files.folder / "generation_config.json"
    if settings.is_file():
        try:
            model.generation_config = GenerationConfig.from_pretrained(files.folder, trust_remote_code=False)
        except Exception as error:  # as many types as files that hold something else
            raise corrupt(settings, ValueError(str(error))) from None
    model.name_or_path = str(files.folder)
    return model


def _expect(files: NestedFiles, name: str, shape: tuple[int, ...]) -> None:
    if files.shape(name) != shape:
        raise GispError(
            f"{files.folder} is corrupt: {name} is {list(files.shape(name))}, its configuration says {list(shape)}"
        )


def _set(model: nn.Module, name: str, value: torch.Tensor) -> None:
    owner, _, leaf = name.rpartition(".")
    module = model.get_submodule(owner)
    module._parameters[leaf] = nn.Parameter(value, requires_grad=True)
