"""Runs mutations: damage a copy, read it, judge what came."""

from __future__ import annotations

import random
import shutil
import signal
import warnings
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gisp.errors import GispError, is_out_of_memory

from .mutate import damaged_bytes
from .targets import MAKERS, TARGETS, Target

# Seconds; a reader that a damaged file keeps busy longer hangs.
_HANGS = 20
_LONGEST_LINE = 1100


@dataclass
class Result:
    """Outcomes by target, and the mutations that ended in neither of the two ways allowed."""

    outcomes: dict[str, Counter[str]] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)


def run(folder: Path, mutations: int, seed: int) -> Result:
    """Read ``mutations`` damaged files in all.

    Args:
        folder: empty; sound folders and the copies at work.
    """
    for name, make in MAKERS.items():
        make(folder / name)
    rng, result = random.Random(seed), Result()
    targets = rng.choices(TARGETS, weights=[target.share for target in TARGETS], k=mutations)
    for target in sorted(targets, key=TARGETS.index):
        number = rng.getrandbits(64)
        counts = result.outcomes.setdefault(target.name, Counter())
        outcome = _one(folder, target, random.Random(number))
        counts[outcome.split(":")[0]] += 1
        if outcome not in ("refused", "read"):
            result.failures.append(f"{target.name} {number}: {outcome}")
    return result


def _one(folder: Path, target: Target, rng: random.Random) -> str:
    top, _, file = target.file.partition("/")
    copy = folder / "copy"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(folder / top, copy)
    sound = _read(target, copy)
    data = (copy / file).read_bytes()
    (copy / file).write_bytes(rng.choice((*target.damage, damaged_bytes))(data, rng))
    try:
        found = _read(target, copy)
    except GispError as error:
        line = str(error)
        fine = "\n" not in line and 0 < len(line) < _LONGEST_LINE
        return "refused" if fine else f"bad line: {line[:200]!r}"
    except Exception as error:  # whatever a reader lets through is what is looked for
        if is_out_of_memory(error):
            # A size in the file is beyond the machine; the command line has one line for all of these.
            return "refused"
        return f"{type(error).__name__}: {str(error)[:300]}"
    return "read" if found in (sound, None) else "changed: the result is another one"


def _read(target: Target, folder: Path) -> Any:
    def hang(*_: object) -> None:
        raise TimeoutError(f"no answer in {_HANGS} s")

    previous = signal.signal(signal.SIGALRM, hang)
    signal.alarm(_HANGS)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return target.read(folder)
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)
