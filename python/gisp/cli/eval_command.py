"""``gisp eval``: options to an evaluation, and its figures as text, JSON, table or picture."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from gisp.cli.flags import flag, numbers, with_flags
from gisp.cli.options.compensation import COMPENSATION, compensation_request
from gisp.cli.options.gpus import GPUS, STAGES, processes, start_processes
from gisp.cli.options.offload import OFFLOAD
from gisp.cli.output import output, plain_console, shows_progress
from gisp.config.evaluation import EvalOptions, LmEvalTasks
from gisp.config.memory import check_gpu_memory
from gisp.data.sources import check_spec
from gisp.errors import GispError
from gisp.files import check_writable, write_atomic
from gisp.replicas.environment import launched, rank

_ROWS = "Choices, prompts and completions"
_HARNESS = "lm-eval"
_ALONG = "Along a run"
_HOW = (
    flag("window", "Longest input in tokens (128 for text, the model's limit for choices and completions).", kind=int),
    flag("stride", "Tokens from the start of one window to the next (the window); text and tokens only.", kind=int),
    flag("limit", "Use only the first N rows, or examples of each task.", kind=int),
    flag("batch_size", "Sequences per forward pass (by their tokens).", kind=int),
    flag("generate", "Also generate and measure exact match.", kind=bool, names=("--generate",), panel=_ROWS),
    flag("until", r"Text that ends an answer; repeatable (\n, \t).", kind=list[str], panel=_ROWS),
    flag("max_new_tokens", "Longest generated answer in tokens (256).", kind=int, panel=_ROWS),
    flag("extract", "Regular expression: compare only its first match, or the first group of it.", panel=_ROWS),
)


@shows_progress
@with_flags((*_HOW, GPUS, STAGES, *OFFLOAD, *COMPENSATION))
def evaluate(
    context: typer.Context,
    target: Annotated[
        str,
        typer.Argument(help="Model or exported folder, hub name, nested checkpoint or run.", metavar="MODEL|RUN"),
    ],
    data: Annotated[
        str | None,
        typer.Option(
            help="Evaluation data, as for prune. Text and tokens give perplexity, choices give accuracy, prompts with "
            "completions give the perplexity of the completions."
        ),
    ] = None,
    sparsity: Annotated[float | None, typer.Option(help="Sparsity to measure; the nearest step (the last).")] = None,
    lm_eval: Annotated[
        str | None, typer.Option(help="lm-eval tasks, separated by commas.", rich_help_panel=_HARNESS)
    ] = None,
    lm_eval_include: Annotated[
        Path | None, typer.Option(help="Folder with more lm-eval task files.", rich_help_panel=_HARNESS)
    ] = None,
    sparsities: Annotated[
        str | None, typer.Option(help="Measure dense and at these sparsities: 0.2,0.3,0.5.", rich_help_panel=_ALONG)
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="PNG file to plot the figures to.", rich_help_panel=_ALONG)] = None,
    out: Annotated[Path | None, typer.Option(help="JSON file to write the figures to.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    dtype: Annotated[str | None, typer.Option(help="bfloat16 or float32.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    **flags: Any,
) -> None:
    """Measure a model, an export or a run: perplexity, choice accuracy, exact match or lm-eval tasks."""
    _check_data(data, lm_eval, lm_eval_include, flags)
    _check_places(sparsity, sparsities, plot, out)
    check_gpu_memory(flags["gpu_memory"], bool(flags["offload"]))
    points = None if sparsities is None else numbers(sparsities)

    common = {
        **_what(lm_eval, lm_eval_include, flags),
        "device": device,
        "dtype": dtype,
        "offload": bool(flags["offload"]),
        "gpu_memory": flags["gpu_memory"],
        "compensation": compensation_request(flags),
    }
    _check_given(target, data, sparsity, points, flags["calibration"])
    common["stages"] = flags["stages"] or 1
    gpus = _gpus(target, flags["gpus"], common)
    start_processes(context, gpus, device)

    from gisp.target import evaluate_along, evaluate_target

    with processes(gpus, device) as replicas:
        common["replicas"] = replicas
        if points is None:
            result = evaluate_target(target, data, sparsity=sparsity, **common)
        else:
            result = evaluate_along(target, data, sparsities=points, on_point=_progress, **common)
    if not rank():
        _show(result, plot, out, as_json)


def _gpus(target: str, gpus: int | None, asked: dict[str, Any]) -> int | None:
    """Processes to start, which are those of the stages where there are any."""
    stages = asked["stages"]
    if stages == 1 or launched():
        return gpus
    if gpus not in (None, stages):
        raise GispError(f"--gpus is {gpus}, --stages {stages} starts as many processes: leave it out")
    from gisp.run.record import read_record
    from gisp.stages.rules import Sharing, check_sharing
    from gisp.target.check import check_stages, is_run

    check_stages(stages, asked["lm_eval"], asked["compensation"], asked["offload"], asked["options"].generate)
    if not is_run(target):
        raise GispError(f"--stages {stages} takes a run, {target} is none: leave it out, or give --offload")
    check_sharing(Sharing(stages, stages, int(read_record(Path(target))["base_model"]["layers"])))
    return stages


def _check_data(data: str | None, lm_eval: str | None, include: Path | None, flags: dict[str, Any]) -> None:
    """Refuse flags that miss what they are about."""
    if data is None and lm_eval is None:
        raise GispError("--data is missing: gisp eval MODEL|RUN --data SPEC, or --lm-eval TASKS")
    about = next((name for name in ("generate", "stride", "window") if flags[name] is not None), None)
    if data is None and about:
        raise GispError(f"--{about} is about --data: give --data SPEC or leave it out")
    if lm_eval is None and include is not None:
        raise GispError(f"--lm-eval-include {include} belongs to --lm-eval: add the names of tasks")


def _check_given(
    target: str, data: str | None, sparsity: float | None, points: list[float] | None, calibration: str | None
) -> None:
    """Refuse a model, a point or data that are not there."""
    from gisp.target.check import check_along, check_target

    if points is None:
        check_target(target, sparsity)
    else:
        check_along(target, points)
    for spec in (data, calibration):
        if spec is not None:
            check_spec(spec)


def _check_places(sparsity: float | None, sparsities: str | None, plot: Path | None, out: Path | None) -> None:
    """Refuse points and files that do not go together, and files that cannot be written."""
    if sparsities is not None and sparsity is not None:
        raise GispError("--sparsity and --sparsities are both given: leave one out")
    if plot is not None and sparsities is None:
        raise GispError(f"--plot {plot} draws several points: give --sparsities too, or leave it out")
    if plot is not None and plot.suffix.lower() != ".png":
        raise GispError(f"--plot is {plot}: give a .png file")
    if out is not None and out.suffix.lower() != ".json":
        raise GispError(f"--out is {out}: give a .json file")
    for path in (out, plot):
        if path is not None:
            check_writable(path)


def _what(lm_eval: str | None, include: Path | None, flags: dict[str, Any]) -> dict[str, Any]:
    """Options of an evaluation and its lm-eval tasks."""
    given = {option.name: flags[option.name] for option in _HOW if flags[option.name] is not None}
    given["until"] = tuple(text.replace("\\n", "\n").replace("\\t", "\t") for text in given.get("until", ()))
    options = EvalOptions(**given)
    names = tuple(name.strip() for name in (lm_eval or "").split(","))
    tasks = None if lm_eval is None else LmEvalTasks(names, include, options.limit, options.batch_size)
    return {"options": options, "lm_eval": tasks}


def _show(result: dict[str, Any], plot: Path | None, out: Path | None, as_json: bool) -> None:
    """Write and print the figures."""
    from gisp.run.evaluations import finite_json

    written = json.dumps(finite_json(result))
    if out is not None:
        write_atomic(out, written.encode())
    if plot is not None:
        from gisp.report.points import draw_points

        write_atomic(plot, draw_points(result["points"]))
    if as_json:
        print(written)
    elif "points" in result:
        _print_points(result["points"])
    else:
        _print_one(result)


def _progress(point: dict[str, Any]) -> None:
    output().say(f"sparsity {point['sparsity']:.4f}: {_figures_line(point)}")


def _figures_line(result: dict[str, Any]) -> str:
    from gisp.run.evaluations import figures

    return ", ".join(f"{name} {_number(value, error)}" for name, value, error in figures(result))


def _number(value: float | None, error: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.4f}" if error is None else f"{value:.4f} ± {error:.4f}"


def _print_one(result: dict[str, Any]) -> None:
    conditions = []
    if "examples" in result:
        conditions.append(f"{result['examples']:,} examples")
    if "tokens" in result:
        conditions.append(f"{result['tokens']:,} tokens, window {result['window']}")
        if result.get("stride", result["window"]) != result["window"]:
            conditions.append(f"stride {result['stride']}")
    shown = f" ({', '.join(conditions)})" if conditions else ""
    print(f"{_figures_line(result)} at decoder sparsity {result['sparsity']:.4f}{shown}")
    if "compensation" in result:
        print(f"  compensation: {result['compensation']}")
    for name, what in (("truncated", "examples"), ("prompts_truncated", "prompts")):
        if result.get(name):
            print(f"{what} that lost tokens at their start to fit: {result[name]:,}")


def _print_points(points: list[dict[str, Any]]) -> None:
    from gisp.run.evaluations import figures

    names = [name for name, _, _ in figures(points[0])]
    table = Table()
    for heading in ("sparsity", "whole model", "parameters", "KV bytes/token", *names):
        table.add_column(heading, no_wrap=True)
    for point in points:
        kv = point["kv_bytes_per_token"]
        table.add_row(
            f"{point['sparsity']:.4f}",
            f"{point['model_sparsity']:.4f}",
            f"{point['parameters']:,}",
            "-" if kv is None else f"{kv:,}",
            *(_number(value, error) for _, value, error in figures(point)),
        )
    plain_console().print(table)
