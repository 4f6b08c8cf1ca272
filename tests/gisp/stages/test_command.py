"""``gisp prune --stages``: processes of a command, what is refused, and a stage that dies."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import end_of, run_ranks, start_ranks
from run_cases import OPTIONS
from safetensors.torch import load_file, save_file
from tiny import tiny_model, tiny_tokens
from torch import distributed

import gisp
from gisp.cli import main
from gisp.replicas import launch, watch
from gisp.replicas.errors import ReplicaError
from gisp.run.trajectory import StepRecord

GIVEN = ("--device=cpu", "--dtype=float32", "--steps=3", "--align=4", "--batch-tokens=128", "--sparsity=0.3", "--quiet")


@pytest.mark.usefixtures("forked_launch")
def test_stages_write_the_run_of_one_process(
    tmp_path: Path, model_folder: Path, token_file: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for name, more in (("one", ["--gpus", "1"]), ("two", ["--gpus", "2", "--stages", "2"])):
        given = ["prune", str(model_folder), "--data", str(token_file), "--out", str(tmp_path / name), *GIVEN, *more]
        assert main([option for option in given if option != "--quiet"]) == 0
    evaluating, exporting = capfd.readouterr().err.splitlines()[-2:]
    assert evaluating.endswith("--data TEXT --stages 2") and exporting.endswith("--stages 2")
    one, two = ({p.name: p.read_bytes() for p in (tmp_path / n).rglob("*.safetensors")} for n in ("one", "two"))
    assert one == two and len(one) == 3


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["--stages", "2"], "--stages 2 needs as many processes: add --gpus 2"),
        (["--stages", "2", "--gpus", "1"], "--stages 2 needs as many processes: add --gpus 2"),
        (["--stages", "2", "--gpus", "3"], "--stages 2 does not divide 3 processes evenly: give --gpus 2 or 4"),
        (["--stages", "4", "--gpus", "2"], "--stages 4 does not divide 2 processes evenly: give --gpus 4"),
        (["--stages", "9", "--gpus", "9"], "--stages 9 is more than the 4 layers of this model"),
        (["--stages", "2", "--gpus", "2", "--regrow", "1"], "--regrow 1 passes data through all of it"),
        (["--stages", "2", "--gpus", "2", "--offload"], "--offload always leaves layers in host memory"),
        (["--gpus", "2", "--offload"], "--offload always is for one GPU, 2 processes share this run"),
        (["--stages", "2", "--gpus", "4", "--slices", "1"], "--slices 1 is less than the 2 replicas of 4 processes"),
        (
            ["--stages", "2", "--gpus", "2", "--criterion", "gisp"],
            "--criterion second-order, wanda-sp, flap, not gisp",
        ),
        (["--stages", "0", "--gpus", "2"], "--stages"),
    ],
)
def test_what_cannot_be_split_is_refused(
    tmp_path: Path,
    model_folder: Path,
    token_file: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    given: list[str],
    words: str,
) -> None:
    def never(*_: Any, **__: Any) -> int:
        raise AssertionError("started")

    monkeypatch.setattr(launch, "launch", never)
    out = tmp_path / "r"
    code = main(["prune", str(model_folder), "--data", str(token_file), "--out", str(out), "--device=cpu", *given])
    lines = capsys.readouterr().err.splitlines()
    assert code == 2 and len(lines) == 1 and words in lines[0]
    assert not out.exists()


REFUSED: tuple[tuple[dict[str, Any], str], ...] = (
    ({"criterion": "flap"}, "goes with --criterion second-order, not flap"),
    ({"offload": "always"}, "--offload always leaves layers in host memory"),
    ({"regrow": 1}, "--regrow 1 passes data through all of it"),
    ({"objective": "choice"}, "--objective choice passes data through all of it"),
    ({"allocator": "owl"}, "--allocator owl passes data through all of it"),
    ({"objective": lambda model, ids, labels: labels}, "an objective of your own needs all of it"),
    ({"stages": 3}, "--stages 3 does not divide 2 processes evenly"),
    ({"stages": True}, "stages is True"),
    ({"model": "few"}, "--stages 2 is more than the 1 layers"),
    ({"model": "nan"}, "NaN or infinite weights in model.layers.2.mlp.up_proj.weight"),
    ({"model": "short"}, "missing keys, first model.layers.3.mlp.down_proj.weight"),
    ({"model": "foreign"}, "unexpected keys, first model.layers.9.other"),
    ({"model": "shapes"}, "mismatched keys, first model.layers.0.mlp.up_proj.weight"),
    ({"model": "bin"}, "has no safetensors that --stages can read"),
    ({"model": "gemma"}, "GemmaForCausalLM has a buffer model.embed_tokens.embed_scale"),
    ({"model": "stablelm"}, "--stages needs a model that the fused pass scores: no final RMS norm"),
)


def refuse_all(folder: str) -> None:
    for number, (options, words) in enumerate(REFUSED):
        given = {**OPTIONS, "stages": 2, "model": "sound", **options}
        model = f"{folder}/{given.pop('model')}"
        with pytest.raises(gisp.GispError) as caught:
            gisp.prune(
                model, tiny_tokens(16), out=f"{folder}/r{number}", process_group=distributed.group.WORLD, **given
            )
        assert words in str(caught.value), (words, str(caught.value))
        assert not Path(f"{folder}/r{number}/trajectory.json").exists()
    # One that ends first would break the other's last exchange.
    Path(f"{folder}/done-{distributed.get_rank()}").touch()
    while len([*Path(folder).glob("done-*")]) < 2:
        time.sleep(0.05)


def test_one_line_says_what_cannot_be_split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import GemmaConfig, GemmaForCausalLM, StableLmConfig, StableLmForCausalLM

    tiny_model().save_pretrained(tmp_path / "sound")
    tiny_model(layers=1).save_pretrained(tmp_path / "few")
    tiny_model().save_pretrained(tmp_path / "bin")
    (tmp_path / "bin" / "model.safetensors").unlink()
    changes = {
        "nan": lambda state: state["model.layers.2.mlp.up_proj.weight"].fill_(torch.nan),
        "short": lambda state: state.pop("model.layers.3.mlp.down_proj.weight"),
        "foreign": lambda state: state.update({"model.layers.9.other": torch.ones(2)}),
        "shapes": lambda state: state.update({"model.layers.0.mlp.up_proj.weight": torch.ones(2)}),
    }
    for name, change in changes.items():
        tiny_model().save_pretrained(tmp_path / name)
        state = load_file(tmp_path / name / "model.safetensors")
        change(state)
        save_file(state, tmp_path / name / "model.safetensors", metadata={"format": "pt"})
    sizes: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 24,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
    }
    sizes["num_key_value_heads"] = 2
    GemmaForCausalLM(GemmaConfig(vocab_size=96, head_dim=8, **sizes)).save_pretrained(tmp_path / "gemma")
    StableLmForCausalLM(StableLmConfig(vocab_size=96, **sizes)).save_pretrained(tmp_path / "stablelm")
    run_ranks(2, tmp_path / "ranks", refuse_all, str(tmp_path))


def killed_run(model: str, out: str) -> None:
    watch.BEAT, watch.SILENCE, watch.GRACE = 0.1, 4.0, 1.0

    def die(record: StepRecord, steps: int) -> None:
        if record.step == 2 and distributed.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)

    group = distributed.group.WORLD
    try:
        gisp.prune(model, tiny_tokens(16), out=out, process_group=group, stages=2, on_step=die, **OPTIONS)
    except ReplicaError as error:
        print(f"telling: {error}", flush=True)
    else:
        raise AssertionError("the run must not reach its end")


def test_a_stage_that_dies_is_named(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path / "model")
    started = start_ranks(2, tmp_path / "ranks", killed_run, str(tmp_path / "model"), str(tmp_path / "run"))
    found = end_of(started, tmp_path / "ranks", [0])
    assert found[0].code == 0, found[0].text
    assert "telling: rank 1 (" in found[0].text and "ended without a word" in found[0].text
    assert len(gisp.Trajectory.load(tmp_path / "run").steps) >= 1


def unlike_run(stages: list[int]) -> None:
    rank, group = distributed.get_rank(), distributed.group.WORLD
    with pytest.raises(gisp.GispError) as caught:
        gisp.prune(tiny_model(), tiny_tokens(16), process_group=group, stages=stages[rank], **OPTIONS)
    assert f"rank 1 has stages {stages[1]}, rank 0 has {stages[0]}" in str(caught.value)


@pytest.mark.parametrize("stages", [[2, 1, 2, 2], [1, 2, 2, 2], [2, 4, 2, 2]], ids=str)
def test_processes_of_other_stages_are_told_apart(tmp_path: Path, stages: list[int]) -> None:
    run_ranks(4, tmp_path / "ranks", unlike_run, stages)


def in_memory_run(folder: str) -> None:
    group = distributed.group.WORLD
    trajectory = gisp.prune(
        tiny_model(), tiny_tokens(16), out=f"{folder}/two", process_group=group, stages=2, **OPTIONS
    )
    assert trajectory.model is not None
    assert any(p.is_meta for p in trajectory.model.parameters())
    bare = tiny_model().to("meta")
    with pytest.raises(gisp.GispError, match="of this stage is on meta"):
        gisp.prune(bare, tiny_tokens(16), process_group=group, stages=2, **OPTIONS)


def test_a_model_in_memory_is_split(tmp_path: Path) -> None:
    gisp.prune(tiny_model(), tiny_tokens(16), out=tmp_path / "one", slices=8, **OPTIONS)
    run_ranks(2, tmp_path / "ranks", in_memory_run, str(tmp_path))
    one, two = ((tmp_path / name / "trajectory.safetensors").read_bytes() for name in ("one", "two"))
    assert one == two


def test_one_process_is_no_stage_of_several(tmp_path: Path) -> None:
    with pytest.raises(gisp.GispError, match="--stages 2 needs as many processes: add --gpus 2"):
        gisp.prune(tiny_model(), tiny_tokens(16), stages=2, **OPTIONS)
