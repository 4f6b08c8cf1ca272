"""Evaluations that several processes share: the figures of one process, to the bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from eval_cases import byte_tokenizer, shrunken, write_rows
from harness_cases import write_tasks
from ranks import run_ranks
from safetensors.torch import save_file
from tiny import tiny_model, tiny_tokens
from torch import distributed

from gisp.cli import main
from gisp.data import Sequences
from gisp.errors import GispError
from gisp.evaluate import perplexity
from gisp.evaluate.generation import generate_greedily
from gisp.evaluate.pairs import Request, log_likelihoods
from gisp.replicas.group import Replicas
from gisp.replicas.sharing import shared_slices, sharing

WORDS = ("cab", "bag", "tab", "12", "x", "abab", "no", "it")


def figures() -> dict[str, Any]:
    """Everything an evaluation asks a model for, in more batches than processes and in batches of one."""
    model, tokens = shrunken("query", empty_layer=1), tiny_tokens(11, 40)
    rows = [(row[: 3 + 3 * i], row[: 3 + 3 * i]) for i, row in enumerate(tokens)]
    requests = [Request(tuple(row[: 4 + i].tolist()), tuple(row[-2:].tolist()), False) for i, row in enumerate(tokens)]
    prompts = [row[: 2 + i % 3].tolist() for i, row in enumerate(tokens[:5])]
    return {
        "perplexity": [perplexity(model, Sequences.plain(rows), 16, batch_size=n).perplexity for n in (1, 2, 99)],
        "stride": perplexity(model, Sequences.plain(rows), 16, 5, batch_size=3).perplexity,
        "likelihoods": log_likelihoods(model, [*requests, *requests[:3]], 2),
        "answers": generate_greedily(model, byte_tokenizer(), prompts, max_new_tokens=4, batch_size=2),
    }


def shared_figures(folder: str) -> None:
    with sharing(Replicas(distributed.group.WORLD)) as replicas:
        found = figures()
        Path(folder, f"{replicas.rank}.json").write_text(json.dumps(found))
        other = Sequences.plain([(row, row) for row in tiny_tokens(4, 8, seed=replicas.rank)])
        with pytest.raises(GispError, match="rank 1 has evaluation data"):
            perplexity(tiny_model(), other, 8)


@pytest.mark.parametrize("size", [2, 3])
def test_every_process_gets_the_figures_of_one(size: int, tmp_path: Path) -> None:
    run_ranks(size, tmp_path / "ranks", shared_figures, str(tmp_path))
    wanted = figures()
    for rank in range(size):
        assert json.loads((tmp_path / f"{rank}.json").read_text()) == wanted


def test_nothing_is_shared_unless_asked() -> None:
    assert shared_slices() == 1
    with sharing(None):
        assert shared_slices() == 1
    with sharing(Replicas()) as replicas:
        assert shared_slices() == 8 and replicas.size == 1
    assert shared_slices() == 1


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("shared")
    tiny_model("llama-gqa").save_pretrained(root / "model")
    byte_tokenizer().save_pretrained(root / "model")
    write_rows(root / "tokens.jsonl", [{"text": f"the {word} is a {word}{word}"} for word in WORDS])
    choices = [{"context": f"a {w}", "choices": [" cab", " bag", " no"], "answer": i % 3} for i, w in enumerate(WORDS)]
    write_rows(root / "rows.jsonl", choices)
    return root


def evaluated(capfd: pytest.CaptureFixture[str], *given: str) -> dict[str, Any]:
    capfd.readouterr()
    assert main(["eval", *given, "--device=cpu", "--dtype=float32", "--json", "--quiet"]) == 0
    (line,) = capfd.readouterr().out.splitlines()
    return dict(json.loads(line))


@pytest.mark.usefixtures("forked_launch")
def test_the_command_prints_once_what_one_process_prints(
    places: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "r.json"
    asked = [str(places / "model"), "--data", str(places / "tokens.jsonl"), "--batch-size=2"]
    alone = evaluated(capfd, *asked)
    assert evaluated(capfd, *asked, "--gpus=2", "--out", str(out)) == alone
    assert json.loads(out.read_text()) == alone


@pytest.mark.usefixtures("forked_launch")
def test_choices_of_a_command_do_not_follow_the_number_of_processes(
    places: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    asked = [str(places / "model"), "--data", str(places / "rows.jsonl"), "--batch-size=2"]
    alone = evaluated(capfd, *asked)
    # Each process may have its layers in host memory.
    for more in (["--gpus=2", "--offload"], ["--gpus", "1"]):
        assert evaluated(capfd, *asked, *more) == alone


@pytest.mark.usefixtures("forked_launch")
def test_what_all_meet_is_told_once(places: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    save_file({"input_ids": torch.full((4, 8), 10_000)}, tmp_path / "t.safetensors")
    given = ["eval", str(places / "model"), f"--data={tmp_path / 't.safetensors'}", "--device=cpu"]
    assert main([*given, "--gpus=2"]) == 2
    errors = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "10000" in errors[0]


@pytest.mark.usefixtures("forked_launch")
def test_lm_eval_does_not_follow_the_number_of_processes(places: Path, capfd: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("lm_eval")
    write_tasks(places / "tasks")
    asked = [str(places / "model"), "--lm-eval=gisp_choices,gisp_contexts", f"--lm-eval-include={places / 'tasks'}"]
    one = evaluated(capfd, *asked, "--gpus=1")
    assert evaluated(capfd, *asked, "--gpus=2") == one
    assert evaluated(capfd, *asked)["lm_eval"] == one["lm_eval"]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["--gpus=2", "--device=cuda:0"], "leave --device cuda:0 out"),
        (["--gpus=99", "--device=auto"], f"{torch.cuda.device_count()} CUDA devices are here"),
        (["--gpus=0"], "--gpus"),
    ],
)
def test_what_cannot_be_started_is_refused(
    places: Path, given: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["eval", str(places / "model"), "--data", str(places / "rows.jsonl"), *given]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and words in lines[0]
