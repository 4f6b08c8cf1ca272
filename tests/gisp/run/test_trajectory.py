"""Runs on disk and in memory: moving a model along them, and refusing what does not belong together."""

from __future__ import annotations

import json

import pytest
import torch
from run_cases import OPTIONS, logits, run_into
from safetensors.torch import load_file, save_file
from tiny import tiny_model, tiny_tokens

import gisp
from gisp.cli import main
from gisp.errors import GispError
from gisp.model.structures import fingerprint
from gisp.run.trajectory import StepRecord
from gisp.target import evaluate_target


def test_a_run_is_no_model(tmp_path, model_folder, token_file):
    run_into(tmp_path / "r", model_folder, token_file)
    for use in (gisp.load, lambda path: gisp.prune(path, token_file)):
        with pytest.raises(GispError, match=r"is a run: export one of its sizes, or gisp\.Trajectory\.load"):
            use(tmp_path / "r")


def test_a_model_moves_down_and_up_bit_for_bit():
    model = tiny_model()
    dense = logits(model)
    trajectory = gisp.prune(model, tiny_tokens(16, 16), **OPTIONS)
    small = logits(model)
    assert trajectory.at(0, model) is model
    assert torch.equal(logits(model), dense)
    trajectory.at(0.15)
    middle = logits(model)
    trajectory.at()
    assert torch.equal(logits(model), small)
    trajectory.at(0.15)
    assert torch.equal(logits(model), middle)


def test_a_pruned_model_follows_another_trajectory_of_its_base():
    model = tiny_model()
    first = gisp.prune(model, tiny_tokens(16, 16), **OPTIONS)
    small = logits(model)
    other = gisp.prune(tiny_model(), tiny_tokens(16, 16, seed=9), **OPTIONS, seed=3)
    assert any(not torch.equal(first.removed_at[n], other.removed_at[n]) for n in first.removed_at)
    other.at(None, model)
    assert not torch.equal(logits(model), small)
    first.at(None, model)
    torch.testing.assert_close(logits(model), small, rtol=0, atol=1e-5 * float(small.abs().max()))


def test_a_model_in_memory_goes_on_after_a_run_that_failed(tmp_path):
    """As the refusal says: in a notebook the model is the same, and there is no trajectory of what was cut."""

    def fail(record: StepRecord, steps: int) -> None:
        if record.step == 2:
            raise ValueError("mine")

    model, tokens = tiny_model(), tiny_tokens(16, 16)
    with pytest.raises(ValueError, match="mine"):
        gisp.prune(model, tokens, out=tmp_path / "run", on_step=fail, **OPTIONS)
    with pytest.raises(GispError, match=r"after a run that failed gisp.Trajectory.load\(RUN\).at\(0, model\)"):
        gisp.prune(model, tokens, out=tmp_path / "run", resume=True, **OPTIONS)
    gisp.Trajectory.load(tmp_path / "run").at(0, model)
    found = gisp.prune(model, tokens, out=tmp_path / "run", resume=True, **OPTIONS)
    whole = gisp.prune(tiny_model(), tokens, **OPTIONS)
    assert all(torch.equal(found.removed_at[name], at) for name, at in whole.removed_at.items())


def test_models_that_cannot_follow_are_refused():
    model = tiny_model()
    trajectory = gisp.prune(model, tiny_tokens(16, 16), **OPTIONS)
    with pytest.raises(GispError, match="already pruned"):
        gisp.prune(model, tiny_tokens(16, 16), **OPTIONS)
    with pytest.raises(GispError, match="other weights than"):
        trajectory.at(0.1, tiny_model(seed=5))
    with pytest.raises(GispError, match=r"sparsity is '0\.1': give a value"):
        trajectory.at("0.1")  # type: ignore[arg-type]
    with pytest.raises(GispError, match="num_key_value_heads 4"):
        trajectory.at(0.1, tiny_model("llama-mha"))
    model.double()
    with pytest.raises(GispError, match="can no longer be moved"):
        trajectory.at(0.1)


def test_one_changed_weight_is_another_base_model():
    trajectory = gisp.prune(tiny_model(), tiny_tokens(16, 16), **OPTIONS)
    base = tiny_model()
    weights = base.model.layers[1].mlp.up_proj.weight.data
    for row, column in ((5, 7), (23, 31), (0, 0)):
        kept = weights[row, column].clone()
        weights[row, column] += 0.5
        with pytest.raises(GispError, match="other weights than"):
            trajectory.at(0.1, base)
        weights[row, column] = kept
    trajectory.at(0.1, base)


@pytest.mark.parametrize("count", [1, 3, 1000, 1003])
def test_a_fingerprint_is_the_same_in_other_dtypes_and_places(count):
    class Flat(torch.nn.Module):
        def __init__(self, values):
            super().__init__()
            self.weight = torch.nn.Parameter(values)

    values = torch.randn(count + 1).bfloat16()
    found = {fingerprint(Flat(v)) for v in (values[1:], values[1:].clone(), values[1:].float(), values[1:].double())}
    assert len(found) == 1
    for place in range(0, count, max(1, count // 7)):
        changed = values[1:].clone()
        changed[place] += 1
        assert fingerprint(Flat(changed)) not in found


@pytest.mark.parametrize("where", ["adapter", "float64"])
def test_layers_that_cannot_be_scored_are_refused_before_anything(where):
    model = tiny_model()
    if where == "adapter":
        model.model.layers[1].mlp.up_proj.forward = lambda x: x
    else:
        model.model.layers[1].mlp.up_proj.double()
    with pytest.raises(GispError, match=r"layer 1 .*up_proj"):
        gisp.prune(model, tiny_tokens(16, 16), **OPTIONS)


def test_a_weight_of_another_shape_is_named(tmp_path, token_file, capsys):
    tiny_model().save_pretrained(tmp_path / "m")
    path = tmp_path / "m" / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.1.mlp.up_proj.weight"] = torch.zeros(3, 5)
    save_file(tensors, path, metadata={"format": "pt"})
    capsys.readouterr()
    assert main(["eval", str(tmp_path / "m"), "--data", str(token_file)]) == 2
    error = capsys.readouterr().err
    assert "mismatched keys" in error and "model.layers.1.mlp.up_proj.weight" in error and error.count("\n") == 1


def test_evaluating_to_nan_is_an_error(tmp_path, token_file):
    model = tiny_model()
    with torch.no_grad():
        model.model.norm.weight.fill_(3e38)
        model.lm_head.weight.fill_(3e38)
    model.save_pretrained(tmp_path / "m")
    with pytest.raises(GispError, match="evaluation data is NaN"):
        evaluate_target(str(tmp_path / "m"), str(token_file), window=16, device="cpu")


def test_a_checkpoint_with_more_layers_than_its_config_is_refused(tmp_path):
    tiny_model(layers=3).save_pretrained(tmp_path / "m")
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    (tmp_path / "m" / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 2}))
    with pytest.raises(GispError, match=r"unexpected keys, first model\.layers\.2"):
        gisp.load(tmp_path / "m")
    config["quantization_config"] = {"quant_method": "gptq"}
    (tmp_path / "m" / "config.json").write_text(json.dumps(config))
    with pytest.raises(GispError, match=r"quantised \(gptq\)"):
        gisp.load(tmp_path / "m")


def test_stream_scores_do_not_depend_on_the_batch_size():
    found = [gisp.prune(tiny_model(), tiny_tokens(16, 16), **OPTIONS, batch_size=size).removed_at for size in (None, 2)]
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_a_base_model_that_is_gone_is_named_with_the_remedy(tmp_path, token_file):
    tiny_model().save_pretrained(tmp_path / "m")
    run_into(tmp_path / "run", tmp_path / "m", token_file)
    (tmp_path / "m").rename(tmp_path / "moved")
    trajectory = gisp.Trajectory.load(tmp_path / "run")
    with pytest.raises(GispError, match=r"m, is not there: .*base_model\.path in trajectory\.json"):
        trajectory.at(0.1)
    record = tmp_path / "run" / "trajectory.json"
    record.write_text(record.read_text().replace(str(tmp_path / "m"), str(tmp_path / "moved")))
    gisp.Trajectory.load(tmp_path / "run").at(0.1)
