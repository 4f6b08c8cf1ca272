"""Bad input: exit code 2, one line naming the value, nothing written and nothing changed."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

from . import models
from .cli import CPU_FLOAT32, PAPER, assert_refused, must_run, prune_arguments, run_cli, snapshot, spawn_cli


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory, model_folder: Callable[[str], Path]) -> Path:
    """A folder with every bad model and bad data file of the tests below."""
    folder = tmp_path_factory.mktemp("bad")
    good = model_folder("llama-mha")
    models.gpt2(folder / "gpt2")
    (folder / "only-config").mkdir()
    shutil.copy(good / "config.json", folder / "only-config")
    (folder / "empty-folder").mkdir()
    (folder / "notes.txt").write_text("not a model\n")
    for name in ("nan-weights", "cut-weights", "broken-config", "spoken"):
        shutil.copytree(good, folder / name)
    weights = load_file(good / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3, 5] = float("nan")
    save_file(weights, folder / "nan-weights" / "model.safetensors", metadata={"format": "pt"})
    whole = (good / "model.safetensors").read_bytes()
    (folder / "cut-weights" / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    (folder / "broken-config" / "config.json").write_text('{"model_type": "llama",')
    words = {"[UNK]": 0, **{f"w{i}": i for i in range(1, models.VOCAB)}}
    tokenizer = Tokenizer(WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]")
    fast.save_pretrained(folder / "spoken")
    _write_bad_data(folder)
    return folder


def _write_bad_data(folder: Path) -> None:
    ids = models.token_ids()
    generator = torch.Generator().manual_seed(0)
    noise = torch.randint(0, 256, (4096,), generator=generator)
    (folder / "noise.safetensors").write_bytes(bytes(noise.tolist()))
    (folder / "empty.safetensors").write_bytes(b"")
    high, low = ids.clone(), ids.clone()
    high[7, 4], low[7, 4] = models.VOCAB, -3
    tensors = {
        "float": {"input_ids": ids.float()},
        "high": {"input_ids": high},
        "negative": {"input_ids": low},
        "rank-1": {"input_ids": ids[0].clone()},
        "rank-3": {"input_ids": ids[None].clone()},
        "no-rows": {"input_ids": ids[:0].clone()},
        "no-columns": {"input_ids": ids[:, :0].clone()},
        "one-column": {"input_ids": ids[:, :1].clone()},
        "no-ids": {"tokens": ids},
        "short-labels": {"input_ids": ids, "labels": ids[:, :-1].clone()},
        "all-ignored": {"input_ids": ids, "labels": torch.full_like(ids, -100)},
        "float-labels": {"input_ids": ids, "labels": ids.float()},
        "high-labels": {"input_ids": ids, "labels": high},
    }
    for name, content in tensors.items():
        save_file(content, folder / f"{name}.safetensors")
    (folder / "broken.jsonl").write_text('{"text": "w1 w2 w3 w4"}\n{"text": "w5 w6\n')
    (folder / "empty.jsonl").write_text("")
    (folder / "unknown-keys.jsonl").write_text('{"speech": "w1 w2 w3"}\n')
    (folder / "not-objects.jsonl").write_text("[1, 2, 3]\n")
    (folder / "table.xyz").write_text("1,2,3\n")


MODELS = {
    "missing": ("no-such-model", ("no-such-model",)),
    "gpt2": ("gpt2", ("gpt2",)),
    "only-config": ("only-config", ("only-config",)),
    "empty-folder": ("empty-folder", ("empty-folder",)),
    "text-file": ("notes.txt", ("notes.txt",)),
    "nan-weights": ("nan-weights", ("nan",)),
    "cut-weights": ("cut-weights", ("cut-weights",)),
    "broken-config": ("broken-config", ("broken-config",)),
}


@pytest.mark.parametrize("kind", MODELS)
def test_bad_model(kind: str, shelf: Path, tokens: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    name, words = MODELS[kind]
    out, before = tmp_path / "run", snapshot(shelf)
    done = run_cli(capfd, *prune_arguments(shelf / name, tokens, out, *PAPER))
    assert_refused(done, *words)
    assert not out.exists()
    assert snapshot(shelf) == before


@pytest.mark.parametrize("kind", ["missing", "only-config", "text-file", "cut-weights"])
def test_eval_of_a_bad_model(kind: str, shelf: Path, tokens: Path, capfd: pytest.CaptureFixture[str]) -> None:
    name, words = MODELS[kind]
    assert_refused(run_cli(capfd, "eval", shelf / name, "--data", tokens), *words)


DATA = {
    "missing": ("no-such-file.safetensors", ("no-such-file.safetensors",)),
    "empty-file": ("empty.safetensors", ("empty.safetensors",)),
    "noise": ("noise.safetensors", ("noise.safetensors",)),
    "float": ("float.safetensors", ("float32",)),
    "out-of-range": ("high.safetensors", (str(models.VOCAB),)),
    "negative": ("negative.safetensors", ("-3",)),
    "rank-1": ("rank-1.safetensors", ("32",)),
    "rank-3": ("rank-3.safetensors", ("12", "32")),
    "no-rows": ("no-rows.safetensors", ("no-rows",)),
    "no-columns": ("no-columns.safetensors", ("no-columns",)),
    "one-column": ("one-column.safetensors", ()),
    "no-ids": ("no-ids.safetensors", ("input_ids",)),
    "short-labels": ("short-labels.safetensors", ("labels", "31")),
    "all-ignored": ("all-ignored.safetensors", ("all-ignored",)),
    "float-labels": ("float-labels.safetensors", ("labels",)),
    "high-labels": ("high-labels.safetensors", (str(models.VOCAB),)),
    "broken-jsonl": ("broken.jsonl", ("broken.jsonl", "2")),
    "empty-jsonl": ("empty.jsonl", ("empty.jsonl",)),
    "unknown-keys": ("unknown-keys.jsonl", ("speech",)),
    "not-objects": ("not-objects.jsonl", ("not-objects.jsonl",)),
    "unknown-type": ("table.xyz", ("table.xyz",)),
    "folder": ("empty-folder", ("empty-folder",)),
}


@pytest.mark.parametrize("kind", DATA)
def test_bad_data(kind: str, shelf: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    name, words = DATA[kind]
    out, before = tmp_path / "run", snapshot(shelf)
    done = run_cli(capfd, *prune_arguments(shelf / "spoken", shelf / name, out, *PAPER))
    assert_refused(done, *words)
    assert not out.exists()
    assert snapshot(shelf) == before


@pytest.mark.parametrize("kind", DATA)
def test_eval_of_bad_data(kind: str, shelf: Path, capfd: pytest.CaptureFixture[str]) -> None:
    name, words = DATA[kind]
    assert_refused(run_cli(capfd, "eval", shelf / "spoken", "--data", shelf / name), *words)


def test_text_without_a_tokenizer(
    shelf: Path,
    model_folder: Callable[[str], Path],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    data, out = tmp_path / "good.jsonl", tmp_path / "run"
    data.write_text('{"text": "w1 w2 w3 w4 w5"}\n' * 4)
    done = run_cli(capfd, *prune_arguments(model_folder("llama-mha"), data, out, *PAPER))
    assert_refused(done, "tokenizer")
    assert not out.exists()
    must_run(*prune_arguments(shelf / "spoken", data, out, *PAPER))


OPTIONS = [
    *[("--sparsity", value) for value in ("0", "-0.1", "1", "1.5", "0.97", "nan", "inf", "half")],
    *[("--steps", value) for value in ("0", "-3", "abc", "2.5")],
    *[("--samples", value) for value in ("0", "-1", "few")],
    *[("--batch-size", value) for value in ("0", "-2", "many", "--3", "\u00b2", "9" * 20)],
    *[("--seq-len", value) for value in ("0", "1", "-5")],
    *[("--align", value) for value in ("0", "-4", "9" * 20)],
    *[("--ema", value) for value in ("1.0", "-0.5", "nan")],
    *[("--protect-first", value) for value in ("-0.1", "1.5")],
    ("--protect-last", "-1"),
    ("--preset", "slow"),
    ("--objective", "accuracy"),
    ("--norm", "layer"),
    ("--engine", "steam"),
    ("--gqa", "pairs"),
    ("--device", "toaster"),
    ("--dtype", "int8"),
    ("--seed", "dice"),
    ("--frobnicate", "1"),
]


@pytest.mark.parametrize("option", OPTIONS, ids=lambda pair: f"{pair[0][2:]}={pair[1]}")
def test_bad_option(
    option: tuple[str, str],
    model_folder: Callable[[str], Path],
    tokens: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    out, (name, value) = tmp_path / "run", option
    # A value starting with a dash is only unambiguous in the --name=value form.
    arguments = prune_arguments(model_folder("llama-mha"), tokens, out, *PAPER, f"{name}={value}")
    done = run_cli(capfd, *arguments)
    assert_refused(done, name[2:] if name == "--frobnicate" else value.removesuffix(".0"))
    assert not out.exists()


@pytest.mark.parametrize("ratio", ["0", "-0.2", "1.0", "1.7", "0.95"])
def test_bad_ratio(
    ratio: str,
    model_folder: Callable[[str], Path],
    tokens: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """0.95 of all structures is beyond what the protected layers leave."""
    out = tmp_path / "run"
    options = ("--preset", "official", "--steps", 3, f"--ratio={ratio}")
    done = run_cli(capfd, *prune_arguments(model_folder("llama-mha"), tokens, out, *options))
    assert_refused(done, ratio.removesuffix(".0"))
    assert not out.exists()


@pytest.mark.parametrize(
    ("content", "word"),
    [(None, "options.yaml"), ("steps: [1", "options.yaml"), ("stepz: 4\n", "stepz"), ("- 1\n", "options.yaml")],
    ids=["missing", "broken", "unknown-key", "not-a-mapping"],
)  # fmt: skip
def test_bad_config_file(
    content: str | None,
    word: str,
    model_folder: Callable[[str], Path],
    tokens: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    config, out = tmp_path / "options.yaml", tmp_path / "run"
    if content is not None:
        config.write_text(content)
    arguments = prune_arguments(model_folder("llama-mha"), tokens, out, "--config", config)
    assert_refused(run_cli(capfd, *arguments), word)
    assert not out.exists()


@pytest.mark.parametrize(
    "argv", [(), ("polish",), ("prune",), ("eval",), ("export",)], ids=lambda a: "-".join(a) or "none"
)  # fmt: skip
def test_incomplete_command(argv: tuple[str, ...], capfd: pytest.CaptureFixture[str]) -> None:
    done = run_cli(capfd, *argv)
    if argv:
        assert_refused(done)
    else:
        assert "Traceback" not in done.text
        assert "prune" in done.stdout


def test_missing_data_option(
    model_folder: Callable[[str], Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    done = run_cli(capfd, "prune", model_folder("llama-mha"), "--out", out, *CPU_FLOAT32)
    assert_refused(done, "--data")
    assert not out.exists()


@pytest.mark.parametrize("occupant", ["file", "foreign-folder"])
def test_out_is_taken(
    occupant: str,
    model_folder: Callable[[str], Path],
    tokens: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "precious"
    if occupant == "foreign-folder":
        out.mkdir()
        (out / "thesis.tex").write_text("years of work")
    else:
        out.write_text("years of work")
    before = snapshot(tmp_path)
    done = run_cli(capfd, *prune_arguments(model_folder("llama-mha"), tokens, out, *PAPER))
    assert_refused(done, "precious")
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("window", ["0", "1", "-4", "wide"])
def test_bad_window(
    window: str,
    model_folder: Callable[[str], Path],
    tokens: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    model = model_folder("llama-mha")
    assert_refused(run_cli(capfd, "eval", model, "--data", tokens, f"--window={window}"), window)


def test_python_calls_raise_errors_that_name_the_value(
    model_folder: Callable[[str], Path], input_ids: torch.Tensor, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    import gisp

    path = model_folder("llama-mha")
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    before = {name: p.clone() for name, p in model.named_parameters()}
    for data, options, word in (
        (input_ids.float(), {"sparsity": 0.3}, "float32"),
        (input_ids + 100, {"sparsity": 0.3}, "2"),
        (input_ids, {"sparsity": 1.5}, "1.5"),
        (input_ids, {"sparsity": 0.3, "preset": "slow"}, "slow"),
        (input_ids, {"sparsity": 0.3, "stepz": 3}, "stepz"),
    ):
        with pytest.raises((ValueError, TypeError), match=word):
            gisp.prune(model, data, **options)
    after = dict(model.named_parameters())
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    with pytest.raises((ValueError, FileNotFoundError), match="nowhere"):
        gisp.Trajectory.load(tmp_path / "nowhere")


def test_a_real_process(shelf: Path, tokens: Path, tmp_path: Path) -> None:
    """The same through a shell: warnings of imported libraries must not add lines."""
    out = tmp_path / "run"
    assert_refused(spawn_cli(*prune_arguments(shelf / "gpt2", tokens, out, *PAPER)), "gpt2")
    assert not out.exists()
    assert snapshot(tmp_path) == {}
