"""``gisp prune --gpus`` and what torchrun starts: processes, exit codes and the one line of a failure."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from gisp.cli import main
from gisp.errors import GispError
from gisp.replicas import watch
from gisp.replicas.environment import launched, rank
from gisp.replicas.launch import launch

_ENDS = """
import os, signal, sys, time
# As a command unwinds.
signal.signal(signal.SIGTERM, lambda number, _: os._exit(128 + number))
if os.environ["RANK"] == "1":
    sys.exit(int(sys.argv[1])) if sys.argv[1].isdigit() else os.kill(os.getpid(), getattr(signal, sys.argv[1]))
time.sleep(0 if sys.argv[1] == "0" else 60)
"""
_REFUSES = """
import sys
from gisp.cli import main
from gisp.replicas.environment import rank
sys.exit(main(["prune", "m", "--data", "d", "--out", "o", "--steps", "0" if sys.argv[1] == "all" or rank() else "1"]))
"""
_FIRST_WAITS = """
import threading
if not rank():
    threading.Event().wait()
sys.exit"""
_STOPS = """
import os, signal, sys, time
from pathlib import Path
import gisp
from gisp.replicas import signs, watch
from gisp.replicas.environment import joined, rank
from gisp.run.setup import Setup
from tiny import tiny_model, tiny_tokens

watch.BEAT, watch.SILENCE, watch.GRACE, signs.STILL = 0.2, 4.0, 1.0, 4.0
score = Setup.score


def scored(self, step):
    if rank() == 1 and step == 2:
        Path(sys.argv[1]).write_text(str(time.time()))
        os.kill(os.getpid(), signal.SIGSTOP)
    return score(self, step)


Setup.score = scored
with joined("cpu") as group:
    options = {"sparsity": 0.3, "steps": 4, "align": 4, "batch_tokens": 64}
    gisp.prune(tiny_model(), tiny_tokens(16, 16), process_group=group, progress=False, **options)
"""
_RUNS = """
import os, sys, time
from pathlib import Path
place, own = Path(sys.argv[1]), Path(sys.argv[1]) / os.environ["RANK"]
own.write_text(str(os.getpid()))
while not (place / "end").exists():
    time.sleep(0.05)
"""
_LAUNCHES = (
    "import sys; from gisp.replicas.launch import launch; sys.exit(launch(2, 'running', sys.argv[1:], 'begin anew'))"
)
OPTIONS = ("--device=cpu", "--dtype=float32", "--steps=3", "--align=4", "--batch-tokens=128", "--sparsity=0.3")


@pytest.fixture
def ending(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module whose second process ends as its argument says, and which the first would outlive."""
    (tmp_path / "ending.py").write_text(_ENDS)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), *sys.path]))
    return "ending"


def test_the_first_failure_is_the_result(ending: str) -> None:
    assert launch(2, ending, ["0"], "begin anew") == 0
    assert launch(2, ending, ["2"], "begin anew") == 2
    # By hand; the command has said how to go on.
    assert launch(2, ending, ["SIGTERM"], "begin anew") == 143
    with pytest.raises(KeyboardInterrupt):
        launch(2, ending, ["130"], "begin anew")
    # As a library does that calls exit.
    with pytest.raises(GispError, match=r"rank 1 \(process \d+\) ended with exit code 3 and without a word, so the o"):
        launch(2, ending, ["3"], "begin anew")
    with pytest.raises(
        GispError, match=r"rank 1 \(process \d+\) was ended by SIGKILL \(.*memory.*\), so the others.*: begin anew"
    ):
        launch(2, ending, ["SIGKILL"], "begin anew")


def until(condition: Callable[[], bool]) -> None:
    """Wait for what is to come; a minute is too long."""
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def _states(processes: list[int]) -> set[str]:
    return {Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] for pid in processes}


def test_what_stops_the_command_stops_its_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-Z, and then fg: a terminal reaches the command alone."""
    (tmp_path / "running.py").write_text(_RUNS)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), *(path for path in sys.path if path)]))
    command = subprocess.Popen([sys.executable, "-c", _LAUNCHES, str(tmp_path)])
    try:
        started = [tmp_path / "0", tmp_path / "1"]
        until(lambda: all(path.exists() and path.read_text() for path in started))
        processes = [command.pid, *(int(path.read_text()) for path in started)]
        command.send_signal(signal.SIGTSTP)
        until(lambda: _states(processes) == {"T"})
        command.send_signal(signal.SIGCONT)
        until(lambda: "T" not in _states(processes))
        (tmp_path / "end").touch()
        assert command.wait() == 0
    finally:
        command.kill()


@pytest.mark.parametrize("who", ["all", "second"])
def test_one_line_says_what_some_refuse(
    who: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Hosts may differ in what a command finds there, before its processes have met."""
    (tmp_path / "refusing.py").write_text(_REFUSES if who == "all" else _REFUSES.replace("\nsys.exit", _FIRST_WAITS))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), *(path for path in sys.path if path)]))
    assert launch(2, "refusing", [who], "begin anew") == 2
    (line,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    assert "--steps" in line and (who == "all" or line.startswith(f"error: rank 1 on {socket.gethostname()}: "))


def test_one_that_does_not_get_on_ends_with_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """What else keeps one from getting on, and how it is told, ``test_stuck.py`` shows."""
    (tmp_path / "stopping.py").write_text(_STOPS)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), *(path for path in sys.path if path)]))
    assert launch(2, "stopping", [str(tmp_path / "when")], "begin anew") == watch.EXIT_CODE
    # Half a minute is what the launcher gives a process that does not listen.
    assert time.time() - float((tmp_path / "when").read_text()) < 30
    (line,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    assert line.startswith("error: rank 1 (") and "was stopped by a signal" in line


def test_several_processes_write_the_run_of_one(
    tmp_path: Path, model_folder: Path, token_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path for path in sys.path if path))
    for gpus in ("1", "2"):
        given = ["prune", str(model_folder), "--data", str(token_file), "--out", str(tmp_path / gpus), *OPTIONS]
        assert main([*given, "--quiet", "--gpus", gpus]) == 0
    one, two = ({p.name: p.read_bytes() for p in (tmp_path / n).rglob("*.safetensors")} for n in ("1", "2"))
    assert one == two and len(one) == 3
    assert "slices: 4" in (tmp_path / "2" / "config.yaml").read_text()


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["--gpus", "2", "--criterion", "gisp"], "--criterion second-order, wanda-sp, flap, not gisp"),
        (
            ["--gpus", "2", "--slices", "1"],
            "--slices 1 is less than the 2 replicas of 2 processes",
        ),
        # The default, which does not follow the number of GPUs.
        (["--gpus", "8", "--device", "cpu"], "--slices 4 is less than the 8 replicas of 8 processes: give --slices 8"),
        (["--gpus", "2", "--device", "cuda:0"], "leave --device cuda:0 out"),
        (["--gpus", "0"], "--gpus"),
        (["--gpus", "99", "--device", "auto"], f"{torch.cuda.device_count()} CUDA devices are here"),
    ],
)
def test_what_cannot_be_shared_is_refused(
    tmp_path: Path,
    model_folder: Path,
    token_file: Path,
    capsys: pytest.CaptureFixture[str],
    given: list[str],
    words: str,
) -> None:
    more = ["--slices", "100"] if "99" in given else []
    code = main(["prune", str(model_folder), "--data", str(token_file), "--out", str(tmp_path / "r"), *given, *more])
    lines = capsys.readouterr().err.splitlines()
    assert code == 2 and len(lines) == 1 and words in lines[0]
    assert not (tmp_path / "r").exists()


def test_a_run_begun_without_slices_goes_on_alone(
    tmp_path: Path, model_folder: Path, token_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "r")
    assert main(["prune", str(model_folder), "--data", str(token_file), "--out", out, *OPTIONS, "--quiet"]) == 0
    capsys.readouterr()
    for gpus in ("1", "2"):
        assert main(["prune", "--resume", out, "--gpus", gpus]) == 2
        assert "was begun without --slices" in capsys.readouterr().err
    assert main(["prune", "--resume", out, "--quiet"]) == 0


def test_processes_are_told_by_their_environment(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    assert not launched() and rank() == 0
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "1")
    for name, value in (("RANK", "1"), ("LOCAL_RANK", "1"), ("WORLD_SIZE", "2")):
        assert not launched()
        monkeypatch.setenv(name, value)
    assert launched() and rank() == 1
    # What all processes refuse alike the first one tells.
    assert main(["prune", "nowhere", "--data", "nothing", "--out", "run", "--steps", "0"]) == 2
    assert capsys.readouterr().err == ""
    monkeypatch.setenv("RANK", "0")
    assert main(["prune", "nowhere", "--data", "nothing", "--out", "run", "--gpus", "2"]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert not launched()
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "torchrun")
    assert launched()
