"""Exporting a model that was pruned in memory, without a run folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gisp.errors import GispError
from gisp.export.formats.hf import export_hf
from gisp.export.formats.masked import export_masked
from gisp.export.spec import ExportReport, PrunedSpec
from gisp.files import as_path
from gisp.model.modes import default_device
from gisp.model.shrink import ShrinkableModel
from gisp.offload.stream import check_in_one_place

_WRITERS = {"hf": export_hf, "masked": export_masked}


@default_device()
def export_model(
    model: Any, out: str | Path, *, format: str = "hf", tokenizer_from: str | Path | None = None
) -> ExportReport:
    """Export a model that ``gisp.prune`` pruned in memory, at the size that it has now.

    While the export is written, the model is restored to its dense size to compare logits. Then it is pruned again.

    Args:
        model: pruned by :func:`gisp.prune` in this process.
        out: folder to write; must be absent or empty.
        format: ``hf`` or ``masked``.
        tokenizer_from: folder whose tokenizer and other files beside the weights are copied.

    Raises:
        GispError: the model is not pruned, was compensated or packed, or has parts that were added to it; ``out`` is
            taken; or the logits do not agree.
    """
    shrinkable = ShrinkableModel.of(model)
    if shrinkable is None or not shrinkable.history:
        raise GispError("this model is not pruned: use its own save_pretrained")
    check_in_one_place(model, "export_model")
    if not isinstance(format, str) or format not in _WRITERS:
        raise GispError(f"format {format!r} needs a run folder: choose hf or masked, or gisp.export_run")
    if shrinkable.compensated:
        raise GispError("this model is compensated, which growing it back undoes: gisp export RUN --compensate instead")
    _check_parts(model)
    history, model_map, keep = list(shrinkable.history), shrinkable.map, shrinkable.keep()
    left = sum(p.numel() for p in model.parameters())
    folder = None if tokenizer_from is None else as_path(tokenizer_from, "tokenizer_from")
    if folder is not None and not folder.is_dir():
        raise GispError(f"tokenizer_from {folder} is not a folder: give that of the base model, or leave it out")
    place = as_path(out, "out")
    shrinkable.rollback(len(history))
    try:
        removed = model_map.parameters - left
        spec = PrunedSpec(
            keep=keep,
            sparsity=removed / model_map.decoder_parameters,
            model_sparsity=removed / model_map.parameters,
            step=len(history),
            run={"base_model": {"path": getattr(model, "name_or_path", ""), "fingerprint": shrinkable.fingerprint}},
        )
        return _WRITERS[format](model, spec, place, tokenizer_from=folder)
    finally:
        for removal in history:
            shrinkable.remove(removal)


def _check_parts(model: Any) -> None:
    """Refuse weights and buffers beside the decoder and its output embeddings, which no export has a place for.

    Raises:
        GispError: names one.
    """
    head = model.get_output_embeddings()
    known = {"model", *(name for name, module in model.named_children() if module is head)}
    for name in model.state_dict():
        if name.split(".")[0] not in known:
            raise GispError(f"{name} is no part of a {type(model).__name__}, an export cannot hold it: remove it first")
