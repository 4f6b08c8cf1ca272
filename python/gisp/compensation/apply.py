"""Fitting and folding in: into a model pruned in place, or into the dense model an export is made from."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.distributed import ProcessGroup

from gisp.compensation.acceptance import HeldOut, MethodResult
from gisp.compensation.methods.run import BlockUpdate, run_methods
from gisp.compensation.methods.sweep import OnBlock
from gisp.compensation.options import METHODS, CompensationOptions, make_options
from gisp.data import DEFAULT_SEQ_LEN, Sequences, load_sequences
from gisp.data.held_out import run_text_of
from gisp.errors import GispError
from gisp.model.checks import check_autocast
from gisp.model.keep import Keep, block_columns
from gisp.model.shrink import ShrinkableModel
from gisp.model.structures import ModelMap
from gisp.offload.stream import LayerStream
from gisp.progress import reporting
from gisp.progress.track import Report
from gisp.replicas.group import Replicas
from gisp.replicas.sharing import sharing


@dataclass(frozen=True)
class HeldAgainst:
    """A text whose loss a compensation may not raise by more than 0.5 % of perplexity.

    Attributes:
        name: a kind of the calibration text, the run's own text, or a kind of it.
        texts, tokens: of what is held out.
    """

    name: str
    texts: int
    tokens: int


@dataclass(frozen=True)
class Compensation:
    """What was done.

    Attributes:
        updates: of every output projection that changes, in the order of the layers.
        results: what every method did; none where nothing was removed.
        texts, tokens: of what is held out; a text is a document, a question or, where there are few, a sequence.
        against: whose loss was a limit beside that of the calibration text in total.
    """

    options: CompensationOptions
    updates: tuple[BlockUpdate, ...]
    results: tuple[MethodResult, ...]
    texts: int
    tokens: int
    against: tuple[HeldAgainst, ...] = ()

    @property
    def seen(self) -> int:
        """Calibration tokens of all methods; one seen twice counts twice."""
        return sum(result.tokens for result in self.results)

    def describe(self) -> str:
        """Every method with its options and what was kept of it, in one line."""
        if not self.results:
            return f"{self.options.method}: nothing was removed, nothing is changed"
        parts = [_described(result, self.options) for result in self.results]
        first, last = self.results[0].before, self.results[-1].after
        fell = f"{first:.4g} to {last:.4g}" if self.updates else f"stays {first:.4g}"
        held_out = f"{self.tokens:,} held-out tokens of {self.texts} texts"
        parts.append(f"divergence from the dense model {fell} nats a token on {held_out}")
        if self.against:
            texts = [f"{text.name} ({text.tokens:,} tokens of {text.texts} texts)" for text in self.against]
            parts.append(f"also held against {', '.join(texts)}")
        if not self.updates:
            parts.append("nothing is kept, the weights stay as they were")
        return "; ".join(parts)


def _described(result: MethodResult, options: CompensationOptions) -> str:
    facts, method = [], METHODS[result.name]
    if "target" in method.options:
        facts.append(f"target {options.target}")
    if "damping" in method.options:
        facts.append(f"damping {options.damping:g}" + _raised(result, float(options.damping or 0)))
    if method.biases is not None and options.biases(result.name) != method.biases:
        facts.append("with biases" if options.biases(result.name) else "without biases")
    if method.kind == "training":
        facts.append(f"learning rate {options.rate_of(result.name):g}")
    if result.kept:
        if result.blocks:
            accepted = sum(block.accepted for block in result.blocks)
            facts.append(f"size {result.size:.3g} in {accepted} of {len(result.blocks)} blocks")
        elif result.steps:
            facts.append(f"{sum(step.size > 0 for step in result.steps)} of {len(result.steps)} steps taken")
        else:
            facts.append(f"best after {result.count} of {options.steps_of(result.name)} steps")
            if result.size < 1:
                facts.append(f"size {result.size:.3g}")
    facts.append(f"{result.tokens:,} calibration tokens")
    limited = f"limited by the loss of {' and '.join(result.limited)}" if result.limited else ""
    if result.kept and limited:
        facts.append(limited)
    if not result.kept:
        gain = result.before - result.reached
        why = (
            f"dropped as the fall of {gain:.2g} nats does not exceed its standard error {result.error:.2g}"
            if gain
            else "dropped as nothing brought the model nearer to the dense one without raising its loss"
        )
        facts.append(f"{why}, {limited}" if limited else why)
    return f"{result.name} ({', '.join(facts)})"


def _raised(result: MethodResult, damping: float) -> str:
    """Where a method needed more damping than was asked for."""
    raised = [block.damping for block in result.blocks if block.damping > damping]
    if raised:
        return f" (raised up to {max(raised):g} in {len(raised)} blocks that were not solvable with it)"
    most = max((step.raised for step in result.steps), default=0)
    return f" (raised up to {max(step.damping for step in result.steps):g} in {most} blocks)" if most else ""


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
    return Compensation(options, tuple(updates), tuple(results), len(held_out.tokens), tokens, _against(held_out))


def _against(held_out: HeldOut) -> tuple[HeldAgainst, ...]:
    tokens = held_out.tokens if held_out.beside is None else torch.cat([held_out.tokens, held_out.beside.tokens])
    return tuple(
        HeldAgainst(limit.name, len(limit.units), int(tokens[limit.units].sum()))
        for limit in held_out.limits
        if limit.rise
    )


def calibration_sequences(model_map: ModelMap, data: Any, tokenizer_from: str | None) -> Sequences:
    """The data as sequences of at most 256 tokens."""
    if isinstance(data, Sequences):
        return data
    return load_sequences(data, vocab_size=model_map.vocab_size, seq_len=DEFAULT_SEQ_LEN, tokenizer_from=tokenizer_from)


@torch.inference_mode(False)
def compensate(
    model: nn.Module,
    data: Any,
    *,
    on_block: OnBlock | None = None,
    progress: bool | Report | None = None,
    process_group: ProcessGroup | None = None,
    **options: Any,
) -> Compensation:
    """Compensate a model that was pruned in place, whatever chose its structures.

    The output projections (o_proj, down_proj) get new weights and, with an intercept, biases. Moving the model along
    its steps (``Trajectory.at``, ``ShrinkableModel.remove`` and ``rollback``) first takes the compensation back, bit
    for bit; compensating again replaces it, and one that fails leaves the model without any.

    Args:
        model: pruned by :func:`gisp.prune`, ``Trajectory.at`` or ``ShrinkableModel.remove``, not packed.
        data: calibration data, as for :func:`gisp.prune`.
        on_block: called with every block's fit.
        progress: who hears how far it is, as for :func:`gisp.prune`.
        process_group: processes that compensate together, each its own copy of the model; ``None``: this one alone.
        **options: see :class:`CompensationOptions`.

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
        weight = None if update.weight is None else update.weight[:, position]
        undo.append(_overwrite(linear, weight, update.bias))

    def restore() -> None:
        for step in reversed(undo):
            step()

    shrinkable.until_moved(restore)


def fold_into_dense(model_map: ModelMap, compensation: Compensation) -> None:
    """Write a compensation into the dense model it was fitted on, at the columns that stay, for an export.

    The model as a whole computes nothing useful then: only with the removed structures gone. Factors multiply its own
    weights, whatever dtype they were fitted in.
    """
    outputs = model_map.outputs
    with torch.no_grad():
        for update in compensation.updates:
            linear, block = outputs[update.name]
            columns, weight = update.columns.to(linear.weight.device), update.weight
            if update.factors is not None:
                factors = update.factors.to(linear.weight.device).repeat_interleave(block)
                weight = linear.weight[:, columns].float() * factors
            if weight is not None:
                linear.weight[:, columns] = weight.to(linear.weight)
            _set_bias(linear, update.bias)
        if any(update.bias is not None for update in compensation.updates):
            # A checkpoint has them in all layers or in none.
            for linear, _ in outputs.values():
                _set_bias(linear, linear.weight.new_zeros(linear.out_features) if linear.bias is None else None)


@contextmanager
def folded_into_dense(model_map: ModelMap, compensation: Compensation) -> Iterator[None]:
    """:func:`fold_into_dense` for a while; the model is then as it was, bit for bit.

    Memory: the changed columns once more.
    """
    outputs = model_map.outputs
    before: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
    for update in compensation.updates:
        weight = outputs[update.name][0].weight
        columns = update.columns.to(weight.device)
        before.append((weight, columns, weight.detach()[:, columns].clone()))
    linears = [linear for linear, _ in outputs.values()]
    biases = [(linear, linear.bias) for linear in linears]
    values_of = {linear: linear.bias.detach().clone() for linear in linears if linear.bias is not None}
    fold_into_dense(model_map, compensation)
    try:
        yield
    finally:
        with torch.no_grad():
            for weight, columns, values in before:
                weight[:, columns] = values
            for linear, bias in biases:
                linear.bias = bias
                if bias is not None:
                    bias.copy_(values_of[linear])


@torch.no_grad()
def _overwrite(linear: nn.Linear, weight: torch.Tensor | None, bias: torch.Tensor | None) -> Callable[[], None]:
    """Give a layer other values in place, None for those it has; the returned call brings the old ones back."""
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
        linear.bias = nn.Parameter(bias.to(linear.weight, copy=True), requires_grad=linear.weight.requires_grad)
    else:
        linear.bias.copy_(bias)
