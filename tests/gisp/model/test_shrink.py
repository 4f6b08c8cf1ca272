"""A physically shrunk model computes what the masked one computes, and goes back exactly."""

from __future__ import annotations

import copy
import io
import pickle
import re

import pytest
import torch
from tiny import FAMILIES, tiny_model, tiny_tokens

from gisp.errors import GispError
from gisp.model.shrink import ShrinkableModel
from gisp.model.structures import map_model

REMOVAL = {
    "layers.0.heads": torch.tensor([0, 3]),
    "layers.1.heads": torch.tensor([0, 1]),
    "layers.1.channels": torch.tensor([0, 5, 6, 23]),
    "layers.2.heads": torch.tensor([0, 1, 2, 3]),
    "layers.2.channels": torch.arange(24),
}


def masked(model, removal):
    """The same model with the outgoing weights of removed structures zeroed."""
    model = copy.deepcopy(model)
    for name, index in removal.items():
        _, layer, kind = name.split(".")
        block = model.model.layers[int(layer)]
        with torch.no_grad():
            if kind == "heads":
                head_dim = block.self_attn.head_dim
                for head in index.tolist():
                    block.self_attn.o_proj.weight[:, head * head_dim : (head + 1) * head_dim] = 0
            else:
                block.mlp.down_proj.weight[:, index] = 0
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_the_masked_model_and_rollback_is_exact(family):
    model = tiny_model(family)
    ids = tiny_tokens(3)
    with torch.no_grad():
        dense = model(ids).logits
        expected = masked(model, REMOVAL)(ids).logits
        shrinkable = ShrinkableModel(map_model(model))
        before = sum(p.numel() for p in model.parameters())
        untouched = model(ids).logits
        shrinkable.remove({"layers.0.heads": torch.tensor([3])})
        shrinkable.remove({**REMOVAL, "layers.0.heads": torch.tensor([0])})
        shrunk = model(ids).logits
        assert sum(p.numel() for p in model.parameters()) < before
        shrinkable.rollback(2)
        restored = model(ids).logits
    torch.testing.assert_close(shrunk, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
    assert torch.equal(restored, untouched)
    torch.testing.assert_close(untouched, dense, rtol=0, atol=1e-5 * float(dense.abs().max()))


@pytest.mark.parametrize("family", ["llama-mha", "llama-gqa"])
def test_generation_with_a_cache_survives_a_first_layer_without_heads(family):
    model = tiny_model(family)
    ids = tiny_tokens(1, 5)
    removal = {"layers.0.heads": torch.arange(4), "layers.1.heads": torch.tensor([2])}
    expected = masked(model, removal).generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0)
    ShrinkableModel(map_model(model)).remove(removal)
    assert torch.equal(model.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0), expected)


def test_packed_steps_cannot_be_undone_and_say_so():
    model = tiny_model()
    shrinkable = ShrinkableModel(map_model(model))
    shrinkable.remove({"layers.1.channels": torch.tensor([1, 2])})
    with torch.no_grad():
        before = model(tiny_tokens(2)).logits
        shrinkable.pack()
        after = model(tiny_tokens(2)).logits
    assert torch.equal(before, after)
    with pytest.raises(GispError, match="cannot be undone"):
        shrinkable.rollback(1)


def test_gradient_of_shared_keys_equals_repeated_keys():
    from gisp.model.attention import _ExpandKeyValue

    x = torch.randn(2, 3, 5, 4, dtype=torch.float64, requires_grad=True)
    index = torch.tensor([2, 0, 0, 2])
    weight = torch.randn(2, 4, 5, 4, dtype=torch.float64)
    (_ExpandKeyValue.apply(x, index) * weight).sum().backward()
    expected = torch.zeros_like(x).index_add_(1, index, weight)
    torch.testing.assert_close(x.grad, expected)


def test_groups_found_on_a_pruned_model_leave_shared_keys_alone():
    from gisp_kernels import iter_groups

    model = tiny_model("llama-gqa")
    ShrinkableModel(map_model(model)).remove({"layers.1.heads": torch.tensor([0, 3])})
    groups = {group.name: group for group in iter_groups(model)}
    pruned = groups["model.layers.1.self_attn"]
    assert pruned.count == 2
    assert [p.linear for p in pruned.projections] == [
        model.model.layers[1].self_attn.q_proj,
        model.model.layers[1].self_attn.o_proj,
    ]


def test_a_graph_built_before_pack_notices_a_later_removal():
    model = tiny_model("llama-mha")
    shrinkable = ShrinkableModel(map_model(model))
    shrinkable.remove({"layers.1.channels": torch.tensor([0, 1])})
    shrinkable.pack()
    loss = model(tiny_tokens(2)).logits.sum()
    shrinkable.remove({"layers.1.channels": torch.tensor([2, 3])})
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


UNEVEN = {"layers.1.heads": torch.tensor([0, 1, 2])}


@pytest.mark.parametrize("attention", ["eager", "sdpa", "flex_attention", "flash_attention_2", "paged|sdpa"])
def test_attention_that_would_share_uneven_heads_evenly_is_refused(attention):
    model = tiny_model("llama-gqa")
    shrinkable = ShrinkableModel(map_model(model))
    shrinkable.remove({"layers.1.heads": torch.tensor([0, 1])})
    with torch.no_grad():
        before = model(tiny_tokens(2)).logits
        for part in (model, copy.deepcopy(model), model.model):
            with pytest.raises(GispError, match=rf"attention '{re.escape(attention)}' takes no uneven key/value heads"):
                part.set_attn_implementation(attention)
        assert torch.equal(model(tiny_tokens(2)).logits, before)


def test_attention_chosen_while_heads_are_even_serves_as_long_as_they_are():
    model = tiny_model("llama-gqa")
    shrinkable = ShrinkableModel(map_model(model))
    with torch.no_grad():
        model.set_attn_implementation("eager")
        torch.testing.assert_close(model(tiny_tokens(2)).logits, tiny_model("llama-gqa")(tiny_tokens(2)).logits)
        shrinkable.remove({"layers.1.heads": torch.tensor([0, 1])})
        expected = masked(tiny_model("llama-gqa"), {"layers.1.heads": torch.tensor([0, 1])})(tiny_tokens(2)).logits
        torch.testing.assert_close(model(tiny_tokens(2)).logits, expected)


def test_whole_key_value_heads_leave_the_choice():
    model = tiny_model("llama-gqa")
    ShrinkableModel(map_model(model, "group")).remove({"layers.1.heads": torch.tensor([0, 1])})
    with torch.no_grad():
        before = model(tiny_tokens(2)).logits
        model.set_attn_implementation("eager")
        torch.testing.assert_close(model(tiny_tokens(2)).logits, before)


@pytest.mark.parametrize("how", ["compiled", "exported"])
def test_uneven_heads_are_traced_as_one_graph(how):
    model = tiny_model("llama-gqa")
    ShrinkableModel(map_model(model)).remove(UNEVEN)
    with torch.no_grad():
        expected = model(tiny_tokens(2), use_cache=False).logits
        if how == "compiled":
            traced = torch.compile(model, backend="eager", fullgraph=True)
        else:
            traced = torch.export.export(model, (tiny_tokens(2),), {"use_cache": False}, strict=False).module()
        torch.testing.assert_close(traced(tiny_tokens(2), use_cache=False).logits, expected)


@pytest.mark.parametrize("how", ["copied", "pickled", "saved by torch"])
def test_a_copy_moves_by_itself(how):
    model = tiny_model("llama-gqa")
    shrinkable = ShrinkableModel(map_model(model))
    shrinkable.remove(REMOVAL)
    shrinkable.remove({"layers.3.channels": torch.tensor([1])})
    if how == "copied":
        other = copy.deepcopy(model)
    elif how == "pickled":
        other = pickle.loads(pickle.dumps(model))
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    moved = ShrinkableModel.of(other)
    assert moved is not None
    assert moved.map.model is other
    with torch.no_grad():
        pruned = model(tiny_tokens(2)).logits
        assert torch.equal(other(tiny_tokens(2)).logits, pruned)
        moved.rollback(2)
        assert torch.equal(model(tiny_tokens(2)).logits, pruned)
        shrinkable.rollback(2)
        dense = model(tiny_tokens(2)).logits
        assert torch.equal(other(tiny_tokens(2)).logits, dense)
        other.lm_head.weight.zero_()
        other.model.layers[0].mlp.up_proj.weight.zero_()
        assert torch.equal(model(tiny_tokens(2)).logits, dense)


def test_a_model_with_adapters_is_moved_once_they_are_merged():
    peft = pytest.importorskip("peft")
    model = tiny_model("llama-gqa")
    shrinkable = ShrinkableModel(map_model(model))
    shrinkable.remove(REMOVAL)
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules="all-linear"))
    with torch.no_grad():
        before = adapted(tiny_tokens(2)).logits
        for move in (shrinkable.rollback, lambda: shrinkable.remove({"layers.3.channels": torch.tensor([1])})):
            with pytest.raises(GispError, match=r"was replaced: .* model.merge_and_unload\(\)"):
                move()
            assert torch.equal(adapted(tiny_tokens(2)).logits, before)
        adapted.merge_and_unload()
        shrinkable.rollback()
        assert torch.equal(model(tiny_tokens(2)).logits, tiny_model("llama-gqa")(tiny_tokens(2)).logits)
