"""Scores of every criterion from their formulas, in float64, one sequence at a time and without padding.

Written from the papers alone: of the package only the loss's definition (mean over sequences of their mean NLL) is
assumed, nothing is imported.
"""

from __future__ import annotations

import copy
from typing import Any

import torch


class Oracle:
    """A float64 copy of a model that has seen some sequences.

    Args:
        rows: (input_ids [S], labels [S]) of each sequence.
        group: score key/value heads with their query heads instead of query heads.
    """

    def __init__(self, model: Any, rows: Any, *, group: bool = False) -> None:
        self.model = copy.deepcopy(model).double().eval()
        self.layers = list(self.model.model.layers)
        config = self.model.config
        self.head_dim = self.layers[0].self_attn.head_dim
        self.shared = config.num_attention_heads != config.num_key_value_heads
        self.group = group
        per_kv = config.num_attention_heads // config.num_key_value_heads
        self.columns = self.head_dim * (per_kv if group else 1)
        self.inputs: dict[torch.nn.Module, torch.Tensor] = {}
        handles = [
            module.register_forward_hook(self._keep_input)
            for module in self.model.modules()
            if isinstance(module, torch.nn.Linear)
        ]
        losses = []
        for ids, labels in rows:
            out = self.model(ids[None])
            losses.append(torch.nn.functional.cross_entropy(out.logits[0, :-1], labels[1:], ignore_index=-100))
        for handle in handles:
            handle.remove()
        self.loss = torch.stack(losses).mean()
        self.loss.backward()

    def _keep_input(self, module: torch.nn.Module, args: Any, _: Any) -> None:
        seen = args[0].detach().flatten(0, -2)
        self.inputs[module] = torch.cat((self.inputs[module], seen)) if module in self.inputs else seen

    def parts(self, layer: int) -> dict[str, list[tuple[torch.nn.Linear, int, int]]]:
        """By group the Linear layers, the axis summed over and the lines of one structure."""
        attention, mlp = self.layers[layer].self_attn, self.layers[layer].mlp
        heads = [(attention.q_proj, 1, self.columns)]
        if self.group or not self.shared:
            heads += [(attention.k_proj, 1, self.head_dim), (attention.v_proj, 1, self.head_dim)]
        heads.append((attention.o_proj, 0, self.columns))
        channels = [(mlp.gate_proj, 1, 1), (mlp.up_proj, 1, 1), (mlp.down_proj, 0, 1)]
        return {f"layers.{layer}.heads": heads, f"layers.{layer}.channels": channels}

    def each(self, formula: Any) -> dict[str, torch.Tensor]:
        found = {}
        for layer in range(len(self.layers)):
            for name, parts in self.parts(layer).items():
                found[name] = formula(name, parts).detach()
        return found

    def magnitude(self) -> dict[str, torch.Tensor]:
        return self.each(lambda _, parts: sum(m.weight.abs().sum(d).view(-1, n).sum(1) for m, d, n in parts))

    def taylor(self) -> dict[str, torch.Tensor]:
        return self.each(
            lambda _, parts: sum((m.weight * m.weight.grad).abs().sum(d).view(-1, n).sum(1) for m, d, n in parts)
        )

    def signed(self) -> dict[str, torch.Tensor]:
        return self.each(
            lambda _, parts: sum((m.weight * m.weight.grad).sum(d).view(-1, n).sum(1) for m, d, n in parts).abs()
        )

    def wanda(self) -> dict[str, torch.Tensor]:
        def formula(_: str, parts: Any) -> torch.Tensor:
            module, _, lines = parts[-1]
            metric = module.weight.abs() * self.inputs[module].pow(2).mean(0).sqrt()
            return metric.mean(0).view(-1, lines).sum(1)

        return self.each(formula)

    def flap(self, *, standardise: bool) -> dict[str, torch.Tensor]:
        def formula(_: str, parts: Any) -> torch.Tensor:
            module, _, lines = parts[-1]
            metric = self.inputs[module].var(0, correction=0) * module.weight.pow(2).sum(0)
            if standardise:
                metric = (metric - metric.mean()) / metric.std()
            return metric.view(-1, lines).mean(1)

        return self.each(formula)

    def influence(self, rows: Any) -> list[float]:
        """1 - mean cosine of every layer; the last layer's output is taken before the final norm."""
        totals, tokens, seen = [0.0] * len(self.layers), 0, []
        readers = [*self.layers, self.model.model.norm]
        handles = [m.register_forward_pre_hook(lambda _, args: seen.append(args[0][0])) for m in readers]
        with torch.no_grad():
            for ids, _ in rows:
                seen.clear()
                self.model(ids[None])
                for i in range(len(self.layers)):
                    x, y = seen[i], seen[i + 1]
                    totals[i] += float(((x * y).sum(1) / (x.norm(dim=1) * y.norm(dim=1))).sum())
                tokens += len(ids)
        for handle in handles:
            handle.remove()
        return [1 - total / tokens for total in totals]

    def outliers(self, factor: float) -> list[float]:
        """Part of each layer's weights with |W| * ||X|| above ``factor`` times the mean over the layer."""
        ratios = []
        for layer in self.layers:
            linears = [m for m in layer.modules() if isinstance(m, torch.nn.Linear)]
            metric = torch.cat([(m.weight.abs() * self.inputs[m].norm(dim=0)).flatten() for m in linears])
            ratios.append(float((metric > factor * metric.mean()).double().mean()))
        return ratios
