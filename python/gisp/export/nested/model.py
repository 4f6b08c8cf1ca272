"""A model read from a nested checkpoint: it holds the prefixes of one sparsity and can be moved to another."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import nn

from gisp.errors import GispError
from gisp.export.nested.files import RECORD, NestedFiles
from gisp.export.nested.order import output_projections, stored_name
from gisp.export.nested.own import OwnRows, check_tensors
from gisp.export.nested.shown import ShownBias, ShownRows
from gisp.model.attention import NoHeads, set_head_counts, set_kv_index, use_indexed_attention
from gisp.model.checks import check_no_adapters
from gisp.model.load import quiet
from gisp.model.modes import default_device
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

    @default_device()
    def resize(self, sparsity: float, *, keep_memory: bool = False) -> Any:
        """Move the model in place to the sparsity of the run nearest to ``sparsity``, down or up.

        A step that has a compensation of its own is shown with it. Output projections that are replaced stand in
        memory twice until all are.

        Args:
            keep_memory: do not give back the memory of what is no longer shown; moving up again then reads nothing.

        Returns:
            The model. Its Parameters stay the same objects, but for output biases that only some sizes have; their
            gradients are dropped where shape or origin change.

        Raises:
            GispError: no sparsity of the run, adapters that are not merged, or files that have changed; the model is
                then as it was.
        """
        check_no_adapters(self)  # type: ignore[arg-type]
        self._nested.move(self._nested.files.step_for(sparsity), keep_memory)
        return self

    def save_pretrained(self, *_: Any, **__: Any) -> NoReturn:
        """Refused: the stock class would not load layers of different width.

        Raises:
            GispError: always.
        """
        raise GispError("a model of a nested checkpoint is not saved: use gisp export RUN --sparsity S --out DIR")


@cache
def nested_class(base: Any) -> Any:
    """The class of models of a nested checkpoint made from one of transformers."""
    return type(f"Nested{base.__name__}", (NestedModelMixin, base), {"__module__": __name__})


def __getattr__(name: str) -> Any:
    """These classes by name, for pickles."""
    import transformers

    base = getattr(transformers, name.removeprefix("Nested"), None) if name.startswith("Nested") else None
    if not isinstance(base, type):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return nested_class(base)


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
        sparsity: the nearest of the run is taken, ``None`` for its end; with its own compensation, if it has one.
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
        files.expect(name, tuple(parameter.shape))
        _set(model, name, files.rows(name, 0, parameter.shape[0]).to(device, kind))
    if tied:
        model.tie_weights()
    model.model.rotary_emb.to(device)
    model.__class__ = nested_class(model.__class__)
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
            files.expect(stored, shape)
            nothing = torch.empty(0, *shape[1:], dtype=dtype, device=device)
            own = OwnRows(files, owner, stored) if item.dim else None
            shown = ShownRows(linear, part, bool(item.dim), stored, nothing, own)
            self._shown.append((layer, KINDS.index(item.kind), item.block(self._head_dim), shown))
        check_tensors(files, self._head_dim)
        owners = [owner for _, owner, _ in output_projections(len(self._layers))]
        self._biases = [ShownBias(model.get_submodule(owner), owner, files) for owner in owners if files.milestones]
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
        finally:
            if not keep_memory:
                for *_, shown in self._shown:
                    shown.release()

    def _show(self, step: int, keep_memory: bool) -> None:
        counts = self.files.nesting.prefixes[step].tolist()
        for bias in self._biases:
            bias.show(step, self.files)
        # What is replaced comes first: behind it all rows become fewer, which reads nothing, or all become more.
        for replaced in (True, False):
            for layer, kind, block, shown in self._shown:
                if shown.replaced_at(step) == replaced:
                    shown.show(counts[layer][kind] * block, step, self.files, keep_memory)
        for i, (heads, kv_heads, _) in enumerate(counts):
            self._set_attention(i, heads, kv_heads)
        self.step = step
        record = self.files.record["steps"][step]
        self._model.config.gisp = {
            "step": step,
            **record,
            "base_fingerprint": self.files.record["base_model"]["fingerprint"],
            **({"compensation": self.files.milestones[step]} if step in self.files.milestones else {}),
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


def _empty_model(files: NestedFiles) -> Any:
    """The dense model; its parameters are without memory."""
    quiet()
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    values = dict(files.record["base_config"])
    try:
        config = AutoConfig.for_model(values.pop("model_type"), **values)
        with torch.device("meta"):
            model: Any = AutoModelForCausalLM.from_config(
                config, attn_implementation="sdpa", dtype=config.dtype, trust_remote_code=False
            )
        # Its frequencies are computed, no checkpoint holds them.
        model.model.rotary_emb = type(model.model.rotary_emb)(config=config)
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


def _set(model: nn.Module, name: str, value: torch.Tensor) -> None:
    owner, _, leaf = name.rpartition(".")
    module = model.get_submodule(owner)
    module._parameters[leaf] = nn.Parameter(value, requires_grad=True)
