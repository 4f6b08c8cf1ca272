"""Masked reference of the `paper` and `official` presets, written from the formulas with plain loops.

Nothing shrinks here: weights of removed structures are set to zero in dense matrices, the forward pass is spelled
out layer by layer, and the gradient of every matrix is an ordinary ``.grad`` summed over the whole calibration set.
Runs in float32 or in float64 throughout; the difference of the two tells whether two scores nearly tie.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file

IGNORED = -100


@dataclass
class Decoder:
    """Weights and sizes of a Llama-shaped decoder folder (Llama, Mistral, Qwen2, Qwen3)."""

    weights: dict[str, torch.Tensor]
    layers: int
    hidden: int
    channels: int
    heads: int
    kv_heads: int
    head_dim: int
    eps: float
    inv_freq: torch.Tensor
    window: int | None

    @classmethod
    def load(cls, path: Path, dtype: torch.dtype) -> Decoder:
        config = json.loads((path / "config.json").read_text())
        weights = {k: v.to(dtype) for k, v in load_file(path / "model.safetensors").items()}
        if "lm_head.weight" not in weights:
            weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
        head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
        uses_window = config["model_type"] == "mistral"
        return cls(
            weights=weights,
            layers=config["num_hidden_layers"],
            hidden=config["hidden_size"],
            channels=config["intermediate_size"],
            heads=config["num_attention_heads"],
            kv_heads=config["num_key_value_heads"],
            head_dim=head_dim,
            eps=config["rms_norm_eps"],
            inv_freq=_inv_freq(config["rope_parameters"], head_dim).to(dtype),
            window=config["sliding_window"] if uses_window else None,
        )

    @property
    def multi_head(self) -> bool:
        """Whether every query head has its own key and value."""
        return self.heads == self.kv_heads

    @property
    def decoder_parameters(self) -> int:
        return sum(w.numel() for name, w in self.weights.items() if ".layers." in name)

    @property
    def head_weights(self) -> int:
        return (4 if self.multi_head else 2) * self.head_dim * self.hidden

    @property
    def head_parameters(self) -> int:
        """Weights and biases that a removed head takes along: all that its rows and columns hold."""
        rows = ("q_proj", "k_proj", "v_proj") if self.multi_head else ("q_proj",)
        return self.head_weights + self.head_dim * sum(self._biased(f"self_attn.{name}") for name in rows)

    @property
    def channel_weights(self) -> int:
        return 3 * self.hidden

    @property
    def channel_parameters(self) -> int:
        return self.channel_weights + sum(self._biased(f"mlp.{name}") for name in ("gate_proj", "up_proj"))

    def _biased(self, name: str) -> bool:
        return f"model.layers.0.{name}.bias" in self.weights

    def _linear(self, name: str, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weights[f"{name}.weight"], self.weights.get(f"{name}.bias"))

    def _norm(self, name: str, x: torch.Tensor) -> torch.Tensor:
        scale = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)
        return x * scale * self.weights[f"{name}.weight"]

    def _attention(self, prefix: str, x: torch.Tensor) -> torch.Tensor:
        batch, length, _ = x.shape
        q = self._linear(f"{prefix}.q_proj", x).view(batch, length, self.heads, self.head_dim)
        k = self._linear(f"{prefix}.k_proj", x).view(batch, length, self.kv_heads, self.head_dim)
        v = self._linear(f"{prefix}.v_proj", x).view(batch, length, self.kv_heads, self.head_dim)
        if f"{prefix}.q_norm.weight" in self.weights:
            q = self._norm(f"{prefix}.q_norm", q)
            k = self._norm(f"{prefix}.k_norm", k)
        q, k = self._rotate(q), self._rotate(k)
        position = torch.arange(length)
        distance = position[:, None] - position[None, :]
        visible = distance >= 0
        if self.window is not None:
            visible &= distance < self.window
        outputs = []
        for head in range(self.heads):
            shared = head * self.kv_heads // self.heads
            logits = q[:, :, head] @ k[:, :, shared].transpose(1, 2) / math.sqrt(self.head_dim)
            weights = logits.masked_fill(~visible, -math.inf).softmax(-1)
            outputs.append(weights @ v[:, :, shared])
        return self._linear(f"{prefix}.o_proj", torch.cat(outputs, dim=-1))

    def _rotate(self, x: torch.Tensor) -> torch.Tensor:
        angle = torch.arange(x.shape[1], dtype=x.dtype)[:, None] * self.inv_freq
        cos, sin = angle.cos()[None, :, None], angle.sin()[None, :, None]
        left, right = x.chunk(2, dim=-1)
        return torch.cat((left * cos - right * sin, right * cos + left * sin), dim=-1)

    def _mlp(self, prefix: str, x: torch.Tensor) -> torch.Tensor:
        gate = F.silu(self._linear(f"{prefix}.gate_proj", x))
        return self._linear(f"{prefix}.down_proj", gate * self._linear(f"{prefix}.up_proj", x))

    def logits(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Next-token logits [batch, length, vocabulary]."""
        x = self.weights["model.embed_tokens.weight"][input_ids]
        for i in range(self.layers):
            block = f"model.layers.{i}"
            x = x + self._attention(f"{block}.self_attn", self._norm(f"{block}.input_layernorm", x))
            x = x + self._mlp(f"{block}.mlp", self._norm(f"{block}.post_attention_layernorm", x))
        return self._linear("lm_head", self._norm("model.norm", x))

    def remove_head(self, layer: int, head: int) -> None:
        """Zero what a removed head owns; with shared key/value heads its k and v stay."""
        attention = f"model.layers.{layer}.self_attn"
        rows = slice(head * self.head_dim, (head + 1) * self.head_dim)
        for name in ("q_proj", "k_proj", "v_proj") if self.multi_head else ("q_proj",):
            self.weights[f"{attention}.{name}.weight"].data[rows] = 0
        self.weights[f"{attention}.o_proj.weight"].data[:, rows] = 0

    def remove_channel(self, layer: int, channel: int) -> None:
        mlp = f"model.layers.{layer}.mlp"
        self.weights[f"{mlp}.gate_proj.weight"].data[channel] = 0
        self.weights[f"{mlp}.up_proj.weight"].data[channel] = 0
        self.weights[f"{mlp}.down_proj.weight"].data[:, channel] = 0


def _inv_freq(rope: dict[str, float | str], head_dim: int) -> torch.Tensor:
    """Rotary frequencies in the float32 precision models are run with; "default" and "llama3" scaling."""
    exponent = torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
    plain = 1.0 / (float(rope["rope_theta"]) ** exponent)
    if rope["rope_type"] == "default":
        return plain
    if rope["rope_type"] != "llama3":
        raise ValueError(f"unknown rope_type {rope['rope_type']!r}")
    factor, original = float(rope["factor"]), float(rope["original_max_position_embeddings"])
    low, high = float(rope["low_freq_factor"]), float(rope["high_freq_factor"])
    scaled = []
    for value in plain:
        wavelength = 2 * math.pi / value
        if wavelength < original / high:
            scaled.append(value)
        elif wavelength > original / low:
            scaled.append(value / factor)
        else:
            smooth = (original / wavelength - low) / (high - low)
            scaled.append((1 - smooth) * value / factor + smooth * value)
    return torch.stack(scaled)


@dataclass
class Removal:
    """What a reference run removed: 1-based steps, 0 = kept, plus the sparsity after each step."""

    heads: list[list[int]]
    channels: list[list[int]]
    sparsity: list[float] = field(default_factory=list)

    def flat(self) -> list[int]:
        return [t for rows in (*self.heads, *self.channels) for t in rows]


def sequence_losses(decoder: Decoder, input_ids: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
    """Mean NLL of the scored tokens of every sequence, [batch]."""
    labels = input_ids if labels is None else labels
    logits, targets = decoder.logits(input_ids)[:, :-1], labels[:, 1:]
    log_p = logits.log_softmax(-1)
    means = []
    for row in range(len(input_ids)):
        scored = targets[row] != IGNORED
        picked = log_p[row, scored].gather(-1, targets[row, scored][:, None])
        means.append(-picked.mean())
    return torch.stack(means)


def gradients(
    decoder: Decoder, input_ids: torch.Tensor, labels: torch.Tensor | None, batch: int
) -> dict[str, torch.Tensor]:
    """Gradient of the mean sequence loss for every matrix of the decoder layers."""
    names = [n for n in decoder.weights if ".layers." in n and n.endswith("proj.weight")]
    for name in names:
        decoder.weights[name].requires_grad_(True).grad = None
    for start in range(0, len(input_ids), batch):
        rows = slice(start, start + batch)
        losses = sequence_losses(decoder, input_ids[rows], None if labels is None else labels[rows])
        (losses.sum() / len(input_ids)).backward()
    result = {}
    for name in names:
        grad = decoder.weights[name].grad
        if grad is None:
            raise RuntimeError(f"no gradient reached {name}")
        result[name] = grad
        decoder.weights[name].requires_grad_(False).grad = None
    return result


def raw_scores(decoder: Decoder, grads: dict[str, torch.Tensor]) -> tuple[list[list[float]], list[list[float]]]:
    """Sum of |W * G| over the elements of every head and every channel, per layer."""
    heads, channels = [], []
    for i in range(decoder.layers):
        element = {
            name.split(".")[-2]: (decoder.weights[name] * grad).abs()
            for name, grad in grads.items()
            if name.startswith(f"model.layers.{i}.")
        }
        scores = []
        for head in range(decoder.heads):
            rows = slice(head * decoder.head_dim, (head + 1) * decoder.head_dim)
            score = element["q_proj"][rows].sum() + element["o_proj"][:, rows].sum()
            if decoder.multi_head:
                score = score + element["k_proj"][rows].sum() + element["v_proj"][rows].sum()
            scores.append(float(score))
        heads.append(scores)
        channels.append(
            [
                float(element["gate_proj"][c].sum() + element["up_proj"][c].sum() + element["down_proj"][:, c].sum())
                for c in range(decoder.channels)
            ]
        )
    return heads, channels


def protected_layers(layers: int) -> set[int]:
    """The first int(0.1 L) layers and the last one."""
    return {*range(int(0.1 * layers)), layers - 1}


def prune(
    path: Path,
    preset: str,
    input_ids: torch.Tensor,
    labels: torch.Tensor | None = None,
    *,
    steps: int,
    amount: float,
    batch: int = 4,
    dtype: torch.dtype = torch.float64,
) -> Removal:
    """Run `paper` (amount = sparsity) or `official` (amount = ratio) on masked weights."""
    decoder = Decoder.load(path, dtype)
    # A structure is (kind, layer, index); list order is the tie order: all heads, then all channels.
    structures = [("head", i, h) for i in range(decoder.layers) for h in range(decoder.heads)]
    structures += [("channel", i, c) for i in range(decoder.layers) for c in range(decoder.channels)]
    size = {"head": decoder.head_parameters, "channel": decoder.channel_parameters}
    divisor = {"head": decoder.head_weights, "channel": decoder.channel_weights}
    if preset == "official":
        divisor = {"head": 4 * decoder.head_dim * decoder.hidden, "channel": 3 * decoder.channels}
    protected = protected_layers(decoder.layers)
    removed_at = dict.fromkeys(structures, 0)
    result = Removal([], [])
    for step in range(1, steps + 1):
        heads, channels = raw_scores(decoder, gradients(decoder, input_ids, labels, batch))
        scores = {s: (heads if s[0] == "head" else channels)[s[1]][s[2]] / divisor[s[0]] for s in structures}
        removed_so_far = sum(size[s[0]] for s in structures if removed_at[s])
        if preset == "paper":
            # Exact, because a target may be a whole number of parameters that is reached exactly.
            target = Fraction(str(amount)) * step / steps * decoder.decoder_parameters
            live = [s for s in structures if not removed_at[s] and s[1] not in protected]
            chosen = []
            for s in sorted(live, key=scores.__getitem__):
                if removed_so_far + size[s[0]] > target:
                    break
                removed_so_far += size[s[0]]
                chosen.append(s)
        else:
            ratio = amount * (step - 1) / (steps - 1)
            k = len(structures) - int(len(structures) * (1 - ratio)) + 1
            ranked = {s: math.inf if s[1] in protected else 0.0 if removed_at[s] else scores[s] for s in structures}
            threshold = sorted(ranked.values())[k - 1]
            chosen = [s for s in structures if not removed_at[s] and ranked[s] <= threshold]
        for s in chosen:
            removed_at[s] = step
            (decoder.remove_head if s[0] == "head" else decoder.remove_channel)(s[1], s[2])
        removed = sum(size[s[0]] for s in structures if removed_at[s])
        result.sparsity.append(removed / decoder.decoder_parameters)
    for i in range(decoder.layers):
        result.heads.append([removed_at["head", i, h] for h in range(decoder.heads)])
        result.channels.append([removed_at["channel", i, c] for c in range(decoder.channels)])
    return result


def masked_decoder(path: Path, removal: Removal, step: int, dtype: torch.dtype = torch.float64) -> Decoder:
    """The dense decoder with everything removed up to and including ``step`` set to zero."""
    decoder = Decoder.load(path, dtype)
    for layer, rows in enumerate(removal.heads):
        for head, at in enumerate(rows):
            if 0 < at <= step:
                decoder.remove_head(layer, head)
    for layer, rows in enumerate(removal.channels):
        for channel, at in enumerate(rows):
            if 0 < at <= step:
                decoder.remove_channel(layer, channel)
    return decoder


def perplexity(
    decoder: Decoder,
    input_ids: torch.Tensor,
    window: int,
    labels: torch.Tensor | None = None,
) -> tuple[float, int]:
    """exp(mean NLL) over rows cut into windows, and the number of predicted tokens."""
    labels = input_ids if labels is None else labels
    total, count = 0.0, 0
    for row, targets in zip(input_ids, labels, strict=True):
        for start in range(0, len(row), window):
            piece, wanted = row[start : start + window], targets[start : start + window][1:]
            log_p = decoder.logits(piece[None])[0, :-1].log_softmax(-1)
            for position, token in enumerate(wanted.tolist()):
                if token != IGNORED:
                    total -= float(log_p[position, token])
                    count += 1
    return math.exp(total / count), count
