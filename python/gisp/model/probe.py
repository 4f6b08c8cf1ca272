"""A trial pruning of models of kinds that were never tried: what goes must leave the rest as it was."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import nn

from gisp.errors import GispError
from gisp.model.modes import evaluation_mode
from gisp.model.shrink import ShrinkableModel
from gisp.model.structures import ModelMap

# Model types whose pruning and exports are tested; those are the families of gisp.export.modeling_gisp.
PROVEN = frozenset(
    {
        "cohere",
        "cohere2",
        "ernie4_5",
        "exaone4",
        "gemma",
        "gemma3_text",
        "granite",
        "helium",
        "hunyuan_v1_dense",
        "hyperclovax",
        "llama",
        "ministral",
        "ministral3",
        "mistral",
        "olmo",
        "qwen2",
        "qwen3",
        "seed_oss",
        "smollm3",
        "stablelm",
    }
)
_TOKENS = 16
# Half of all heads and channels change the logits by more than rounding in any dtype does.
_SHARE_OF_CHANGE = 0.25


@torch.no_grad()
def check_independence(shrinkable: ShrinkableModel) -> None:
    """Remove half of all heads, then half of all channels, and compare each with the same ones masked.

    Layers can have Llama's parts and combine heads with one another, as differential attention does, or share keys and
    values across layers: removing one is then something else than masking it. The model is afterwards as before.

    Raises:
        GispError: removal and masking differ.
    """
    model_map = shrinkable.map
    for kind in ("heads", "channels"):
        removal = {}
        for group in (group for group in model_map.groups if group.kind == kind):
            members = shrinkable.members(group.name)
            removal[group.name] = members[(group.count + 1) // 2 * model_map.members(group) :]
        if not _same(shrinkable, removal):
            raise GispError(
                f"model type {model_map.model_type!r} has Llama's projections but uses them in another way: removing "
                f"{kind} changes those that stay, such models are not supported"
            )


def _same(shrinkable: ShrinkableModel, removal: dict[str, torch.Tensor]) -> bool:
    """Whether removing comes nearer to masking than masking to doing nothing."""
    model_map = shrinkable.map
    device = next(model_map.model.parameters()).device
    tokens = (torch.arange(_TOKENS, device=device) * 7 + 1)[None] % model_map.vocab_size

    def logits() -> torch.Tensor:
        with evaluation_mode(model_map.model):
            found: torch.Tensor = model_map.model(input_ids=tokens, use_cache=False).logits
        return found.double()

    dense = logits()
    with _masked(model_map, removal):
        masked = logits()
    shrinkable.remove(removal)
    try:
        shrunk = logits()
    except (RuntimeError, ValueError, IndexError):
        return False
    finally:
        shrinkable.rollback()
    return float((shrunk - masked).norm()) <= _SHARE_OF_CHANGE * float((masked - dense).norm())


@contextmanager
def _masked(model_map: ModelMap, removal: dict[str, torch.Tensor]) -> Iterator[None]:
    """The removed structures' columns of every output projection read as zero."""
    with ExitStack() as stack:
        for name in removal:
            linear, block = model_map.outputs[name]
            keep = torch.ones(linear.in_features // block, dtype=linear.weight.dtype, device=linear.weight.device)
            keep[removal[name].to(keep.device)] = 0
            stack.callback(linear.register_forward_pre_hook(_times(keep.repeat_interleave(block))).remove)
        yield


def _times(mask: torch.Tensor) -> Callable[[nn.Module, tuple[torch.Tensor]], tuple[torch.Tensor]]:
    return lambda _, inputs: (inputs[0] * mask,)
