"""What recorders score of whole models of transformers, as autograd's own weight gradients have it, and what not."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from recorder_oracle import Block, grad_of
from torch import nn

from gisp_kernels import Compactor, Projection, StructureGroup, iter_groups, record_importance, record_lines

SMALL: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
}
LATENT: dict[str, Any] = {
    "moe_intermediate_size": 12,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 6,
    "num_key_value_heads": 4,
}


def causal(kind: str, **config: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        settings = getattr(transformers, f"{kind}Config")(**(SMALL | config))
        return getattr(transformers, f"{kind}ForCausalLM")(settings)

    return build


VIT = transformers.ViTConfig(
    hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4, image_size=8, patch_size=4
)


def vit() -> nn.Module:
    return transformers.ViTForImageClassification(VIT)


def t5() -> nn.Module:
    config = transformers.T5Config(vocab_size=40, d_model=16, d_kv=4, d_ff=24, num_layers=2, num_heads=4)
    config.decoder_start_token_id = 0
    return transformers.T5ForConditionalGeneration(config)


def gpt2() -> nn.Module:
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=40, n_embd=16, n_layer=2, n_head=4, n_positions=32)
    )


def loss_of(model: nn.Module, seed: int = 0) -> torch.Tensor:
    random = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, 40, (2, 9), generator=random)
    if "ViT" in type(model).__name__:
        return model(pixel_values=torch.randn(2, 3, 8, 8, generator=random)).logits.pow(2).mean()
    return model(input_ids=ids, labels=ids).loss


def true_scores(model: nn.Module, groups: list[StructureGroup], power: int = 1) -> dict[str, torch.Tensor]:
    """The definition: ``|W * G| ** power`` summed over the elements of each structure, structure by structure."""
    weights = [getattr(p.linear, p.parameter) for group in groups for p in group.projections]
    grads = dict(zip(map(id, weights), torch.autograd.grad(loss_of(model), weights), strict=True))
    scores = {}
    for group in groups:
        total = torch.zeros(group.count, dtype=torch.float64)
        for p in group.projections:
            stored = getattr(p.linear, p.parameter)
            products = (stored.double() * grads[id(stored)].double()).abs().detach() ** power
            if "GptOss" in type(p.linear).__name__:
                products = products.transpose(-1, -2)
            lines = products.sum(-1 if p.axis == "row" else -2).flatten()
            own = p.index if p.index is not None else torch.arange(p.width).view(group.count, -1)
            total += torch.stack([lines[lines_of_one].sum() for lines_of_one in own])
        scores[group.name] = total
    return scores


MODELS: dict[str, Callable[[], nn.Module]] = {
    "llama": causal("Llama", num_key_value_heads=4),
    "llama-gqa": causal("Llama"),
    "mixtral": causal("Mixtral", num_local_experts=4, num_experts_per_tok=2),
    "qwen3-moe": causal("Qwen3Moe", num_experts=4, num_experts_per_tok=2, moe_intermediate_size=12, head_dim=4),
    "qwen2-moe": causal(
        "Qwen2Moe", num_experts=4, num_experts_per_tok=2, moe_intermediate_size=12, shared_expert_intermediate_size=12
    ),
    "gpt-oss": causal("GptOss", num_local_experts=4, num_experts_per_tok=2, head_dim=4),
    "deepseek-v3": causal("DeepseekV3", q_lora_rank=8, **LATENT),
    "deepseek-v3-without-q-latent": causal("DeepseekV3", q_lora_rank=None, **LATENT),
    "opt": causal("OPT", ffn_dim=24, word_embed_proj_dim=16),
    "t5": t5,
    "vit": vit,
}


@pytest.mark.parametrize("keep_grad", [False, True], ids=["scored", "kept"])
@pytest.mark.parametrize("name", MODELS)
def test_every_structure_of_a_model_is_scored(name: str, keep_grad: bool) -> None:
    model = MODELS[name]().eval()
    groups = list(iter_groups(model))
    truth = true_scores(model, groups, power=1 + keep_grad)
    with record_importance(model, keep_grad=keep_grad, power=1 + keep_grad) as recorder:
        loss_of(model).backward()
    scores = recorder.scores()
    assert scores.keys() == truth.keys()
    for group, expected in truth.items():
        torch.testing.assert_close(scores[group].double(), expected, rtol=1e-4, atol=1e-12, msg=group)
    coverage = recorder.coverage()
    assert not coverage.unscored
    assert not coverage.unreached
    assert 0 < coverage.share <= 1
    assert coverage.parameters == sum(p.numel() for p in model.parameters())
    if not keep_grad:
        assert all(getattr(p.linear, p.parameter).grad is None for group in groups for p in group.projections)
    else:
        plain = copy.deepcopy(model)
        plain.zero_grad()
        loss_of(plain).backward()
        for (path, kept), own in zip(model.named_parameters(), plain.parameters(), strict=True):
            assert (kept.grad is None) == (own.grad is None), path
            assert own.grad is None or torch.equal(grad_of(kept), own.grad), path


def test_what_each_rule_leaves_out() -> None:
    left_out = {
        "llama-gqa": {"one dimension", "embedding", "output", "shared by heads"},
        "mixtral": {"one dimension", "embedding", "output", "shared by heads", "router"},
        "deepseek-v3": {"one dimension", "embedding", "output", "shared by heads", "router"},
        "vit": {"one dimension", "embedding", "output"},
        "t5": {"one dimension", "embedding"},
    }
    for name, rules in left_out.items():
        coverage = record_importance(MODELS[name]()).coverage()
        assert set(coverage.excluded.values()) == rules, name
        scored = set(coverage.scored)
        assert not scored & coverage.excluded.keys()


def test_routers_inside_a_module_of_their_own_need_no_scores() -> None:
    build = causal("HunYuanMoEV1", num_experts=4, moe_topk=2, head_dim=4)
    excluded = record_importance(build()).coverage().excluded
    assert excluded["model.layers.0.mlp.gate.wg.weight"] == "router"


@pytest.mark.parametrize(
    ("build", "named"),
    [
        (gpt2, "transformer.h.0.attn.c_attn.weight, transformer.h.0.attn.c_proj.weight"),
        (causal("Phi3"), "self_attn.o_proj.weight, .*qkv_proj.weight, .*gate_up_proj.weight"),
        (lambda: transformers.ViTModel(VIT), "1 weights of ViTModel would not be scored: pooler.dense.weight"),
    ],
    ids=["gpt2", "phi3", "pooler"],
)
def test_weights_nobody_scores_are_named(build: Callable[[], nn.Module], named: str) -> None:
    model = build()
    if not list(iter_groups(model)):
        with pytest.raises(ValueError, match=r"no attention .* pass StructureGroups or nn.Linear layers"):
            record_importance(model)
        model = nn.ModuleList([Block(), model])
    with pytest.raises(ValueError, match=named):
        record_importance(model)
    recorder = record_importance(model, strict=False)
    coverage = recorder.coverage()
    assert coverage.unscored
    again = record_importance(model, ignore=coverage.unscored).coverage()
    assert not again.unscored
    assert again.scored == coverage.scored
    assert {again.excluded[name] for name in coverage.unscored} == {"ignored"}


def test_phi3_by_an_index() -> None:
    model: Any = causal("Phi3")().eval()
    groups = []
    for number, layer in enumerate(model.model.layers):
        rows = torch.arange(48)
        index = torch.stack([rows[:24], rows[24:]], 1)
        groups += [
            StructureGroup(
                f"{number}.mlp",
                (Projection(layer.mlp.gate_up_proj, "row", index=index), Projection(layer.mlp.down_proj, "column")),
                "channels",
            ),
            StructureGroup(
                f"{number}.heads",
                (
                    Projection(layer.self_attn.qkv_proj, "row", index=torch.arange(16).view(4, 4)),
                    Projection(layer.self_attn.o_proj, "column", 4),
                ),
                "heads",
            ),
        ]
    truth = true_scores(model, groups)
    with record_importance(groups) as recorder:
        loss_of(model).backward()
    for name, expected in truth.items():
        torch.testing.assert_close(recorder.scores()[name].double(), expected, rtol=1e-4, atol=0.0)
    channels = [group for group in groups if group.kind == "channels"]
    compactor = Compactor(channels)
    ids = torch.arange(8)[None]
    with torch.no_grad():
        dense = model(ids).logits
        weights = [group.projections[1].linear.weight for group in channels]
        kept = [weight[:, [1, 3]].clone() for weight in weights]
        for weight in weights:
            weight[:, [1, 3]] = 0
        masked = model(ids).logits
        compactor.remove({group.name: [1, 3] for group in channels})
        torch.testing.assert_close(model(ids).logits, masked)
        compactor.rollback()
        for weight, columns in zip(weights, kept, strict=True):
            weight[:, [1, 3]] = columns
        assert torch.equal(model(ids).logits, dense)


def test_gpt2_by_lines() -> None:
    model = gpt2().eval()
    loss_of(model).backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    with record_lines(model) as recorder:
        loss_of(model).backward()
    assert not recorder.coverage().unscored
    for name, module in model.named_modules():
        if type(module).__name__ == "Conv1D":
            truth = (module.weight * grads[f"{name}.weight"]).abs().double().detach()
            torch.testing.assert_close(recorder.scores_of(module, "row").double(), truth.sum(0), rtol=1e-4, atol=0.0)
            torch.testing.assert_close(recorder.scores_of(module, "column").double(), truth.sum(1), rtol=1e-4, atol=0.0)


def test_lines_of_a_model_with_experts_name_the_experts() -> None:
    with pytest.raises(ValueError, match=r"mlp\.experts\.gate_up_proj, .*mlp\.experts\.down_proj"):
        record_lines(MODELS["mixtral"]())


@pytest.mark.parametrize("name", ["mixtral", "deepseek-v3", "gpt-oss"])
def test_frozen_experts_are_scored(name: str) -> None:
    model = MODELS[name]().eval()
    truth = true_scores(model, list(iter_groups(model)))
    model.requires_grad_(False)
    with record_importance(model) as recorder:
        loss_of(model).backward()
    for group, expected in truth.items():
        torch.testing.assert_close(recorder.scores()[group].double(), expected, rtol=1e-4, atol=1e-12)
    assert not any(p.requires_grad or p.grad is not None for p in model.parameters())


def test_experts_have_no_uses_to_predict_from() -> None:
    with pytest.raises(ValueError, match=r"'second-order' scores the forward of a plain nn.Linear"):
        record_importance(MODELS["mixtral"](), mode="second-order")


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
def test_experts_are_scored_by_every_implementation(implementation: str) -> None:
    model = MODELS["mixtral"]().eval()
    truth = true_scores(model, list(iter_groups(model)))
    model.set_experts_implementation(implementation)  # type: ignore[operator]
    with record_importance(model, mode="exact") as recorder:
        loss_of(model).backward()
    for name, expected in truth.items():
        torch.testing.assert_close(recorder.scores()[name].double(), expected, rtol=1e-3, atol=1e-9)


def test_groups_that_no_pass_reached_are_told() -> None:
    blocks = nn.ModuleList([Block(), Block()])
    with record_importance(blocks) as recorder:
        blocks[0].loss(torch.randn(1, 3, 16)).backward()  # type: ignore[operator]
    assert recorder.coverage().unreached == ("1.attn", "1.mlp")
    recorder.reset()
    assert len(recorder.coverage().unreached) == 4


def test_coverage_of_explicit_layers_is_all_of_them() -> None:
    linear = nn.Linear(4, 6)
    index = torch.tensor([[0, 1], [2, 3]])
    partial = StructureGroup("g", (Projection(linear, "row", index=index),))
    assert record_importance([linear]).coverage().share == 1
    coverage = record_importance([partial]).coverage()
    assert (coverage.scored_parameters, coverage.parameters) == (16, 24)


def test_adapters_of_peft() -> None:
    peft = pytest.importorskip("peft")
    model = causal("Llama")().eval()
    names = ["q_proj", "v_proj", "o_proj", "up_proj", "down_proj"]
    wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=names, init_lora_weights=False))
    plain = copy.deepcopy(wrapped)
    plain.requires_grad_(True)
    truth = true_scores(plain, list(iter_groups(plain)))
    loss = loss_of(wrapped)
    loss.backward()
    grads = {name: p.grad.clone() for name, p in wrapped.named_parameters() if p.grad is not None}
    for keep_grad in (False, True):
        wrapped.zero_grad()
        with record_importance(wrapped, keep_grad=keep_grad) as recorder:
            loss_of(wrapped).backward()
        coverage = recorder.coverage()
        assert not coverage.unscored
        assert {rule for name, rule in coverage.excluded.items() if "lora_" in name} == {"adapter"}
        for name, expected in truth.items():
            torch.testing.assert_close(recorder.scores()[name].double(), expected, rtol=1e-4, atol=0.0)
        assert grads
        assert all(torch.equal(p.grad, grads[name]) for name, p in wrapped.named_parameters() if name in grads)
    layer = wrapped.base_model.model.model.layers[0].self_attn.q_proj
    with record_lines(wrapped) as lines:
        loss_of(wrapped).backward()
    assert lines.scores_of(layer, "row").shape == (16,)
    assert not any("lora" in name for name in lines.scores())


def test_modules_that_peft_trains_whole() -> None:
    peft = pytest.importorskip("peft")
    trained = peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head", "embed_tokens"])
    excluded = record_importance(peft.get_peft_model(causal("Llama")(), trained)).coverage().excluded
    for copy_of in ("original_module", "modules_to_save.default"):
        assert excluded[f"base_model.model.lm_head.{copy_of}.weight"] == "output"
        assert excluded[f"base_model.model.model.embed_tokens.{copy_of}.weight"] == "embedding"
    trained = peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["down_proj"])
    with pytest.raises(ValueError, match=r"would not be scored: .*mlp\.down_proj\.original_module\.weight"):
        record_importance(peft.get_peft_model(causal("Llama")(), trained))
