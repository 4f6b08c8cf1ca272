"""Groups of any layers: after each step the model computes what the masked one does, and every step can be undone."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import transformers
from cut_models import CASES, Case, case
from recorder_oracle import grad_of
from torch import nn

from gisp_kernels import Compactor, Projection, StructureGroup, iter_groups


def tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: t.detach().clone() for name, t in model.state_dict().items()}


def assert_same(model: nn.Module, expected: dict[str, torch.Tensor]) -> None:
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, expected[name]), name


def assert_as_masked(found: Case, name: str, removed: dict[str, list[int]]) -> None:
    masked = case(name)
    masked.mask(removed)
    torch.testing.assert_close(found.output(), masked.output(), rtol=1e-11, atol=1e-11)


def merged(steps: list[dict[str, list[int]]]) -> dict[str, list[int]]:
    return {name: [i for step in steps for i in step.get(name, [])] for step in steps for name in step}


@pytest.mark.parametrize("name", CASES)
def test_steps_compute_what_the_masked_model_does_and_can_be_undone(name: str) -> None:
    found = case(name)
    objects = dict(found.model.named_parameters())
    before = sum(p.numel() for p in objects.values())
    compactor = Compactor(found.groups)
    states = [tensors(found.model)]
    for number, step in enumerate(found.steps, start=1):
        compactor.remove(step)
        assert_as_masked(found, name, merged(found.steps[:number]))
        states.append(tensors(found.model))
    assert sum(p.numel() for p in found.model.parameters()) < before
    assert all(dict(found.model.named_parameters())[key] is value for key, value in objects.items())
    while compactor.depth:
        states.pop()
        compactor.rollback()
        assert_same(found.model, states[-1])
    assert repr(found.model) == repr(case(name).model), "sizes came back"
    compactor.remove(merged(found.steps))
    assert_as_masked(found, name, merged(found.steps))


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_packed_models_go_on(name: str, in_place: bool) -> None:
    found = case(name)
    compactor = Compactor(found.groups)
    compactor.remove(found.steps[0])
    compactor.pack(in_place=in_place)
    assert compactor.bytes_storage() == compactor.bytes_packed()
    assert in_place or all(
        t.untyped_storage().nbytes() == t.numel() * t.element_size()
        for projection in found.groups[0].projections
        for t in (*projection.linear.parameters(), *projection.linear.buffers())
        if t.dim()
    )
    state = tensors(found.model)
    assert_as_masked(found, name, found.steps[0])
    compactor.remove(found.steps[1])
    assert_as_masked(found, name, merged(found.steps))
    compactor.rollback()
    assert_same(found.model, state)


def test_memory_format_outlives_pack() -> None:
    found = case("channels last")
    compactor = Compactor(found.groups)
    compactor.remove(found.steps[0])
    compactor.pack()
    weight = found.model.second.weight
    assert weight.is_contiguous(memory_format=torch.channels_last) and not weight.is_contiguous()


@pytest.mark.parametrize("name", ["fused", "concatenated"])
def test_a_group_tells_where_its_lines_are_now(name: str) -> None:
    found = case(name)
    compactor = Compactor(found.groups)

    def lines(projection: Projection) -> torch.Tensor:
        weight = projection.weight if projection.axis == "row" else projection.weight.t()
        index = projection.index
        return weight.unflatten(0, (-1, projection.block)) if index is None else weight[index]

    for step in found.steps:
        compactor.remove(step)
        for dense in case(name).groups:
            kept = compactor.order(dense.name)[: compactor.kept(dense.name)]
            now = compactor.group(dense.name)
            assert now.count == len(kept)
            for before, after in zip(dense.projections, now.projections, strict=True):
                mine, full = lines(after), lines(before)[kept]
                # The other side may have lost lines to another group.
                assert torch.equal(mine, full) or mine.shape[-1] < full.shape[-1]


def test_one_line_of_two_structures_is_refused() -> None:
    linear, other = nn.Linear(4, 6), nn.Linear(6, 2)
    whole = StructureGroup("whole", (Projection(linear, "row"),))
    pairs = StructureGroup("pairs", (Projection(linear, "row", 2), Projection(other, "column", 2)))
    with pytest.raises(ValueError, match=r"two groups cut the rows of projection 0 of group 'whole'.*index"):
        Compactor([whole, pairs])
    twice = StructureGroup("twice", (Projection(linear, "row", index=torch.tensor([[0, 1], [1, 2]])),))
    with pytest.raises(ValueError, match="the rows of projection 0 of group 'twice': one line is given to two"):
        Compactor([twice])
    with pytest.raises(ValueError, match="one line is given to two structures"):
        Compactor([whole, twice])


def test_layers_that_cannot_be_cut_are_refused() -> None:
    def refused(layer: nn.Module, axis: str, block: int = 1) -> Compactor:
        return Compactor([StructureGroup("g", (Projection(layer, axis, block),))])  # type: ignore[arg-type]

    with pytest.raises(TypeError, match=r"projection 0 of group 'g': a Bilinear cannot be cut: give a Linear"):
        refused(nn.Bilinear(3, 4, 5), "row")
    with pytest.raises(ValueError, match="a Conv2d of 2 groups loses whole groups"):
        refused(nn.Conv2d(4, 4, 1, groups=2), "column")
    with pytest.raises(ValueError, match="a Conv2d loses 2 rows at a time: give such a block"):
        refused(nn.Conv2d(4, 4, 1, groups=2), "row")
    with pytest.raises(ValueError, match="a GroupNorm loses 3 rows at a time"):
        refused(nn.GroupNorm(2, 6), "row", 2)
    with pytest.raises(ValueError, match="a ConvTranspose2d of 2 groups cannot be cut"):
        refused(nn.ConvTranspose2d(4, 4, 1, groups=2), "row")
    with pytest.raises(ValueError, match=r"a LayerNorm over \(2, 3\) cannot lose rows"):
        refused(nn.LayerNorm((2, 3)), "row")
    with pytest.raises(ValueError, match="padding_idx=0 cannot lose entries"):
        refused(nn.Embedding(4, 3, padding_idx=0), "column")
    with pytest.raises(ValueError, match="a BatchNorm1d has no columns that can go"):
        refused(nn.BatchNorm1d(4), "column")
    with pytest.raises(ValueError, match=r"weight of the .*Linear is computed from other tensors"):
        refused(nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)), "row")


def test_norms_without_weights_follow() -> None:
    norms = [nn.LayerNorm(6, elementwise_affine=False), nn.BatchNorm1d(6, affine=False, track_running_stats=False)]
    first = nn.Linear(3, 6)
    model = nn.Sequential(first, *norms)
    compactor = Compactor([StructureGroup("g", tuple(Projection(m, "row") for m in model))])
    compactor.remove({"g": [2, 3]})
    assert norms[0].normalized_shape == (4,) and norms[1].num_features == 4
    assert model(torch.randn(5, 3)).shape == (5, 4)
    compactor.rollback()
    assert norms[0].normalized_shape == (6,)


def test_training_goes_on_while_an_older_loss_is_alive() -> None:
    found = case("concatenated")
    calls = []
    hooked = found.model.left.weight
    hooked.register_post_accumulate_grad_hook(lambda p: calls.append(p.shape))
    old = found.output().sum()
    old.backward(retain_graph=True)
    compactor = Compactor(found.groups)
    for step in found.steps:
        compactor.remove(step)
        found.output().sum().backward()
    for parameter in found.model.parameters():
        assert grad_of(parameter).shape == parameter.shape
    assert calls[-1] == hooked.shape, "hooks of parameters stay"
    compactor.rollback(2)
    found.output().sum().backward()


def test_an_older_loss_is_refused() -> None:
    linear = nn.Linear(4, 6)
    groups = [StructureGroup("g", (Projection(linear, "row"),))]
    old = linear(torch.randn(2, 4)).sum()
    compactor = Compactor(groups)
    compactor.remove({"g": [0]})
    kept = linear(torch.randn(2, 4)).sum()
    with pytest.raises(RuntimeError, match="loss was computed before structures were removed or brought back"):
        old.backward()
    compactor.rollback()
    with pytest.raises(RuntimeError, match="loss was computed before structures"):
        kept.backward()
    assert linear.weight.grad is None
    # Autograd itself notices where it saved the weight.
    found = case("fused")
    loss = found.output().sum()
    Compactor(found.groups).remove({"mlp": [0]})
    with pytest.raises(RuntimeError, match=r"modified by an inplace operation|computed before structures"):
        loss.backward()


@pytest.mark.parametrize("made_inside", [False, True])
def test_steps_inside_inference_mode(made_inside: bool) -> None:
    found = case("fused")
    with torch.inference_mode(made_inside):
        compactor = Compactor(found.groups)
    with torch.inference_mode():
        compactor.remove(found.steps[0])
        assert_as_masked(found, "fused", found.steps[0])
    compactor.remove(found.steps[1])
    found.output().sum().backward()
    with torch.inference_mode():
        compactor.rollback(2)
    assert_same(found.model, tensors(case("fused").model))


def test_a_norm_over_all_heads_goes_along_where_it_is_added() -> None:
    config = transformers.Olmo2Config(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=4, pad_token_id=0
    )
    model = transformers.Olmo2ForCausalLM(config)
    attention = model.model.layers[0].self_attn
    group = next(iter_groups(model))
    norms = (Projection(attention.q_norm, "row", 4), Projection(attention.k_norm, "row", 4))
    weights = {name: p.detach().clone() for name, p in attention.named_parameters()}
    Compactor([dataclasses.replace(group, projections=(*group.projections, *norms))]).remove({group.name: [1]})
    # The last head comes to the place of the one that went.
    lines = torch.tensor([*range(4), *range(12, 16), *range(8, 12)])
    for name, parameter in attention.named_parameters():
        assert torch.equal(parameter, weights[name][:, lines] if name.startswith("o_proj") else weights[name][lines])
    assert model(torch.tensor([[3, 4, 5]])).logits.isfinite().all()
