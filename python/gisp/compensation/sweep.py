"""Fitting all blocks of a pruned model in the order of its layers, so that later ones see the compensated stream."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from gisp.compensation.fits import Solution, make_fit
from gisp.compensation.options import CompensationOptions
from gisp.compensation.streams import Batch, Decoder, ResidualBlock, make_batches
from gisp.data import Sequences
from gisp.errors import GispError
from gisp.model.keep import Keep
from gisp.model.modes import evaluation_mode, exact_products
from gisp.model.structures import ModelMap

OnBlock = Callable[["BlockUpdate"], None]


@dataclass(frozen=True)
class BlockUpdate:
    """New weights of one output projection.

    Attributes:
        name: of the block's group, ``layers.{i}.heads`` or ``layers.{i}.channels``.
        columns: original input columns of the projection that stay, int64 [K].
        weight: [D, K] for these columns, in the dtype of the model; None = as it was.
        bias: the whole bias [D] in the dtype of the model; None = as it was.
        before, after: what the block's output lacked to its target over the calibration tokens, as a fraction of the
            target's sum of squares, without and with the update (of ``kfac``: with the least squares it starts from).
        damping: what the solver needed.
    """

    name: str
    columns: torch.Tensor
    weight: torch.Tensor | None
    bias: torch.Tensor | None
    before: float
    after: float
    damping: float


@torch.no_grad()
def fit_updates(
    model_map: ModelMap,
    keep: Keep,
    data: Sequences,
    options: CompensationOptions,
    on_block: OnBlock | None = None,
) -> tuple[list[BlockUpdate], int]:
    """Updates of every output projection that needs one, and the number of calibration tokens.

    Memory beside the model: the residual stream of all calibration tokens ([tokens, D] in the model's dtype; twice that
    for the target ``dense``) and the kept inputs of one output projection ([tokens, K]), one batch's activations, and
    the sums of one block (see :mod:`gisp.compensation.fits`). Time: two forward passes at the dense width, one for the
    target ``local``.

    Args:
        model_map: map of the dense model, which is left as it was.
        keep: what stays.
        data: calibration sequences; every token counts, scored or not.

    Raises:
        GispError: a model built otherwise, or activations that are not finite.
    """
    model = model_map.model
    batches = make_batches(data, options.tokens, model.get_input_embeddings().weight.device)
    tokens = sum(int(batch.ids.numel() if batch.real is None else batch.real.sum()) for batch in batches)
    with exact_products(), evaluation_mode(model):
        sweep = _Sweep(model_map, batches, options)
        for item in model_map.layers:
            kept = keep.columns(item.index, model_map.head_dim)
            for block, columns in zip(sweep.decoder.blocks(item), kept, strict=True):
                sweep.advance(block, columns, on_block)
    return sweep.updates, tokens


class _Sweep:
    """The two residual streams between blocks: the pruned model's and, for the target ``dense``, the dense one's."""

    def __init__(self, model_map: ModelMap, batches: list[Batch], options: CompensationOptions) -> None:
        self.batches, self.options = batches, options
        self.decoder = Decoder(model_map, batches)
        self.pruned = self.decoder.embedded
        # The dense stream is kept once the pruned one departs from it.
        self.dense: list[torch.Tensor] | None = None
        self.updates: list[BlockUpdate] = []

    def advance(self, block: ResidualBlock, columns: torch.Tensor, on_block: OnBlock | None) -> None:
        """Fit one block and move both streams past it."""
        if len(columns) == block.projection.in_features:
            # Blocks that lost nothing stay as they are: corrected for errors of others they do worse on other text.
            for stream in (self.pruned, self.dense or []):
                stream[:] = [states + block.run(states)[1] for states in stream]
            return
        if self.options.target == "dense" and self.dense is None:
            self.dense = list(self.pruned)
        columns = columns.to(block.projection.weight.device)
        update, inputs = self._fit(block, columns)
        self.updates.append(update)
        weight = block.projection.weight[:, columns] if update.weight is None else update.weight
        bias = block.projection.bias if update.bias is None else update.bias
        for number, (states, left) in enumerate(zip(self.pruned, inputs, strict=True)):
            self.pruned[number] = states + functional.linear(left, weight, bias)
        if on_block:
            on_block(update)

    def _fit(self, block: ResidualBlock, columns: torch.Tensor) -> tuple[BlockUpdate, list[torch.Tensor]]:
        """The block's update, and the kept inputs [B, S, K] of its projection by batch; the dense stream moves on."""
        projection, options = block.projection, self.options
        weight = projection.weight[:, columns].float()
        fit = make_fit(options.method, weight, intercept=bool(options.intercept), damping=options.damping)
        wanted = 0.0
        held = []
        for number, batch in enumerate(self.batches):
            inputs, output = block.run(self.pruned[number])
            target = batch.tokens(output).float()
            if self.dense is not None:
                after = self.dense[number] + block.run(self.dense[number])[1]
                target = batch.tokens(after).float() - batch.tokens(self.pruned[number]).float()
                self.dense[number] = after
            if projection.bias is not None:
                target = target - projection.bias.float()
            held.append(inputs[..., columns])
            left = batch.tokens(held[-1]).float()
            fit.add(left, target - left @ weight.T)
            wanted += float(target.square().sum(dtype=torch.float64))
        try:
            solution = fit.solve()
        except ArithmeticError as error:
            raise GispError(f"{block.name} cannot be compensated: {error}") from None
        return _update(block, columns, weight, solution, wanted), held


def _update(
    block: ResidualBlock, columns: torch.Tensor, weight: torch.Tensor, found: Solution, wanted: float
) -> BlockUpdate:
    projection: nn.Linear = block.projection
    new_weight = None if found.weight is None else (weight.double() + found.weight).to(projection.weight.dtype)
    new_bias: Any = None
    if found.bias is not None:
        old = 0 if projection.bias is None else projection.bias.double()
        new_bias = (old + found.bias).to(projection.weight.dtype)
    for name, tensor in (("weights", new_weight), ("biases", new_bias)):
        if tensor is not None and not bool(torch.isfinite(tensor).all()):
            raise GispError(f"compensated {name} of {block.name} are not finite: check the weights and the data")
    scale = max(wanted, 1e-30)
    return BlockUpdate(
        block.name, columns, new_weight, new_bias, found.before / scale, found.after / scale, found.damping
    )
