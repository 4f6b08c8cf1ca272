"""Fitting and folding in: into a model pruned in place, or into the dense model an export is made from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from gisp.compensation.held_out import hold_out, interleaved
from gisp.compensation.kfac import KfacStep, kfac_updates
from gisp.compensation.options import ONLY, CompensationOptions
from gisp.compensation.sweep import BlockUpdate, OnBlock, fit_updates
from gisp.data import DEFAULT_SEQ_LEN, Sequences, load_sequences
from gisp.errors import GispError
from gisp.model.keep import Keep, block_columns
from gisp.model.shrink import ShrinkableModel
from gisp.model.structures import ModelMap


@dataclass(frozen=True)
class Compensation:
    """What was fitted.

    Attributes:
        updates: of every output projection that changes, in the order of the layers.
        tokens: calibration tokens of the fit (those of ``kfac``'s steps are in ``steps``).
        steps: of ``kfac``.
    """

    options: CompensationOptions
    updates: tuple[BlockUpdate, ...]
    tokens: int
    steps: tuple[KfacStep, ...] = ()

    def describe(self) -> str:
        """Method and options in one line."""
        options = self.options
        extra = f", damping {options.damping:g}" if options.method in ONLY["damping"] else ""
        if options.method != "bias" and options.intercept != (options.method == "affine"):
            extra += ", with biases" if options.intercept else ", without biases"
        raised = [update.damping for update in self.updates if update.damping > options.damping]
        if raised:
            extra += f" (raised up to {max(raised):g} in {len(raised)} blocks that were not solvable with it)"
        stiff = [step for step in self.steps if step.raised]
        if stiff:
            most = max(step.raised for step in stiff)
            extra += f" (in steps raised up to {max(step.damping for step in stiff):g} in {most} blocks)"
        tokens = f"{self.tokens:,}"
        if self.steps:
            fell = f"{self.steps[0].before:.3g} to {self.steps[-1].after:.3g}"
            taken = sum(step.size > 0 for step in self.steps)
            count = f"{taken} of {len(self.steps)} steps taken"
            extra += f", {count} (divergence from the dense model {fell} nats a token)"
            tokens += f" + {sum(step.tokens for step in self.steps):,}"
        return f"{options.method}, target {options.target}{extra}, {tokens} calibration tokens"


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

    Args:
        keep: what stays.
        data: ``Sequences``, or a SPEC as for ``gisp prune`` (see :func:`gisp.data.load_sequences`). Tasks of a mixture
            are taken in turn.
        tokenizer_from: model folder or name whose tokenizer reads text.

    Raises:
        GispError: unreadable data, a single sequence (``kfac``), a model built otherwise, or activations that are not
            finite.
    """
    sequences = interleaved(calibration_sequences(model_map, data, tokenizer_from))
    held_out: Sequences | None = None
    if options.method == "kfac":
        sequences, held_out = hold_out(sequences)
    steps: list[KfacStep] = []
    # Steps take gradients of what was fitted, whatever mode the caller is in.
    with torch.inference_mode(False):
        updates, tokens = fit_updates(model_map, keep, sequences, options, on_block)
        if held_out is not None:
            updates, steps = kfac_updates(model_map, updates, sequences, held_out, options)
    return Compensation(options, tuple(updates), tokens, tuple(steps))


def calibration_sequences(model_map: ModelMap, data: Any, tokenizer_from: str | None) -> Sequences:
    """The data as sequences of at most 256 tokens."""
    if isinstance(data, Sequences):
        return data
    return load_sequences(data, vocab_size=model_map.vocab_size, seq_len=DEFAULT_SEQ_LEN, tokenizer_from=tokenizer_from)


@torch.inference_mode(False)
def compensate(model: nn.Module, data: Any, *, on_block: OnBlock | None = None, **options: Any) -> Compensation:
    """Compensate a model that was pruned in place, whatever chose its structures.

    The output projections (o_proj, down_proj) get new weights and, with an intercept, biases. Moving the model along
    its steps (``Trajectory.at``, ``ShrinkableModel.remove`` and ``rollback``) first takes the compensation back, bit
    for bit; compensating again replaces it, and one that fails leaves the model without any.

    Args:
        model: pruned by :func:`gisp.prune`, ``Trajectory.at`` or ``ShrinkableModel.remove``, not packed.
        data: calibration data, as for :func:`gisp.prune`.
        on_block: called with every block's update.
        **options: see :class:`CompensationOptions`.

    Raises:
        GispError: a model that is not pruned or was packed, a bad option, unreadable data.
    """
    chosen = make_options(**options)
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
        found = fit_compensation(model_map, keep, sequences, chosen, on_block=on_block)
    finally:
        for removal in history:
            shrinkable.remove(removal)
    fold_into_pruned(shrinkable, found)
    return found


def make_options(**options: Any) -> CompensationOptions:
    """Checked options.

    Raises:
        GispError: an unknown option or value.
    """
    known = CompensationOptions.__dataclass_fields__
    unknown = next((name for name in options if name not in known), None)
    if unknown:
        raise GispError(f"unknown option {unknown}: compensation has {', '.join(known)}")
    return CompensationOptions(**options)


def fold_into_pruned(shrinkable: ShrinkableModel, compensation: Compensation) -> None:
    """Write a compensation into a model in the state it was fitted for, until the model is moved.

    Raises:
        GispError: the model keeps other structures.
    """
    outputs = shrinkable.map.outputs
    undo: list[Callable[[], None]] = []
    places = []
    for update in compensation.updates:
        linear, width = outputs[update.name]
        order = block_columns(shrinkable.members(update.name), width)
        if not torch.equal(order.sort().values, update.columns.cpu()):
            raise GispError(f"{update.name} keeps other structures than this compensation was fitted for: fit it anew")
        # Columns of the update stand in original order, those of the model in the order of its swaps.
        places.append((linear, update, torch.searchsorted(update.columns.cpu(), order).to(linear.weight.device)))
    for linear, update, position in places:
        undo.append(_overwrite(linear, None if update.weight is None else update.weight[:, position], update.bias))

    def restore() -> None:
        for step in reversed(undo):
            step()

    shrinkable.until_moved(restore)


def fold_into_dense(model_map: ModelMap, compensation: Compensation) -> None:
    """Write a compensation into the dense model it was fitted on, at the columns that stay, for an export.

    The model as a whole computes nothing useful then: only with the removed structures gone.
    """
    outputs = model_map.outputs
    with torch.no_grad():
        for update in compensation.updates:
            linear, _ = outputs[update.name]
            if update.weight is not None:
                linear.weight[:, update.columns] = update.weight.to(linear.weight.dtype)
            _set_bias(linear, update.bias)
        if any(update.bias is not None for update in compensation.updates):
            # A checkpoint has them in all layers or in none.
            for linear, _ in outputs.values():
                _set_bias(linear, linear.weight.new_zeros(linear.out_features) if linear.bias is None else None)


@torch.no_grad()
def _overwrite(linear: nn.Linear, weight: torch.Tensor | None, bias: torch.Tensor | None) -> Callable[[], None]:
    """Give a layer other values in place; the returned call brings the old ones back."""
    old_weight = None if weight is None else linear.weight.detach().clone()
    old_bias, old_values = linear.bias, None if linear.bias is None else linear.bias.detach().clone()
    if weight is not None:
        linear.weight.copy_(weight)
    _set_bias(linear, bias)

    def restore() -> None:
        with torch.no_grad():
            if old_weight is not None:
                linear.weight.copy_(old_weight)
            linear.bias = old_bias
            if old_values is not None:
                old_bias.copy_(old_values)

    return restore


def _set_bias(linear: nn.Linear, bias: torch.Tensor | None) -> None:
    if bias is None:
        return
    if linear.bias is None:
        linear.bias = nn.Parameter(bias.to(linear.weight.dtype, copy=True), requires_grad=linear.weight.requires_grad)
    else:
        linear.bias.copy_(bias)
