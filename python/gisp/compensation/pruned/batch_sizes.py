"""How many tokens pass a student at a time: few enough for memory, enough for fast products."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from gisp.model.structures import ModelMap

# Tokens of a batch on a CPU, and on a GPU where no graph is kept: enough for fast products, and few enough for several
# processes to share held-out text.
_TOKENS_PER_BATCH, _MEASURED_TOKENS = 2048, 4096
# What a backward pass may keep on a GPU: all activations, roughly 64 bytes per layer and dimension of the stream, or
# the inputs of layers alone where that leaves too few tokens for fast products.
_BATCH_BYTES, _BYTES_KEPT = 2**33, 64
_LEAST_TOKENS, _FEW_TOKENS, _MOST_TOKENS, _TOKENS_AGAIN = 256, 4096, 16384, 8192


@dataclass(frozen=True)
class BatchSizes:
    """Tokens of batches, and how many batches pass each layer one after the other before the next layer.

    Attributes:
        graphs: whether a backward pass of autograd keeps the activations of all layers; else they run again.
        tokens, together: where autograd differentiates.
        fused_tokens, fused_together: where the fused pass does.
        measured_tokens: where nothing does.
    """

    graphs: bool
    tokens: int
    together: int
    fused_tokens: int
    fused_together: int
    measured_tokens: int

    @classmethod
    def of(cls, model_map: ModelMap, weight: torch.Tensor, *, recomputes: bool) -> BatchSizes:
        """Sizes for a dense model.

        Args:
            weight: of the embeddings, for the device that computes and the bytes of an element.
            recomputes: whether layers run again in a backward pass anyway, as those in host memory do.
        """
        of_layers = len(model_map.layers) * model_map.hidden_size
        inputs = _BATCH_BYTES // (of_layers * weight.element_size())
        if weight.device.type != "cuda":
            graphs, tokens, fused, measured = not recomputes, _TOKENS_PER_BATCH, _TOKENS_PER_BATCH, _TOKENS_PER_BATCH
        else:
            fitting = min(max(_LEAST_TOKENS, _BATCH_BYTES // (_BYTES_KEPT * of_layers)), _MOST_TOKENS)
            graphs = not recomputes and fitting >= _FEW_TOKENS
            tokens, fused = fitting if graphs else _TOKENS_AGAIN, max(fitting, _TOKENS_AGAIN)
            measured = _MEASURED_TOKENS
        return cls(
            graphs=graphs,
            tokens=tokens,
            together=1 if graphs else max(1, inputs // tokens),
            fused_tokens=fused,
            fused_together=max(1, inputs // fused) if recomputes else 1,
            measured_tokens=measured,
        )


def most_tokens(model_map: ModelMap, device: torch.device) -> int:
    """Tokens of a backward pass whose layers keep their inputs alone, at most."""
    size = next(model_map.model.parameters()).element_size()
    inputs = _BATCH_BYTES // (len(model_map.layers) * model_map.hidden_size * size)
    return max(inputs, _MOST_TOKENS if device.type == "cuda" else _TOKENS_PER_BATCH)
