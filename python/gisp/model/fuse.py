"""Fused elementwise parts for inference: RMS norms and gated MLPs of a loaded model by the kernels of the pruning pass.

A norm is seven launches in plain transformers, ``silu(gate) * up`` two; in a pruned model they weigh more, because they
do not shrink with the matrices around them. Serving engines fuse them too.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from gisp.errors import GispError
from gisp.model.modes import default_device
from gisp_kernels.ops.decoder import add_rms_norm, swiglu

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class FusedRMSNorm(nn.Module):
    """An RMS norm in one launch; the weight is the Parameter of the module it stands for."""

    def __init__(self, plain: Any) -> None:
        super().__init__()
        self.weight = plain.weight
        self.variance_epsilon = float(plain.variance_epsilon)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """The norm over the last dimension, [..., D], rounded where transformers' ``LlamaRMSNorm`` rounds."""
        x = hidden_states
        if not _fusable(x, self.weight):
            unit = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
            return self.weight * unit.to(x.dtype)
        return add_rms_norm(x.reshape(-1, x.shape[-1]), None, self.weight, self.variance_epsilon)[1].view(x.shape)


class FusedMLP(nn.Module):
    """A gated MLP whose activation is one launch; its projections are those of the module it stands for."""

    def __init__(self, plain: Any) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = plain.gate_proj, plain.up_proj, plain.down_proj
        self.act_fn = plain.act_fn

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``down(silu(gate(x)) * up(x))``, [..., D] to [..., D]."""
        gate, up = self.gate_proj(x), self.up_proj(x)
        if not _fusable(gate, up):
            projected: torch.Tensor = self.down_proj(self.act_fn(gate) * up)
            return projected
        shape = (-1, gate.shape[-1])
        projected = self.down_proj(swiglu(gate.reshape(shape), up.reshape(shape)).view(gate.shape))
        return projected


@default_device()
def fuse(model: Any) -> Any:
    """Let a loaded Llama-like model run its norms and MLPs with fused kernels, in place.

    Weights and their names stay as they are. Where a gradient is needed the plain formulas run. On a CPU the fused
    parts are plain torch too: correct, not faster.

    A part that does not compute what its fused form does (compared on random numbers) is left alone.

    Returns:
        ``model``.

    Raises:
        GispError: no RMS norm and no gated SiLU MLP found in it.
    """
    if not isinstance(model, nn.Module):
        raise GispError(f"{model!r} is no model: give a loaded one, as gisp.load returns it")
    replaced = 0
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, (FusedRMSNorm, FusedMLP)):
                replaced += 1
                continue
            made = _fused(child)
            if made is not None:
                setattr(parent, name, made.train(child.training))
                replaced += 1
    if replaced == 0:
        raise GispError(f"{type(model).__name__} has no RMS norm and no gated SiLU MLP: there is nothing to fuse")
    return model


def _fused(module: nn.Module) -> nn.Module | None:
    if is_rms_norm(module):
        norm = FusedRMSNorm(module)
        return norm if _agree(module, norm, norm.weight, norm.weight.shape[0]) else None
    projections = [getattr(module, name, None) for name in ("gate_proj", "up_proj", "down_proj")]
    if not all(type(item) is nn.Linear for item in projections) or not is_silu(getattr(module, "act_fn", nn.ReLU())):
        return None
    mlp = FusedMLP(module)
    return mlp if _agree(module, mlp, mlp.gate_proj.weight, mlp.gate_proj.in_features) else None


@torch.no_grad()
def _agree(plain: nn.Module, fused: nn.Module, like: torch.Tensor, width: int) -> bool:
    """Whether both give the same output for random input of ``like``'s dtype and device, rounding aside."""
    generator = torch.Generator().manual_seed(0)
    probe = torch.randn(2, width, generator=generator).to(like.device, like.dtype)
    expected, found = plain(probe).double(), fused(probe).double()
    distance = (found - expected).norm() / expected.norm().clamp_min(1e-30)
    return bool(distance <= 16 * torch.finfo(like.dtype).eps)


def _fusable(*tensors: torch.Tensor) -> bool:
    needs_gradient = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    return not needs_gradient and len({t.dtype for t in tensors}) == 1 and tensors[0].dtype in _DTYPES


def is_rms_norm(module: Any) -> bool:
    """Whether a module has the parts of transformers' ``LlamaRMSNorm``; what it computes is not looked at."""
    return (
        isinstance(module, nn.Module)
        and isinstance(getattr(module, "weight", None), nn.Parameter)
        and isinstance(getattr(module, "variance_epsilon", None), float)
        and getattr(module, "bias", None) is None
    )


def is_silu(activation: Any) -> bool:
    """Whether an elementwise function is SiLU, by its values."""
    probe = torch.linspace(-4, 4, 9)
    return torch.allclose(activation(probe), nn.functional.silu(probe))
