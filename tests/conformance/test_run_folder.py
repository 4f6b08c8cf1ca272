"""What a run leaves behind, and the models it stands for."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from . import models, oracle
from .cli import must_run, prune_arguments
from .conftest import SPARSITY, STEPS
from .reading import read_json, read_removal

FILES = {"trajectory.safetensors", "trajectory.json", "metrics.jsonl", "config.yaml"}
ARCHITECTURES = ["llama-mha", "llama-gqa", "qwen2", "qwen3"]


def keys_of(value: object) -> Iterator[str]:
    """All keys of a JSON value, at any depth."""
    if isinstance(value, dict):
        for key, child in value.items():
            yield key
            yield from keys_of(child)
    elif isinstance(value, list):
        for child in value:
            yield from keys_of(child)


def removed_by(removal: oracle.Removal, step: int) -> tuple[int, int]:
    """Heads and channels removed up to and including ``step``."""
    heads = sum(0 < t <= step for row in removal.heads for t in row)
    channels = sum(0 < t <= step for row in removal.channels for t in row)
    return heads, channels


def assert_same_logits(model: torch.nn.Module, decoder: oracle.Decoder) -> None:
    """Relative 1e-5 of the largest logit, on sequences no run has seen."""
    unseen = models.token_ids(rows=3, length=24, seed=123)
    with torch.no_grad():
        got = model(input_ids=unseen).logits.double()
        want = decoder.logits(unseen)
    assert got.shape == want.shape
    assert (got - want).abs().max() <= 1e-5 * want.abs().max()


@pytest.mark.parametrize("preset", ["paper", "official"])
def test_files(preset: str, finished_run: Callable[[str, str], Path]) -> None:
    run = finished_run("llama-gqa", preset)
    names = {p.name for p in run.iterdir()}
    assert names >= FILES
    # Other tests may have evaluated the run.
    extra = names - FILES - {"state", "evaluations.json"}
    assert all(Path(name).suffix in {".png", ".svg", ".pdf", ".html"} for name in extra), extra
    assert not [p for p in run.rglob("*") if p.suffix in {".pt", ".pth", ".bin", ".pkl", ".tmp"}]
    written = [p for p in run.rglob("*") if p.is_file()]
    for path in written:
        # torch.save writes a zip archive, pickle protocols 2 and up start with 0x80; the first byte of a safetensors
        # file is the low byte of its header's length and can be anything, its header opens with a brace.
        head = path.read_bytes()[:9]
        assert head[:2] != b"PK", path
        assert head[:1] != b"\x80" or (path.suffix == ".safetensors" and head[8:9] == b"{"), path


@pytest.mark.parametrize("family", ["llama-mha", "llama-gqa", "qwen3", "llama-bias", "llama-deep"])
def test_tensors(
    family: str,
    finished_run: Callable[[str, str], Path],
    model_folder: Callable[[str], Path],
) -> None:
    tensors = load_file(finished_run(family, "paper") / "trajectory.safetensors")
    decoder = oracle.Decoder.load(model_folder(family), torch.float32)
    shapes = {}
    for i in range(decoder.layers):
        shapes[f"layers.{i}.heads.removed_at"] = (decoder.heads,)
        shapes[f"layers.{i}.channels.removed_at"] = (decoder.channels,)
    assert {name: tuple(t.shape) for name, t in tensors.items()} == shapes
    assert {t.dtype for t in tensors.values()} == {torch.int32}
    for name, tensor in tensors.items():
        assert tensor.min() >= 0
        assert tensor.max() <= STEPS
        if int(name.split(".")[1]) in oracle.protected_layers(decoder.layers):
            assert not tensor.any()


def test_json(finished_run: Callable[[str, str], Path], model_folder: Callable[[str], Path]) -> None:
    run = finished_run("llama-mha", "paper")
    content = read_json(run)
    keys = {key.lower() for key in keys_of(content)}
    for word in ("version", "fingerprint", "config", "loss", "seconds", "sparsity", "torch"):
        assert any(word in key for key in keys), f"no key with {word!r} among {sorted(keys)}"
    assert str(model_folder("llama-mha")) in json.dumps(content)
    steps = content["steps"]
    assert isinstance(steps, list)
    assert [s["step"] for s in steps] == list(range(1, STEPS + 1))
    for step in steps:
        assert step["loss"] > 0
        assert step["seconds"] > 0


def test_first_loss_is_that_of_the_dense_model(
    finished_run: Callable[[str, str], Path],
    model_folder: Callable[[str], Path],
    input_ids: torch.Tensor,
) -> None:
    steps = read_json(finished_run("qwen2", "paper"))["steps"]
    assert isinstance(steps, list)
    decoder = oracle.Decoder.load(model_folder("qwen2"), torch.float64)
    loss = float(oracle.sequence_losses(decoder, input_ids).mean())
    assert steps[0]["loss"] == pytest.approx(loss, rel=1e-5)


def test_metrics_and_config(finished_run: Callable[[str, str], Path]) -> None:
    run = finished_run("llama-mha", "official")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["preset"] == "official"
    assert config["steps"] == STEPS
    assert config["ratio"] == 0.6


@pytest.mark.parametrize("preset", ["paper", "official"])
@pytest.mark.parametrize("family", ["llama-mha", "llama-gqa", "qwen2", "qwen3", "llama-bias"])
def test_sparsity_counts_removed_parameters(
    family: str,
    preset: str,
    finished_run: Callable[[str, str], Path],
    model_folder: Callable[[str], Path],
) -> None:
    run = finished_run(family, preset)
    decoder, removal = (
        oracle.Decoder.load(model_folder(family), torch.float32),
        read_removal(run),
    )
    reported = [s["sparsity"] for s in read_json(run)["steps"]]
    computed = []
    for step in range(1, STEPS + 1):
        heads, channels = removed_by(removal, step)
        removed = heads * decoder.head_parameters + channels * decoder.channel_parameters
        computed.append(removed / decoder.decoder_parameters)
        if preset == "paper":
            assert computed[-1] <= SPARSITY * step / STEPS + 1e-12
    assert reported == pytest.approx(computed, rel=1e-9)


def test_align_keeps_multiples_and_minimums(model_folder: Callable[[str], Path], tokens: Path, tmp_path: Path) -> None:
    """Preset fast: widths stay multiples of --align and no block is emptied, at any step."""
    out, align, steps = tmp_path / "run", 8, 10
    options = ("--preset", "fast", "--steps", steps, "--align", align, "--sparsity", 0.7)
    must_run(*prune_arguments(model_folder("llama-gqa"), tokens, out, *options))
    removal = read_removal(out)
    for step in range(1, steps + 1):
        for row in removal.channels:
            kept = sum(not 0 < t <= step for t in row)
            assert kept >= align
            assert kept % align == 0
        for row in removal.heads:
            assert sum(not 0 < t <= step for t in row) >= 1
    assert removed_by(removal, steps)[1] > removed_by(removal, 1)[1]


@pytest.mark.parametrize("preset", ["paper", "official"])
@pytest.mark.parametrize("family", [*ARCHITECTURES, "llama-bias", "mistral", "deepseek"])
def test_at_equals_the_masked_model(
    family: str,
    preset: str,
    finished_run: Callable[[str, str], Path],
    model_folder: Callable[[str], Path],
) -> None:
    import gisp

    run = finished_run(family, preset)
    steps, removal = read_json(run)["steps"], read_removal(run)
    assert isinstance(steps, list)
    trajectory = gisp.Trajectory.load(run)
    for step in (3, 6, STEPS):
        model = trajectory.at(steps[step - 1]["sparsity"])
        assert_same_logits(model, oracle.masked_decoder(model_folder(family), removal, step))


def test_at_with_a_model_already_in_memory(
    finished_run: Callable[[str, str], Path], model_folder: Callable[[str], Path]
) -> None:
    import gisp

    run = finished_run("llama-gqa", "paper")
    path, removal = model_folder("llama-gqa"), read_removal(run)
    dense = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    steps = read_json(run)["steps"]
    assert isinstance(steps, list)
    model = gisp.Trajectory.load(run).at(steps[4]["sparsity"], model=dense)
    assert_same_logits(model, oracle.masked_decoder(path, removal, 5))


def test_a_sparsity_between_steps_picks_the_nearest(
    finished_run: Callable[[str, str], Path], model_folder: Callable[[str], Path]
) -> None:
    import gisp

    run = finished_run("qwen3", "paper")
    path, removal = model_folder("qwen3"), read_removal(run)
    passed = [s["sparsity"] for s in read_json(run)["steps"]]
    trajectory = gisp.Trajectory.load(run)
    low, high = passed[3], passed[4]
    wanted = {
        0.55 * low + 0.45 * high: 4,
        0.45 * low + 0.55 * high: 5,
        passed[-1] + 0.4 * (passed[-1] - passed[-2]): STEPS,
    }
    for sparsity, step in wanted.items():
        assert_same_logits(trajectory.at(sparsity), oracle.masked_decoder(path, removal, step))
    with pytest.raises(gisp.GispError, match="the run ends at"):
        trajectory.at(passed[-1] + 0.2)


def test_of_two_equally_near_steps_the_smaller_is_taken(
    finished_run: Callable[[str, str], Path], model_folder: Callable[[str], Path]
) -> None:
    import gisp

    run = finished_run("llama-mha", "paper")
    path, removal = model_folder("llama-mha"), read_removal(run)
    passed = [s["sparsity"] for s in read_json(run)["steps"]]
    halfway = {
        index + 1: (low + high) / 2
        for index, (low, high) in enumerate(pairwise(passed))
        # Only midpoints that floating point represents exactly are equally near.
        if (low + high) / 2 - low == high - (low + high) / 2 > 0
    }
    assert halfway
    trajectory = gisp.Trajectory.load(run)
    for step, sparsity in halfway.items():
        assert_same_logits(trajectory.at(sparsity), oracle.masked_decoder(path, removal, step))


def test_prune_in_place_and_save(
    finished_run: Callable[[str, str], Path],
    expected: Callable[[str, str], oracle.Removal],
    model_folder: Callable[[str], Path],
    input_ids: torch.Tensor,
    tokens: Path,
    tmp_path: Path,
) -> None:
    import gisp

    path = model_folder("llama-gqa")
    for name, data in (("tensor", input_ids), ("path", tokens), ("spec", str(tokens))):
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        trajectory = gisp.prune(
            model, data, sparsity=SPARSITY, preset="paper", steps=STEPS, device="cpu", dtype="float32"
        )
        wanted = expected("llama-gqa", "paper")
        assert_same_logits(model, oracle.masked_decoder(path, wanted, STEPS))
        trajectory.save(tmp_path / name)
        assert read_removal(tmp_path / name).flat() == wanted.flat()
        loaded = gisp.Trajectory.load(tmp_path / name)
        dense = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        assert_same_logits(loaded.at(SPARSITY, model=dense), oracle.masked_decoder(path, wanted, STEPS))


def test_save_copies_a_run(finished_run: Callable[[str, str], Path], tmp_path: Path) -> None:
    import gisp

    run = finished_run("llama-mha", "paper")
    gisp.Trajectory.load(run).save(tmp_path / "copy")
    name = "trajectory.safetensors"
    assert (tmp_path / "copy" / name).read_bytes() == (run / name).read_bytes()
    assert read_json(tmp_path / "copy")["steps"] == read_json(run)["steps"]


@pytest.mark.parametrize("family", [*ARCHITECTURES, "llama-bias"])
def test_exports_equal_the_masked_model(
    family: str,
    finished_run: Callable[[str, str], Path],
    model_folder: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    """`hf` loads through gisp.load, `masked` through plain transformers; both compute the same logits."""
    import gisp

    run = finished_run(family, "official")
    wanted = oracle.masked_decoder(model_folder(family), read_removal(run), 7)
    steps = read_json(run)["steps"]
    assert isinstance(steps, list)
    for form in ("hf", "masked"):
        options = ("--sparsity", steps[6]["sparsity"], "--format", form)
        must_run("export", run, "--out", tmp_path / form, *options)
    assert_same_logits(gisp.load(tmp_path / "hf"), wanted)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "masked", dtype=torch.float32)
    assert_same_logits(plain, wanted)


def test_a_moved_run_still_finds_its_base(
    finished_run: Callable[[str, str], Path], model_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    import gisp

    moved = tmp_path / "elsewhere"
    shutil.copytree(finished_run("qwen2", "paper"), moved)
    wanted = oracle.masked_decoder(model_folder("qwen2"), read_removal(moved), STEPS)
    assert_same_logits(gisp.Trajectory.load(moved).at(SPARSITY), wanted)
