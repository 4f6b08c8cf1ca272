"""Criterion ``learned-gates``: gates trained to the sparsity of the step; structures go by the order of their gates."""

from __future__ import annotations

import warnings

import torch

from gisp.model.modes import deterministic, frozen
from gisp.progress import track
from gisp.score.base import StepScores
from gisp.score.context import Context
from gisp.score.criteria.learned_gates.budget import Budget
from gisp.score.criteria.learned_gates.distillation import distilled
from gisp.score.criteria.learned_gates.gates import Gates
from gisp_kernels.groups import StructureGroup

# Weight of the divergence from the dense model beside the NLL, of the released code.
DIVERGENCE = 2.0
# Part of the budget that closed gates must hold, or the training was too short to say what should go.
_MET = 0.7
# Seeds of the steps of a run lie this far apart.
_SEED_STRIDE = 104_729


class LearnedGates:
    """Scores structures by gates trained to a budget of parameters, weights frozen (arXiv 2603.08065).

    A step trains gates on the model as it finds it until what they close adds up to the sparsity the step is to reach.
    Scores are the variables behind them: at or below zero where the gate is closed.
    """

    def __init__(self, context: Context) -> None:
        self._context = context

    def score(self, step: int, groups: list[StructureGroup]) -> StepScores:
        """Scores of ``groups`` at a step; the loss is that of the model before, over all data of the training."""
        context, config = self._context, self._context.config
        if not groups:
            return StepScores.of({}, *context.forward_pass(step))
        assert config.gate_steps is not None and config.gate_rate is not None
        gates = Gates(groups)
        parameters = context.map.decoder_parameters
        costs = [torch.tensor(self._cost(g) / parameters, dtype=torch.float32).expand(g.count) for g in groups]
        goal = float(config.sparsity or 0) * step / config.steps
        budget = Budget(
            torch.cat(costs).to(context.device),
            goal - self._removed() / parameters,
            steps=config.gate_steps,
            rate=config.gate_rate,
            seed=config.seed + step * _SEED_STRIDE,
        )
        loss, tokens = torch.zeros((), dtype=torch.float64, device=context.device), 0
        with deterministic(context.device), frozen(context.model), torch.enable_grad():
            for number in track(range(config.gate_steps), "training gates"):
                gates.values, gates.grad = budget.gates, torch.zeros_like(gates.grad)
                part, passed = self._train(gates, (step - 1) * config.gate_steps + number + 1)
                budget.step(gates.grad)
                loss += part / config.gate_steps
                tokens += passed
        z = budget.z.detach()
        closed = float(budget.costs[z <= 0].sum())
        if closed < _MET * budget.target:
            warnings.warn(
                f"{config.gate_steps} training steps closed gates of {closed:.4f} of the decoder parameters, "
                f"{budget.target:.4f} are to go: give more --gate-steps or a higher --gate-rate",
                stacklevel=2,
            )
        return StepScores.of({name: z[span] for name, span in gates.spans.items()}, loss, tokens)

    def _train(self, gates: Gates, number: int) -> tuple[torch.Tensor, int]:
        """Gradients of the gates on a batch; the dense model's loss, 0-dim float64, and the tokens."""
        context, model = self._context, self._context.model
        steps, data = context.steps, context.data
        numbers, weights = steps.numbers(number), steps.weights(number)
        loss, tokens = torch.zeros((), dtype=torch.float64, device=context.device), 0
        for start, stop in steps.batches(numbers, bounded=True):
            ids, labels = (t.to(context.device) for t in data.batch(numbers[start:stop]))
            with torch.no_grad():
                dense = model(input_ids=ids, use_cache=False).logits
            with gates:
                logits = model(input_ids=ids, use_cache=False).logits
            share = torch.tensor(weights[start:stop], dtype=torch.float32, device=context.device)
            found = distilled(logits, dense, labels, share, DIVERGENCE)
            logits.backward(found.grad)
            loss += found.dense_nll
            tokens += ids.numel()
        return loss, tokens

    def _cost(self, group: StructureGroup) -> int:
        """Parameters that go with a structure of a group."""
        model_map = self._context.map
        if group.kind == "channels":
            return model_map.channel_parameters
        return model_map.kv_group_parameters if model_map.gqa == "group" else model_map.head_parameters

    def _removed(self) -> int:
        """Parameters that earlier steps removed."""
        model_map, kept = self._context.map, self._context.shrinkable.kept
        heads = model_map.num_heads // model_map.heads_per_structure
        dense = {"heads": heads, "channels": model_map.intermediate_size}
        return sum(self._cost(group) * (dense[str(group.kind)] - kept(group.name)) for group in model_map.groups)
