"""Options of the study's command, and the bench and the cells they ask for."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from benchmarks.common.command import Parser, count, numbers, positive
from benchmarks.decoders.decoder import Decoder, train_decoder
from benchmarks.quality.cells import STUDIES, Cell, Compensations, Sizes
from benchmarks.quality.runner import Bench
from benchmarks.quality.tasks import read_tasks
from gisp.compensation.options import make_options
from gisp.errors import GispError
from gisp.model.load import check_model_path, resolve_device

NAME = "python -m benchmarks.quality"
WINDOWS = (1024, 128)


def parser(description: str | None) -> argparse.ArgumentParser:
    """All options."""
    options = Parser(prog=NAME, description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    _data_options(options)
    add = options.add_argument
    add("--study", action="append", choices=STUDIES, help="repeatable, in this order (criteria)")
    add("--only", action="append", default=[], metavar="NAME", help="part of study/way/seed; repeatable")
    add("--seeds", type=count, default=3, help="0 to N-1 (3)")
    add("--steps", type=count, default=Sizes.steps, help="of fast (200)")
    add("--batch-tokens", type=count, default=Sizes.batch_tokens, help="of a step of fast (8192)")
    add("--exact-tokens", type=count, default=Sizes.exact_tokens, help="of exact schedules (163840)")
    add("--exact-steps", type=count, help="of exact schedules (the preset's own)")
    add("--exact-seeds", type=count, default=Sizes.exact_seeds, help="of them, the costliest by far (3)")
    add("--gate-steps", type=count, help="of learned gates (their own)")
    add("--sparsities", default="0.2,0.3,0.4,0.5")
    add(
        "--compensate",
        action="append",
        metavar="METHOD[:NAME=VALUE,...]",
        help="of every way, instead of the study's own; none for none; repeatable",
    )
    add("--quick", action="store_true", help="a cut for a CPU: 60 steps, 64 windows evaluated, one seed")
    add("--jobs", type=count, default=1, help="processes of each GPU side by side (1)")
    add("--gpus", type=count, default=1, help="GPUs taken (1)")
    add("--budget", type=positive, metavar="SECONDS", help="stop after that; what is finished is kept")
    add("--device", default="auto")
    add("--dtype", default=None, help="bfloat16 (default on a GPU) or float32")
    add("--out", type=Path, help="JSON file to write or to go on with")
    add("--plot", action="store_true", help="also draw PNGs beside --out")
    add("--list", action="store_true", help="print the cells and stop")
    return options


def _data_options(options: argparse.ArgumentParser) -> None:
    add = options.add_argument
    add("model", nargs="?", help="folder or name of a decoder")
    add("--calibration", action="append", metavar="FILE", help="text (.jsonl, .txt) or token files; repeatable")
    add("--evaluation", action="append", metavar="FILE", help="text or token file; repeatable, the first one counts")
    add("--train", type=Path, metavar="DIR", help="instead of MODEL, train one of 65M parameters there")
    add("--corpus", type=Path, help="text to train on: a folder of Python source or a .jsonl.gz")
    add("--train-seconds", type=positive, help="shorten the training to this time")
    add("--seq-len", type=count, default=Bench.seq_len, help="tokens of a calibration row of text (512)")
    add("--window", type=count, action="append", help="of the evaluation; repeatable, the first one counts (1024, 128)")
    add("--evaluation-rows", type=count, metavar="N", help="windows evaluated of each text (all)")
    add("--tasks", type=Path, metavar="FILE", help="also accuracy on tasks that benchmarks.quality.prepare wrote")
    add("--task-rows", type=count, metavar="N", help="questions of each task (all)")
    add("--generated-rows", type=int, default=0, metavar="N", help="questions of tasks that generate (0: leave out)")


def read_bench(args: argparse.Namespace) -> Bench:
    """The bench of given options; ``--train`` trains its decoder first.

    Raises:
        GispError: options that do not go together, or an impossible one.
    """
    calibration, evaluation = args.calibration or (), args.evaluation or ()
    if args.train is not None:
        if not (args.train / "config.json").exists():
            if args.corpus is None:
                raise GispError("--train needs text: give --corpus")
            train_decoder(args.train, args.corpus, args.train_seconds)
        decoder = Decoder.trained(args.train)
        model = str(decoder.path)
        calibration, evaluation = (str(decoder.calibration),), (str(decoder.evaluation),)
    elif args.model is None or not calibration or not evaluation:
        raise GispError("give MODEL, --calibration and --evaluation, or --train DIR with --corpus")
    else:
        model = args.model
        check_model_path(model)
    studies = args.study or ()
    if "task" in studies and args.tasks is None:
        raise GispError("--study task needs tasks: give --tasks FILE, made by benchmarks.quality.prepare")
    return Bench(
        model,
        tuple(calibration),
        tuple(evaluation),
        tuple(sorted(numbers("--sparsities", args.sparsities, float))),
        tuple(args.window or WINDOWS),
        args.seq_len,
        args.evaluation_rows,
        args.tasks,
        args.task_rows,
        args.generated_rows,
        "task" in studies,
        str(resolve_device(args.device)),
        args.dtype,
    )


def chosen(args: argparse.Namespace, gqa: bool, tasks: tuple[str, ...]) -> list[Cell]:
    """The cells asked for: study by study, and in each those of one seed before those of the next.

    Raises:
        GispError: none are, or a compensation that is none.
    """
    sizes = Sizes(
        steps=args.steps,
        batch_tokens=args.batch_tokens,
        exact_tokens=args.exact_tokens,
        exact_steps=args.exact_steps,
        exact_seeds=args.exact_seeds,
        gate_steps=args.gate_steps,
        gqa=gqa,
        tasks=tasks,
    )
    made = (STUDIES[study](range(args.seeds), sizes) for study in dict.fromkeys(args.study or ["criteria"]))
    found = [cell for each in made for cell in sorted(each, key=lambda cell: cell.seed)]
    found = [cell for cell in found if not args.only or any(word in cell.key for word in args.only)]
    if not found:
        raise GispError(f"--only {', '.join(args.only)} matches no way of pruning: see --list")
    if args.compensate is None:
        return found
    compensations = read_compensations(args.compensate)
    return [Cell(**{**vars(cell), "compensate": compensations}) for cell in found]


def read_compensations(texts: list[str]) -> Compensations:
    """Options of :func:`gisp.compensate` from ``METHOD[:NAME=VALUE,...]``; values are JSON or words.

    Raises:
        GispError: options that are none.
    """
    found = []
    for text in texts:
        method, _, rest = text.partition(":")
        if method == "none":
            continue
        pairs = [item.partition("=") for item in rest.split(",") if item]
        options = {"method": method, **{name: _value(value) for name, _, value in pairs}}
        make_options(**options)
        found.append(options)
    return tuple(found)


def shares_heads(model: str) -> bool:
    """Whether a decoder's query heads share key/value heads, from its configuration alone."""
    from transformers import AutoConfig

    try:
        config: Any = AutoConfig.from_pretrained(model, trust_remote_code=False)
    except Exception as error:  # as many types as there are ways to break a folder
        raise GispError(f"model {model} cannot be loaded: {' '.join(str(error).split())[:200]}") from None
    heads = getattr(config, "num_attention_heads", 1)
    return bool((getattr(config, "num_key_value_heads", None) or heads) < heads)


def task_names(tasks: Path | None) -> tuple[str, ...]:
    """Names in a file of prepared tasks."""
    return () if tasks is None else tuple(read_tasks(tasks))


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text
