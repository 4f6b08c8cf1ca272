"""Our Taylor importance in LLM-Pruner's pruner chooses what theirs does, in every setting they have."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm

pytest.importorskip("LLMPruner", reason="needs LLM-Pruner, which has no package: put its checkout on PYTHONPATH")
peer = pytest.importorskip("LLMPruner.pruner.hf_llama_pruner", exc_type=ImportError)
tp = pytest.importorskip("LLMPruner.torch_pruning")

from gisp_kernels.adapters.llm_pruner import TaylorImportance  # noqa: E402

IDS = torch.arange(48).view(4, 12)
KINDS = ["vectorize", "param_first", "param_second", "param_mix"]


def decoder(tied: bool = False) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=61,
        hidden_size=32,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        tie_word_embeddings=tied,
    )
    return LlamaForCausalLM(config).eval()


def loss_of(model: Any, ids: torch.Tensor) -> torch.Tensor:
    loss: torch.Tensor = model(input_ids=ids, labels=ids, use_cache=False).loss
    return loss


def pass_as_theirs(model: Any, taylor: str) -> None:
    """The backward passes of their ``hf_prune.py``."""
    model.zero_grad()
    if taylor in ("param_mix", "param_second"):
        for row in IDS:
            loss_of(model, row[None]).backward()
            for parameter in model.parameters():
                square = parameter.grad * parameter.grad / len(IDS)
                parameter.acc_grad = getattr(parameter, "acc_grad", 0) + square
            model.zero_grad()
    loss_of(model, IDS).backward()


def pass_as_ours(importance: TaylorImportance, model: Any, taylor: str) -> None:
    model.zero_grad()
    if taylor in ("param_mix", "param_second"):
        with importance.record_examples():
            for row in IDS:
                loss_of(model, row[None]).backward()
    if taylor != "param_second":
        model.zero_grad()
        with importance.record():
            loss_of(model, IDS).backward()


def hidden_group(model: Any) -> Any:
    """What goes with a channel of the residual stream, as their dependency graph lists it."""
    found = []
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        found += [(layer.input_layernorm, peer.hf_rmsnorm_pruner.prune_out_channels)]
        found += [(m, tp.prune_linear_in_channels) for m in (attention.q_proj, attention.k_proj, attention.v_proj)]
        found += [(m, tp.prune_linear_out_channels) for m in (attention.o_proj, mlp.down_proj)]
        found += [(m, peer.hf_linear_pruner.prune_in_channels) for m in (mlp.gate_proj, mlp.up_proj)]
    found += [(model.model.embed_tokens, tp.prune_embedding_out_channels), (model.lm_head, tp.prune_linear_in_channels)]
    return [(_Dependency(m, handler), list(range(32))) for m, handler in found]


class _Dependency:
    def __init__(self, module: Any, handler: Any) -> None:
        self.target = type("Target", (), {"module": module})()
        self.handler = handler


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("taylor", KINDS)
def test_scores_of_the_hidden_size(taylor: str, tied: bool) -> None:
    theirs = decoder(tied)
    ours = copy.deepcopy(theirs)
    recorded = TaylorImportance(ours, taylor=taylor)
    pass_as_theirs(theirs, taylor)
    pass_as_ours(recorded, ours, taylor)
    for reduction in ("sum", "mean", "max", "prod", "first", "second", None):
        expected = peer.TaylorImportance(group_reduction=reduction, taylor=taylor)(hidden_group(theirs))
        importance = TaylorImportance(ours, taylor=taylor, group_reduction=reduction)
        importance._lines = recorded._lines
        actual = importance(hidden_group(ours))
        assert actual is not None
        if reduction != "prod":
            torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-7)
        assert torch.equal(actual.argsort(), expected.argsort()), reduction


@pytest.mark.parametrize("taylor", KINDS)
@pytest.mark.parametrize("global_pruning", [False, True])
def test_their_pruner_chooses_the_same(taylor: str, global_pruning: bool) -> None:
    theirs = decoder()
    ours = copy.deepcopy(theirs)
    pruners = []
    for model, importance in (
        (theirs, peer.TaylorImportance(group_reduction="sum", taylor=taylor)),
        (ours, TaylorImportance(ours, group_reduction="sum", taylor=taylor)),
    ):
        pruners.append(
            tp.pruner.MetaPruner(
                model,
                IDS[:1],
                importance=importance,
                output_transform=lambda out: out.logits,
                global_pruning=global_pruning,
                iterative_steps=1,
                ch_sparsity=0.5,
                ignored_layers=[],
                channel_groups={},
                consecutive_groups={layer.self_attn.q_proj: 8 for layer in model.model.layers},
                customized_pruners={LlamaRMSNorm: peer.hf_rmsnorm_pruner},
                root_module_types=None,
                root_instances=[
                    m for layer in model.model.layers for m in (layer.self_attn.q_proj, layer.mlp.gate_proj)
                ],
            )
        )
    pass_as_theirs(theirs, taylor)
    pass_as_ours(pruners[1].importance, ours, taylor)
    for pruner in pruners:
        pruner.step()
    assert sum(p.numel() for p in ours.parameters()) < sum(p.numel() for p in decoder().parameters())
    for (name, one), other in zip(theirs.named_parameters(), ours.parameters(), strict=True):
        assert torch.equal(one, other), name


def test_what_was_not_recorded_is_refused() -> None:
    model = decoder()
    importance = TaylorImportance(model, taylor="param_mix")
    with pytest.raises(
        RuntimeError, match=r"'param_mix' needs backward passes inside record\(\) and record_examples\(\)"
    ):
        importance(hidden_group(model))
    with pytest.raises(RuntimeError, match="no backward pass was recorded"), importance.record():
        pass
