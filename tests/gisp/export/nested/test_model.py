"""Nested checkpoints: every step is the masked model, prefixes alone are read, broken ones are refused."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from export_models import FAMILIES, HEADS, dense, masked, tokens
from nested_cases import STEPS, logits, sound_checkpoint, trajectory_of
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import tiny_model, tiny_tokens
from transformers import LlamaForCausalLM

import gisp
from gisp.cli import main
from gisp.errors import GispError
from gisp.export.nested.export import export_nested
from gisp.export.nested.files import NestedFiles, write_shards
from gisp.export.nested.model import load_nested
from gisp.export.nested.order import nest
from gisp.model.structures import heads_name
from gisp.run.trajectory import Trajectory


@pytest.fixture(scope="module", params=FAMILIES)
def nested(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Trajectory, Path]:
    base = dense(request.param)
    trajectory = trajectory_of(base)
    folder = tmp_path_factory.mktemp("nested") / request.param
    report = export_nested(base, trajectory, folder)
    assert len(report.relative_differences) == 4 and max(report.relative_differences.values()) <= 1e-5
    return base, trajectory, folder


@pytest.fixture
def llama(tmp_path: Path) -> tuple[Any, Trajectory, Path]:
    base = dense("llama-gqa")
    trajectory = trajectory_of(base)
    export_nested(base, trajectory, tmp_path / "nested")
    return base, trajectory, tmp_path / "nested"


def test_every_step_gives_the_masked_logits(nested: tuple[Any, Trajectory, Path]) -> None:
    base, trajectory, folder = nested
    for step in range(STEPS + 1):
        model = gisp.load(folder, sparsity=trajectory.sparsity_at(step))
        wanted = logits(masked(base, trajectory.keep(step)))
        assert model.sparsity == trajectory.sparsity_at(step)
        assert float((logits(model) - wanted).abs().max()) <= 1e-5 * float(wanted.abs().max())


def test_a_model_generates_with_a_cache(nested: tuple[Any, Trajectory, Path]) -> None:
    base, trajectory, folder = nested
    model = gisp.load(folder)
    options = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    wanted = masked(base, trajectory.keep(STEPS)).generate(tokens(), **options)
    assert torch.equal(model.generate(tokens(), **options), wanted)


@pytest.mark.parametrize("keep_memory", [False, True])
def test_moving_down_and_up_again_changes_no_bit(nested: tuple[Any, Trajectory, Path], keep_memory: bool) -> None:
    _, trajectory, folder = nested
    points = [trajectory.sparsity_at(step) for step in (1, 4, 0, 5, 2)]
    fresh = {point: logits(gisp.load(folder, sparsity=point)) for point in points}
    model = gisp.load(folder, sparsity=points[-1])
    parameters = dict(model.named_parameters())
    for point in points * 2:
        assert model.resize(point, keep_memory=keep_memory) is model
        assert torch.equal(logits(model), fresh[point])
    assert all(parameter is parameters[name] for name, parameter in model.named_parameters())


@pytest.mark.parametrize("copied", [deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_moves_by_itself(nested: tuple[Any, Trajectory, Path], copied: Callable[[Any], Any]) -> None:
    _, _, folder = nested
    small, large = (logits(gisp.load(folder, sparsity=sparsity)) for sparsity in (0.5, 0.0))
    assert not torch.equal(small, large)
    model = gisp.load(folder, sparsity=0.5)
    other = copied(model)
    assert torch.equal(logits(other), small)
    assert torch.equal(logits(other.resize(0.0)), large)
    assert torch.equal(logits(model), small)
    with torch.no_grad():
        other.model.embed_tokens.weight.zero_()
    assert torch.equal(logits(model.resize(0.0)), large)


def test_adapters_are_merged_before_a_model_is_resized(llama: tuple[Any, Trajectory, Path]) -> None:
    peft = pytest.importorskip("peft")
    model = gisp.load(llama[2], sparsity=0.5)
    small = logits(model)
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules="all-linear"))
    with pytest.raises(GispError, match=r"carries peft adapters .*merge_and_unload"):
        model.resize(0.0)
    assert torch.equal(logits(adapted), small)
    adapted.merge_and_unload()
    assert torch.equal(logits(model.resize(0.0)), logits(gisp.load(llama[2], sparsity=0.0)))


def storage_bytes(model: Any) -> int:
    return sum({p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in model.parameters()}.values())


def test_memory_and_bytes_read_are_those_of_the_size(llama: tuple[Any, Trajectory, Path]) -> None:
    _, trajectory, folder = llama
    last = trajectory.sparsity_at(STEPS)
    model = gisp.load(folder, sparsity=last)
    shown = sum(p.numel() * p.element_size() for p in model.parameters())
    assert storage_bytes(model) == shown == model._nested.files.bytes_read
    model.resize(0.0)
    whole = sum(p.numel() * p.element_size() for p in model.parameters())
    # Each row once, however often the model moves between sizes it holds.
    assert model._nested.files.bytes_read == storage_bytes(model) == whole
    model.resize(last, keep_memory=True)
    model.resize(0.0)
    assert model._nested.files.bytes_read == storage_bytes(model) == whole
    model.resize(last)
    assert storage_bytes(model) == shown


def poison_tails(folder: Path, trajectory: Trajectory) -> None:
    """Fill with NaN what the end of the run does not keep."""
    prefixes = nest(trajectory).prefixes[-1]
    kinds = {"q_proj": (0, 8), "o_proj": (0, 8), "k_proj": (1, 8), "v_proj": (1, 8)}
    file = folder / "nested-00001.safetensors"
    tensors = load_file(file)
    for name, tensor in tensors.items():
        parts = name.split(".")
        if "layers" in parts and parts[-1] != "bias" and parts[4].endswith("_proj"):
            kind, block = kinds.get(parts[4], (2, 1))
            tensor[int(prefixes[int(parts[2]), kind]) * block :] = float("nan")
    save_file(tensors, file)


def test_what_a_size_does_not_keep_is_not_read(llama: tuple[Any, Trajectory, Path]) -> None:
    _, trajectory, folder = llama
    wanted = logits(gisp.load(folder))
    poison_tails(folder, trajectory)
    assert torch.equal(logits(gisp.load(folder)), wanted)
    assert logits(gisp.load(folder, sparsity=0.0)).isnan().any()
    with pytest.raises(GispError, match="is corrupt: its SHA-256 is not the recorded one"):
        gisp.load(folder, verify=True)


def test_a_model_moved_to_another_dtype_goes_on(llama: tuple[Any, Trajectory, Path]) -> None:
    _, trajectory, folder = llama
    low, high = trajectory.sparsity_at(1), trajectory.sparsity_at(4)
    for keep in (False, True):
        model = gisp.load(folder, sparsity=low)
        model.resize(high, keep_memory=keep).to(torch.bfloat16)
        model.resize(low)
        # Not the logits: `to` also rounds the rotary frequencies, which loading does not.
        wanted = gisp.load(folder, sparsity=low, dtype=torch.bfloat16)
        found = dict(model.named_parameters())
        assert all(torch.equal(found[name], parameter) for name, parameter in wanted.named_parameters())


def test_gradients_of_another_shape_go(llama: tuple[Any, Trajectory, Path]) -> None:
    _, trajectory, folder = llama
    model = gisp.load(folder, sparsity=0.0)
    model(input_ids=tokens(), labels=tokens()).loss.backward()
    model.resize(trajectory.sparsity_at(3))
    for parameter in model.parameters():
        assert parameter.grad is None or parameter.grad.shape == parameter.shape
    model(input_ids=tokens(), labels=tokens()).loss.backward()


def test_a_failed_move_leaves_the_model_as_it_was(
    llama: tuple[Any, Trajectory, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, trajectory, folder = llama
    model = gisp.load(folder)
    before, read = logits(model), NestedFiles.rows

    def fails(self: NestedFiles, name: str, start: int, stop: int) -> torch.Tensor:
        if "layers.2" in name:
            raise GispError("the disk is gone")
        return read(self, name, start, stop)

    monkeypatch.setattr(NestedFiles, "rows", fails)
    with pytest.raises(GispError, match="the disk is gone"):
        model.resize(0.0)
    assert torch.equal(logits(model), before) and model.sparsity == trajectory.sparsity_at(STEPS)


def test_even_groups_need_no_index() -> None:
    """Dense layers and layers of whole groups run as the stock model does."""
    base = dense("llama-gqa")
    trajectory = trajectory_of(base, whole_layers=False)
    at = torch.zeros(HEADS, dtype=torch.int32)
    at[4:] = 2
    for layer in range(4):
        trajectory.removed_at[heads_name(layer)] = at.clone()
    order = nest(trajectory).layers[0]
    assert order.heads.tolist() == list(range(8)) and order.kv_of_head.tolist() == [0] * 4 + [1] * 4
    assert nest(trajectory).prefixes[:, 0, :2].tolist() == [[8, 2], [8, 2], *[[4, 1]] * 4]


def test_orders_put_first_what_goes_last() -> None:
    base = dense("llama-gqa")
    trajectory = trajectory_of(base)
    nesting = nest(trajectory)
    for layer, order in enumerate(nesting.layers):
        for step in range(STEPS + 1):
            heads, kv, channels = nesting.prefixes[step, layer].tolist()
            keep = trajectory.keep(step)
            assert sorted(order.heads[:heads].tolist()) == list(keep.heads[layer])
            assert sorted(order.kv_heads[:kv].tolist()) == sorted({head // 4 for head in keep.heads[layer]})
            assert sorted(order.channels[:channels].tolist()) == list(keep.channels[layer])
        assert torch.equal(order.kv_heads[order.kv_of_head], order.heads // 4)


def test_shards_hold_every_tensor_once(tmp_path: Path) -> None:
    tensors = {f"t{i}": torch.randn(i + 1, 8) for i in range(7)}
    where = write_shards(tmp_path, iter(tensors.items()), shard_bytes=200)
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) > 2 and set(where.values()) == {file.name for file in files}
    for name, file in where.items():
        with safe_open(tmp_path / file, framework="pt") as shard:
            assert torch.equal(shard.get_tensor(name), tensors[name])


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sound_checkpoint(tmp_path_factory.mktemp("sound") / "nested")


def test_a_nested_model_is_neither_saved_nor_pruned(sound: Path, tmp_path: Path) -> None:
    model = gisp.load(sound, sparsity=0.0)
    assert isinstance(model, LlamaForCausalLM)
    with pytest.raises(GispError, match="is not saved: use gisp export"):
        model.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()
    with pytest.raises(GispError, match="is not pruned again"):
        gisp.prune(model, tokens(), sparsity=0.1)
    with pytest.raises(GispError, match=r"is already pruned \(gisp_nested\): give its dense base"):
        gisp.prune(sound, tokens(), sparsity=0.1)


def test_an_export_that_fails_its_check_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = dense("llama-mha")
    trajectory = trajectory_of(base)
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}

    def other(folder: Path, *args: Any, **kwargs: Any) -> Any:
        model = load_nested(folder, *args, **kwargs)
        model.model.norm.weight.data *= 1.01
        return model

    monkeypatch.setattr("gisp.export.nested.export.load_nested", other)
    with pytest.raises(GispError, match="differ by"):
        export_nested(base, trajectory, tmp_path / "nested")
    assert list(tmp_path.iterdir()) == []
    assert all(torch.equal(tensor, before[name]) for name, tensor in base.state_dict().items())


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """A real run with its model and tokens."""
    root = tmp_path_factory.mktemp("run")
    tiny_model("llama-gqa").save_pretrained(root / "model")
    save_file({"input_ids": tiny_tokens(16, 16)}, root / "tokens.safetensors")
    options = ["--steps", "4", "--protect-last", "0", "--align", "4", "--batch-tokens", "64", "--device", "cpu"]
    arguments = ["prune", str(root / "model"), "--data", str(root / "tokens.safetensors"), "--out", str(root / "run")]
    assert main([*arguments, *options, "--dtype", "float32"]) == 0
    return root / "run", root / "model", root / "tokens.safetensors"


def test_the_command_line_writes_and_evaluates(
    run: tuple[Path, Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "nested"
    assert main(["export", str(run[0]), "--nested", str(folder), "--device", "cpu"]) == 0
    assert "dense and 4 sparsities" in capsys.readouterr().out
    found = []
    for target in (run[0], folder):
        arguments = ["eval", str(target), "--sparsity", "0.3", "--data", str(run[2]), "--json", "--device", "cpu"]
        assert main(arguments) == 0
        found.append(json.loads(capsys.readouterr().out))
    assert found[0]["sparsity"] == found[1]["sparsity"]
    assert found[0]["perplexity"] == pytest.approx(found[1]["perplexity"], rel=1e-6)
    assert "| 0.0000 |" in (folder / "README.md").read_text()
    assert main(["inspect", str(folder)]) == 0
    assert f"{found[0]['sparsity']:.4f}" in capsys.readouterr().out
    assert main(["export", str(run[0]), "--nested", str(folder), "--device", "cpu"]) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--nested", "n", "--sparsity", "0.3"], "leave --sparsity 0.3 out"),
        (["--sparsity", "0.3"], "--out is missing"),
        (["--out", "o"], "--sparsity is missing"),
    ],
)
def test_options_that_do_not_go_together(
    run: tuple[Path, Path, Path], arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", str(run[0]), *arguments]) == 2
    assert message in capsys.readouterr().err


def test_another_base_model_is_refused(run: tuple[Path, Path, Path], tmp_path: Path) -> None:
    moved = tmp_path / "run"
    shutil.copytree(run[0], moved)
    record = json.loads((moved / "trajectory.json").read_text())
    other = tmp_path / "model"
    tiny_model("llama-gqa", seed=9).save_pretrained(other)
    record["base_model"]["path"] = str(other)
    (moved / "trajectory.json").write_text(json.dumps(record))
    assert main(["export", str(moved), "--nested", str(tmp_path / "nested"), "--device", "cpu"]) == 2
    assert not (tmp_path / "nested").exists()


def test_a_sparsity_needs_a_checkpoint_of_several(run: tuple[Path, Path, Path]) -> None:
    with pytest.raises(GispError, match=r"sparsity 0.3 needs a nested checkpoint"):
        gisp.load(run[1], sparsity=0.3)
    assert deepcopy(gisp.load(run[1])).config.model_type == "llama"


@pytest.mark.parametrize("dtype", ["float33", "nn", torch.int8, 16])
def test_a_dtype_of_weights_is_a_floating_one(sound: Path, dtype: Any) -> None:
    with pytest.raises(GispError, match=r"unknown dtype .*: give float32"):
        gisp.load(sound, dtype=dtype)
