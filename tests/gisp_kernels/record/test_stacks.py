"""Stacks of other people: weights used outside their layer, swapped, quantised, compiled. Right, refused or told."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from recorder_oracle import Block, assert_scores, grad_of, true_scores
from torch import nn

from gisp_kernels import Projection, StructureGroup, record_importance, record_lines
from gisp_kernels.record.targets import Mode

MODES: tuple[Mode, ...] = ("stream", "exact", "signed")
Loss = Callable[[nn.Module, torch.Tensor], torch.Tensor]


class ByView(nn.Module):
    """Uses the weight of one layer through a view, without calling the layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(16, 8), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = F.linear(x, self.first.weight.view(2, 4, 16).flatten(0, 1), self.first.bias)
        return self.last(hidden.tanh())


class Dropped(nn.Module):
    """A parametrization that is another weight at every read."""

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return F.dropout(weight, 0.5)


def attention() -> nn.Module:
    return nn.MultiheadAttention(16, 4, batch_first=True)


def loss_of(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    output = model(x, x, x)[0] if isinstance(model, nn.MultiheadAttention) else model(x)
    return output.pow(2).mean()


def true_rows(model: nn.Module, x: torch.Tensor, mode: Mode) -> dict[str, torch.Tensor]:
    """Scores by rows of every Linear layer, from gradients that autograd leaves in a copy."""
    own = copy.deepcopy(model).requires_grad_(True)
    loss_of(own, x).backward()
    found = {}
    for name, module in own.named_modules():
        if isinstance(module, nn.Linear):
            products = (module.weight * grad_of(module.weight)).double().detach()
            found[f"{name}.row"] = (products if mode == "signed" else products.abs()).sum(1).abs()
    return found


@pytest.mark.parametrize("keep_grad", [False, True])
@pytest.mark.parametrize("frozen", [False, True], ids=["trainable", "frozen"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("build", [ByView, attention], ids=["view", "attention"])
def test_weights_that_code_uses_without_their_layer(
    build: Callable[[], nn.Module], mode: Mode, frozen: bool, keep_grad: bool, batch: torch.Tensor
) -> None:
    model = build()
    truth = true_rows(model, batch, mode)
    model.requires_grad_(not frozen)
    with record_lines(model, ["row"], mode=mode, keep_grad=keep_grad, strict=False) as recorder:
        loss_of(model, batch).backward()
    assert_scores(recorder.scores(), truth, rtol=1e-4)
    kept = keep_grad and not frozen
    assert all(p.requires_grad != frozen for p in model.parameters())
    layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
    assert all((layer.weight.grad is not None) == kept for layer in layers)


@pytest.mark.parametrize("frozen", [False, True], ids=["trainable", "frozen"])
def test_the_fused_projection_of_multi_head_attention(frozen: bool, batch: torch.Tensor) -> None:
    model: Any = attention()
    index = torch.arange(48).view(3, 4, 4).transpose(0, 1).flatten(1)
    heads = (Projection(model, "row", index=index, parameter="in_proj_weight"), Projection(model.out_proj, "column", 4))
    loss_of(model, batch).backward()
    rows = (model.in_proj_weight * grad_of(model.in_proj_weight)).abs().sum(1)
    columns = (model.out_proj.weight * grad_of(model.out_proj.weight)).abs().sum(0)
    truth = (rows[index].sum(1) + columns.view(4, 4).sum(1)).detach().double()
    model.zero_grad()
    model.requires_grad_(not frozen)
    with record_importance([StructureGroup("heads", heads)]) as recorder:
        loss_of(model, batch).backward()
    assert_scores(recorder.scores(), {"heads": truth})
    with pytest.raises(ValueError, match=r"would not be scored: in_proj_weight"):
        record_lines(model)


@pytest.mark.parametrize("frozen", [False, True], ids=["trainable", "frozen"])
def test_a_predicted_change_needs_the_forward_of_the_layer(frozen: bool, batch: torch.Tensor) -> None:
    model: Any = attention().requires_grad_(not frozen)
    groups = [StructureGroup("heads", (Projection(model.out_proj, "column", 4),))]
    with (
        record_importance(groups, mode="second-order"),
        pytest.raises(RuntimeError, match="forward inside the recorder"),
    ):
        loss_of(model, batch.requires_grad_()).backward()


@pytest.mark.parametrize("frozen", [False, True], ids=["trainable", "frozen"])
@pytest.mark.parametrize("keep_grad", [False, True])
@pytest.mark.parametrize("mode", [*MODES, "second-order"])
def test_passes_towards_other_tensors_score_nothing(
    model: Block, batch: torch.Tensor, mode: Mode, keep_grad: bool, frozen: bool
) -> None:
    model.requires_grad_(not frozen)
    batch.requires_grad_()
    with record_importance(model, mode=mode, keep_grad=keep_grad) as recorder:
        model.loss(batch).backward()
        expected = {name: scores.clone() for name, scores in recorder.scores().items()}
        recorder.reset()
        torch.autograd.grad(model.loss(batch), [batch])
        with pytest.warns(UserWarning, match="no backward pass has reached all weights of attn, mlp"):
            assert all((scores == 0).all() for scores in recorder.scores().values())
        model.loss(batch).backward()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            found = recorder.scores()
    assert all(torch.equal(found[name], scores) for name, scores in expected.items())


@pytest.mark.parametrize("shared", [False, True], ids=["one", "two layers with one weight"])
def test_a_gradient_that_was_there_stays(shared: bool, batch: torch.Tensor) -> None:
    from transformers.pytorch_utils import Conv1D

    first, second = Conv1D(16, 16), Conv1D(16, 16)
    if shared:
        second.weight = first.weight
    kept = torch.randn(16, 16)
    first.weight.grad = kept.clone()
    with record_lines([first, second]):
        for _ in range(2):
            torch.autograd.grad(second(first(batch)).pow(2).mean(), [first.weight])
            assert torch.equal(first.weight.grad, kept)
        second(first(batch)).pow(2).mean().backward()
        assert torch.equal(first.weight.grad, kept)
    assert torch.equal(first.weight.grad, kept)


@pytest.mark.parametrize("keep_grad", [False, True])
def test_other_weights_than_those_of_the_module_are_refused(model: Block, batch: torch.Tensor, keep_grad: bool) -> None:
    others = {name: (2 * p).detach().requires_grad_() for name, p in model.named_parameters()}
    with record_importance(model, keep_grad=keep_grad), pytest.raises(RuntimeError, match="functional_call"):
        torch.func.functional_call(model, others, (batch,))
    truth = true_scores(model, batch)
    with record_importance(model, keep_grad=keep_grad) as recorder:
        torch.func.functional_call(model, dict(model.named_parameters()), (batch,)).pow(2).mean().backward()
    assert_scores(recorder.scores(), truth)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_transforms_are_scored_or_refused(model: Block, batch: torch.Tensor) -> None:
    def mapped() -> torch.Tensor:
        output: torch.Tensor = torch.func.vmap(lambda x: model(x[None])[0])(batch).pow(2).mean()
        return output

    truth = true_scores(model, batch)
    with record_importance(model, keep_grad=True) as recorder:
        mapped().backward()
    assert_scores(recorder.scores(), truth)
    for keep_grad in (False, True):
        with record_importance(model, keep_grad=keep_grad), pytest.raises(RuntimeError, match=r"torch\.func"):
            torch.func.grad(model.loss)(batch) if not keep_grad else torch.func.grad(
                lambda weights: torch.func.functional_call(model, weights, (batch,)).pow(2).mean()
            )(dict(model.named_parameters()))
    with record_importance(model), pytest.raises(RuntimeError, match=r"transform of torch\.func"):
        mapped()


def test_a_weight_whose_gradient_nobody_forms_is_told(model: Block, batch: torch.Tensor) -> None:
    class Product(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
            ctx.save_for_backward(weight)
            return x @ weight.T

        @staticmethod
        def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
            return grads[0] @ ctx.saved_tensors[0], None

    mlp = model.mlp
    mlp.forward = lambda x: mlp.down_proj(F.silu(mlp.gate_proj(x)) * Product.apply(x, mlp.up_proj.weight))  # type: ignore[method-assign]
    for frozen in (False, True):
        model.requires_grad_(not frozen)
        with record_importance(model) as recorder:
            model.loss(batch).backward()
        assert recorder.coverage().unreached == ("mlp",)
        for read in (recorder.scores, lambda recorder=recorder: recorder.scores_of(mlp.up_proj)):
            with pytest.warns(UserWarning, match="no backward pass has reached all weights of mlp: those score 0"):
                read()


def test_parametrizations_that_change_are_right_or_refused(batch: torch.Tensor) -> None:
    normed = nn.utils.parametrizations.spectral_norm(nn.Linear(16, 8))
    with pytest.raises(TypeError, match=r"changes buffers whenever it is read \(spectral_norm\)"):
        record_lines([normed])
    normed.eval()
    vectors = [buffer.clone() for buffer in normed.buffers()]
    with record_lines([normed]) as recorder:
        normed(batch).pow(2).mean().backward()
    assert all(torch.equal(one, other) for one, other in zip(normed.buffers(), vectors, strict=True))
    assert (recorder.scores()["0.row"] > 0).all()

    noisy: Any = nn.Linear(16, 64, bias=False)
    nn.utils.parametrize.register_parametrization(noisy, "weight", Dropped())
    read: list[torch.Tensor] = []
    noisy.parametrizations.weight[0].register_forward_hook(lambda *arguments: read.append(arguments[2].detach()))
    with record_lines([noisy], ["row"]) as recorder:
        read.clear()
        output = noisy(batch)
        used = next(weight for weight in read if torch.allclose(batch @ weight.T, output, atol=1e-6))
        output.pow(2).mean().backward()
    grad = (2 * output.detach() / output.numel()).flatten(0, 1).T @ batch.flatten(0, 1)
    torch.testing.assert_close(recorder.scores()["0.row"], (used * grad).abs().sum(1))


def test_pruned_by_a_mask(model: Block, batch: torch.Tensor) -> None:
    from torch.nn.utils import prune

    prune.l1_unstructured(model.mlp.up_proj, "weight", 0.5)
    plain = Block()
    weights = {name: value for name, value in model.state_dict().items() if "mlp.up_proj.weight" not in name}
    plain.load_state_dict({**weights, "mlp.up_proj.weight": model.mlp.up_proj.weight.detach()})
    with record_importance(model) as recorder:
        model.loss(batch).backward()
    assert_scores(recorder.scores(), true_scores(plain, batch))


class Packed(nn.Module):
    """As GPTQ, AWQ and HQQ hold a layer: integers in a buffer."""

    def __init__(self, into: int, out: int) -> None:
        super().__init__()
        self.in_features, self.out_features = into, out
        self.register_buffer("qweight", torch.zeros(into // 4, out, dtype=torch.int32))


def quantised_by_torch(model: Block) -> None:
    warnings.simplefilter("ignore")
    model.mlp = torch.ao.quantization.quantize_dynamic(model.mlp, {nn.Linear}, dtype=torch.qint8)


def packed(model: Any) -> None:
    for name in ("gate_proj", "up_proj"):
        setattr(model.mlp, name, Packed(16, 21))
    model.mlp.down_proj = Packed(21, 16)


def quantised_by_torchao(model: Block) -> None:
    torchao = pytest.importorskip("torchao.quantization")
    torchao.quantize_(model, torchao.Int8WeightOnlyConfig())


@pytest.mark.parametrize(
    ("quantise", "error", "message"),
    [
        (
            quantised_by_torch,
            ValueError,
            "would not be scored: mlp.gate_proj.weight, mlp.up_proj.weight, mlp.down_proj",
        ),
        (packed, ValueError, "would not be scored: mlp.gate_proj.weight, mlp.up_proj.weight, mlp.down_proj.weight"),
        (quantised_by_torchao, TypeError, "no plain tensor: record the model before quantising it"),
    ],
    ids=["torch", "packed", "torchao"],
)
def test_quantised_layers_are_named(
    model: Block, quantise: Callable[[Block], None], error: type[Exception], message: str
) -> None:
    with warnings.catch_warnings():
        quantise(model)
        with pytest.raises(error, match=message):
            record_importance(model)


def whole_layer(model: Any) -> None:
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.compile(backend="aot_eager")


def wrapped_layer(model: Any) -> None:
    model.mlp.up_proj = torch.compile(model.mlp.up_proj, backend="aot_eager")


def wrapped_block(model: Any) -> None:
    model.mlp = torch.compile(model.mlp, backend="aot_eager")


@pytest.mark.parametrize("keep_grad", [False, True])
@pytest.mark.parametrize("when", ["before", "inside"])
@pytest.mark.parametrize("compiled", [whole_layer, wrapped_layer, wrapped_block], ids=lambda work: work.__name__)
def test_compiled_submodules(
    model: Block, batch: torch.Tensor, compiled: Callable[[Any], None], when: str, keep_grad: bool
) -> None:
    torch._dynamo.reset()
    truth = true_scores(model, batch)
    compiled(model)
    if when == "before":
        model.loss(batch)
    with record_importance(model, keep_grad=keep_grad) as recorder:
        model.loss(batch).backward()
    found = {name.replace("._orig_mod", ""): scores for name, scores in recorder.scores().items()}
    assert_scores(found, truth, rtol=1e-4)
    torch._dynamo.reset()


def test_copies_on_several_devices_are_refused(model: Block, monkeypatch: pytest.MonkeyPatch) -> None:
    parallel = nn.DataParallel(model)
    monkeypatch.setattr(parallel, "device_ids", [0, 1])
    with pytest.raises(RuntimeError, match="DataParallel runs copies of layers on other devices: pass keep_grad=True"):
        record_importance(parallel)
    record_importance(parallel, keep_grad=True)


def zero_three(model: Any) -> None:
    model.mlp.up_proj.weight.ds_id = 3


def one_row(model: Any) -> None:
    model.mlp.up_proj.weight = nn.Parameter(torch.zeros(5))


@pytest.mark.parametrize("part", [zero_three, one_row], ids=lambda work: work.__name__)
def test_split_weights_are_refused(model: Block, part: Callable[[Any], None]) -> None:
    part(model)
    for record in (record_importance, record_lines):
        with pytest.raises(RuntimeError, match="flattened and split: use fully_shard or ZeRO-2"):
            record(model, keep_grad=True)


def test_adapters_of_peft_that_are_merged(batch: torch.Tensor) -> None:
    peft = pytest.importorskip("peft")
    model = peft.inject_adapter_in_model(
        peft.LoraConfig(target_modules=["up_proj", "o_proj"], init_lora_weights=False), Block()
    )
    layers = [module for module in model.modules() if hasattr(module, "base_layer")]
    assert len(layers) == 2
    for layer in layers:
        layer.merge()
    plain = Block()
    state = {
        name.replace(".base_layer", ""): value for name, value in model.state_dict().items() if "lora_" not in name
    }
    plain.load_state_dict(state)
    for frozen in (False, True):
        model.requires_grad_(not frozen)
        with record_importance(model) as recorder:
            model.loss(batch).backward()
        assert_scores(recorder.scores(), true_scores(plain, batch))


def test_adapters_that_read_the_weight_themselves(batch: torch.Tensor) -> None:
    """DoRA with dropout multiplies with the weight beside its layer."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["up_proj"], use_dora=True, lora_dropout=0.5, init_lora_weights=False)
    model = peft.inject_adapter_in_model(config, Block()).train()
    weight = model.mlp.up_proj.base_layer.weight

    def backward() -> None:
        torch.manual_seed(3)
        model.loss(batch).backward()

    weight.requires_grad_(True)
    backward()
    truth = (weight * grad_of(weight)).abs().sum(1).detach()
    model.zero_grad()
    weight.requires_grad_(False)
    with record_lines([model.mlp.up_proj], ["row"]), pytest.raises(RuntimeError, match="in its layer and elsewhere"):
        backward()
    with record_lines([model.mlp.up_proj], ["row"], mode="exact") as recorder:
        backward()
    torch.testing.assert_close(recorder.scores()["0.row"], truth, rtol=1e-4, atol=1e-8)
