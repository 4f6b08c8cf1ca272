"""Training goes on while its gradients are scored: the same gradients as without a recorder, and the right scores."""

from __future__ import annotations

import copy
import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from recorder_oracle import Block, assert_scores, grad_of, true_scores
from torch import nn
from torch.utils.checkpoint import checkpoint

from gisp_kernels import Projection, StructureGroup, iter_groups, record_importance
from gisp_kernels.record.targets import Mode

MODES: tuple[Mode, ...] = ("stream", "exact")
KEPT: tuple[Mode, ...] = (*MODES, "signed")


def gradients(model: nn.Module) -> dict[str, torch.Tensor | None]:
    return {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}


def assert_same_gradients(one: nn.Module, other: nn.Module) -> None:
    for name, expected in gradients(other).items():
        found = dict(one.named_parameters())[name].grad
        assert (found is None) == (expected is None), name
        assert found is None or expected is None or torch.equal(found, expected), name


@pytest.mark.parametrize("early", [False, True], ids=["forward inside", "forward before"])
@pytest.mark.parametrize("mode", KEPT)
def test_gradients_accumulate_as_always(model: Block, mode: Mode, early: bool) -> None:
    plain, batches = copy.deepcopy(model), torch.randn(3, 2, 7, 16)
    for batch in batches:
        plain.loss(batch).backward()
    losses = [model.loss(batch) for batch in batches] if early else []
    with record_importance(model, mode=mode, keep_grad=True) as recorder:
        for number, batch in enumerate(batches):
            (losses[number] if early else model.loss(batch)).backward()
    assert_same_gradients(model, plain)
    assert recorder.backward_calls == 3
    if mode != "signed":
        assert_scores(recorder.scores(), true_scores(model, *batches, exact=mode == "exact"))
    assert not any(p._backward_hooks or p._post_accumulate_grad_hooks for p in model.parameters())


@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
@pytest.mark.parametrize("mode", MODES)
def test_checkpointing(model: Block, batch: torch.Tensor, mode: Mode, reentrant: bool) -> None:
    truth = true_scores(model, batch)
    plain = copy.deepcopy(model)
    for own in (model, plain):
        own.wrap = functools.partial(checkpoint, use_reentrant=reentrant)
    batch.requires_grad_()
    plain.loss(batch).backward()
    with record_importance(model, mode=mode, keep_grad=True) as recorder:
        model.loss(batch).backward()
    assert recorder.backward_calls == 1
    assert_same_gradients(model, plain)
    assert_scores(recorder.scores(), truth)


@pytest.mark.parametrize("when", ["before", "inside"])
@pytest.mark.parametrize("mode", MODES)
def test_compiled(model: Block, batch: torch.Tensor, mode: Mode, when: str) -> None:
    truth = true_scores(model, batch)
    plain = copy.deepcopy(model)
    torch.compile(plain, backend="aot_eager")(batch).pow(2).mean().backward()
    if when == "before":
        compiled = torch.compile(model, backend="aot_eager")
        compiled(batch)
    with record_importance(model, mode=mode, keep_grad=True) as recorder:
        if when == "inside":
            compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        compiled(batch).pow(2).mean().backward()
        compiled(batch).pow(2).mean().backward()
    plain.zero_grad()
    for _ in range(2):
        torch.compile(plain, backend="aot_eager")(batch).pow(2).mean().backward()
    assert_same_gradients(model, plain)
    factor = 2
    assert_scores(recorder.scores(), {name: factor * value for name, value in truth.items()})
    torch._dynamo.reset()


@pytest.mark.parametrize("frozen", [False, True], ids=["trainable", "frozen"])
@pytest.mark.parametrize("when", ["before", "inside"])
def test_compiled_without_keeping_gradients(model: Block, batch: torch.Tensor, when: str, frozen: bool) -> None:
    truth = true_scores(model, batch)
    model.requires_grad_(not frozen)
    batch.requires_grad_()
    compiled = torch.compile(model, backend="aot_eager")
    if when == "before":
        compiled(batch).pow(2).mean().backward()
        model.zero_grad()
    with record_importance(compiled) as recorder:  # type: ignore[arg-type]
        compiled(batch).pow(2).mean().backward()
    scores = {name.removeprefix("_orig_mod."): values for name, values in recorder.scores().items()}
    assert_scores(scores, truth)
    assert model.mlp.up_proj.weight.grad is None
    torch._dynamo.reset()


ROUTES = ["plain", "reentrant", "non-reentrant", "compiled", "autocast", "input without gradient"]


@pytest.mark.parametrize("route", ROUTES)
def test_second_order_scores_beside_the_gradients(model: Block, route: str) -> None:
    batches, plain = torch.randn(2, 3, 7, 16).requires_grad_(route != "input without gradient"), copy.deepcopy(model)
    if "reentrant" in route:
        for own in (model, plain):
            own.wrap = functools.partial(checkpoint, use_reentrant=route == "reentrant")
    runs = [torch.compile(own, backend="aot_eager") if route == "compiled" else own for own in (plain, model)]

    def step(run: Any, batch: torch.Tensor) -> None:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=route == "autocast"):
            output = run(batch)
        output.float().pow(2).mean().backward()

    for batch in batches:
        step(runs[0], batch)
    scores = {}
    for keep_grad in (True, False):
        # The compiler has seen the layers without a recorder.
        with record_importance(model, mode="second-order", keep_grad=keep_grad) as recorder:
            for batch in batches:
                step(runs[1], batch)
        scores[keep_grad] = recorder.scores()
        assert recorder.backward_calls == 2
        if keep_grad and route != "compiled":
            assert_same_gradients(model, plain)
        elif keep_grad:
            # A graph broken at every layer sums in another order.
            for one, other in zip(model.parameters(), plain.parameters(), strict=True):
                torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-6)
    for name, expected in scores[False].items():
        rtol = 2e-2 if route == "autocast" else 1e-5
        torch.testing.assert_close(scores[True][name], expected, rtol=rtol, atol=rtol * float(expected.abs().max()))
    torch._dynamo.reset()


def test_second_order_by_rows_and_with_closed_gates(model: Block, batch: torch.Tensor) -> None:
    closed = {"mlp": torch.arange(21) % 3 == 0}
    rows = [StructureGroup("rows", (Projection(model.mlp.up_proj, "row", 3),))]
    for target, options in ((rows, {}), (list(iter_groups(model)), {"closed": closed})):
        found = {}
        for keep_grad in (False, True):
            model.zero_grad()
            with record_importance(target, mode="second-order", keep_grad=keep_grad, **options) as recorder:  # type: ignore[arg-type]
                model.loss(batch).backward()
            found[keep_grad] = recorder.scores()
        assert model.mlp.up_proj.weight.grad is not None
        for name, expected in found[False].items():
            torch.testing.assert_close(found[True][name], expected, rtol=1e-5, atol=1e-8)


def test_second_order_scores_of_a_graph_from_before_are_refused(model: Block, batch: torch.Tensor) -> None:
    loss = model.loss(batch)
    with record_importance(model, mode="second-order", keep_grad=True):
        with pytest.raises(RuntimeError, match="need the forward inside the recorder"):
            loss.backward()
        model.loss(batch).backward()


def test_a_frozen_weight_is_scored_as_ever(model: Block, batch: torch.Tensor) -> None:
    truth = true_scores(model, batch)
    model.mlp.requires_grad_(False)
    plain = copy.deepcopy(model)
    plain.loss(batch).backward()
    with record_importance(model, keep_grad=True) as recorder:
        model.loss(batch).backward()
    assert_scores(recorder.scores(), truth)
    assert_same_gradients(model, plain)


def test_accelerate_with_accumulation(model: Block) -> None:
    accelerate = pytest.importorskip("accelerate")
    batches, found = torch.randn(4, 2, 7, 16), {}
    for recorded in (False, True):
        own = copy.deepcopy(model)
        accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
        prepared, optimizer = accelerator.prepare(own, torch.optim.SGD(own.parameters(), lr=0.1))
        with record_importance(own, keep_grad=True) if recorded else torch.enable_grad() as recorder:
            for batch in batches:
                with accelerator.accumulate(prepared):
                    accelerator.backward(own.loss(batch))
                    optimizer.step()
                    optimizer.zero_grad()
        found[recorded] = own
    assert recorder is not None
    assert recorder.backward_calls == 4
    for one, other in zip(found[False].parameters(), found[True].parameters(), strict=True):
        assert torch.equal(one, other)


def test_trainer(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    from tiny import tiny_model

    rows = [{"input_ids": ids, "labels": ids} for ids in torch.randint(0, 64, (8, 12))]
    found = {}
    for recorded in (False, True):
        model = tiny_model("llama-gqa")
        trainer = transformers.Trainer(
            model=model,
            train_dataset=rows,
            args=transformers.TrainingArguments(
                output_dir=str(tmp_path),
                per_device_train_batch_size=2,
                gradient_accumulation_steps=2,
                max_steps=2,
                use_cpu=True,
                report_to=[],
                save_strategy="no",
                disable_tqdm=True,
            ),
        )
        with record_importance(model, keep_grad=True) if recorded else torch.enable_grad() as recorder:
            trainer.train()
        found[recorded] = model
    assert recorder is not None
    assert recorder.backward_calls == 4
    assert not recorder.coverage().unreached
    assert all((scores > 0).all() for scores in recorder.scores().values())
    for one, other in zip(found[False].parameters(), found[True].parameters(), strict=True):
        assert torch.equal(one, other)


def test_an_optimizer_inside_the_backward_pass(model: Block, batch: torch.Tensor) -> None:
    truth = true_scores(model, batch)

    def step(weight: torch.Tensor) -> None:
        with torch.no_grad():
            weight -= 0.1 * grad_of(weight)
        weight.grad = None

    handles = [p.register_post_accumulate_grad_hook(step) for p in model.parameters()]
    with record_importance(model, keep_grad=True) as recorder:
        model.loss(batch).backward()
    assert_scores(recorder.scores(), truth)
    assert len(list(iter_groups(model))) == 2
    for handle in handles:
        handle.remove()
