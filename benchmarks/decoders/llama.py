"""Shape of a decoder, the course of its training, its loss."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast


@dataclass(frozen=True)
class TrainConfig:
    """Shape of the decoder and course of its training.

    The defaults are the demo decoder's; its shape has 3.8 million parameters, 7.6 MB in bfloat16. ``batch`` counts
    sequences of ``seq_len`` tokens; the learning rate rises over ``warmup`` steps, then falls on a cosine to a
    twentieth of ``lr``.
    """

    vocab_size: int = 2048
    layers: int = 8
    hidden: int = 192
    heads: int = 6
    mlp: int = 480
    seq_len: int = 256
    batch: int = 256
    steps: int = 4000
    lr: float = 3e-3
    warmup: int = 200
    weight_decay: float = 0.1
    clip: float = 1.0
    seed: int = 0
    log_every: int = 50
    evaluate_every: int = 500

    def lr_at(self, step: int, steps: int) -> float:
        """Learning rate of a step (0-based) out of ``steps``."""
        warmup = max(1, min(self.warmup, steps // 10))
        if step < warmup:
            return self.lr * (step + 1) / warmup
        done = (step - warmup) / max(1, steps - warmup)
        return self.lr * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * done)))


def build_model(config: TrainConfig, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A randomly initialised Llama with tied embeddings, float32 on the CPU."""
    end = tokenizer.eos_token_id
    llama = LlamaConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden,
        intermediate_size=config.mlp,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        num_key_value_heads=config.heads,
        max_position_embeddings=config.seq_len,
        # At this vocabulary an output matrix of its own would cost a layer.
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=end,
        pad_token_id=end,
    )
    torch.manual_seed(config.seed)
    return LlamaForCausalLM(llama)


def next_token_loss(model: torch.nn.Module, rows: torch.Tensor) -> torch.Tensor:
    """Mean negative log-likelihood over all predicted tokens of int64 rows [B, S], float32."""
    logits = model(input_ids=rows, use_cache=False).logits[:, :-1]
    return functional.cross_entropy(logits.float().flatten(0, 1), rows[:, 1:].flatten())


@torch.no_grad()
def perplexity(model: torch.nn.Module, rows: torch.Tensor, batch: int) -> float:
    """exp(mean negative log-likelihood) over all predicted tokens of int64 rows [N, S]."""
    total = sum(float(next_token_loss(model, part)) * len(part) for part in rows.split(batch))
    return math.exp(total / len(rows))
