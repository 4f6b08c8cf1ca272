"""Our Taylor importance in the pruners of Torch-Pruning chooses what theirs does, in every setting they have."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, Phi3Config, Phi3ForCausalLM

tp = pytest.importorskip("torch_pruning", reason="needs Torch-Pruning: pip install '.[torch-pruning]'")

from gisp_kernels.adapters.torch_pruning import TaylorImportance  # noqa: E402

REDUCTIONS = ["sum", "mean", "max", "prod", "first", "gate", None]
NORMALIZERS: list[Any] = [None, "sum", "standarization", "mean", "max", "gaussian", "sentinel_0.5", "lamp"]


def halved(scores: torch.Tensor) -> torch.Tensor:
    return scores / 2


class Net(nn.Module):
    """Convolutions, both norms, a residual stream and Linear layers behind a flattening."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8))
        self.into = nn.Linear(8 * 4, 12)
        self.norm, self.mix = nn.LayerNorm(12), nn.Linear(12, 12)
        self.head = nn.Sequential(nn.Linear(12, 10), nn.GELU(), nn.Linear(10, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.into(self.stem(x).flatten(1))
        out: torch.Tensor = self.head(x + self.mix(self.norm(x)))
        return out


def net() -> Net:
    torch.manual_seed(0)
    return Net()


IMAGES = torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(1))


def groups_of(model: Any) -> list[Any]:
    graph = tp.DependencyGraph().build_dependency(model, example_inputs=IMAGES)
    last = model.head[2]
    return list(graph.get_all_groups(ignored_layers=[last], root_module_types=[nn.Conv2d, nn.Linear]))


@pytest.mark.parametrize("multivariable", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_scores_of_groups_in_every_setting(multivariable: bool, bias: bool) -> None:
    theirs, ours = net(), net()
    ours.load_state_dict(theirs.state_dict())
    recorded = TaylorImportance(ours, multivariable=multivariable)
    for images in IMAGES.split(2):
        theirs(images).square().sum().backward()
    with recorded.record() as recorder:
        for images in IMAGES.split(2):
            ours(images).square().sum().backward()
    assert recorder.backward_calls == 2
    assert all(m.weight.grad is None for m in ours.modules() if isinstance(m, nn.Linear))
    found = list(zip(groups_of(theirs), groups_of(ours), strict=True))
    assert len(found) > 2
    for reduction, normalizer in itertools.product(REDUCTIONS, [*NORMALIZERS, halved]):
        if reduction is None and str(normalizer).startswith("sentinel"):
            continue  # theirs takes a row for a score
        options: dict[str, Any] = {"group_reduction": reduction, "normalizer": normalizer}
        options |= {"multivariable": multivariable, "bias": bias}
        expected, actual = tp.importance.TaylorImportance(**options), TaylorImportance(ours, **options)
        actual._lines = recorded._lines
        for one, other in found:
            try:
                true = expected(one)
            except RuntimeError:  # theirs cannot stack layers behind a flattening
                assert reduction is None
                continue
            mine = actual(other)
            assert mine is not None
            # A product multiplies the relative errors of signed sums, LAMP divides by differences of sums.
            if reduction != "prod" and normalizer != "lamp":
                torch.testing.assert_close(mine, true, rtol=2e-4, atol=1e-6, msg=f"{reduction} {normalizer}")
            assert torch.equal(mine.argsort(), true.argsort()), (reduction, normalizer)


Step = Callable[[nn.Module], torch.Tensor]


def assert_same_choice(
    model: Any, loss: Step, inputs: Any, settings: Callable[[Any], dict[str, Any]], **own: Any
) -> None:
    """Prune a model and its copy in two steps, by their importance and ours."""
    other = copy.deepcopy(model)
    theirs, ours = tp.importance.TaylorImportance(**own), TaylorImportance(other, **own)
    pruners = [
        tp.pruner.BasePruner(m, inputs, importance=imp, pruning_ratio=0.5, iterative_steps=2, **settings(m))
        for m, imp in ((model, theirs), (other, ours))
    ]
    before = sum(p.numel() for p in model.parameters())
    for _ in range(2):
        model.zero_grad()
        other.zero_grad()
        loss(model).backward()
        with ours.record():
            loss(other).backward()
        for pruner in pruners:
            pruner.step()
    assert sum(p.numel() for p in model.parameters()) < before
    for (name, one), two in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(one, two), name
    assert torch.isfinite(loss(other))


@pytest.mark.parametrize(
    "settings", [{}, {"global_pruning": True}, {"global_pruning": True, "isomorphic": True}], ids=str
)
@pytest.mark.parametrize("multivariable", [False, True])
def test_pruners_choose_the_same(settings: dict[str, Any], multivariable: bool) -> None:
    assert_same_choice(
        net(),
        lambda m: m(IMAGES).square().sum(),
        IMAGES,
        lambda m: {"ignored_layers": [m.head[2]], **settings},
        multivariable=multivariable,
    )


def decoder(kind: str) -> Any:
    shape: dict[str, Any] = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2}
    shape |= {"num_attention_heads": 4, "max_position_embeddings": 32, "attn_implementation": "sdpa"}
    torch.manual_seed(0)
    if kind == "fused":
        return Phi3ForCausalLM(Phi3Config(num_key_value_heads=4, pad_token_id=0, **shape)).eval()
    heads = 2 if "gqa" in kind else 4
    return LlamaForCausalLM(LlamaConfig(num_key_value_heads=heads, tie_word_embeddings="tied" in kind, **shape)).eval()


def attention_settings(model: Any) -> dict[str, Any]:
    heads, groups, config = {}, {}, model.config
    for layer in model.model.layers:
        attention = layer.self_attn
        if hasattr(attention, "qkv_proj"):
            heads[attention.qkv_proj] = config.num_attention_heads
            groups[layer.mlp.gate_up_proj] = 2
        else:
            heads[attention.q_proj] = config.num_attention_heads
            heads[attention.k_proj] = heads[attention.v_proj] = config.num_key_value_heads
    return {"num_heads": heads, "out_channel_groups": groups}


def groups_of_decoder(model: Any, ids: torch.Tensor, importance: Any) -> list[Any]:
    """Hidden size and channels, and without shared key/value heads, whose graph theirs does not finish, heads."""
    inputs = {"input_ids": ids, "use_cache": False}
    types = [nn.Linear, nn.Embedding]
    if model.config.num_key_value_heads == model.config.num_attention_heads:
        pruner = tp.pruner.BasePruner(
            model,
            inputs,
            importance=importance,
            output_transform=lambda out: out.logits,
            root_module_types=types,
            **attention_settings(model),
        )
        return list(pruner.DG.get_all_groups(root_module_types=types))
    graph = tp.DependencyGraph().build_dependency(model, inputs, output_transform=lambda out: out.logits)
    found = [graph.get_pruning_group(model.model.embed_tokens, tp.prune_embedding_out_channels, list(range(32)))]
    for layer in model.model.layers:
        found.append(graph.get_pruning_group(layer.mlp.gate_proj, tp.prune_linear_out_channels, list(range(40))))
    return found


@pytest.mark.parametrize("kind", ["mha", "gqa", "mha tied", "gqa tied", "fused"])
def test_scores_of_decoders(kind: str) -> None:
    theirs = decoder(kind)
    ours = copy.deepcopy(theirs)
    ids = torch.arange(24).view(2, 12)
    for multivariable in (False, True):
        theirs.zero_grad()
        theirs(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        importance = TaylorImportance(ours, multivariable=multivariable)
        with importance.record():
            ours(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        expected = tp.importance.TaylorImportance(multivariable=multivariable)
        found = [groups_of_decoder(m, ids, expected) for m in (theirs, ours)]
        assert len(found[0]) == len(found[1]) >= 3
        for one, other in zip(*found, strict=True):
            true, mine = expected(one), importance(other)
            torch.testing.assert_close(mine, true, rtol=5e-4, atol=1e-6)
            assert mine is not None
            # Scores that differ by a rounding may trade places.
            torch.testing.assert_close(true[mine.argsort()], true.sort().values, rtol=1e-5, atol=1e-7)
        ours.zero_grad()


def test_what_was_not_recorded_is_refused() -> None:
    model = net()
    importance = TaylorImportance(model)
    groups = groups_of(model)
    with pytest.raises(RuntimeError, match=r"nothing was recorded: call loss.backward"):
        importance(groups[0])
    with pytest.raises(RuntimeError, match=r"no backward pass was recorded"), importance.record():
        model(IMAGES)
    with importance.record():
        model(IMAGES).sum().backward()
    last = next(group for group in groups if any(dep.target.module is model.into for dep, _ in group))
    last.prune(list(range(4)))
    with pytest.raises(RuntimeError, match=r"a Linear of \(8, .*was .*when it was recorded: record anew after a step"):
        importance(groups_of(model)[1])
