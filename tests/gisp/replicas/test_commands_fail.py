"""What happens to one process of an evaluation, a compensation or an export in stages: one line names it, all end."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from ranks import end_of, start_ranks
from run_cases import OPTIONS
from safetensors.torch import save_file
from tiny import tiny_model, tiny_tokens
from torch import distributed

import gisp
from gisp.export.staged import export_staged
from gisp.replicas import agreement, signs, watch
from gisp.replicas.errors import ReplicaError
from gisp.replicas.group import Replicas
from gisp.target import evaluate_target


def evaluate(folder: str, out: str, stages: int = 1) -> None:
    replicas = Replicas(distributed.group.WORLD)
    evaluate_target(f"{folder}/run", f"{folder}/data.safetensors", device="cpu", replicas=replicas, stages=stages)


def compensate(folder: str, out: str) -> None:
    model = gisp.Trajectory.load(f"{folder}/run").at(0.2)
    gisp.compensate(model, tiny_tokens(16, seed=3), method="lsq", process_group=distributed.group.WORLD)


def export(folder: str, out: str) -> None:
    export_staged(f"{folder}/run", 0.2, out, process_group=distributed.group.WORLD, device="cpu")


COMMANDS: dict[str, Callable[[str, str], None]] = {
    "eval": evaluate,
    "eval in stages": lambda folder, out: evaluate(folder, out, 2),
    "compensate": compensate,
    "export in stages": export,
}
WORDS = {
    "killed": "ended without a word",
    "left": "ended without a word",
    "stopped": "was stopped by a signal; it was last seen",
    "stuck": "is stuck, it has done nothing for 3 s; it was last seen at work",
    "memory": "is out of memory (MemoryError): give a smaller",
}


def broken_command(command: str, folder: str, out: str, how: str) -> None:
    """A command in whose second collective after the start the last process fails."""
    watch.BEAT, watch.SILENCE, watch.GRACE, signs.STILL = 0.1, 2.0, 1.0, 3.0
    gather, calls = Replicas.gather, [0]

    def fail() -> None:
        if how in ("killed", "stopped"):
            os.kill(os.getpid(), {"killed": signal.SIGKILL, "stopped": signal.SIGSTOP}[how])
        elif how == "left":
            os._exit(3)
        elif how == "memory":
            raise MemoryError
        else:
            threading.Event().wait()

    def gathered(self: Replicas, rows: torch.Tensor, most: int) -> torch.Tensor:
        if self._watch is not None and self.rank == self.size - 1:
            calls[0] += 1
            if calls[0] == 3:
                fail()
        return gather(self, rows, most)

    Replicas.gather = gathered  # type: ignore[method-assign]
    try:
        COMMANDS[command](folder, out)
    except ReplicaError as error:
        print(f"told already: {error}" if error.told else f"telling: {error}", flush=True)
    except gisp.GispError as error:
        print(f"telling: {error}", flush=True)
    else:
        raise AssertionError("the command must not reach its end")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run and data."""
    folder = tmp_path_factory.mktemp("place")
    tiny_model().save_pretrained(folder / "model")
    for name, seed in (("run", 0), ("other", 7)):
        gisp.prune(folder / "model", tiny_tokens(16), out=folder / name, seed=seed, **OPTIONS)
    save_file({"input_ids": tiny_tokens(9, 40, seed=5)}, folder / "data.safetensors")
    return folder


@pytest.mark.parametrize(
    ("command", "how"),
    [
        ("eval", "killed"),
        ("eval", "stuck"),
        ("eval in stages", "stopped"),
        ("eval in stages", "memory"),
        ("compensate", "left"),
        ("compensate", "stuck"),
        ("export in stages", "killed"),
        ("export in stages", "stuck"),
    ],
)
def test_one_line_names_the_process(place: Path, tmp_path: Path, command: str, how: str) -> None:
    ranks, out = tmp_path / "ranks", tmp_path / "out"
    started = start_ranks(2, ranks, broken_command, command, str(place), str(out), how)
    found = end_of(started, ranks, [0, 1] if how in ("stuck", "memory") else [0])
    lines = [line for ended in found for line in ended.text.splitlines() if line.startswith(("telling: ", "error: "))]
    assert len(lines) == 1 and "rank 1 (" in lines[0] and WORDS[how] in lines[0], [ended.text for ended in found]
    assert not out.exists()


def unlike_command(command: str, folder: str, out: str, what: str) -> None:
    if distributed.get_rank() == 1:
        if what == "code":
            agreement.code_digest = lambda: "b" * 64
        else:
            load = gisp.Trajectory.load
            gisp.Trajectory.load = lambda run: load(str(run).replace("/run", "/other"))  # type: ignore[method-assign, assignment]
    with pytest.raises(gisp.GispError) as caught:
        COMMANDS[command](folder, out)
    print(caught.value, flush=True)


@pytest.mark.parametrize("what", ["run", "code"])
@pytest.mark.parametrize("command", ["eval in stages", "export in stages"])
def test_what_a_process_has_otherwise_is_named(place: Path, tmp_path: Path, command: str, what: str) -> None:
    ranks, out = tmp_path / "ranks", tmp_path / "out"
    found = end_of(start_ranks(2, ranks, unlike_command, command, str(place), str(out), what), ranks)
    assert all(ended.code == 0 and f"rank 1 has {what} " in ended.text for ended in found), found
    assert not out.exists()
