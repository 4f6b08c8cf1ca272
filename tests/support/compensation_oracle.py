"""Compensated models by plain float64 formulas on all activations of a block at once."""

from __future__ import annotations

import math
from copy import deepcopy
from typing import Any

import torch
from tiny import tiny_tokens

from gisp.compensation import BlockUpdate, Compensation
from gisp.compensation.methods.fits import Solution
from gisp.data import Sequences
from gisp.data.held_out import hold_out

# What tests remove from a tiny model: blocks that lost heads, channels, both, nothing.
REMOVED = {
    "layers.0.channels": torch.tensor([1, 5, 6, 20]),
    "layers.1.heads": torch.tensor([0, 2]),
    "layers.1.channels": torch.tensor([3, 4, 22, 23, 0]),
    "layers.2.heads": torch.tensor([3]),
}


def kept_of(model: Any, removed: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    counts = {"heads": 4, "channels": 24}
    names = [f"layers.{i}.{kind}" for i in range(len(model.model.layers)) for kind in counts]
    gone = {name: set(removed.get(name, torch.tensor([])).tolist()) for name in names}
    return {n: torch.tensor([i for i in range(counts[n.split(".")[2]]) if i not in gone[n]]).long() for n in names}


def projection(model: Any, name: str) -> tuple[Any, int]:
    layer = model.model.layers[int(name.split(".")[1])]
    return (layer.self_attn.o_proj, layer.self_attn.head_dim) if name.endswith("heads") else (layer.mlp.down_proj, 1)


def rows(lengths: tuple[int, ...] = (16, 9, 12, 16, 5, 16, 11, 16, 7, 16, 13, 16)) -> Sequences:
    """Rows of different lengths: batches of them are padded."""
    ids = tiny_tokens(len(lengths), max(lengths), seed=5)
    return Sequences.plain([(row[:n], row[:n].clone()) for row, n in zip(ids, lengths, strict=True)])


def masked(model: Any, found: Compensation) -> Any:
    """A float64 copy with the compensated weights; the removed columns are zero."""
    copy = deepcopy(model).double()
    for update in found.updates:
        linear, _ = projection(copy, update.name)
        with torch.no_grad():
            linear.weight.zero_()
            linear.weight[:, update.columns] = weight_of(update).double()
    return copy


def divergence(dense: Any, pruned: Any, data: list[torch.Tensor]) -> torch.Tensor:
    """Sum over tokens, each row alone."""
    total = torch.zeros((), dtype=torch.float64)
    for ids in data:
        with torch.no_grad():
            wanted = dense(ids[None]).logits.softmax(-1)
        total = total + (wanted * (wanted.log() - pruned(ids[None]).logits.log_softmax(-1))).sum()
    return total


def seen_rows(tokens: torch.Tensor) -> torch.Tensor:
    """Those rows of tokens [N, S] that fits see, the others are held out."""
    seen, _ = hold_out(Sequences.plain([(ids, ids) for ids in tokens]))
    return torch.stack([ids for ids, _ in seen.rows])


def weight_of(found: BlockUpdate | Solution) -> torch.Tensor:
    """The weight that a fit found, which must be one."""
    assert found.weight is not None
    return found.weight


def columns(kept: torch.Tensor, width: int) -> torch.Tensor:
    return torch.cat([torch.arange(k * width, (k + 1) * width) for k in kept.tolist()] or [torch.arange(0)])


class Masked:
    """A float64 copy of a dense model in which blocks lose their removed columns one after the other."""

    def __init__(self, model: Any) -> None:
        self.model = deepcopy(model).double()
        self.dense = deepcopy(self.model)

    def stream(self, model: Any, name: str, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Inputs of a projection, residual stream before and after its block; flat, float64."""
        linear, _ = projection(model, name)
        layer = model.model.layers[int(name.split(".")[1])]
        norm = layer.input_layernorm if name.endswith("heads") else layer.post_attention_layernorm
        seen: dict[str, torch.Tensor] = {}
        hooks = [
            norm.register_forward_pre_hook(lambda _, args: seen.update(before=args[0])),
            linear.register_forward_hook(lambda _, args, out: seen.update(inputs=args[0], output=out)),
        ]
        with torch.no_grad():
            model(tokens)
        for hook in hooks:
            hook.remove()
        flat = {key: value.flatten(0, 1) for key, value in seen.items()}
        return flat["inputs"], flat["before"], flat["before"] + flat["output"]

    def put(self, name: str, kept: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        linear, width = projection(self.model, name)
        with torch.no_grad():
            linear.weight.zero_()
            linear.weight[:, columns(kept, width)] = weight
            if bias is not None:
                linear.bias = torch.nn.Parameter(bias)


def oracle(
    model: Any, removed: dict[str, torch.Tensor], tokens: torch.Tensor, method: str, target: str, **options: Any
) -> Masked:
    """The compensated model in float64, each block by a formula on all activations at once."""
    masked = Masked(model)
    kept = kept_of(model, removed)
    order = [f"layers.{i}.{kind}" for i in range(len(model.model.layers)) for kind in ("heads", "channels")]
    intercept, damping = options.get("intercept", method in ("bias", "affine")), options.get("damping", 0.01)
    for name in [n for n in order if n in removed]:
        linear, width = projection(masked.dense, name)
        cols = columns(kept[name], width)
        x_all, before, after = masked.stream(masked.model, name, tokens)
        if target == "dense":
            _, _, dense_after = masked.stream(masked.dense, name, tokens)
            wanted = dense_after - before
        else:
            wanted = after - before
        x, w = x_all[:, cols], linear.weight[:, cols].detach()
        b = torch.zeros(len(w), dtype=torch.float64) if linear.bias is None else linear.bias.detach()
        plain = x @ w.T
        if method == "bias":
            new_w, new_b = w, (wanted - plain).mean(0)
        elif method == "affine":
            new_w, new_b = w.clone(), b.clone()
            for i in range(len(w)):
                design = torch.stack([plain[:, i], torch.ones(len(plain), dtype=torch.float64)], 1)
                slope, level = torch.linalg.lstsq(design, wanted[:, i : i + 1]).solution.flatten()
                new_w[i], new_b[i] = slope * w[i], level
        elif method == "rescale":
            # The whole branch P times one number against what the block should give beside its own bias.
            new_w, new_b = w * torch.linalg.lstsq(plain.reshape(-1, 1), (wanted - b).reshape(-1, 1)).solution, b
        else:
            rest = wanted - b - plain
            ones = torch.ones(len(x), 1, dtype=torch.float64)
            centre = (lambda t: t - t.mean(0)) if intercept else (lambda t: t)
            xc, rc = centre(x), centre(rest)
            lam = damping * xc.square().sum() / max(xc.shape[1], 1)
            # Ridge as ordinary least squares on rows that pull the change to zero.
            rows = torch.cat([xc, math.sqrt(lam) * torch.eye(xc.shape[1], dtype=torch.float64)])
            goal = torch.cat([rc, torch.zeros(xc.shape[1], rc.shape[1], dtype=torch.float64)])
            change = torch.linalg.lstsq(rows, goal).solution.T if xc.shape[1] else w
            new_w, new_b = w + change, b + (rest - x @ change.T).mean(0) * ones[0] if intercept else b
        masked.put(name, kept[name], new_w, new_b if intercept else None)
    return masked
