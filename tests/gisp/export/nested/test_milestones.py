"""Milestones of nested checkpoints: sizes with their own compensation beside plain ones, and broken ones refused."""

from __future__ import annotations

import json
import shutil
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from export_models import FAMILIES, dense, masked, tokens
from nested_cases import FORMS, STEPS, logits, milestone_of, sound_milestones, trajectory_of
from safetensors.torch import load_file, save_file

import gisp
from gisp.compensation import fold_into_dense
from gisp.compensation.fold import folded_into_dense
from gisp.errors import GispError
from gisp.export.nested.export import export_nested
from gisp.export.nested.files import NestedFiles
from gisp.export.nested.place import RECORD
from gisp.export.nested.sizes import own_bytes, shared_bytes
from gisp.model.structures import map_model

MILESTONES = (2, 4)


def wanted(base: Any, trajectory: Any, step: int, form: str) -> torch.Tensor:
    """Logits of the masked model, compensated at milestones."""
    model = deepcopy(base)
    if step in MILESTONES:
        fold_into_dense(map_model(model), milestone_of(base, trajectory, step, form).compensation)
    return logits(masked(model, trajectory.keep(step)))


def close(found: torch.Tensor, other: torch.Tensor) -> bool:
    return float((found - other).abs().max()) <= 1e-5 * float(other.abs().max())


CASES = [(family, "weights and biases") for family in FAMILIES] + [("llama-gqa", form) for form in FORMS]
CASES += [("llama-bias", form) for form in FORMS]


@pytest.mark.parametrize(("family", "form"), sorted(set(CASES)))
def test_every_size_is_its_own_and_moving_changes_no_bit(tmp_path: Path, family: str, form: str) -> None:
    base = dense(family)
    trajectory = trajectory_of(base)
    milestones = [milestone_of(base, trajectory, step, form) for step in MILESTONES]
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    report = export_nested(base, trajectory, tmp_path / "nested", milestones=milestones)
    after = base.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)
    points = [trajectory.sparsity_at(step) for step in range(STEPS + 1)]
    assert {points[step] for step in MILESTONES} <= report.relative_differences.keys()
    fresh = []
    for step, point in enumerate(points):
        model = gisp.load(tmp_path / "nested", sparsity=point)
        fresh.append(logits(model))
        assert close(fresh[-1], wanted(base, trajectory, step, form))
        assert model.config.gisp.get("compensation") == (f"{form} of step {step}" if step in MILESTONES else None)
    assert not close(fresh[2], logits(masked(base, trajectory.keep(2))))
    for keep_memory in (False, True):
        model = gisp.load(tmp_path / "nested", sparsity=points[2])
        parameters = {name: p for name, p in model.named_parameters() if not name.endswith("_proj.bias")}
        for step in (2, 4, 5, 2, 0, 4, 1, 2, 3):
            model.resize(points[step], keep_memory=keep_memory)
            assert torch.equal(logits(model), fresh[step])
            if not keep_memory:
                shown = sum(p.numel() * p.element_size() for p in model.parameters())
                assert storage_bytes(model) == shown
                assert not any(shown._aside for *_, shown in model._nested._shown)
        now = dict(model.named_parameters())
        assert all(now[name] is parameter for name, parameter in parameters.items())


def storage_bytes(model: Any) -> int:
    return sum({p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in model.parameters()}.values())


def test_bfloat16_checkpoints_and_loads_in_another_dtype(tmp_path: Path) -> None:
    base = dense("llama-gqa", torch.bfloat16)
    trajectory = trajectory_of(base)
    milestones = [milestone_of(base, trajectory, 2, "factors"), milestone_of(base, trajectory, 4)]
    export_nested(base, trajectory, tmp_path / "nested", milestones=milestones)
    points = [trajectory.sparsity_at(step) for step in range(STEPS + 1)]
    wide = gisp.load(tmp_path / "nested", sparsity=points[2], dtype=torch.float32)
    narrow = gisp.load(tmp_path / "nested", sparsity=points[2])
    assert all(torch.equal(a, b.float()) for a, b in zip(wide.parameters(), narrow.parameters(), strict=True))
    # A model that somebody moved to another dtype reads anew what it showed in the old one.
    for keep_memory in (False, True):
        model = gisp.load(tmp_path / "nested", sparsity=points[2])
        model.resize(points[3], keep_memory=keep_memory).float().resize(points[4], keep_memory=keep_memory)
        model.resize(points[2], keep_memory=keep_memory)
        for (name, found), other in zip(model.named_parameters(), wide.parameters(), strict=True):
            assert found.dtype == torch.float32 and torch.equal(found, other), name


def test_what_is_kept_in_memory_is_not_read_again(tmp_path: Path) -> None:
    folder = sound_milestones(tmp_path / "nested")
    points = NestedFiles.open(folder).sparsities
    model = gisp.load(folder, sparsity=points[2])
    for step in (1, 4, 0, 2):
        model.resize(points[step], keep_memory=True)
    read = model._nested.files.bytes_read
    for step in (4, 1, 2, 0, 4):
        model.resize(points[step], keep_memory=True)
    assert model._nested.files.bytes_read == read


def test_gradients_of_replaced_weights_go(tmp_path: Path) -> None:
    folder = sound_milestones(tmp_path / "nested")
    points = NestedFiles.open(folder).sparsities
    model = gisp.load(folder, sparsity=points[1])
    model.resize(points[2], keep_memory=True).resize(points[1], keep_memory=True)
    model(input_ids=tokens(), labels=tokens()).loss.backward()
    weight = model.model.layers[3].mlp.down_proj.weight
    assert weight.grad is not None
    model.resize(points[2], keep_memory=True)
    assert weight.grad is None
    model(input_ids=tokens(), labels=tokens()).loss.backward()


@pytest.mark.parametrize(("start", "end"), [(1, 2), (2, 4), (2, 0), (5, 4), (4, 5)])
@pytest.mark.parametrize("part", ["mlp.down_proj", "self_attn.q_proj", "o_proj.bias"])
def test_a_failed_move_leaves_the_model_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, start: int, end: int, part: str
) -> None:
    folder = sound_milestones(tmp_path / "nested")
    points = NestedFiles.open(folder).sparsities
    model = gisp.load(folder, sparsity=points[start])
    before, read = logits(model), NestedFiles.rows
    gone: list[str] = []

    def fails(self: NestedFiles, name: str, start: int, stop: int) -> torch.Tensor:
        if gone or f"layers.3.{part}" in name or (f"layers.3.self_attn.{part}" in name):
            gone.append(name)
            raise GispError("the disk is gone")
        return read(self, name, start, stop)

    with monkeypatch.context() as patch:
        patch.setattr(NestedFiles, "rows", fails)
        try:
            model.resize(points[end])
        except GispError as error:
            assert str(error) == "the disk is gone"
    if gone:
        assert torch.equal(logits(model), before) and model.sparsity == points[start]
    model.resize(points[end])
    assert torch.equal(logits(model), logits(gisp.load(folder, sparsity=points[end])))


def test_sizes_are_told_in_bytes(tmp_path: Path) -> None:
    folder = sound_milestones(tmp_path / "nested")
    files = NestedFiles.open(folder)
    shared = shared_bytes(files)
    for step, point in enumerate(files.sparsities):
        if step not in MILESTONES:
            model = gisp.load(folder, sparsity=point)
            assert shared[step] == sum(p.numel() * p.element_size() for p in model.parameters())
    for step in MILESTONES:
        held = load_file(folder / f"nested-milestone-{step}-00001.safetensors")
        assert own_bytes(files, step) == sum(t.numel() * t.element_size() for t in held.values())
    assert own_bytes(files, 4) < own_bytes(files, 2) / 20
    card = (folder / "README.md").read_text()
    assert f"| {files.sparsities[2]:.4f} | {own_bytes(files, 2):,} | weights and biases of step 2 |" in card
    assert f" {shared[2]:,} |" in card
    record = json.loads((folder / RECORD).read_text())
    assert record["version"] == 2


def test_without_milestones_nothing_is_new(tmp_path: Path) -> None:
    base = dense("llama-gqa")
    export_nested(base, trajectory_of(base), tmp_path / "nested")
    record = json.loads((tmp_path / "nested" / RECORD).read_text())
    assert record["version"] == 1 and "milestones" not in record
    assert "Compensated" not in (tmp_path / "nested" / "README.md").read_text()


def test_a_compensation_that_is_not_what_was_fitted_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = dense("llama-gqa")
    trajectory = trajectory_of(base)
    other = milestone_of(base, trajectory, 2).compensation
    monkeypatch.setattr(
        "gisp.export.nested.export.folded_into_dense", lambda model_map, _: folded_into_dense(model_map, other)
    )
    milestones = [milestone_of(base, trajectory, 2, "factors")]
    with pytest.raises(GispError, match="differ by"):
        export_nested(base, trajectory, tmp_path / "nested", milestones=milestones)
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sound_milestones(tmp_path_factory.mktemp("sound") / "nested")


@pytest.fixture
def copy(sound: Path, tmp_path: Path) -> Path:
    shutil.copytree(sound, tmp_path / "copy")
    return tmp_path / "copy"


def test_missing_cut_and_changed_files_are_refused(copy: Path) -> None:
    file = copy / "nested-milestone-2-00001.safetensors"
    data = file.read_bytes()
    changed = bytearray(data)
    changed[-1] ^= 1
    file.write_bytes(changed)
    with pytest.raises(GispError, match=r"nested-milestone-2-00001.safetensors is corrupt: its SHA-256"):
        gisp.load(copy, verify=True)
    file.write_bytes(data[:-8])
    with pytest.raises(GispError, match=r"nested-milestone-2-00001.safetensors has \d+ bytes, not \d+"):
        gisp.load(copy)
    file.unlink()
    with pytest.raises(GispError, match=r"nested-milestone-2-00001.safetensors is missing: copy the whole folder"):
        gisp.load(copy)


ITEM = {"step": 2, "compensation": "x", "tensors": 1}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": 1}, "it has 2 milestones"),
        ({"milestones": []}, "it has 0 milestones"),
        ({"milestones": {"2": "x"}}, "milestones is not a list"),
        ({"milestones": [ITEM, ITEM]}, r"milestones are at steps \[2, 2\]"),
        ({"milestones": [{**ITEM, "step": 0}]}, r"milestones are at steps \[0\]"),
        ({"milestones": [{**ITEM, "step": 6}]}, r"milestones are at steps \[6\]"),
        ({"milestones": [{**ITEM, "compensation": 5}]}, "milestone 2 does not say what was done"),
        ({"milestones": [{**ITEM, "tensors": -1}]}, "milestone 2 has -1 tensors"),
        ({"milestones": [ITEM]}, "milestones hold .* tensors by step"),
        ({"milestones": [{"step": 2}]}, "compensation is missing"),
    ],
)
def test_wrong_milestones_are_refused(copy: Path, changes: dict[str, Any], message: str) -> None:
    record = json.loads((copy / RECORD).read_text())
    (copy / RECORD).write_text(json.dumps(record | changes))
    with pytest.raises(GispError, match=message) as error:
        gisp.load(copy)
    assert RECORD in str(error.value)


def rewritten(folder: Path, step: int, change: Any) -> None:
    """Change a milestone's tensors, and the record with them."""
    file = folder / f"nested-milestone-{step}-00001.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)
    record = json.loads((folder / RECORD).read_text())
    record["files"][file.name]["bytes"] = file.stat().st_size
    kept = {name: place for name, place in record["tensors"].items() if place != file.name}
    record["tensors"] = kept | dict.fromkeys(tensors, file.name)
    next(item for item in record["milestones"] if item["step"] == step)["tensors"] = len(tensors)
    (folder / RECORD).write_text(json.dumps(record))


DOWN = "model.layers.3.mlp.down_proj"


@pytest.mark.parametrize(
    ("step", "name", "like", "message"),
    [
        (2, f"{DOWN}.weight.transposed", lambda t: t[1:], r"down_proj.weight.transposed is \["),
        (2, f"{DOWN}.bias", lambda t: t[1:], r"down_proj.bias is \["),
        (4, f"{DOWN}.factors", lambda t: t[1:], r"down_proj.factors is \["),
        (2, f"{DOWN}.factors", None, "down_proj.factors has no place"),
        (2, "model.layers.9.mlp.down_proj.bias", torch.ones(64), "milestone 2 holds tensors that the model has not"),
        (4, "model.norm.weight", torch.ones(64), "milestone 4 holds tensors that the model has not"),
    ],
)
def test_tensors_without_a_place_are_refused(copy: Path, step: int, name: str, like: Any, message: str) -> None:
    kept = int(NestedFiles.open(copy).nesting.prefixes[step, 3, 2])

    def change(tensors: dict[str, torch.Tensor]) -> None:
        stored = f"milestones.{step}.{name}"
        value = torch.ones(kept) if like is None else like
        tensors[stored] = value if isinstance(value, torch.Tensor) else value(tensors[stored]).contiguous()

    rewritten(copy, step, change)
    with pytest.raises(GispError, match=message):
        gisp.load(copy, sparsity=0.0)
