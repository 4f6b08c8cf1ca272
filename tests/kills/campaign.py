"""Starts commands, ends them at a random moment, and checks what they leave and what the next one makes of it."""

from __future__ import annotations

import multiprocessing
import os
import random
import shutil
import signal
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGHUP)
# Seconds: after each file put in place, so that tiny steps last until a signal arrives; and for a command to end.
_PAUSE = 0.01
_PATIENCE = 180


@dataclass
class Result:
    """How often each scenario ended how, and what should not have happened."""

    ends: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)


def _child(arguments: list[str], log: str, beside: bool) -> None:
    from gisp.cli import main
    from gisp.run import loop
    from gisp.run.step import StepWriter

    if beside:
        # As on a GPU.
        loop.StepWriter = lambda **_: StepWriter(overlap=True)  # type: ignore[assignment, misc]
    replace = os.replace

    def slowly(*paths: Any, **options: Any) -> None:
        replace(*paths, **options)
        time.sleep(_PAUSE)

    os.replace = os.rename = slowly
    target = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(target, 1)
    os.dup2(target, 2)
    sys.exit(main(arguments))


class Campaign:
    """A model, data and undisturbed results in a folder, and scenarios that end commands over them."""

    def __init__(self, folder: Path, seed: int) -> None:
        from safetensors.torch import save_file
        from tiny import tiny_model, tiny_tokens

        self.folder, self.rng, self.result = folder, random.Random(seed), Result()
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["gisp.run.prune", "gisp.export.run", "gisp.target"])
        self.model, self.data, self.whole = folder / "model", folder / "data.safetensors", folder / "whole"
        tiny_model().save_pretrained(self.model)
        save_file({"input_ids": tiny_tokens(32, 16)}, self.data)
        # Begun before the server has its imports, which no kill should wait for.
        self._finish(["inspect", "absent"], code=2)
        export = ["export", str(self.whole), "--sparsity", "0.2", "--device", "cpu", "--out"]
        fit = ["--compensate", "lsq", "--calibration", str(self.data), "--calibration-tokens", "512"]
        self.commands = {
            "prune": self._prune(self.whole),
            "export": [*export, str(folder / "export")],
            "compensate": [*export, str(folder / "compensate"), *fit],
            "eval": ["eval", str(self.whole), "--data", str(self.data), "--window", "16", "--device", "cpu"],
        }
        self.seconds = {name: self._finish(arguments) for name, arguments in self.commands.items()}
        self.sound = {name: contents(folder / name) for name in ("whole", "export", "compensate")}

    def scenario(self) -> None:
        """One command or two of one kind, one of them ended, and the command again."""
        name, number = self.rng.choice(list(self.commands)), self.rng.choice(SIGNALS)
        writers = self.rng.choice((1, 1, 2)) if name != "eval" else 1
        place = self.folder / "at work"
        place.mkdir()
        arguments = list(self.commands[name])
        if name != "eval":
            arguments[arguments.index("--out") + 1] = str(place / "out")
        started = [self._start(arguments) for _ in range(writers)]
        time.sleep(self.rng.uniform(0, 1.1 * self.seconds[name]))
        ended = self.rng.choice(started)
        if ended.is_alive() and ended.pid:
            os.kill(ended.pid, number)
        codes = [self._code(process) for process in started]
        label = f"{name} x{writers} {number.name} {codes}"
        self.result.ends[f"{name} x{writers} {number.name} -> {self._code(ended)}"] += 1
        self._judge(label, codes, number)
        unfinished = [path.name for path in place.rglob("*") if path.name.startswith(".")]
        if number != signal.SIGKILL and unfinished:
            self._fail(f"{label}: left {unfinished}")
        if name == "prune":
            self._resume(label, place / "out", arguments)
        elif name != "eval":
            self._export_again(label, name, place / "out", arguments)
        elif contents(self.whole) != self.sound["whole"]:
            self._fail(f"{label}: the run was changed")
        shutil.rmtree(place)

    def _judge(self, label: str, codes: list[int], number: int) -> None:
        """A command ends well, as the signal says, or because another one writes."""
        refused = {2} if len(codes) == 2 else set()
        # Before its handlers are set a process ends by the signal itself.
        allowed = {0, -number, 128 + number} | refused
        if set(codes) - allowed or codes == [2, 2]:
            self._fail(f"{label}: unexpected exit code, {self._tail()}")

    def _resume(self, label: str, out: Path, arguments: list[str]) -> None:
        begun = (out / "trajectory.json").is_file()
        self._finish(["prune", "--resume", str(out)] if begun else [*arguments, "--resume"], label=label)
        tensors = "trajectory.safetensors"
        if contents(out).get(tensors) != self.sound["whole"][tensors]:
            self._fail(f"{label}: the resumed run is another one")
        self._check_tidy(label, out.parent)

    def _export_again(self, label: str, name: str, out: Path, arguments: list[str]) -> None:
        if out.exists():
            # It appeared, so it is whole.
            if contents(out) != self.sound[name]:
                self._fail(f"{label}: what appeared is not the whole export")
            shutil.rmtree(out)
        self._finish(arguments, label=label)
        if contents(out) != self.sound[name]:
            self._fail(f"{label}: the export made again is another one")
        self._check_tidy(label, out.parent)

    def _check_tidy(self, label: str, place: Path) -> None:
        left = [path.name for path in place.rglob("*") if path.name.startswith(".")]
        if left:
            self._fail(f"{label}: the next command left {left}")

    def _prune(self, out: Path) -> list[str]:
        options = ["--sparsity", "0.3", "--steps", "6", "--align", "4", "--batch-tokens", "64", "--dtype", "float32"]
        where = ["prune", str(self.model), "--data", str(self.data), "--out", str(out), "--device", "cpu"]
        return [*where, *options]

    def _start(self, arguments: list[str]) -> BaseProcess:
        beside = self.rng.random() < 0.5
        process = self._context.Process(target=_child, args=(arguments, str(self.folder / "log"), beside))
        process.start()
        return process

    def _code(self, process: BaseProcess) -> int:
        process.join(_PATIENCE)
        if process.exitcode is None:
            process.kill()
            process.join()
            self._fail(f"process {process.pid} did not end in {_PATIENCE} s")
        return int(process.exitcode or 0)

    def _finish(self, arguments: list[str], *, label: str = "", code: int = 0) -> float:
        """Run a command to its end; its seconds."""
        started = time.monotonic()
        found = self._code(self._start(arguments))
        if found != code:
            self._fail(f"{label}: gisp {' '.join(arguments)} ended with {found}: {self._tail()}")
        return time.monotonic() - started

    def _fail(self, line: str) -> None:
        self.result.failures.append(line)

    def _tail(self) -> str:
        log = self.folder / "log"
        return " | ".join(log.read_text(errors="replace").splitlines()[-3:]) if log.exists() else ""


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder by its relative path; model cards say when they were made and are left out."""
    found = {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
    return {name: data for name, data in found.items() if not name.endswith(".md")}


def run(folder: Path, kills: int, seed: int) -> Result:
    """``kills`` scenarios in an empty folder."""
    campaign = Campaign(folder, seed)
    for _ in range(kills):
        campaign.scenario()
    return campaign.result
