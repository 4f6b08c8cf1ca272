"""Groups of Torch-Pruning's graph, scored and cut by us, are what Torch-Pruning scores and cuts itself."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    ViTConfig,
    ViTForImageClassification,
)

tp = pytest.importorskip("torch_pruning", reason="needs Torch-Pruning: pip install '.[torch-pruning]'")

from gisp_kernels import Compactor, StructureGroup, record_importance  # noqa: E402
from gisp_kernels.adapters.dependency_graph import dependency_groups, scored_parts  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:Unwrapped parameters")
IMAGES = torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(1))
IDS = torch.arange(24).view(2, 12)
SHAPE: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 32,
}


class Net(nn.Module):
    """Convolutions, norms, a residual stream, channels that a concatenation brings together."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3))
        self.into, self.beside = nn.Linear(8 * 4, 12), nn.Linear(8 * 4, 6)
        self.norm, self.mix = nn.LayerNorm(18), nn.Linear(18, 18)
        self.fused, self.head = nn.Linear(18, 20), nn.Linear(10, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x).flatten(1)
        x = torch.cat([self.into(x), self.beside(x)], 1)
        gate, up = self.fused(x + self.mix(self.norm(x))).chunk(2, 1)
        out: torch.Tensor = self.head(gate.sigmoid() * up)
        return out


def net() -> Any:
    torch.manual_seed(0)
    return Net().eval()


def decoder(kind: str) -> Any:
    torch.manual_seed(0)
    if kind == "fused":
        config = Phi3Config(num_key_value_heads=4, pad_token_id=0, eos_token_id=0, **SHAPE)
        return Phi3ForCausalLM(config).eval()
    return LlamaForCausalLM(LlamaConfig(num_key_value_heads=2 if kind == "gqa" else 4, **SHAPE)).eval()


def groups_of(model: Any, **options: Any) -> list[StructureGroup]:
    if isinstance(model, Net):
        return dependency_groups(model, IMAGES, ignored_layers=[model.head], **options)
    heads = {layer.self_attn.o_proj: 4 for layer in model.model.layers}
    return dependency_groups(
        model,
        {"input_ids": IDS, "use_cache": False},
        num_heads=heads,
        ignored_layers=[model.lm_head, *options.pop("ignored_layers", ())],
        root_module_types=[nn.Linear, nn.Embedding],
        output_transform=lambda output: output.logits,
        **options,
    )


def output_of(model: Any) -> torch.Tensor:
    result: torch.Tensor = model(IMAGES) if isinstance(model, Net) else model(input_ids=IDS, use_cache=False).logits
    return result


def pruned_by_their_group(model: Any, group: StructureGroup, structures: list[int]) -> Any:
    """A copy that Torch-Pruning cut by the rows of the group's first layer."""
    other = copy.deepcopy(model)
    names = {module: name for name, module in model.named_modules()}
    first = group.projections[0]
    rows = torch.arange(first.width).view(group.count, -1) if first.index is None else first.index
    root = other.get_submodule(names[first.linear])
    inputs: Any = IMAGES if isinstance(model, Net) else {"input_ids": IDS, "use_cache": False}
    transform = None if isinstance(model, Net) else lambda output: output.logits
    graph = tp.DependencyGraph().build_dependency(other, inputs, output_transform=transform, verbose=False)
    prune = graph.get_pruner_of_module(root).prune_out_channels
    graph.get_pruning_group(root, prune, sorted(rows[structures].flatten().tolist())).prune()
    return other


@pytest.mark.parametrize("kind", ["net", "mha", "fused"])
def test_we_cut_what_they_cut(kind: str) -> None:
    dense = net() if kind == "net" else decoder(kind)
    for number in range(len(groups_of(dense))):
        model = copy.deepcopy(dense)
        group = groups_of(model)[number]
        theirs = pruned_by_their_group(model, group, [1, 3])
        before = sum(p.numel() for p in model.parameters())
        Compactor([group]).remove({group.name: [1, 3]})
        assert sum(p.numel() for p in model.parameters()) < before
        for (name, one), other in zip(model.named_parameters(), theirs.parameters(), strict=True):
            # What stays may lie in another order.
            assert torch.equal(one.flatten().sort().values, other.flatten().sort().values), (group.name, name)
            assert one.shape == other.shape
        if "qkv_proj" not in group.name:  # its module holds the number of heads by itself
            torch.testing.assert_close(output_of(model), output_of(theirs), rtol=1e-4, atol=1e-5)


def test_every_layer_is_in_a_group() -> None:
    model = net()
    found = groups_of(model)
    assert [(group.name, group.count) for group in found] == [
        ("stem.0", 8),
        ("stem.3", 8),
        ("into", 12),
        ("beside", 6),
        ("fused", 10),
    ]
    layers = {projection.linear for group in found for projection in group.projections}
    assert layers == {m for m in model.modules() if any(True for _ in m.parameters(recurse=False))}
    (fused,) = (group for group in found if group.name == "fused")
    index = fused.projections[0].index
    assert index is not None
    assert index.tolist() == [[n, n + 10] for n in range(10)]
    fused_layers = groups_of(decoder("fused"))
    heads = next(group for group in fused_layers if "qkv_proj" in group.name)
    assert heads.count == 4
    assert heads.projections[0].index is not None
    assert heads.projections[0].index[1].tolist() == [*range(8, 16), *range(40, 48), *range(72, 80)]


@pytest.mark.parametrize("kind", ["net", "mha", "fused"])
def test_scores_are_sums_over_what_goes_together(kind: str) -> None:
    model = net() if kind == "net" else decoder(kind)
    groups = scored_parts(groups_of(model))
    assert len(groups) == {"net": 4, "mha": 5, "fused": 5}[kind]
    with record_importance(groups) as recorder:
        output_of(model).square().mean().backward()
    model.zero_grad()
    output_of(model).square().mean().backward()
    for group in groups:
        truth = torch.zeros(group.count)
        for projection in group.projections:
            products = (projection.weight * projection.linear.weight.grad).abs().detach()
            lines = products.sum(1 if projection.axis == "row" else 0)
            own = torch.arange(len(lines)).view(group.count, -1) if projection.index is None else projection.index
            truth += lines[own].sum(1)
        torch.testing.assert_close(recorder.scores()[group.name], truth, rtol=1e-4, atol=1e-8)


def test_shared_heads_end_with_an_error_and_the_rest_is_found() -> None:
    model = decoder("gqa")
    with pytest.raises(
        ValueError, match=r"outputs of 'model.layers.0.self_attn.q_proj' leaves the \d+ rows of a Linear"
    ):
        groups_of(model)
    attention = [
        projection
        for layer in model.model.layers
        for projection in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj)
    ]
    found = {group.name: group.count for group in groups_of(model, ignored_layers=attention)}
    mlps = {f"model.layers.{number}.mlp.gate_proj": 40 for number in range(2)}
    assert found == {"model.embed_tokens": 32, **mlps}


def test_parameters_that_the_graph_does_not_know_are_refused() -> None:
    model = GPT2LMHeadModel(GPT2Config(vocab_size=61, n_embd=32, n_layer=1, n_head=4, n_positions=16)).eval()
    with pytest.raises(ValueError, match=r"parameter of shape .* of a Conv1D, whose outputs and inputs"):
        dependency_groups(
            model,
            {"input_ids": IDS, "use_cache": False},
            root_module_types=[nn.Embedding],
            output_transform=lambda output: output.logits,
        )


class _Scaled(nn.Module):
    """Scales by a vector of its own between two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 16)
        self.scale = nn.Parameter(torch.ones(16))
        self.head = nn.Linear(16, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.inner(x) * self.scale)


class _Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 16)
        self.lstm = nn.LSTM(16, 12, batch_first=True)
        self.head = nn.Linear(12, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.lstm(self.inner(x))[0])


@pytest.mark.parametrize(("model", "kind"), [(_Scaled(), "_Scaled"), (_Recurrent(), "LSTM")])
def test_layers_that_cannot_be_cut_are_refused_by_name(model: Any, kind: str) -> None:
    inputs = torch.randn(2, 5, 8)
    with pytest.raises(ValueError, match=rf"outputs of 'inner' go with a {kind}: .*Name layers .* in ignored_layers"):
        dependency_groups(model, inputs, ignored_layers=[model.head])
    assert dependency_groups(model, inputs, ignored_layers=[model.head, model.inner]) == []


def test_groups_of_a_vision_transformer() -> None:
    config = ViTConfig(
        hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4, image_size=6, patch_size=3
    )
    model: Any = ViTForImageClassification(config).eval()
    outputs = [module for name, module in model.named_modules() if name.endswith(("o_proj", "attention.output.dense"))]
    assert len(outputs) == 2
    options: dict[str, Any] = {"num_heads": dict.fromkeys(outputs, 4), "output_transform": lambda output: output.logits}
    with pytest.raises(ValueError, match=r"a parameter of shape \(1, .*, 32\) of a ViT"):
        dependency_groups(model, IMAGES, **options)
    patches = next(module for module in model.modules() if isinstance(module, nn.Conv2d))
    groups = dependency_groups(model, IMAGES, ignored_layers=[patches, model.classifier], **options)
    assert sorted(group.count for group in groups) == [4, 4, 40, 40]
    channels = [group for group in groups if group.count == 40]
    with torch.no_grad():
        for group in channels:
            column = next(p.linear for p in group.projections if p.axis == "column")
            column.weight[:, [2, 5]] = 0
        masked = model(IMAGES).logits
        Compactor(groups).remove({group.name: [2, 5] for group in channels})
        torch.testing.assert_close(model(IMAGES).logits, masked)
