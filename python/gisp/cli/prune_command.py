"""``gisp prune``: options to a run, with progress."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any

import typer

from gisp.cli import app
from gisp.cli.progress import StepProgress
from gisp.errors import GispError

_SCORES = "Scores"
_LIMITS = "What may go"
_COMPUTE = "Compute"


@app.command()
def prune(
    model: Annotated[str | None, typer.Argument(help="Folder or hub name of the dense model.")] = None,
    data: Annotated[
        str | None,
        typer.Option(
            help="Calibration data: .safetensors, .jsonl, .txt or .parquet, a folder saved by datasets, a dataset, "
            "lm-eval:TASK[,TASK] (commonsense: the usual seven) or a .yaml that weighs several (docs/data.md)."
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Run folder to write.")] = None,
    preset: Annotated[str | None, typer.Option(help="fast (default), paper or official.")] = None,
    sparsity: Annotated[float | None, typer.Option(help="Part of the decoder parameters to remove (0.5).")] = None,
    steps: Annotated[int | None, typer.Option(help="Pruning steps (fast 200, paper 50, official 112).")] = None,
    ratio: Annotated[
        float | None, typer.Option(help="Part of all structures to remove; preset official only (0.7).")
    ] = None,
    samples: Annotated[int | None, typer.Option(help="Calibration sequences used, the first ones (all).")] = None,
    seq_len: Annotated[int | None, typer.Option(help="Tokens per sequence (256, token files: as they are).")] = None,
    batch_size: Annotated[str | None, typer.Option(help="Sequences per backward pass, or auto.")] = None,
    batch_tokens: Annotated[
        int | None, typer.Option(help="Tokens per step of the stream engine (8192).", rich_help_panel=_COMPUTE)
    ] = None,
    objective: Annotated[
        str | None, typer.Option(help="lm, completion, margin or choice.", rich_help_panel=_SCORES)
    ] = None,
    criterion: Annotated[
        str | None,
        typer.Option(
            help="Where scores come from: second-order (fast), gisp (paper, official), magnitude, random, "
            "taylor-local, signed, wanda-sp, flap or block-influence.",
            rich_help_panel=_SCORES,
        ),
    ] = None,
    allocator: Annotated[
        str | None,
        typer.Option(
            help="How layers compete: global (by their scores), uniform (the same part of each) or owl (less of layers "
            "with outliers); as the criterion was published by default.",
            rich_help_panel=_SCORES,
        ),
    ] = None,
    first_order: Annotated[
        str | None,
        typer.Option(
            help="First-order term of second-order scores: shrunk by its noise, or plain (default of --one-shot).",
            rich_help_panel=_SCORES,
        ),
    ] = None,
    one_shot: Annotated[
        bool | None,
        typer.Option(
            "--one-shot/--no-one-shot",
            help="Remove everything in one step, scored once on all calibration data (off).",
            rich_help_panel=_SCORES,
        ),
    ] = None,
    norm: Annotated[str | None, typer.Option(help="params, official, zscore or none.", rich_help_panel=_SCORES)] = None,
    engine: Annotated[str | None, typer.Option(help="stream or exact.", rich_help_panel=_SCORES)] = None,
    ema: Annotated[
        float | None, typer.Option(help="Weight of the past in averaged scores.", rich_help_panel=_SCORES)
    ] = None,
    protect_first: Annotated[
        float | None, typer.Option(help="Fraction of layers protected at the start (0.1).", rich_help_panel=_LIMITS)
    ] = None,
    protect_last: Annotated[
        int | None, typer.Option(help="Layers protected at the end (1).", rich_help_panel=_LIMITS)
    ] = None,
    align: Annotated[
        int | None, typer.Option(help="Kept MLP widths are multiples of this.", rich_help_panel=_LIMITS)
    ] = None,
    gqa: Annotated[
        str | None,
        typer.Option(
            help="Where query heads share key/value heads: query (any query head), balanced (equally many of each "
            "key/value head) or group (whole key/value heads, which shrinks the cache).",
            rich_help_panel=_LIMITS,
        ),
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the data order (0).", rich_help_panel=_COMPUTE)] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu or cuda.", rich_help_panel=_COMPUTE)] = None,
    dtype: Annotated[
        str | None, typer.Option(help="bfloat16 (default on a GPU) or float32 (on a CPU).", rich_help_panel=_COMPUTE)
    ] = None,
    fp8: Annotated[
        bool | None,
        typer.Option("--fp8/--no-fp8", help="8-bit products in the importance pass (off).", rich_help_panel=_COMPUTE),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in --out if there is one.")] = False,
    config: Annotated[Path | None, typer.Option(help="YAML file of these options; flags override it.")] = None,
) -> None:
    """Prune a model step by step; every sparsity passed on the way stays available."""
    from gisp.config.options import FIELDS, read_yaml, without_defaults
    from gisp.run.loop import prune as run_prune

    given = dict(locals())
    options: dict[str, Any] = read_yaml(config) if config else {}
    places = {"model": model, "data": data, "out": out}
    for name, value in places.items():
        stored = options.pop(name, None)
        places[name] = value or (str(stored) if stored else None)
    asked = {name: given[name] for name in FIELDS if given.get(name) is not None}
    options = {**without_defaults(options, asked), **asked}
    unknown = next((name for name in options if name not in FIELDS), None)
    if unknown:
        raise GispError(f"unknown option {unknown!r} in {config}: choose one of {', '.join(FIELDS)}")
    missing = [n for n, v in zip(("MODEL", "--data", "--out"), places.values(), strict=True) if not v]
    if missing:
        raise GispError(f"{missing[0]} is missing: gisp prune MODEL --data SPEC --out RUN")
    options["batch_size"] = _batch_size(options.get("batch_size"))
    with StepProgress("pruning") as progress:
        if options.get("ratio") is not None and options.get("preset") != "official":
            progress.say("warning: --ratio belongs to preset official and is ignored here")
            options["ratio"] = None
        if options.get("ratio") is not None and options.get("sparsity") is not None:
            progress.say("warning: --sparsity is ignored beside --ratio, which alone says where preset official ends")
        trajectory = run_prune(
            str(places["model"]),
            places["data"],
            out=str(places["out"]),
            resume=resume,
            on_step=progress.step,
            **options,
        )
    last = trajectory.steps[-1]
    goal = trajectory.config["sparsity"]
    if trajectory.config["schedule"] == "structures" and goal is not None and last.sparsity < goal:
        progress.say(f"warning: the schedule ended at {last.sparsity:.4f}, short of {goal}: give a higher --ratio")
    if not last.removed_parameters:
        asked_for = f"--ratio {trajectory.config['ratio']}" if goal is None else f"{goal} of the decoder parameters"
        progress.say(
            f"warning: nothing was removed: {asked_for} is less than the smallest removal "
            f"(widths go in multiples of --align {trajectory.config['align']}): give more"
        )
    progress.say(
        f"{places['out']}: {len(trajectory.steps)} steps, decoder sparsity {last.sparsity:.4f}, "
        f"whole model {last.model_sparsity:.4f}"
    )


def _batch_size(value: Any) -> int | None:
    if value is None or value == "auto":
        return None
    if not isinstance(value, bool) and re.fullmatch(r"[+-]?[0-9]{1,18}", str(value)):
        return int(value)
    raise GispError(f"--batch-size is {value!r}: give a number or auto")
