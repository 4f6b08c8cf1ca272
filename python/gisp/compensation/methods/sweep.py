"""Fitting all blocks of a pruned model in the order of its layers, so that later ones see the fitted stream."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional

from gisp.compensation.acceptance import BlockFit, HeldOut, Measured, MethodResult, difference
from gisp.compensation.methods.fits import FITS, Solution
from gisp.compensation.pruned.projections import NO_MOVE, Move, Projection
from gisp.compensation.pruned.student import Student
from gisp.compensation.size_search import search
from gisp.compensation.streams import Batch, Decoder, ResidualBlock, make_batches
from gisp.errors import GispError
from gisp.model.structures import ModelMap
from gisp.progress import track
from gisp.replicas.sharing import in_slices, sharers
from gisp_kernels.ops.products import linear_in_float32

OnBlock = Callable[[BlockFit], None]


@dataclass(frozen=True)
class Fit:
    """How a method fits: one of :mod:`gisp.compensation.methods.fits`, its target and its options."""

    method: str
    target: str
    intercept: bool
    damping: float


def run_fit(
    model_map: ModelMap,
    student: Student,
    rows: Sequence[torch.Tensor],
    held_out: HeldOut,
    before: Measured,
    fit: Fit,
    on_block: OnBlock | None = None,
    later: int = 0,
) -> tuple[MethodResult, Measured]:
    """Fit every output projection of a student, and move it as far as that helps on held-out text.

    A block whose residual does not fall on held-out tokens keeps its weights. One size in (0, 1] on all accepted moves
    is searched by the divergence from the dense model, and is 0 where none makes it fall.

    Memory beside the student: the moves in float32, the residual streams of all tokens ([tokens, D] in the model's
    dtype; twice that for the target ``dense``), the kept inputs of one output projection ([tokens, K]), one batch's
    activations, and the sums of one block (see :mod:`gisp.compensation.methods.fits`). Time: two forward passes at the
    dense width, one for the target ``local``, and a forward pass over the held-out text for every size.

    Args:
        rows: token ids of the rows to fit to.
        before: the student on held-out text.
        later: methods that follow, for which it leaves their part of what the limits allow.

    Returns:
        The result, and what it leaves behind.

    Raises:
        GispError: a model built otherwise, or activations that are not finite.
    """
    blocks, moves = fit_blocks(model_map, student, rows, held_out, fit, on_block)
    after, size = before, 0.0
    if any(block.accepted for block in blocks):

        def tried(size: float) -> Measured:
            return student.measure(held_out, student.moved(moves, size))

        size, after = search(tried, 1.0, before, most=1.0, share=1 / (1 + later))
    tokens = sum(map(len, rows))
    result = MethodResult.ended(fit.method, tokens, held_out, before, after, size=size, blocks=tuple(blocks))
    if not result.kept:
        return result, before
    student.move(moves, size)
    return result, after


@torch.no_grad()
def fit_blocks(
    model_map: ModelMap,
    student: Student,
    rows: Sequence[torch.Tensor],
    held_out: HeldOut,
    fit: Fit,
    on_block: OnBlock | None = None,
) -> tuple[list[BlockFit], list[Move]]:
    """Fits of every projection of a student, and the moves to them; none where held-out tokens speak against it."""
    projections = {projection.name: projection for projection in student.projections}
    sweep = _Sweep(model_map, rows, held_out, fit)
    visits = sweep.decoder.visits
    blocks, moves = [], []
    with visits.visiting(range(len(model_map.layers))):
        for item in track(model_map.layers, "fitting layers"):
            with visits.visit(item.index):
                for block in sweep.decoder.blocks(item):
                    projection = projections.get(block.name)
                    if projection is None:
                        sweep.pass_by(block)
                        continue
                    found, move = sweep.fit(block, projection)
                    blocks.append(found)
                    moves.append(move if found.accepted else NO_MOVE)
                    if on_block:
                        on_block(found)
    return blocks, moves


class _Sweep:
    """The two residual streams between blocks: the pruned model's and, for the target ``dense``, the dense one's.

    Of a text that processes share each has the streams of the slices and of the held-out batches that fall to it.

    Attributes:
        batches: those of the fit, slice after slice, and behind them those held out.
        places: by slice, where its batches stand.
        held: by number of the held-out batch, where it stands.
    """

    def __init__(self, model_map: ModelMap, rows: Sequence[torch.Tensor], held_out: HeldOut, how: Fit) -> None:
        self.held_out, self.how = held_out, how
        self.batches: list[Batch] = []
        self.places: dict[int, range] = {}
        device, slices = model_map.model.get_input_embeddings().weight.device, in_slices(rows)
        self.slices = len(slices)
        for number in sharers().share(self.slices):
            begin = len(self.batches)
            self.batches += make_batches(slices[number], device)
            self.places[number] = range(begin, len(self.batches))
        self.held = {n: len(self.batches) + i for i, n in enumerate(sharers().share(len(held_out.batches)))}
        self.batches += [held_out.batches[number] for number in self.held]
        self.decoder = Decoder(model_map, self.batches)
        self.pruned = self.decoder.embedded
        # The dense stream is kept once the pruned one departs from it.
        self.dense: list[torch.Tensor] | None = None

    def pass_by(self, block: ResidualBlock) -> None:
        """Move both streams past a block that lost nothing: corrected for errors of others it does worse elsewhere."""
        for stream in (self.pruned, self.dense or []):
            stream[:] = [states + block.run(states)[1] for states in stream]

    def fit(self, block: ResidualBlock, projection: Projection) -> tuple[BlockFit, Move]:
        """The fit of one block and the move to it; both streams move past the block, with the fit where accepted."""
        if self.how.target == "dense" and self.dense is None:
            self.dense = list(self.pruned)
        own = projection.value()
        weight, bias = own.weight.float(), projection.bias_of(own)
        fit = FITS[self.how.method](weight, intercept=self.how.intercept, damping=self.how.damping)
        inputs: dict[int, torch.Tensor] = {}
        wanted = torch.zeros((), dtype=torch.float64, device=weight.device)

        def residual_of(place: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
            inputs[place], target = self._inputs_and_target(place, block, projection)
            if bias is not None:
                target = target - bias.float()
            left = self.batches[place].tokens(inputs[place])
            return left, target, target - linear_in_float32(left, own.weight)

        def fill(number: int, sums: Sequence[torch.Tensor]) -> None:
            part = fit.holding(sums[:-1])
            for place in self.places[number]:
                left, target, residual = residual_of(place)
                sums[-1].add_(target.square().sum(dtype=torch.float64))
                part.add(left, residual)

        sharers().add_up([*fit.sums, wanted], self.slices, fill)
        lacking = {place: residual_of(place)[2] for place in self.held.values()}
        try:
            solution = fit.solve()
        except ArithmeticError as error:
            raise GispError(f"{block.name} cannot be compensated: {error}") from None
        move = _checked_move(block.name, solution)
        accepted = self._falls(projection, move, inputs, lacking)
        value = projection.value(move) if accepted else own
        for place, states in enumerate(self.pruned):
            self.pruned[place] = states + functional.linear(inputs[place], value.weight, projection.bias_of(value))
        scale = max(float(wanted), 1e-30)
        kept = Move(None if move.weight is None else move.weight.to(projection.weight.device), move.bias)
        return BlockFit(block.name, solution.before / scale, solution.after / scale, solution.damping, accepted), kept

    def _inputs_and_target(
        self, number: int, block: ResidualBlock, projection: Projection
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Kept inputs [B, S, K] of a batch and what the output should be, float32 [T, D]; the dense stream moves on."""
        batch = self.batches[number]
        inputs, output = block.run(self.pruned[number])
        target = batch.tokens(output).float()
        if self.dense is not None:
            after = self.dense[number] + block.run(self.dense[number])[1]
            target = batch.tokens(after).float() - batch.tokens(self.pruned[number]).float()
            self.dense[number] = after
        return inputs[..., projection.columns], target

    def _falls(
        self, projection: Projection, move: Move, inputs: dict[int, torch.Tensor], lacking: dict[int, torch.Tensor]
    ) -> bool:
        """Whether the move brings held-out outputs nearer to their targets; both are by place of the batch."""
        own, value = projection.value(), projection.value(move)
        change = value.weight.float() - own.weight.float()
        old, new = (projection.bias_of(each) for each in (own, value))
        shift = 0 if new is None else new.float() - (0 if old is None else old.float())

        def values_of(number: int) -> tuple[torch.Tensor, torch.Tensor]:
            place = self.held[number]
            residual = lacking[place]
            rest = residual - self.batches[place].tokens(inputs[place]).float() @ change.T - shift
            return residual.square().sum(1), rest.square().sum(1)

        before, after = self.held_out.totals(values_of)
        return difference(before, after, self.held_out.tokens).falls


def _checked_move(name: str, found: Solution) -> Move:
    move = Move(*(None if tensor is None else tensor.float() for tensor in (found.weight, found.bias)))
    for what, tensor in (("weights", move.weight), ("biases", move.bias)):
        if tensor is not None and not bool(torch.isfinite(tensor).all()):
            raise GispError(f"compensated {what} of {name} are not finite: check the weights and the data")
    return move
