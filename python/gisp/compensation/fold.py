"""Folding a compensation in: into a model pruned in place, or into the dense model an export is made from."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import nn

from gisp.compensation.result import Compensation
from gisp.errors import GispError
from gisp.model.keep import block_columns
from gisp.model.shrink import ShrinkableModel
from gisp.model.structures import ModelMap


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

    shrinkable.until_moved(partial(_run, undo[::-1]))


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
            _restore(linear, None, bias, values_of.get(linear))


@torch.no_grad()
def _overwrite(linear: nn.Linear, weight: torch.Tensor | None, bias: torch.Tensor | None) -> Callable[[], None]:
    """Give a layer other values in place, None for those it has; the returned call brings the old ones back."""
    old_weight = None if weight is None else linear.weight.detach().clone()
    old_bias, old_values = linear.bias, None if linear.bias is None else linear.bias.detach().clone()
    if weight is not None:
        linear.weight.copy_(weight)
    _set_bias(linear, bias)

    return partial(_restore, linear, old_weight, old_bias, old_values)


@torch.no_grad()
def _restore(
    linear: nn.Linear, weight: torch.Tensor | None, bias: nn.Parameter | None, values: torch.Tensor | None
) -> None:
    if weight is not None:
        linear.weight.copy_(weight)
    linear.register_parameter("bias", bias)
    if bias is not None and values is not None:
        bias.copy_(values)


def _run(steps: Iterable[Callable[[], None]]) -> None:
    for step in steps:
        step()


def _set_bias(linear: nn.Linear, bias: torch.Tensor | None) -> None:
    if bias is None:
        return
    if linear.bias is None:
        linear.bias = nn.Parameter(bias.to(linear.weight, copy=True), requires_grad=linear.weight.requires_grad)
    else:
        linear.bias.copy_(bias)
