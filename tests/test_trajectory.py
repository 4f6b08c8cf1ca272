"""Runs on disk and in memory: moving a model along them, and refusing what does not belong together."""

from __future__ import annotations

import dataclasses
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import tiny_model, tiny_tokens

import gisp
from gisp.cli import main
from gisp.config import make_config, without_defaults
from gisp.errors import GispError
from gisp.evaluation import evaluate_target
from gisp.structures import fingerprint

OPTIONS = {"sparsity": 0.3, "steps": 4, "align": 4, "batch_tokens": 64, "device": "cpu", "dtype": "float32"}


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "gqa"
    tiny_model("llama-gqa").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def token_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokens") / "t.safetensors"
    save_file({"input_ids": tiny_tokens(16, 16)}, path)
    return path


def run_into(out, model_folder, token_file, **options):
    return gisp.prune(model_folder, token_file, out=out, **{**OPTIONS, **options})


def logits(model):
    with torch.no_grad():
        return model(tiny_tokens(2)).logits


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


def test_models_that_cannot_follow_are_refused():
    model = tiny_model()
    trajectory = gisp.prune(model, tiny_tokens(16, 16), **OPTIONS)
    with pytest.raises(GispError, match="already pruned"):
        gisp.prune(model, tiny_tokens(16, 16), **OPTIONS)
    with pytest.raises(GispError, match="other weights than"):
        trajectory.at(0.1, tiny_model(seed=5))
    with pytest.raises(GispError, match=r"sparsity is '0\.1': give a value"):
        trajectory.at("0.1")
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


def test_a_record_nested_too_deeply_is_corrupt(tmp_path, model_folder, token_file):
    run_into(tmp_path / "run", model_folder, token_file)
    (tmp_path / "run" / "trajectory.json").write_text("[" * 100000)
    with pytest.raises(GispError, match=r"trajectory\.json is corrupt"):
        gisp.Trajectory.load(tmp_path / "run")


def test_files_of_two_runs_do_not_mix(tmp_path, model_folder, token_file):
    run_into(tmp_path / "a", model_folder, token_file)
    run_into(tmp_path / "b", model_folder, token_file, norm="none")
    shutil.copy(tmp_path / "b" / "trajectory.safetensors", tmp_path / "a" / "trajectory.safetensors")
    with pytest.raises(GispError, match="different runs"):
        gisp.Trajectory.load(tmp_path / "a")


def test_tensors_of_other_layers_are_foreign(tmp_path, model_folder, token_file):
    run_into(tmp_path / "r", model_folder, token_file)
    path = tmp_path / "r" / "trajectory.safetensors"
    tensors = load_file(path)
    for name in ("foo", "layers.9.heads.removed_at"):
        save_file({**tensors, name: torch.zeros(4, dtype=torch.int32)}, path)
        with pytest.raises(GispError, match=f"it holds {name}"):
            gisp.Trajectory.load(tmp_path / "r")


def test_a_run_without_its_record_is_not_begun_anew(tmp_path, model_folder, token_file):
    out = tmp_path / "r"
    run_into(out, model_folder, token_file)
    (out / "trajectory.json").unlink()
    left = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    for resume in (False, True):
        with pytest.raises(GispError, match=r"trajectory\.json is missing: put it back"):
            run_into(out, model_folder, token_file, resume=resume)
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == left


def test_a_state_that_is_not_finite_is_not_resumed(tmp_path, model_folder, token_file):
    out = tmp_path / "r"

    def stop(record, steps):
        if record.step == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_into(out, model_folder, token_file, on_step=stop)
    path = out / "state" / "step-00002.safetensors"
    save_file({name: torch.full_like(at, float("nan")) for name, at in load_file(path).items()}, path)
    record = (out / "trajectory.json").read_bytes()
    with pytest.raises(GispError, match="not finite: it is corrupt"):
        run_into(out, model_folder, token_file, resume=True)
    assert (out / "trajectory.json").read_bytes() == record


def test_what_a_command_ignores_or_cannot_do_is_said(tmp_path, model_folder, token_file, capsys):
    given = ["prune", str(model_folder), "--data", str(token_file)]
    official = ["--preset", "official", "--ratio", "0.3", "--sparsity", "0.2", "--steps", "2"]
    assert main([*given, "--out", str(tmp_path / "o"), *official]) == 0
    assert "--sparsity is ignored beside --ratio" in "".join(capsys.readouterr())
    assert main([*given, "--out", str(tmp_path / "n"), "--sparsity", "1e-6", "--steps", "2"]) == 0
    assert "nothing was removed: 1e-06 of the decoder" in "".join(capsys.readouterr())


def test_a_weight_of_another_shape_is_named(tmp_path, token_file, capsys):
    tiny_model().save_pretrained(tmp_path / "m")
    path = tmp_path / "m" / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.1.mlp.up_proj.weight"] = torch.zeros(3, 5)
    save_file(tensors, path, metadata={"format": "pt"})
    assert main(["eval", str(tmp_path / "m"), "--data", str(token_file)]) == 2
    error = capsys.readouterr().err
    assert "mismatched keys" in error and "model.layers.1.mlp.up_proj.weight" in error and error.count("\n") == 1


def _set(record, path, value):
    *parents, last = path.split(".")
    for name in parents:
        record = record[int(name) if name.isdigit() else name]
    if value is None:
        del record[last]
    else:
        record[last] = value


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("base_model.layers", "abc"),
        ("base_model.path", None),
        ("base_model.fingerprint", None),
        ("versions", "ab"),
        ("config", {}),
        ("steps.1.sparsity", "x"),
        ("steps.1.sparsity", 0.9),
        ("steps.0.sparsity", -0.2),
        ("steps.0.removed_parameters", 10**9),
        ("steps.1.loss", float("nan")),
        ("steps.0.step", 2),
        ("complete", "yes"),
        ("version", 2),
    ],
)
def test_a_corrupt_record_is_one_line(tmp_path, model_folder, token_file, path, value, capsys):
    run_into(tmp_path / "r", model_folder, token_file)
    file = tmp_path / "r" / "trajectory.json"
    record = json.loads(file.read_text())
    _set(record, path, value)
    file.write_text(json.dumps(record))
    for arguments in (["inspect"], ["report"], ["eval", "--data", str(token_file), "--sparsity", "0.2"]):
        assert main([arguments[0], str(tmp_path / "r"), *arguments[1:]]) == 2
        captured = capsys.readouterr()
        assert captured.err.count("\n") == 1
        assert captured.err.startswith("error: ")
        assert "corrupt" in captured.err


def test_a_stored_config_repeats_its_run(tmp_path, model_folder, token_file):
    given = ["--preset", "official", "--steps", "12", "--sparsity", "0.3", "--dtype", "float32", "--device", "cpu"]
    assert main(["prune", str(model_folder), "--data", str(token_file), "--out", str(tmp_path / "a"), *given]) == 0
    again = ["--config", str(tmp_path / "a" / "config.yaml")]
    assert main(["prune", *again, "--out", str(tmp_path / "b")]) == 0
    files = [(tmp_path / name / "trajectory.safetensors").read_bytes() for name in ("a", "b")]
    assert files[0] == files[1]
    assert gisp.Trajectory.load(tmp_path / "a").steps[-1].sparsity >= 0.3
    assert main(["prune", *again, "--out", str(tmp_path / "a"), "--resume"]) == 0


def test_a_stored_config_goes_with_another_criterion(tmp_path, model_folder, token_file, capsys):
    given = ["--steps", "2", "--sparsity", "0.3", "--dtype", "float32", "--device", "cpu", "--batch-tokens", "64"]
    assert main(["prune", str(model_folder), "--data", str(token_file), "--out", str(tmp_path / "a"), *given]) == 0
    again = ["prune", "--config", str(tmp_path / "a" / "config.yaml"), "--criterion"]
    assert main([*again, "gisp", "--out", str(tmp_path / "b")]) == 0
    assert gisp.Trajectory.load(tmp_path / "b").config["first_order"] == "plain"
    assert main([*again, "second-order", "--out", str(tmp_path / "c")]) == 0
    assert gisp.Trajectory.load(tmp_path / "c").config["first_order"] == "shrunk"
    capsys.readouterr()
    assert main([*again, "gisp", "--first-order", "shrunk", "--out", str(tmp_path / "d")]) == 2
    assert "--first-order shrunk belongs to --criterion second-order" in capsys.readouterr().err
    (tmp_path / "c.yaml").write_text("first_order: plain\n")
    own = ["prune", str(model_folder), "--data", str(token_file), "--config", str(tmp_path / "c.yaml"), *given]
    assert main([*own, "--criterion", "second-order", "--out", str(tmp_path / "e")]) == 0
    assert gisp.Trajectory.load(tmp_path / "e").config["first_order"] == "plain"


def test_a_stored_config_is_used_from_another_folder(tmp_path, model_folder, token_file, monkeypatch):
    monkeypatch.chdir(token_file.parent)
    given = ["--preset", "paper", "--steps", "2", "--sparsity", "0.3", "--dtype", "float32", "--device", "cpu"]
    assert main(["prune", str(model_folder), "--data", token_file.name, "--out", str(tmp_path / "a"), *given]) == 0
    monkeypatch.chdir(tmp_path)
    assert main(["prune", "--config", "a/config.yaml", "--out", "b"]) == 0
    files = [(tmp_path / name / "trajectory.safetensors").read_bytes() for name in ("a", "b")]
    assert files[0] == files[1]


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("resume: true\n", "resume"),
        ("on_step: x\n", "on_step"),
        ("batch_size: .inf\n", "inf"),
        ("batch_size: 4.7\n", "4.7"),
        ("batch_size: true\n", "True"),
        ("seed: 1125899906842624\n", "1125899906842624"),
    ],
)
def test_bad_config_files_are_one_line(tmp_path, model_folder, token_file, text, word, capsys):
    (tmp_path / "c.yaml").write_text(text)
    arguments = ["--data", str(token_file), "--out", str(tmp_path / "r"), "--config", str(tmp_path / "c.yaml")]
    assert main(["prune", str(model_folder), *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert word in error
    assert not (tmp_path / "r").exists()


def test_an_out_folder_that_cannot_be_is_refused_before_any_work(tmp_path, token_file):
    (tmp_path / "file").write_text("")
    model = tiny_model()
    before = logits(model)
    with pytest.raises(GispError, match="is not a folder this user may write to"):
        gisp.prune(model, token_file, out=tmp_path / "file" / "run", **OPTIONS)
    assert torch.equal(logits(model), before)


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


@pytest.mark.parametrize("spoiled", [None, b"\xff\xfe\n", b"[" * 100000])
def test_lost_metrics_do_not_stop_a_resumed_run(tmp_path, model_folder, token_file, spoiled):
    run_into(tmp_path / "whole", model_folder, token_file)

    def stop(record, steps):
        if record.step == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_into(tmp_path / "cut", model_folder, token_file, on_step=stop)
    metrics = tmp_path / "cut" / "metrics.jsonl"
    metrics.unlink() if spoiled is None else metrics.write_bytes(spoiled)
    run_into(tmp_path / "cut", model_folder, token_file, resume=True)
    files = [(tmp_path / name / "trajectory.safetensors").read_bytes() for name in ("whole", "cut")]
    assert files[0] == files[1]


@pytest.mark.parametrize(
    ("made", "asked"),
    [
        ({}, {"preset": "official"}),
        ({}, {"preset": "paper"}),
        ({"preset": "official"}, {"preset": "fast"}),
        ({"criterion": "wanda-sp"}, {"criterion": "gisp"}),
        ({"criterion": "random"}, {"criterion": "second-order"}),
        ({"criterion": "block-influence"}, {"criterion": "flap"}),
        ({}, {"one_shot": True}),
        ({"one_shot": True}, {"criterion": "signed"}),
    ],
)
def test_a_stored_config_gives_way_to_another_preset_or_criterion(made, asked):
    """What a run resolved is not what anyone asked for: only that goes into a run of another kind."""
    own = {"protect_first": 0.3, "seed": 5}
    stored = dataclasses.asdict(make_config(**own, **made))
    stored = {name: value for name, value in stored.items() if value is not None}
    stored.pop("ratio", None)
    found = make_config(**{**without_defaults(stored, asked), **asked})
    wanted = make_config(**own, **{**made, **asked}, sparsity=stored.get("sparsity"))
    assert found == wanted
    assert without_defaults(stored, {name: stored[name] for name in asked}) == stored
    # What differs from the default was asked for.
    assert without_defaults({**stored, "steps": 17}, asked)["steps"] == 17


def test_a_run_with_other_labels_is_another_run(tmp_path, model_folder):
    ids = tiny_tokens(16, 16)
    labels = ids.clone()
    labels[:, :4] = -100
    path = tmp_path / "t.safetensors"

    def stop(record, steps):
        raise KeyboardInterrupt

    save_file({"input_ids": ids}, path)
    with pytest.raises(KeyboardInterrupt):
        run_into(tmp_path / "r", model_folder, path, on_step=stop)
    save_file({"input_ids": ids, "labels": labels}, path)
    with pytest.raises(GispError, match="made with another"):
        run_into(tmp_path / "r", model_folder, path, resume=True)
