"""What a compensation did: new weights, what every method reached, and the one line that says so."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from gisp.compensation.acceptance import HeldOut, MethodResult
from gisp.compensation.methods.run import BlockUpdate
from gisp.compensation.options import METHODS, CompensationOptions


@dataclass(frozen=True)
class HeldAgainst:
    """A text whose loss a compensation may not raise by more than 0.5 % of perplexity.

    Attributes:
        name: a kind of the calibration text, the run's own text, or a kind of it.
        texts, tokens: of what is held out.
    """

    name: str
    texts: int
    tokens: int


@dataclass(frozen=True)
class Compensation:
    """What was done.

    Attributes:
        updates: of every output projection that changes, in the order of the layers.
        results: what every method did; none where nothing was removed.
        texts, tokens: of what is held out; a text is a document, a question or, where there are few, a sequence.
        against: whose loss was a limit beside that of the calibration text in total.
    """

    options: CompensationOptions
    updates: tuple[BlockUpdate, ...]
    results: tuple[MethodResult, ...]
    texts: int
    tokens: int
    against: tuple[HeldAgainst, ...] = ()

    @property
    def seen(self) -> int:
        """Calibration tokens of all methods; one seen twice counts twice."""
        return sum(result.tokens for result in self.results)

    def describe(self) -> str:
        """Every method with its options and what was kept of it, in one line."""
        if not self.results:
            return f"{self.options.method}: nothing was removed, nothing is changed"
        parts = [_described(result, self.options) for result in self.results]
        first, last = self.results[0].before, self.results[-1].after
        fell = f"{first:.4g} to {last:.4g}" if self.updates else f"stays {first:.4g}"
        held_out = f"{self.tokens:,} held-out tokens of {self.texts} texts"
        parts.append(f"divergence from the dense model {fell} nats a token on {held_out}")
        if self.against:
            texts = [f"{text.name} ({text.tokens:,} tokens of {text.texts} texts)" for text in self.against]
            parts.append(f"also held against {', '.join(texts)}")
        if not self.updates:
            parts.append("nothing is kept, the weights stay as they were")
        return "; ".join(parts)


def _described(result: MethodResult, options: CompensationOptions) -> str:
    facts, method = [], METHODS[result.name]
    if "target" in method.options:
        facts.append(f"target {options.target}")
    if "damping" in method.options:
        facts.append(f"damping {options.damping:g}" + _raised(result, float(options.damping or 0)))
    if method.biases is not None and options.biases(result.name) != method.biases:
        facts.append("with biases" if options.biases(result.name) else "without biases")
    if method.kind == "training":
        facts.append(f"learning rate {options.rate_of(result.name):g}")
    if result.kept:
        if result.blocks:
            accepted = sum(block.accepted for block in result.blocks)
            facts.append(f"size {result.size:.3g} in {accepted} of {len(result.blocks)} blocks")
        elif result.steps:
            facts.append(f"{sum(step.size > 0 for step in result.steps)} of {len(result.steps)} steps taken")
        else:
            facts.append(f"best after {result.count} of {options.steps_of(result.name)} steps")
            if result.size < 1:
                facts.append(f"size {result.size:.3g}")
    facts.append(f"{result.tokens:,} calibration tokens")
    limited = f"limited by the loss of {' and '.join(result.limited)}" if result.limited else ""
    if result.kept and limited:
        facts.append(limited)
    if not result.kept:
        gain = result.before - result.reached
        why = (
            f"dropped as the fall of {gain:.2g} nats does not exceed its standard error {result.error:.2g}"
            if gain
            else "dropped as nothing brought the model nearer to the dense one without raising its loss"
        )
        facts.append(f"{why}, {limited}" if limited else why)
    return f"{result.name} ({', '.join(facts)})"


def _raised(result: MethodResult, damping: float) -> str:
    """Where a method needed more damping than was asked for."""
    raised = [block.damping for block in result.blocks if block.damping > damping]
    if raised:
        return f" (raised up to {max(raised):g} in {len(raised)} blocks that were not solvable with it)"
    most = max((step.raised for step in result.steps), default=0)
    return f" (raised up to {max(step.damping for step in result.steps):g} in {most} blocks)" if most else ""


def held_against(held_out: HeldOut) -> tuple[HeldAgainst, ...]:
    """The texts whose loss was a limit, from what a compensation was held against."""
    tokens = held_out.tokens if held_out.beside is None else torch.cat([held_out.tokens, held_out.beside.tokens])
    return tuple(
        HeldAgainst(limit.name, len(limit.numbers), int(tokens[limit.numbers].sum()))
        for limit in held_out.limits
        if limit.rise
    )
