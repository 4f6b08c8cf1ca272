"""Cases of the decoder layer's elementwise ops, with their float64 truth; run on a CPU and on a GPU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

from gisp_kernels.ops import decoder

Tensors = tuple[torch.Tensor, ...]


@dataclass(frozen=True)
class OpCase:
    """One op on fixed inputs.

    Attributes:
        make: (device, dtype) -> inputs.
        run: (inputs, backend) -> outputs; may overwrite the inputs.
        truth: float64 inputs -> float64 outputs.
    """

    name: str
    make: Callable[[str, torch.dtype], Tensors]
    run: Callable[[Tensors, str], Tensors]
    truth: Callable[[Tensors], Tensors]


def randn(*shape: int, device: str, dtype: torch.dtype, seed: int) -> torch.Tensor:
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randn(*shape, generator=generator, device=device).to(dtype)


def strided(rows: int, width: int, device: str, dtype: torch.dtype, seed: int, pad: int = 16) -> torch.Tensor:
    """[rows, width] as the first columns of a wider buffer whose rest is NaN."""
    wide = torch.full((rows, width + pad), float("nan"), device=device, dtype=dtype)
    wide[:, :width] = randn(rows, width, device=device, dtype=dtype, seed=seed)
    return wide[:, :width]


class Blank:
    """A result to be written: [rows, width] inside a wider buffer, NaN everywhere."""

    def __init__(self, rows: int, width: int, like: torch.Tensor, pad: int = 16) -> None:
        self._wide = torch.full((rows, width + pad), float("nan"), device=like.device, dtype=like.dtype)
        self.inside = self._wide[:, :width]

    def heads(self, size: int) -> torch.Tensor:
        return self.inside.unflatten(1, (-1, size))

    def filled(self) -> torch.Tensor:
        """The result, of which nothing lies outside."""
        assert self._wide[:, self.inside.shape[1] :].isnan().all()
        return self.inside


def _norm_truth(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return weight * x * torch.rsqrt(x.pow(2).mean(1, keepdim=True) + eps)


def _gradients(function: Callable[..., torch.Tensor], inputs: Tensors, grad: torch.Tensor) -> Tensors:
    leaves = [t.detach().clone().requires_grad_() for t in inputs]
    return torch.autograd.grad(function(*leaves), leaves, grad)


def norm_cases(tokens: int, width: int) -> list[OpCase]:
    eps = 1e-5

    def make(device: str, dtype: torch.dtype) -> Tensors:
        x, delta, grad, more = (strided(tokens, width, device, dtype, seed) for seed in range(4))
        weight = 1 + 0.1 * randn(width, device=device, dtype=dtype, seed=4)
        return x, delta, weight, grad, more

    def forward(inputs: Tensors, backend: str) -> Tensors:
        x, delta, weight, *_ = inputs
        out = Blank(tokens, width, x)
        total, normed, rstd = decoder.add_rms_norm(x, delta, weight, eps, total=delta, out=out.inside, backend=backend)
        assert total is delta
        assert normed is out.inside
        return total, out.filled(), rstd

    def again(inputs: Tensors, backend: str) -> Tensors:
        x, _, weight, *_ = inputs
        total, normed, rstd = decoder.add_rms_norm(x, None, weight, eps, backend=backend)
        assert total is x
        out = Blank(tokens, width, x)
        decoder.rms_norm_apply(x, rstd, weight, out=out.inside, backend=backend)
        assert torch.equal(out.filled(), normed)
        return (normed,)

    def backward(inputs: Tensors, backend: str) -> Tensors:
        x, _, weight, grad, more = inputs
        rstd = decoder.add_rms_norm(x, None, weight, eps, backend=backend)[2]
        alone = decoder.rms_norm_backward_(None, grad.clone(), x, rstd, weight, backend=backend)
        return decoder.rms_norm_backward_(more, grad, x, rstd, weight, backend=backend), alone

    def forward_truth(inputs: Tensors) -> Tensors:
        x, delta, weight, *_ = inputs
        total = x + delta
        return total, _norm_truth(total, weight, eps), torch.rsqrt(total.pow(2).mean(1) + eps)

    def backward_truth(inputs: Tensors) -> Tensors:
        x, _, weight, grad, more = inputs
        dx = _gradients(lambda v: _norm_truth(v, weight, eps), (x,), grad)[0]
        return more + dx, dx

    return [
        OpCase(f"norm {tokens}x{width}", make, forward, forward_truth),
        OpCase(f"norm again {tokens}x{width}", make, again, lambda i: (_norm_truth(i[0], i[2], eps),)),
        OpCase(f"norm backward {tokens}x{width}", make, backward, backward_truth),
    ]


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    half, repeats = x.shape[2] // 2, x.shape[0] // cos.shape[0]
    turned = torch.cat((-x[..., half:], x[..., :half]), dim=-1)
    return x * cos.repeat(repeats, 1)[:, None] + turned * sin.repeat(repeats, 1)[:, None]


def rotary_case(tokens: int, heads: int, size: int, positions: int) -> OpCase:
    def make(device: str, dtype: torch.dtype) -> Tensors:
        x = strided(tokens, heads * size, device, dtype, 0).unflatten(1, (heads, size))
        return x, *(randn(positions, size, device=device, dtype=dtype, seed=s) for s in (1, 2))

    def in_place(inputs: Tensors, backend: str) -> Tensors:
        return (decoder.rotary(*inputs, out=inputs[0], backend=backend),)

    return OpCase(f"rotary {tokens}x{heads}x{size}", make, in_place, lambda i: (_rotate(*i),))


def swiglu_cases(tokens: int, width: int) -> list[OpCase]:
    def make(device: str, dtype: torch.dtype) -> Tensors:
        both = strided(tokens, 2 * width, device, dtype, 0)
        return 2 * both[:, :width], both[:, width:], strided(tokens, width, device, dtype, 1)

    def backward(inputs: Tensors, backend: str) -> Tensors:
        activation = decoder.swiglu(inputs[0], inputs[1], backend=backend)
        decoder.swiglu_backward_(*inputs, backend=backend)
        assert torch.equal(inputs[2], activation)
        return inputs

    def forward(inputs: Tensors, backend: str) -> Tensors:
        out = Blank(tokens, width, inputs[0])
        decoder.swiglu(inputs[0], inputs[1], out=out.inside, backend=backend)
        return (out.filled(),)

    def act(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        return functional.silu(gate) * up

    length = next(n for n in (8, 3, 1) if tokens % n == 0)

    def gates(inputs: Tensors, backend: str) -> Tensors:
        gate, up, grad = inputs
        scale = randn(width, device=str(gate.device), dtype=gate.dtype, seed=2)
        scaled, other, incoming = (t.clone() for t in inputs)
        out = Blank(tokens // length, width, gate.float())
        found = decoder.swiglu_backward_gates_(gate, up, grad, length, out=out.inside, backend=backend)
        assert found is out.inside
        decoder.swiglu_backward_gates_(scaled, other, incoming, length, scale=scale, backend=backend)
        return gate, up, out.filled(), scaled, other

    def gates_truth(inputs: Tensors) -> Tensors:
        gate, up, grad = inputs
        scale = randn(width, device=str(gate.device), dtype=gate.dtype, seed=2)
        sums = (act(gate, up) * grad).view(-1, length, width).sum(1)
        return *_gradients(act, (gate, up), grad), sums, *_gradients(act, (gate, up), grad * scale)

    return [
        OpCase(f"swiglu backward and gates {tokens}x{width}", make, gates, gates_truth),
        OpCase(
            f"swiglu {tokens}x{width}",
            make,
            forward,
            lambda i: (act(i[0], i[1]),),
        ),
        OpCase(
            f"swiglu backward {tokens}x{width}",
            make,
            backward,
            lambda i: (*_gradients(act, (i[0], i[1]), i[2]), act(i[0], i[1])),
        ),
    ]


def cross_entropy_case(tokens: int, vocabulary: int) -> OpCase:
    def make(device: str, dtype: torch.dtype) -> Tensors:
        logits = strided(tokens, vocabulary, device, dtype, 0)
        targets = torch.randint(0, vocabulary, (tokens,), generator=torch.Generator().manual_seed(1))
        targets[tokens // 3] = -100
        logits[tokens // 3] = float("inf")
        weights = torch.rand(tokens, generator=torch.Generator().manual_seed(2)) - 0.3
        return 3 * logits, targets.to(device), weights.to(device)

    def truth(inputs: Tensors) -> Tensors:
        logits, targets, weights = inputs
        logits = torch.where((targets == -100)[:, None], 0.0, logits)

        def nll(value: torch.Tensor) -> torch.Tensor:
            return functional.cross_entropy(value, targets.long(), reduction="none", ignore_index=-100)

        one = logits.new_ones(())
        return nll(logits), nll(logits), _gradients(lambda v: (nll(v) * weights).sum(), (logits,), one)[0]

    def run(inputs: Tensors, backend: str) -> Tensors:
        before = inputs[0].clone()
        alone = decoder.token_nll(inputs[0], inputs[1], backend=backend)
        assert torch.equal(inputs[0], before)
        return alone, decoder.token_nll_grad_(*inputs, backend=backend), inputs[0]

    return OpCase(f"cross entropy {tokens}x{vocabulary}", make, run, truth)


def expand_case(tokens: int, heads: int, kv_heads: int, size: int) -> OpCase:
    def make(device: str, dtype: torch.dtype) -> Tensors:
        kv = strided(tokens, kv_heads * size, device, dtype, 0).unflatten(1, (kv_heads, size))
        index = torch.randint(0, kv_heads, (heads,), generator=torch.Generator().manual_seed(1))
        return kv, index.to(device)

    def run(inputs: Tensors, backend: str) -> Tensors:
        out = Blank(tokens, heads * size, inputs[0])
        decoder.expand_kv(*inputs, out=out.heads(size), backend=backend)
        return (out.filled().unflatten(1, (heads, size)),)

    return OpCase(f"expand kv {tokens}x{heads}x{size}", make, run, lambda i: (i[0][:, i[1].long()],))


def unrotate_case(tokens: int, heads: int, kv_heads: int, size: int, positions: int, shared: bool = True) -> OpCase:
    def make(device: str, dtype: torch.dtype) -> Tensors:
        grads = (strided(tokens, heads * size, device, dtype, s).unflatten(1, (heads, size)) for s in range(3))
        # Halves that differ: the transpose is not the rotation backwards.
        tables = (randn(positions, size, device=device, dtype=dtype, seed=s) for s in (3, 4))
        index = torch.arange(heads)
        if shared:
            # One key/value head is left without query heads.
            index = torch.randint(0, max(1, kv_heads - 1), (heads,), generator=torch.Generator().manual_seed(1))
        return *grads, *tables, index.to(device)

    def truth(inputs: Tensors) -> Tensors:
        *grads, cos, sin, index = inputs
        own = [torch.zeros_like(grads[0]), *(torch.zeros_like(grads[0][:, :1]).repeat(1, kv_heads, 1) for _ in "kv")]

        def read(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
            spread = _rotate(key, cos, sin)[:, index.long()], value[:, index.long()]
            return torch.stack((_rotate(query, cos, sin), *spread))

        return (torch.cat(_gradients(read, tuple(own), torch.stack(grads)), 1).flatten(1),)

    def run(inputs: Tensors, backend: str) -> Tensors:
        *grads, cos, sin, index = inputs
        query, key, value = (grad.unflatten(0, (-1, positions)).transpose(1, 2) for grad in grads)
        asked = index if shared else None
        return (decoder.unrotate_qkv((query, key, value), cos, sin, asked, kv_heads, backend=backend),)

    return OpCase(f"unrotate {tokens}x{heads}x{kv_heads}x{size}", make, run, truth)


def added_error(case: OpCase, device: str, dtype: torch.dtype, backend: str) -> list[tuple[float, float]]:
    """Per output: largest relative error of ``backend`` and of the reference in the same dtype, against float64."""

    def doubled(tensor: torch.Tensor) -> Any:
        return tensor.double() if tensor.is_floating_point() else tensor

    expected = case.truth(tuple(doubled(t) for t in case.make(device, dtype)))
    found = [case.run(case.make(device, dtype), name) for name in (backend, "reference")]
    errors = []
    for i, truth in enumerate(expected):
        scale = truth.abs().max().clamp_min(1e-30)
        pair = [float((outputs[i].double() - truth).abs().max() / scale) for outputs in found]
        errors.append((pair[0], pair[1]))
    return errors


def attention_operands(size: int, dtype: torch.dtype, device: str) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Queries, keys and values [2, 3, 40, size] as they lie side by side in a pass, and dL/d(output)."""
    generator = torch.Generator().manual_seed(size)
    heads = torch.randn(2, 40, 9, size, generator=generator).to(device, dtype)
    grad = torch.randn(2, 40, 3, size, generator=generator).to(device, dtype)
    return [part.transpose(1, 2) for part in heads.split(3, dim=2)], grad.transpose(1, 2)


def attention_by_autograd(operands: list[torch.Tensor], grad: torch.Tensor, scale: float) -> list[torch.Tensor]:
    """What torch's own function gives: the output and the gradients of the operands."""
    leaves = [tensor.detach().requires_grad_() for tensor in operands]
    query, key, value = leaves
    output = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale)
    return [output.detach(), *torch.autograd.grad(output, leaves, grad)]
