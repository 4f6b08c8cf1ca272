"""Running the command line: inside this process, or as a process of its own that can be killed."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest

# transformers imports lazily: naming the package alone would leave most of it to every child.
PRELOADED = [
    "pytest",
    "torch",
    "transformers.models.auto.modeling_auto",
    "transformers.models.llama.modeling_llama",
    "gisp.cli",
]
CPU_FLOAT32 = ("--device", "cpu", "--dtype", "float32")
PAPER = ("--preset", "paper", "--steps", 3, "--sparsity", 0.3)


@dataclass
class Outcome:
    """Exit code and everything printed, stdout first."""

    code: int
    stdout: str
    stderr: str

    @property
    def text(self) -> str:
        return self.stdout + self.stderr

    @property
    def lines(self) -> list[str]:
        return [line for line in self.text.splitlines() if line.strip()]


def run_cli(capfd: pytest.CaptureFixture[str], *argv: object) -> Outcome:
    """Call ``gisp.cli.main`` in this process."""
    from gisp.cli import main

    capfd.readouterr()
    code = main([str(a) for a in argv])
    return Outcome(code, *capfd.readouterr())


def must_run(*argv: object) -> None:
    """Call ``gisp.cli.main`` in this process and demand exit code 0."""
    from gisp.cli import main

    arguments = [str(a) for a in argv]
    code = main(arguments)
    if code != 0:
        pytest.fail(f"gisp {' '.join(arguments)} ended with exit code {code}")


def prune_arguments(model: Path, data: Path, out: Path, *options: object) -> tuple[object, ...]:
    return ("prune", model, "--data", data, "--out", out, *CPU_FLOAT32, *options)


def _environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}


def spawn_cli(*argv: object) -> Outcome:
    """Run ``python -m gisp`` in a new interpreter, as a user's shell would."""
    done = subprocess.run(
        [sys.executable, "-m", "gisp", *(str(a) for a in argv)],
        capture_output=True, text=True, timeout=120, env=_environment(), check=False,
    )  # fmt: skip
    return Outcome(done.returncode, done.stdout, done.stderr)


def _die_at_rename(number: int) -> None:
    """Make the ``number``-th renaming of a file in this process its last act, before the rename happens."""
    original, count = os.replace, 0

    def replace(*paths: Any, **options: Any) -> None:
        nonlocal count
        count += 1
        if count == number:
            os.kill(os.getpid(), signal.SIGKILL)
        original(*paths, **options)

    os.replace = os.rename = replace


def _pause_after_renames(seconds: float) -> None:
    """Slow a run down at every file it puts in place, so that it cannot end before a signal reaches it."""
    original = os.replace

    def replace(*paths: Any, **options: Any) -> None:
        original(*paths, **options)
        time.sleep(seconds)

    os.replace = os.rename = replace


def _child(arguments: list[str], log: str, die_at_rename: int, pause: float) -> None:
    from gisp.cli import main

    if die_at_rename:
        _die_at_rename(die_at_rename)
    if pause:
        _pause_after_renames(pause)
    target = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(target, 1)
    os.dup2(target, 2)
    # A shell starts what runs in its background with this signal ignored, and children inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    # So does nohup with this one.
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    sys.exit(main(arguments))


# Seconds a process that is to be interrupted waits after each file: a run of ten tiny steps lasts about a second.
PAUSE = 0.03


class Launcher:
    """Starts the command line as real processes, forked from a server that has the imports done.

    A fresh interpreter spends seconds on importing torch; a forked one starts at once, so that a kill lands in the
    run and not in the imports.
    """

    def __init__(self, folder: Path) -> None:
        self._log = folder / "child.log"
        self._context = multiprocessing.get_context("forkserver")
        # The server finds modules by PYTHONPATH only, it does not inherit sys.path.
        previous = os.environ.get("PYTHONPATH")
        os.environ["PYTHONPATH"] = _environment()["PYTHONPATH"]
        try:
            self._context.set_forkserver_preload(PRELOADED)
            self.run("--help")
        finally:
            if previous is None:
                del os.environ["PYTHONPATH"]
            else:
                os.environ["PYTHONPATH"] = previous

    def start(self, *argv: object, die_at_rename: int = 0, pause: float = 0.0) -> BaseProcess:
        arguments = [str(a) for a in argv]
        process = self._context.Process(target=_child, args=(arguments, str(self._log), die_at_rename, pause))
        process.start()
        return process

    def run(self, *argv: object, die_at_rename: int = 0) -> int:
        """Run to the end, or to the rename given, and return the exit code."""
        process = self.start(*argv, die_at_rename=die_at_rename)
        process.join(120)
        if process.exitcode is None:
            process.kill()
            pytest.fail(f"gisp {argv} did not end within 120 s: {self.output()}")
        return process.exitcode

    def interrupt(self, ready: Callable[[], bool], delay: float, number: signal.Signals, *argv: object) -> int:
        """Start, wait until ``ready()``, sleep ``delay`` seconds, send a signal; return the exit code."""
        process = self.start(*argv, pause=PAUSE)
        deadline = time.monotonic() + 60
        while not ready() and process.is_alive() and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(delay)
        if process.is_alive() and process.pid is not None:
            os.kill(process.pid, number)
        process.join(60)
        if process.exitcode is None:
            process.kill()
            pytest.fail(f"gisp {argv} ignored {number.name} for 60 s")
        return process.exitcode

    def output(self) -> str:
        return self._log.read_text() if self._log.exists() else ""


def assert_refused(done: Outcome, *words: str) -> None:
    """Exactly one line, starting with ``error:`` and containing every one of ``words``."""
    assert "Traceback" not in done.text, done.text
    assert done.code == 2, f"exit code {done.code}: {done.text}"
    assert len(done.lines) == 1, done.text
    assert done.lines[0].startswith("error:"), done.text
    for word in words:
        assert word.lower() in done.lines[0].lower(), f"{word!r} is not in: {done.lines[0]}"


def snapshot(folder: Path) -> dict[str, bytes]:
    """Content of every file below ``folder`` by relative path."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
