"""Writing a model folder that appears only when its logits are those of the masked dense model, both in float32.

Each module's parameters are widened only while it runs, so that models of any size and dtype can be compared tightly:
peak memory grows by one module's float32 weights.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gisp.errors import GispError
from gisp.export.beside import copy_beside
from gisp.export.card import PRUNED, CardKind, write_card
from gisp.export.folder import new_folder, write_config, write_weights
from gisp.export.load import load
from gisp.export.relayout import LaidOut
from gisp.export.sizes.layout import AttentionLayout
from gisp.export.spec import TOLERANCE, ExportReport, LayerSizes, PrunedSpec
from gisp.mapped import give_back
from gisp.model.attention import INDEXED_ATTENTION
from gisp.model.keep import Keep, block_columns
from gisp.model.modes import evaluation_mode, exact_products
from gisp.model.structures import ModelMap
from gisp.offload.place import placed_like
from gisp.progress import task
from gisp.stages.stage_model import only_layers

ROUNDING = 2
"""Errors of the masked float32 model that an export may differ by: each of the two may be one away from the truth."""
_ROWS, _TOKENS, _SEED = 2, 64, 20251018
CHECKED_TOKENS = _ROWS * _TOKENS


def write_checked(
    base: Any,
    model_map: ModelMap,
    spec: PrunedSpec,
    out: Path,
    state: LaidOut,
    config: Any,
    tokenizer_from: Path | None,
    kind: CardKind = PRUNED,
) -> ExportReport:
    """Write a model folder, check it and tell on its card how exact it is.

    Every exporter takes the first of these arguments and raises these errors.

    Args:
        base: the dense model the spec was made from; left as it was.
        spec: what to keep.
        out: folder to write; must be absent or empty.
        state: the weights by name.
        config: of transformers, for the exported model.
        tokenizer_from: folder of the base model, from which everything beside weights and code is copied.

    Raises:
        GispError: ``out`` is taken, full disk, or logits that do not agree; nothing is left at ``out``.
    """
    with new_folder(out) as folder:
        size = write_weights(folder, state, state.shapes)
        write_config(folder, config)
        copy_beside(folder, base, tokenizer_from)
        report = checked_report(base, model_map, spec.keep, folder, out, size)
        write_card(folder, base, spec, report, kind)
    return report


def checked_report(base: Any, model_map: ModelMap, keep: Keep, folder: Path, out: Path, size: int) -> ExportReport:
    """Reload an exported folder, compare its logits with the masked base model's and count what it holds.

    Args:
        out: where the folder will be in the end.
        size: bytes of its weight files.

    Raises:
        GispError: the folder does not load, or the logits do not agree.
    """
    with task("computing the logits to compare with"):
        reference = Reference(base, model_map, keep)
    dtype = weight_dtype(base)
    reloaded = placed_like(load(folder, dtype=dtype), base)
    difference = reference.compare(reloaded)
    sizes = tuple(
        LayerSizes(
            heads=len(heads),
            query_heads=layer.self_attn.q_proj.out_features // model_map.head_dim,
            kv_heads=layer.self_attn.k_proj.out_features // model_map.head_dim,
            channels=layer.mlp.gate_proj.out_features,
        )
        for layer, heads in zip(reloaded.model.layers, keep.heads, strict=True)
    )
    return report_of(model_map, out, size, sum(p.numel() for p in reloaded.parameters()), sizes, difference, dtype)


def report_of(
    model_map: ModelMap,
    out: Path,
    size: int,
    parameters: int,
    sizes: tuple[LayerSizes, ...],
    difference: tuple[float, float, float],
    cache: torch.dtype,
) -> ExportReport:
    """A report that counts key/value caches.

    Args:
        model_map: of the dense model.
        out: where the export will be in the end.
        size: bytes of its weight files.
        parameters: that it holds.
        difference: as of :meth:`Reference.compare`.
        cache: dtype of keys and values.
    """
    absolute, relative, tolerance = difference
    head_bytes = 2 * model_map.head_dim * cache.itemsize
    return ExportReport(
        path=out,
        absolute_difference=absolute,
        relative_difference=relative,
        parameters_dense=model_map.parameters,
        parameters_pruned=parameters,
        bytes=size,
        kv_bytes_per_token=head_bytes * sum(item.kv_heads for item in sizes),
        kv_bytes_per_token_dense=head_bytes * model_map.num_kv_heads * len(model_map.layers),
        sizes=sizes,
        tolerance=tolerance,
    )


def planned_sizes(keep: Keep, layouts: Sequence[AttentionLayout]) -> tuple[LayerSizes, ...]:
    """Sizes of the layers that an export writes."""
    return tuple(
        LayerSizes(len(heads), len(layout.query), len(layout.kv), max(1, len(channels)))
        for (heads, channels), layout in zip(keep.layers, layouts, strict=True)
    )


class Reference:
    """The masked base model's logits, float32, that an export must give.

    Attributes:
        tokens: int64 [rows, tokens] they are of.
        logits: float32 [rows, tokens, vocabulary].
    """

    def __init__(self, base: Any, model_map: ModelMap, keep: Keep) -> None:
        positions = int(getattr(base.config, "max_position_embeddings", None) or _TOKENS)
        self._base, self._removed = base, removed_columns(model_map, keep)
        self.tokens = check_tokens(model_map.vocab_size, positions)
        self.logits = exact_logits(base, self.tokens, self._removed)

    def compare(self, exported: Any) -> tuple[float, float, float]:
        """Absolute and relative difference of a model's logits, and up to which relative one they were accepted.

        Beyond ``TOLERANCE`` both are compared with logits in float64: rounding grows with the depth of a model, and an
        export may be as far from the truth as the masked model in float32 is, times ``ROUNDING``.

        Raises:
            GispError: they do not agree.
        """
        got = exact_logits(exported, self.tokens)
        relative = relative_difference(self.logits, got)
        tolerance = TOLERANCE
        if relative > TOLERANCE:
            truth = exact_logits(self._base, self.tokens, self._removed, torch.float64)
            tolerance = max(TOLERANCE, ROUNDING * relative_difference(truth, self.logits))
        return (*compare_logits(self.logits, got, tolerance), tolerance)


def weight_dtype(model: Any) -> torch.dtype:
    """The dtype of the model's weights."""
    dtype: torch.dtype = model.get_input_embeddings().weight.dtype
    return dtype


def check_tokens(vocab_size: int, positions: int) -> torch.Tensor:
    """Fixed random tokens, int64 [2, up to 64]."""
    generator = torch.Generator().manual_seed(_SEED)
    return torch.randint(0, vocab_size, (_ROWS, min(_TOKENS, positions)), generator=generator)


def removed_columns(model_map: ModelMap, keep: Keep) -> dict[nn.Module, torch.Tensor]:
    """Input columns (int64) of every o_proj and down_proj that belong to removed structures.

    Without these columns a removed structure has no way to the output; its other weights do not matter.
    """
    outputs = model_map.outputs
    return {outputs[name][0]: block_columns(index, outputs[name][1]) for name, index in keep.removed(model_map).items()}


def exact_logits(
    model: Any,
    tokens: torch.Tensor,
    removed: Mapping[nn.Module, torch.Tensor] | None = None,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """Logits computed in ``dtype``, [rows, tokens, vocabulary] on the CPU; the model is left exactly as it was.

    Args:
        removed: input columns to take as zero, by Linear module.
    """
    with torch.no_grad(), _deterministic_mode(model), _float32_rotary(model), _widened(model, removed or {}, dtype):
        logits: torch.Tensor = model(input_ids=tokens.to(model.get_input_embeddings().weight.device)).logits
    return logits.to(dtype).cpu()


def chunk_output(
    model: Any,
    layers: Sequence[nn.Module],
    given: torch.Tensor,
    removed: Mapping[nn.Module, torch.Tensor],
    dtype: torch.dtype,
    *,
    ends: bool,
) -> torch.Tensor:
    """What some layers of a model make of a hidden state, or of tokens, computed as :func:`exact_logits` computes.

    Args:
        given: int64 [rows, tokens], or [rows, tokens, hidden].
        ends: give the logits, [rows, tokens, vocabulary], instead of a hidden state.
    """
    modes = _deterministic_mode(model), _float32_rotary(model), _widened(model, removed, dtype)
    with torch.no_grad(), ExitStack() as stack:
        for mode in modes:
            stack.enter_context(mode)
        decoder = stack.enter_context(only_layers(model.model, layers, ends=ends))
        device = next(p.device for layer in layers for p in layer.parameters())
        name = "inputs_embeds" if given.is_floating_point() else "input_ids"
        hidden: torch.Tensor = decoder(**{name: given.to(device)}, use_cache=False).last_hidden_state
        return model.get_output_embeddings()(hidden).to(dtype) if ends else hidden


def compare_logits(wanted: torch.Tensor, got: torch.Tensor, tolerance: float = TOLERANCE) -> tuple[float, float]:
    """Largest absolute difference of logits [rows, tokens, V], and the same by the largest absolute wanted logit.

    Raises:
        GispError: they differ by more than ``tolerance`` relative, or the wanted ones are not finite.
    """
    scale = float(wanted.abs().max())
    if not math.isfinite(scale):
        raise GispError("the pruned model computes NaN or infinite logits: choose a smaller sparsity")
    absolute, relative = float((wanted - got).abs().max()), relative_difference(wanted, got)
    if not relative <= tolerance:
        raise GispError(
            f"logits of the exported model differ by {relative:.1e} relative from the masked model, more than "
            f"{tolerance:.0e}: nothing was written, report this model type"
        )
    return absolute, relative


def relative_difference(wanted: torch.Tensor, got: torch.Tensor) -> float:
    """Largest absolute difference of tensors of one shape, over the largest absolute wanted value unless that is 0."""
    scale, absolute = float(wanted.abs().max()), float((wanted - got).abs().max())
    return absolute / scale if scale else absolute


@contextmanager
def _deterministic_mode(model: Any) -> Iterator[None]:
    """Evaluation mode, scaled dot-product attention and full float32 products, put back afterwards."""
    attention = model.config._attn_implementation
    if attention != INDEXED_ATTENTION:
        # That one is the same with an index of key/value heads, which the model needs.
        model.set_attn_implementation("sdpa")
    try:
        with evaluation_mode(model), exact_products():
            yield
    finally:
        model.set_attn_implementation(attention)


@contextmanager
def _float32_rotary(model: Any) -> Iterator[None]:
    """Rotary frequencies as loading computes them: ``model.to(bfloat16)`` rounds them, and no checkpoint holds them."""
    rotary: Any = getattr(model.model, "rotary_emb", None)
    frequencies = [] if rotary is None else [b for b in rotary.buffers() if b.is_floating_point()]
    if all(buffer.dtype == torch.float32 for buffer in frequencies):
        yield
        return
    # Its own configuration: that of an export has no number of heads for the whole model.
    model.model.rotary_emb = type(rotary)(config=rotary.config).to(frequencies[0].device)
    try:
        yield
    finally:
        model.model.rotary_emb = rotary


@contextmanager
def _widened(model: nn.Module, removed: Mapping[nn.Module, torch.Tensor], dtype: torch.dtype) -> Iterator[None]:
    """Every module sees parameters of ``dtype`` while it runs, with the removed input columns zero."""
    originals: dict[nn.Module, list[tuple[nn.Parameter, torch.Tensor]]] = {}

    def widen(module: nn.Module, _: Any) -> None:
        originals[module] = [(p, p.data) for p in module.parameters(recurse=False)]
        for parameter, data in originals[module]:
            wide = data.to(dtype)
            columns = removed.get(module)
            if columns is not None and parameter.ndim == 2:
                wide = wide.index_fill(1, columns.to(wide.device), 0)
            parameter.data = wide

    def restore(module: nn.Module, *_: Any) -> None:
        for parameter, data in originals.pop(module, ()):
            parameter.data = data
            give_back(data)

    with ExitStack() as stack:
        for module in model.modules():
            if any(True for _ in module.parameters(recurse=False)):
                stack.callback(module.register_forward_pre_hook(widen).remove)
                stack.callback(module.register_forward_hook(restore, always_call=True).remove)
        yield
