"""Query heads, balanced query heads, whole key/value heads: what goes, what is left, and that it runs everywhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gqa_oracle
import pytest
import torch
from safetensors.torch import load_file, save_file
from score_cases import gradient_scorer
from tiny import tiny_model, tiny_tokens

import gisp
from gisp.cli import main
from gisp.config.options import GQA_MODES
from gisp.data import Sequences
from gisp.errors import GispError
from gisp.export.run import export_run
from gisp.model.shrink import ShrinkableModel
from gisp.model.structures import map_model
from gisp.target import evaluate_target

SHAPE = {"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 8}
PAPER: dict[str, Any] = {
    "preset": "paper",
    "steps": 5,
    "sparsity": 0.5,
    "device": "cpu",
    "dtype": "float32",
    "protect_last": 0,
}
FAST: dict[str, Any] = {
    "preset": "fast",
    "steps": 6,
    "sparsity": 0.5,
    "device": "cpu",
    "dtype": "float32",
    "protect_last": 0,
}
FAST |= {"align": 4, "batch_tokens": 64}
SHARING = pytest.mark.parametrize("gqa", ["balanced", "group"])


def gqa_model(seed: int = 0, family: str = "llama-gqa", **shape: Any) -> Any:
    return tiny_model(family, seed=seed, **{**SHAPE, **shape})


def kept_heads(trajectory: gisp.Trajectory, layer: int, step: int | None = None) -> torch.Tensor:
    """Whether each query head is kept, by key/value head: bool [KV, heads of each]."""
    at = trajectory.removed_at[f"layers.{layer}.heads"]
    step = len(trajectory.steps) if step is None else step
    return ((at == 0) | (at > step)).view(SHAPE["num_key_value_heads"], -1)


@pytest.mark.parametrize("gqa", GQA_MODES)
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kv_heads", [2, 4])
def test_removals_equal_an_independent_masked_implementation(gqa: str, seed: int, kv_heads: int) -> None:
    model, ids = gqa_model(seed, num_key_value_heads=kv_heads), tiny_tokens(12, 16, seed=seed + 5)
    expected = gqa_oracle.prune(model, ids, gqa, sparsity=0.5, steps=5, protected=set())
    found = gisp.prune(model, ids, gqa=gqa, **PAPER).removed_at
    for layer in range(4):
        assert found[f"layers.{layer}.heads"].tolist() == expected.heads[layer]
        assert found[f"layers.{layer}.channels"].tolist() == expected.channels[layer]
    assert any(any(steps) for steps in expected.heads)


@pytest.mark.parametrize("kind", ["stream", "exact"])
def test_a_key_value_head_scores_the_sum_over_all_its_projections(kind: str) -> None:
    model, ids = gqa_model(), tiny_tokens(6, 16)
    masked = gqa_oracle.Masked(model)
    expected = [
        [sum(masked.head_score(product, 4 * kv + i) for i in range(4)) + masked.kv_score(product, kv) for kv in (0, 1)]
        for product in masked.products(ids)
    ]
    model_map = map_model(model, "group")
    data = Sequences.plain([(row, row) for row in ids])
    scorer = gradient_scorer(model_map, data, engine=kind, batch_size=None, batch_tokens=8192, seed=0)
    scores = scorer.score(1, [item.heads for item in model_map.layers]).scores
    for layer, values in enumerate(expected):
        assert scores[f"layers.{layer}.heads"].tolist() == pytest.approx(values, rel=1e-4)


@pytest.mark.parametrize("gqa", GQA_MODES)
@pytest.mark.parametrize("family", ["llama-gqa", "llama-bias", "qwen2", "qwen3"])
def test_records_speak_of_the_model_that_is_left(gqa: str, family: str) -> None:
    model = gqa_model(family=family)
    dense = sum(p.numel() for p in model.parameters())
    trajectory = gisp.prune(model, tiny_tokens(16, 16), gqa=gqa, **FAST)
    last = trajectory.steps[-1]
    assert dense - sum(p.numel() for p in model.parameters()) == last.removed_parameters
    assert last.removed_parameters <= 0.5 * map_model(gqa_model(family=family)).decoder_parameters
    kept = torch.stack([kept_heads(trajectory, layer) for layer in range(4)])
    assert last.heads_removed == int((~kept).sum()) > 0
    used = kept.any(2).sum()
    assert last.kv_bytes_per_token == 2 * int(used) * 8 * 4
    layers = [layer.self_attn for layer in model.model.layers]
    if gqa == "group":
        assert torch.equal(kept.any(2), kept.all(2))
        assert [a.k_proj.out_features for a in layers] == [8 * int(n) for n in kept.any(2).sum(1)]
        assert [a.v_proj.out_features for a in layers] == [8 * int(n) for n in kept.any(2).sum(1)]
        assert int(kept.any(2).sum(1).min()) >= 1
    else:
        assert {a.k_proj.out_features for a in layers} == {16}
    if gqa == "balanced":
        assert torch.equal(kept.sum(2).amin(1), kept.sum(2).amax(1))
        assert int(kept.sum(2).min()) >= 1


@SHARING
def test_every_step_keeps_the_rule_and_logits_equal_the_masked_model(gqa: str) -> None:
    model, ids = gqa_model(), tiny_tokens(3)
    trajectory = gisp.prune(model, tiny_tokens(16, 16), gqa=gqa, **FAST)
    for step in range(len(trajectory.steps) + 1):
        masked = gqa_oracle.Masked(gqa_model())
        for layer in range(4):
            kept = kept_heads(trajectory, layer, step)
            assert len(set(kept.sum(1).tolist())) == 1 if gqa == "balanced" else torch.equal(kept.any(1), kept.all(1))
            masked.remove_heads(layer, torch.nonzero(~kept.flatten()).flatten().tolist(), 1)
            for channel in set(range(24)) - set(trajectory.keep(step).channels[layer]):
                masked.remove_channel(layer, channel, 1)
        with torch.no_grad():
            expected = masked.model(ids).logits
            got = trajectory.at(trajectory.sparsity_at(step))(ids).logits
        torch.testing.assert_close(got.double(), expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


@SHARING
def test_a_model_moves_down_and_up_bit_for_bit(gqa: str) -> None:
    model, ids = gqa_model(family="qwen2"), tiny_tokens(2)

    def logits() -> torch.Tensor:
        with torch.no_grad():
            return model(ids).logits

    dense = logits()
    trajectory = gisp.prune(model, tiny_tokens(16, 16), gqa=gqa, **FAST)
    small = logits()
    trajectory.at(0)
    assert torch.equal(logits(), dense)
    trajectory.at(0.25)
    trajectory.at()
    assert torch.equal(logits(), small)
    generated = model.generate(ids[:1, :5], max_new_tokens=4, do_sample=False, pad_token_id=0)
    uncached = model.generate(ids[:1, :5], max_new_tokens=4, do_sample=False, pad_token_id=0, use_cache=False)
    assert torch.equal(generated, uncached)


def test_a_model_changes_between_trajectories_of_all_modes() -> None:
    model, ids = gqa_model(), tiny_tokens(2)
    runs = {gqa: gisp.prune(gqa_model(), tiny_tokens(16, 16), gqa=gqa, **FAST) for gqa in GQA_MODES}
    for gqa in ("group", "query", "balanced", "group"):
        with torch.no_grad():
            expected = runs[gqa].at(None)(ids).logits
            got = runs[gqa].at(None, model)(ids).logits
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


def test_without_shared_heads_all_modes_are_one() -> None:
    found = [gisp.prune(tiny_model("llama-mha"), tiny_tokens(16, 16), gqa=gqa, **FAST).removed_at for gqa in GQA_MODES]
    for other in found[1:]:
        assert all(torch.equal(found[0][name], other[name]) for name in found[0])
    assert any(bool(at.any()) for name, at in found[0].items() if name.endswith("heads"))


def test_a_layer_can_lose_all_its_key_value_heads() -> None:
    model, ids = gqa_model(), tiny_tokens(2, 6)
    masked = gqa_oracle.Masked(gqa_model())
    masked.remove_heads(0, list(range(8)), 1)
    masked.remove_heads(1, [4, 5, 6, 7], 1)
    ShrinkableModel(map_model(model, "group")).remove(
        {"layers.0.heads": torch.arange(8), "layers.1.heads": torch.tensor([7, 5, 4, 6])}
    )
    assert model.model.layers[1].self_attn.k_proj.out_features == 8
    with torch.no_grad():
        expected = masked.model(ids).logits
        torch.testing.assert_close(
            model(ids).logits.double(), expected, rtol=0, atol=1e-5 * float(expected.abs().max())
        )
    generated = model.generate(ids, max_new_tokens=5, do_sample=False, pad_token_id=0)
    assert torch.equal(generated, masked.model.generate(ids, max_new_tokens=5, do_sample=False, pad_token_id=0))


def test_half_a_key_value_head_cannot_go() -> None:
    model = gqa_model()
    shrinkable = ShrinkableModel(map_model(model, "group"))
    for heads in ([0, 1], [0, 1, 2, 4], [2, 3, 4, 5]):
        with pytest.raises(GispError, match=r"the 4 heads of a key/value head go together"):
            shrinkable.remove({"layers.1.heads": torch.tensor(heads)})
    assert shrinkable.history == []
    assert shrinkable.kept("layers.1.heads") == 2


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("gqa")
    gqa_model().save_pretrained(root / "model")
    save_file({"input_ids": tiny_tokens(16, 16)}, root / "tokens.safetensors")
    return root / "model", root / "tokens.safetensors"


@SHARING
def test_a_cut_run_resumes_to_the_same_bits(gqa: str, tmp_path: Path, places: tuple[Path, Path]) -> None:
    def cut(record: Any, steps: int) -> None:
        if record.step == 3:
            raise KeyboardInterrupt

    model, tokens = places
    gisp.prune(model, tokens, out=tmp_path / "whole", gqa=gqa, **FAST)
    with pytest.raises(KeyboardInterrupt):
        gisp.prune(model, tokens, out=tmp_path / "cut", gqa=gqa, on_step=cut, **FAST)
    other = "group" if gqa == "balanced" else "balanced"
    with pytest.raises(GispError, match=f"was made with gqa {gqa}, not {other}"):
        gisp.prune(model, tokens, out=tmp_path / "cut", gqa=other, resume=True, **FAST)
    gisp.prune(model, tokens, out=tmp_path / "cut", gqa=gqa, resume=True, **FAST)
    files = ("trajectory.safetensors", "state/step-00006.safetensors")
    for file in files:
        assert (tmp_path / "whole" / file).read_bytes() == (tmp_path / "cut" / file).read_bytes()


@pytest.mark.usefixtures("light_looks")
@pytest.mark.parametrize("gqa", GQA_MODES)
def test_runs_are_evaluated_reported_and_exported(gqa: str, tmp_path: Path, places: tuple[Path, Path]) -> None:
    model, tokens = places
    arguments = ["--preset", "fast", "--steps", "6", "--sparsity", "0.5", "--protect-last", "0", "--align", "4"]
    arguments += ["--batch-tokens", "64", "--device", "cpu", "--dtype", "float32", "--gqa", gqa]
    run = tmp_path / "run"
    assert main(["prune", str(model), "--data", str(tokens), "--out", str(run), *arguments]) == 0
    assert main(["inspect", str(run)]) == 0
    assert main(["report", str(run)]) == 0
    trajectory = gisp.Trajectory.load(run)
    small = evaluate_target(str(run), str(tokens), device="cpu")
    exports = {form: export_run(run, None, tmp_path / form, format=form, device="cpu") for form in ("hf", "masked")}
    for form, export in exports.items():
        result = evaluate_target(str(tmp_path / form), str(tokens), device="cpu", dtype="float32")
        assert result["perplexity"] == pytest.approx(small["perplexity"], rel=1e-4)
        assert export.report.relative_difference <= 1e-5
    kept = [kept_heads(trajectory, layer) for layer in range(4)]
    layout = exports["hf"].report.sizes
    assert [item.heads for item in layout] == [int(k.sum()) for k in kept]
    if gqa != "query":
        # Exactly what is kept, with nothing repeated or filled up.
        assert [item.query_heads for item in layout] == [int(k.sum()) for k in kept]
        assert [item.kv_heads for item in layout] == [int(k.any(1).sum()) for k in kept]
        assert exports["hf"].report.kv_bytes_per_token == trajectory.steps[-1].kv_bytes_per_token
    weights = load_file(tmp_path / "masked" / "model.safetensors")
    for layer, k in enumerate(kept):
        k_proj = weights[f"model.layers.{layer}.self_attn.k_proj.weight"].view(2, 8, -1)
        assert torch.equal(k_proj.any(2).any(1), k.any(1))
