"""What the benchmark commands share: options, refusals in one line, results written whole."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import torch

from benchmarks.common.registry import MODELS, REAL
from gisp.errors import GispError
from gisp.files import write_atomic
from gisp.model.load import resolve_device
from gisp.replicas.environment import rank
from gisp.replicas.errors import ReplicaError
from gisp.run.record import INVALID, corrupt

# Of --compare: the result kept for this card.
LAST = "last"


class Parser(argparse.ArgumentParser):
    """Options of a command; a mistake is one line for the caller to print."""

    def error(self, message: str) -> NoReturn:
        raise GispError(f"{message} (see {self.prog} --help)")


class Budget:
    """Seconds a command may spend; without a limit it never ends."""

    def __init__(self, seconds: float | None) -> None:
        self.seconds = seconds
        self._start = time.perf_counter()

    @property
    def spent(self) -> float:
        return time.perf_counter() - self._start

    @property
    def over(self) -> bool:
        return self.seconds is not None and self.spent >= self.seconds


def positive(text: str) -> float:
    """A number above zero, for argparse."""
    value = float(text)
    if not value > 0:
        raise ValueError(text)
    return value


def count(text: str) -> int:
    """A whole number above zero, for argparse."""
    value = int(text)
    if value < 1:
        raise ValueError(text)
    return value


def numbers(option: str, text: str, kind: type) -> list[Any]:
    """Numbers of an option, with commas between them.

    Raises:
        GispError: something that is no number.
    """
    try:
        return [kind(value) for value in text.split(",")]
    except ValueError:
        raise GispError(f"{option} is {text!r}: give numbers separated by commas") from None


def require_gpu(what: str) -> None:
    """Refuse to go on without a GPU.

    Raises:
        GispError: there is none.
    """
    if not torch.cuda.is_available():
        raise GispError(f"{what} needs a CUDA device, and torch {torch.__version__} finds none here")


def check_writable(out: Path | None) -> None:
    """Refuse a result file that could not be written, before minutes are spent on it.

    Raises:
        GispError: the path is a folder, or its folder cannot be made.
    """
    if out is None:
        return
    if out.is_dir():
        raise GispError(f"--out {out} is a folder: give a file")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise GispError(f"cannot write {out}: {error.strerror or error}") from None


def models_and_device(args: argparse.Namespace, command: str) -> tuple[list[str], torch.device]:
    """Names of ``--model``, the real ones by default, and the device of ``--device``.

    Raises:
        GispError: an unknown name, or a model that needs a GPU without one; a CPU takes the tiny model alone.
    """
    names = list(dict.fromkeys(args.model or REAL))
    for name in names:
        if name not in MODELS:
            raise GispError(f"unknown model {name!r}: choose one of {', '.join(MODELS)}")
    if args.device != "cpu" or names != ["tiny"]:
        require_gpu(f"{command} --model {names[0]}")
    device = resolve_device(args.device)
    if device.type == "cpu" and names != ["tiny"]:
        raise GispError(f"--device cpu takes --model tiny alone, not {', '.join(names)}")
    return names, device


def add_result_options(options: argparse.ArgumentParser, *, plots: bool) -> None:
    """Where a result goes, and what else is shown of it."""
    options.add_argument("--out", type=Path, help="JSON file to write")
    options.add_argument("--goals", action="store_true", help="also print which goals are met")
    options.add_argument("--from", dest="source", type=Path, metavar="FILE", help="show an earlier result")
    options.add_argument(
        "--compare",
        type=Path,
        metavar="FILE",
        help="compare every ratio with an earlier result of this GPU model, or 'last', the one in benchmarks/results: "
        "exit code 1 where one is worse by more than the noise of both",
    )
    if plots:
        options.add_argument("--plot", action="store_true", help="also draw PNGs beside --out")


def check_plot(args: argparse.Namespace) -> None:
    """Refuse ``--plot`` without a file to draw beside.

    Raises:
        GispError: there is neither ``--out`` nor ``--from``.
    """
    if args.plot and not (args.out or args.source):
        raise GispError("--plot writes beside a result: give --out or --from")


@contextmanager
def reading(path: Path | None) -> Iterator[None]:
    """Read entries of a result from a file; ``None`` for one that was measured, whose errors are ours.

    Raises:
        GispError: an entry is missing or of another type.
    """
    try:
        yield
    except GispError:
        raise
    except INVALID as error:
        if path is None:
            raise
        raise corrupt(path, error) from None


def result_of(
    args: argparse.Namespace,
    benchmark: str,
    measure: Callable[[], dict[str, Any]],
    ratios: Callable[[dict[str, Any]], Any],
) -> dict[str, Any]:
    """The result of ``--from``, or a new one, written to ``--out``.

    Args:
        ratios: what ``--compare`` reads of a result; what it cannot read is refused before anything is measured.

    Raises:
        GispError: an earlier result cannot be read, or the new one not be written.
    """
    if args.compare and str(args.compare) != LAST:
        with reading(args.compare):
            ratios(read_json(args.compare, benchmark))
    if args.source:
        return read_json(args.source, benchmark)
    check_writable(args.out)
    result = measure()
    report(args.out, result)
    return result


def report(out: Path | None, result: dict[str, Any]) -> None:
    """Write a result where a file was asked for, and say so."""
    if out is not None:
        write_json(out, result)
        print(f"wrote {out}")


def write_json(out: Path, result: dict[str, Any]) -> None:
    """Write a result; the file appears whole or not at all."""
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(out, (json.dumps(result, indent=1) + "\n").encode())


def read_json(path: Path, benchmark: str) -> dict[str, Any]:
    """A result written before by ``gisp bench <benchmark>``.

    Raises:
        GispError: it cannot be read or holds no such result.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise GispError(f"cannot read {path}: {error.strerror or error}") from None
    except ValueError as error:
        raise GispError(f"{path} is no JSON: {error}") from None
    if not isinstance(found, dict) or found.get("benchmark") != benchmark:
        raise GispError(f"{path} is no result of gisp bench {benchmark}: give a file its --out wrote")
    if not isinstance(found.get("identity", {}), dict):
        raise GispError(f"{path} is corrupt: identity is no object")
    return found


def table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Columns of text; the first is flush left, numbers flush right."""
    widths = [max(len(line[i]) for line in (header, *lines)) for i in range(len(header))]

    def show(line: Sequence[str]) -> str:
        padded = [line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True))]
        return "  ".join(padded).rstrip()

    return "\n".join([show(header), "  ".join("-" * width for width in widths), *map(show, lines)])


def exit_code(main: Callable[[], int]) -> int:
    """Run a command: 2 and one line on stderr for bad input, told once where several processes run it."""
    try:
        return main()
    except GispError as error:
        told = error.told if isinstance(error, ReplicaError) else rank() > 0
        if not told:
            print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
