"""Elementwise parts of a decoder layer on real shapes, beside eager and compiled PyTorch; fewest possible bytes count.

The library's versions are called as the importance pass calls them: in place where it
does so.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache, partial
from typing import Any

import torch

from benchmarks.common.measure import Inputs
from benchmarks.common.registry import DENSE, HALF, MODELS, REAL, kept_channels, kept_heads
from benchmarks.common.task import AUTO, COMPILED, EAGER, Implementation, Prepared, Task, random_matrix
from benchmarks.kernels import eager
from gisp_kernels.ops import decoder

TOKENS = 8192
LENGTH = 256
EPS = 1e-5
# Elements of logits a pass holds at a time.
LOGIT_ELEMENTS = 2**27
TOKEN_MULTIPLE = 128
# An implementation may err as much as plain versions in the same dtype, a tenth of that more, and float32 rounding.
SLACK, STEP = 1.1, 1e-5


def tasks(quick: bool) -> list[Task]:
    """Tasks of this file; quick ones leave out what must be compiled first."""
    models = REAL[:1] if quick else REAL
    points = (DENSE,) if quick else (DENSE, HALF)
    found = []
    for name in models:
        model = MODELS[name]
        logit_tokens = LOGIT_ELEMENTS // model.vocabulary // TOKEN_MULTIPLE * TOKEN_MULTIPLE
        found += [
            _task("add_rms_norm", name, TOKENS, model.hidden, DENSE, _add_rms_norm),
            _task("rms_norm_backward_", name, TOKENS, model.hidden, DENSE, _rms_norm_backward),
            _task("token_nll_grad_", name, logit_tokens, model.vocabulary, DENSE, _token_nll_grad),
        ]
        for kept in points:
            heads, channels = kept_heads(model, kept), kept_channels(model, kept)
            found += [
                _task("rotary", name, TOKENS, heads * model.head_dim, kept, partial(_rotary, head_dim=model.head_dim)),
                _task("swiglu", name, TOKENS, channels, kept, _swiglu),
                _task("swiglu_backward_", name, TOKENS, channels, kept, _swiglu_backward),
                _task("swiglu_backward_gates_", name, TOKENS, channels, kept, _swiglu_gates),
            ]
    return (
        [replace(task, prepare=partial(_uncompiled, task.prepare)) for task in found if task.prepare]
        if quick
        else found
    )


def _task(op: str, model: str, tokens: int, width: int, kept: float, prepare: Callable[[int, int], Prepared]) -> Task:
    labels = {"model": model, "rows": tokens, "width": width, "kept": kept}
    return Task(op, labels, partial(prepare, tokens, width))


def _uncompiled(prepare: Callable[[], Prepared]) -> Prepared:
    prepared = prepare()
    del prepared.implementations[COMPILED]
    return prepared


@cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function, dynamic=True)


def _prepared(
    inputs: Inputs,
    ours: Callable[..., Sequence[torch.Tensor]],
    formula: Callable[..., Sequence[torch.Tensor]],
    moved: int,
    *arguments: float,
) -> Prepared:
    """A task from the library's function and the plain one.

    Args:
        ours: (*inputs, backend) to results, which may be inputs that were overwritten.
        formula: (*inputs, *arguments) to the same results in new memory.
        moved: fewest bytes read and written.
    """

    def fresh() -> Inputs:
        return tuple(tensor.clone() for tensor in inputs)

    def plain(function: Callable[..., Any]) -> Implementation:
        return lambda *tensors: function(*tensors, *arguments)

    exact = tuple(tensor.double() if tensor.is_floating_point() else tensor for tensor in inputs)
    truth = formula(*exact, *arguments)
    plainest = [_errors(r, truth) for r in (ours(*fresh(), backend="reference"), formula(*fresh(), *arguments))]
    allowed = [SLACK * max(errors) + STEP for errors in zip(*plainest, strict=True)]
    most = torch.finfo(inputs[0].dtype).eps + 2 * STEP

    def check(implementation: Implementation) -> None:
        # Two plain versions written apart agree with the truth to rounding: the formula is right.
        assert max(allowed) <= most, f"the plain versions are off by {max(allowed):.3g} relative, allowed {most:.3g}"
        for number, (error, limit) in enumerate(zip(_errors(implementation(*fresh()), truth), allowed, strict=True)):
            assert error <= limit, f"result {number} is off by {error:.3g} relative, allowed {limit:.3g}"

    implementations: dict[str, Implementation] = {
        AUTO: partial(ours, backend=None),
        COMPILED: plain(_compiled(formula)),
        EAGER: plain(formula),
    }
    return Prepared(inputs, implementations, check, baseline=EAGER, bytes=moved, in_place=True)


def _errors(results: Sequence[torch.Tensor], truth: Sequence[torch.Tensor]) -> list[float]:
    """Distance of each result from the truth relative to its size; infinite where a result is not finite."""
    errors = []
    for result, exact in zip(results, truth, strict=True):
        distance = float((result.double() - exact).norm() / exact.norm())
        errors.append(distance if distance == distance else float("inf"))
    return errors


def _bytes(*tensors: torch.Tensor) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _add_rms_norm(tokens: int, hidden: int) -> Prepared:
    x, delta, weight = random_matrix(tokens, hidden), random_matrix(tokens, hidden), random_matrix(hidden)

    def ours(x: torch.Tensor, delta: torch.Tensor, weight: torch.Tensor, backend: str | None) -> Sequence[torch.Tensor]:
        return decoder.add_rms_norm(x, delta, weight, EPS, total=delta, backend=backend)[:2]

    return _prepared((x, delta, weight), ours, eager.add_rms_norm, 2 * _bytes(x, delta), EPS)


def _rms_norm_backward(tokens: int, hidden: int) -> Prepared:
    grad, normed_grad, x = (random_matrix(tokens, hidden) for _ in range(3))
    weight, rstd = random_matrix(hidden), torch.rsqrt(x.float().pow(2).mean(1) + EPS)

    def ours(*tensors: torch.Tensor, backend: str | None) -> Sequence[torch.Tensor]:
        return (decoder.rms_norm_backward_(*tensors, backend=backend),)

    inputs = (grad, normed_grad, x, rstd, weight)
    return _prepared(inputs, ours, eager.rms_norm_backward, _bytes(grad, normed_grad, x, grad))


def _rotary(tokens: int, width: int, *, head_dim: int) -> Prepared:
    x = random_matrix(tokens, width // head_dim, head_dim)
    cos, sin = _tables(tokens, head_dim, x)

    def ours(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, backend: str | None) -> Sequence[torch.Tensor]:
        return (decoder.rotary(x, cos[:LENGTH], sin[:LENGTH], out=x, backend=backend),)

    return _prepared((x, cos, sin), ours, eager.rotary, _bytes(x, x))


def _tables(tokens: int, head_dim: int, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines of one sequence after the other: every token has its own row, as modules hold them."""
    angle = torch.rand(tokens, head_dim // 2, device=like.device) * 6.28
    angle = angle[:LENGTH].repeat(tokens // LENGTH, 2)
    return angle.cos().to(like.dtype), angle.sin().to(like.dtype)


def _swiglu(tokens: int, channels: int) -> Prepared:
    gate, up = random_matrix(tokens, channels), random_matrix(tokens, channels)

    def ours(gate: torch.Tensor, up: torch.Tensor, backend: str | None) -> Sequence[torch.Tensor]:
        return (decoder.swiglu(gate, up, backend=backend),)

    return _prepared((gate, up), ours, eager.swiglu, _bytes(gate, up, gate))


def _swiglu_backward(tokens: int, channels: int) -> Prepared:
    gate, up, grad = (random_matrix(tokens, channels) for _ in range(3))

    def ours(gate: torch.Tensor, up: torch.Tensor, grad: torch.Tensor, backend: str | None) -> Sequence[torch.Tensor]:
        decoder.swiglu_backward_(gate, up, grad, backend=backend)
        return gate, up, grad

    return _prepared((gate, up, grad), ours, eager.swiglu_backward, 2 * _bytes(gate, up, grad))


def _swiglu_gates(tokens: int, channels: int) -> Prepared:
    gate, up, grad = (random_matrix(tokens, channels) for _ in range(3))

    def ours(gate: torch.Tensor, up: torch.Tensor, grad: torch.Tensor, backend: str | None) -> Sequence[torch.Tensor]:
        return gate, up, decoder.swiglu_backward_gates_(gate, up, grad, LENGTH, backend=backend)

    return _prepared((gate, up, grad), ours, eager.swiglu_backward_gates, _bytes(gate, up) * 2 + _bytes(grad), LENGTH)


def _token_nll_grad(tokens: int, vocabulary: int) -> Prepared:
    logits = random_matrix(tokens, vocabulary)
    targets = torch.randint(0, vocabulary, (tokens,), device=logits.device)
    weights = torch.rand(tokens, device=logits.device)

    def ours(
        logits: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor, backend: str | None
    ) -> Sequence[torch.Tensor]:
        nll = decoder.token_nll_grad_(logits, targets, weights, backend=backend)
        return logits, nll

    return _prepared((logits, targets, weights), ours, eager.token_nll_grad, 2 * _bytes(logits))
