"""The methods of a compensation in turn, each held against the one before it on the same held-out text."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from hashlib import sha256

import torch

from gisp.compensation.acceptance import HeldOut, Measured, MethodResult
from gisp.compensation.methods.kfac import behind, run_kfac
from gisp.compensation.methods.sweep import Fit, OnBlock, run_fit
from gisp.compensation.methods.train import Plan, run_training
from gisp.compensation.options import METHODS, CompensationOptions
from gisp.compensation.pruned.student import Student
from gisp.compensation.streams import first_tokens
from gisp.data import Sequences
from gisp.data.held_out import hold_out, interleaved, without
from gisp.model.keep import Keep
from gisp.model.modes import deterministic, exact_products, frozen
from gisp.model.structures import ModelMap, fingerprint
from gisp.replicas.agreement import agree, machine
from gisp.replicas.sharing import sharers
from gisp.run.record import library_versions


@dataclass(frozen=True)
class BlockUpdate:
    """New weights of one output projection.

    Attributes:
        name: of the block's group, ``layers.{i}.heads`` or ``layers.{i}.channels``.
        columns: original input columns of the projection that stay, int64 [K].
        weight: [D, K] for these columns, in the dtype of the model; None = as it was.
        bias: the whole bias [D] in the dtype of the model; None = as it was.
        factors: float32 [K / columns of a structure], where the weight is the model's own times one factor a kept
            structure; None where it is another one.
    """

    name: str
    columns: torch.Tensor
    weight: torch.Tensor | None
    bias: torch.Tensor | None
    factors: torch.Tensor | None = None


def run_methods(
    model_map: ModelMap,
    keep: Keep,
    data: Sequences,
    options: CompensationOptions,
    on_block: OnBlock | None = None,
    run_text: Sequences | None = None,
) -> tuple[list[BlockUpdate], list[MethodResult], HeldOut]:
    """What the output projections become, what every method did, and the text it was held against.

    Args:
        model_map: map of the dense model, which is left as it was.
        keep: what stays.
        data: calibration sequences; every token counts, scored or not.
        run_text: held-out text of the run that the model was pruned in; what is in the data too does not count.

    Raises:
        GispError: too few sequences, a model built otherwise, or activations that are not finite.
    """
    _agree(model_map, keep, data, options, run_text)
    beside = without(run_text, data)
    seen, unseen = hold_out(interleaved(data))
    done: list[MethodResult] = []
    device = model_map.weight.device
    # Methods take gradients, whatever mode the caller is in.
    with torch.inference_mode(False), torch.no_grad(), deterministic(device), frozen(model_map.model), exact_products():
        longest = max(len(ids) for text in (data, beside) if text is not None for ids, _ in text.rows)
        student = Student(model_map, keep, longest)
        held_out, found = student.hold_out(unseen, beside)
        begin = 0
        for later, name in zip(reversed(range(len(options.methods))), options.methods, strict=True):
            if not (student.movable or (student.projections and options.biases(name))):
                continue
            kind = METHODS[name].kind
            if kind == "fit":
                tokens = int(options.tokens or 0)
                fit = Fit(name, str(options.target), options.biases(name), float(options.damping or 0))
                rows = first_tokens(seen.rows, tokens)
                result, found = run_fit(model_map, student, rows, held_out, found, fit, on_block, later)
                begin = behind(seen.rows, 0, tokens)
            elif kind == "steps":
                result, found = _kfac(student, seen, held_out, found, options, begin, later)
            else:
                result, found = _trained(student, seen, held_out, found, options, name)
            done.append(result)
    updates = []
    for projection in student.projections:
        if projection.changed:
            value, home = projection.value(), projection.weight.device
            weight = value.weight.to(home) if projection.reweighted else None
            columns = projection.columns.to(home)
            updates.append(BlockUpdate(projection.name, columns, weight, value.bias, projection.factors))
    return updates, done, held_out


def _agree(
    model_map: ModelMap, keep: Keep, data: Sequences, options: CompensationOptions, run_text: Sequences | None
) -> None:
    """Require that all processes that share a compensation make the same one."""
    replicas = sharers()
    if replicas.size == 1:
        return
    weight = next(model_map.model.parameters())
    agree(
        replicas,
        {
            **machine(weight.device, library_versions()),
            **{f"option {name}": value for name, value in asdict(options).items()},
            "calibration data": _digest(data),
            "held-out text of the run": "none" if run_text is None else _digest(run_text),
            "model": fingerprint(model_map.model),
            "structures that stay": sha256(repr((keep.heads, keep.channels)).encode()).hexdigest(),
            "weights of": str(weight.dtype),
        },
    )


def _digest(data: Sequences) -> str:
    return sha256((data.digest() + repr(data.kinds)).encode()).hexdigest()


def _kfac(
    student: Student,
    seen: Sequences,
    held_out: HeldOut,
    found: Measured,
    options: CompensationOptions,
    begin: int,
    later: int,
) -> tuple[MethodResult, Measured]:
    tokens, damping = int(options.tokens or 0), float(options.damping or 0)
    steps = options.steps_of("kfac")
    return run_kfac(
        student, seen.rows, held_out, found, begin=begin, tokens=tokens, steps=steps, damping=damping, later=later
    )


def _trained(
    student: Student,
    seen: Sequences,
    held_out: HeldOut,
    found: Measured,
    options: CompensationOptions,
    name: str,
) -> tuple[MethodResult, Measured]:
    steps, rate = options.steps_of(name), options.rate_of(name)
    rates = {"gate_rate": rate} if name == "gates" else {"weight_rate": rate}
    plan = Plan(name, steps, int(options.batch_tokens or 0), **rates)
    return run_training(student, seen.rows, held_out, found, plan)
