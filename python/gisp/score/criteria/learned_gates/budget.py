"""Variables behind gates, and how they are driven to a budget of parameters: annealed surrogate, augmented Lagrangian.

After Deterministic Differentiable Pruning (Huang et al., arXiv 2603.08065) with the settings of its released code. A
gate is ``max(z, 0)``. Its surrogate of "not zero" is a stretched sigmoid of the gate that is 0 at 0 and 1 from twice
its middle on; the middle falls from 0.5 to 0.1, so at first all of a gate's way counts and in the end only whether it
is closed. Gradients pass ``max`` and the clamp of the surrogate straight through: a closed gate can open again.
"""

from __future__ import annotations

import math

import torch

# Of the surrogate: 2.4 / middle is its slope, which with the stretch makes it 0 at 0 and 1 at twice its middle.
_FIRST_MIDDLE, _LAST_MIDDLE = 0.5, 0.1
_SLOPE, _STRETCH = 2.4, 0.1
# What gates start from: 1 with noise of this deviation.
_NOISE = 1e-2
# Learning rates of the multipliers of 1,000 steps; those of fewer steps are as much higher and lead as far.
_LINEAR_RATE, _QUADRATIC_RATE, _RATE_STEPS = 0.02, 0.4, 1000
_WARMUP = 0.1


class Budget:
    """Variables of gates and their multipliers, trained for a given number of steps.

    Args:
        costs: float32 [N], part of the decoder's parameters that goes with each structure.
        target: part of the decoder's parameters that is to go with all of them.
        steps: training steps.
        rate: learning rate of the variables.
        seed: of the noise they start from.

    Attributes:
        costs, target: as given.
        z: float32 [N], the variables; a gate is ``max(z, 0)``.
    """

    def __init__(self, costs: torch.Tensor, target: float, *, steps: int, rate: float, seed: int) -> None:
        drawn = torch.randn(len(costs), dtype=torch.float32, generator=torch.Generator().manual_seed(seed))
        noise = drawn * _NOISE
        self.z = (1 + noise).to(costs.device).requires_grad_()
        self.costs, self.target = costs, target
        self._steps, self._done = steps, 0
        # Of the violation, of its square, and of gates between open and closed.
        self._multipliers = [torch.zeros_like(self.z[0], requires_grad=True) for _ in range(3)]
        linear, quadratic, binary = self._multipliers
        scale = _RATE_STEPS / steps
        self._optimizer = torch.optim.Adam(
            [
                {"params": [self.z], "lr": rate},
                {"params": [linear, binary], "lr": scale * _LINEAR_RATE, "maximize": True},
                {"params": [quadratic], "lr": scale * _QUADRATIC_RATE, "maximize": True},
            ]
        )
        warmup = max(1, round(_WARMUP * steps))
        self._schedule = torch.optim.lr_scheduler.LambdaLR(
            self._optimizer,
            lambda step: (
                step / warmup
                if step < warmup
                else (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup))) / 2
            ),
        )

    @property
    def gates(self) -> torch.Tensor:
        """Present values of the gates, float32 [N]."""
        return self.z.detach().clamp_min(0)

    def step(self, grad: torch.Tensor) -> None:
        """Take one training step.

        Args:
            grad: float32 [N], gradient of the loss by the gates.
        """
        self._optimizer.zero_grad()
        self._penalty().backward()
        assert self.z.grad is not None
        self.z.grad += grad
        self._optimizer.step()
        self._schedule.step()
        self._done += 1

    def expected(self) -> torch.Tensor:
        """Part of the decoder's parameters that goes by the surrogate now, 0-dim with its graph."""
        return self._removed(self._open())

    def _penalty(self) -> torch.Tensor:
        linear, quadratic, binary = self._multipliers
        opened = self._open()
        violation = self._removed(opened) - self.target
        # By parameters: a mean over gates would leave heads, few and large, half open.
        between = (self.costs * opened * (1 - opened)).sum() / self.costs.sum()
        return linear * violation + quadratic * violation.square() + binary * between

    def _open(self) -> torch.Tensor:
        """The surrogate of every gate, in [0, 1]."""
        progress = self._done / self._steps
        middle = _FIRST_MIDDLE - (_FIRST_MIDDLE - _LAST_MIDDLE) * math.sqrt(progress)
        gate = _straight(self.z, self.z.clamp_min(0))
        stretched = torch.sigmoid(_SLOPE / middle * (gate - middle)) * (1 + 2 * _STRETCH) - _STRETCH
        return _straight(stretched, stretched.clamp(0, 1))

    def _removed(self, opened: torch.Tensor) -> torch.Tensor:
        return (self.costs * (1 - opened)).sum()


def _straight(x: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """``value`` with the gradient of ``x``."""
    return x + (value - x).detach()
