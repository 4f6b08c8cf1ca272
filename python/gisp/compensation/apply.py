"""Fitting a compensation: for an export of a dense model, or to a model that was pruned in place."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.distributed import ProcessGroup

from gisp.compensation.fold import fold_into_pruned
from gisp.compensation.methods.run import run_methods
from gisp.compensation.methods.sweep import OnBlock
from gisp.compensation.options import CompensationOptions, make_options
from gisp.compensation.result import Compensation, held_against
from gisp.data import DEFAULT_SEQ_LEN, Sequences, load_sequences
from gisp.data.held_out import run_text_of
from gisp.errors import GispError
from gisp.model.checks import check_autocast
from gisp.model.keep import Keep
from gisp.model.modes import default_device
from gisp.model.shrink import ShrinkableModel
from gisp.model.structures import ModelMap
from gisp.offload.stream import LayerStream
from gisp.progress import reporting
from gisp.progress.track import Report
from gisp.replicas.group import Replicas
from gisp.replicas.sharing import sharing


def fit_compensation(
    model_map: ModelMap,
    keep: Keep,
    data: Any,
    options: CompensationOptions,
    *,
    tokenizer_from: str | None = None,
    on_block: OnBlock | None = None,
) -> Compensation:
    """Fit a dense model's output projections to what stays of its blocks; the model is left as it was.

    It is held against the held-out text of the run that the model belongs to, where there is one.

    Args:
        keep: what stays.
        data: ``Sequences``, or a SPEC as for ``gisp prune`` (see :func:`gisp.data.load_sequences`). Tasks of a mixture
            are taken in turn.
        tokenizer_from: model folder or name whose tokenizer reads text.

    Raises:
        GispError: unreadable data, too few sequences, a model built otherwise, or activations that are not finite.
    """
    sequences = calibration_sequences(model_map, data, tokenizer_from)
    run_text = run_text_of(model_map.model)
    if run_text is not None:
        run_text.checked(model_map.vocab_size)
    updates, results, held_out = run_methods(model_map, keep, sequences, options, on_block, run_text)
    tokens = int(held_out.tokens.sum())
    return Compensation(options, tuple(updates), tuple(results), len(held_out.tokens), tokens, held_against(held_out))


def calibration_sequences(model_map: ModelMap, data: Any, tokenizer_from: str | None) -> Sequences:
    """The data as sequences of at most 256 tokens."""
    if isinstance(data, Sequences):
        return data.checked(model_map.vocab_size)
    return load_sequences(data, vocab_size=model_map.vocab_size, seq_len=DEFAULT_SEQ_LEN, tokenizer_from=tokenizer_from)


@torch.inference_mode(False)
@default_device()
def compensate(
    model: nn.Module,
    data: Any,
    *,
    on_block: OnBlock | None = None,
    progress: bool | Report | None = None,
    process_group: ProcessGroup | None = None,
    **options: Any,
) -> Compensation:
    """Recover quality of a model that was pruned in place, with calibration data and by any criterion.

    The output projections (o_proj, down_proj) get new weights and, with an intercept, biases. If the model is moved
    along its run afterwards (``Trajectory.at``), the compensation is first taken back, bit for bit. Compensating again
    replaces it. If it fails, the model is left without a compensation.

    Args:
        model: a model that was pruned by :func:`gisp.prune`, ``Trajectory.at`` or ``ShrinkableModel.remove``, and not
            packed.
        data: calibration data, as for :func:`gisp.prune`.
        on_block: function that is called with the fit of every block.
        progress: as for :func:`gisp.prune`.
        process_group: processes that share the work, each with its own copy of the model; ``None``: this one alone.
        **options: attributes of :class:`CompensationOptions`, such as ``method="lsq"``.

    Raises:
        GispError: a model that is not pruned or was packed, a bad option, unreadable data, or a method for which
            layers may not lie in host memory.
    """
    chosen = make_options(**options)
    check_autocast("compensation")
    if LayerStream.of(model) is not None:
        chosen.check_streamed()
    shrinkable = ShrinkableModel.of(model)
    if shrinkable is None:
        raise GispError("this model was not pruned: nothing is there to compensate, prune it or take it along a run")
    model_map = shrinkable.map
    name = str(getattr(model, "name_or_path", "")) or None
    sequences = calibration_sequences(model_map, data, name)
    keep = shrinkable.keep()
    history = list(shrinkable.history)
    shrinkable.rollback(len(history))
    try:
        with reporting(progress), sharing(Replicas(process_group) if process_group is not None else None):
            found = fit_compensation(model_map, keep, sequences, chosen, on_block=on_block)
    finally:
        for removal in history:
            shrinkable.remove(removal)
    fold_into_pruned(shrinkable, found)
    return found
