"""``gisp prune``: options to a run, with progress."""

from __future__ import annotations

import re
import shlex
import warnings
from pathlib import Path
from typing import Annotated, Any

import typer

from gisp.cli.flags import flag, with_flags
from gisp.cli.output import output, shows_progress
from gisp.cli.prune_summary import closing_lines
from gisp.cli.stop import InterruptError
from gisp.config.declare import Option
from gisp.config.options import CONFIG_FILE, IN_MEMORY, OPTIONS, make_config, read_yaml, without_defaults
from gisp.config.reference import help_text
from gisp.data.sources import check_spec
from gisp.errors import GispError
from gisp.model.paths import check_model_path


def _flag(option: Option) -> Any:
    if option.kind == "bool":
        return flag(option.name, help_text(option), kind=bool, panel=option.group or None)

    def parse(text: str) -> Any:
        """A number where the option is one and the text is, else the text, which the option's check refuses."""
        if option.kind == "int":
            return int(text) if re.fullmatch(r"[+-]?[0-9]{1,1000}", text) else text
        try:
            return float(text) if option.kind == "float" else text
        except ValueError:
            return text

    metavar = f"<{option.kind}{'|auto' if option.auto else ''}>"
    return flag(option.name, help_text(option), panel=option.group or None, parser=parse, metavar=metavar)


@shows_progress
@with_flags([_flag(option) for option in OPTIONS.values()])
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
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            help="Continue the run in --out if there is one. `gisp prune --resume RUN` takes the rest from RUN.",
        ),
    ] = False,
    log: Annotated[str | None, typer.Option(help="Also log steps to tensorboard, wandb or trackio.")] = None,
    config: Annotated[Path | None, typer.Option(help="YAML file of these options; flags override it.")] = None,
    **flags: Any,
) -> None:
    """Prune a model step by step; every sparsity passed on the way stays available."""
    options: dict[str, Any] = read_yaml(config) if config else {}
    if resume and model is not None and (out, data, config) == (None, None, None):
        out, model = Path(model), None
    places: dict[str, Any] = {"model": model, "data": data, "out": out}
    if resume and out is not None:
        options = {**_recorded(out, places), **options}
    for name, value in places.items():
        stored = options.pop(name, None)
        places[name] = str(value or stored or "")
    given = {name: value for name, value in flags.items() if value is not None}
    options = {**without_defaults(options, given), **given}
    make_config(**options)
    if resume and places["out"] and not places["model"] and not places["data"]:
        raise GispError(f"{places['out']} holds no run to resume: give the folder that gisp prune --out wrote")
    missing = [shown for shown, value in zip(("MODEL", "--data", "--out"), places.values(), strict=True) if not value]
    if missing:
        raise GispError(f"{missing[0]} is missing: gisp prune MODEL --data SPEC --out RUN")

    _check_given(places, resume, log)

    from gisp.run.metrics.trackers import logged
    from gisp.run.prune import prune as run_prune

    if options.get("ratio") is not None and options.get("sparsity") is not None:
        output().warn("warning: --sparsity is ignored beside --ratio, which alone says where the schedule ends")
    try:
        with logged(log, Path(places["out"])) as on_step, warnings.catch_warnings():
            warnings.simplefilter("always", UserWarning)
            warnings.showwarning = lambda message, *_: output().warn(f"warning: {message}")
            trajectory = run_prune(**places, resume=resume, on_step=on_step, **options)
    except KeyboardInterrupt:
        raise InterruptError(_how_to_go_on(Path(places["out"]))) from None
    for line in _shortfalls(trajectory):
        output().warn(f"warning: {line}")
    if not output().quiet:
        for line in closing_lines(trajectory, places["out"], places["data"]):
            output().say(line)


def _check_given(places: dict[str, Any], resume: bool, log: str | None) -> None:
    """Refuse a model, data or a log that is not there, and a folder that is taken."""
    from gisp.run.folder import RunFolder
    from gisp.run.metrics.trackers import check_log

    if log is not None:
        check_log(log)
    check_model_path(places["model"])
    check_spec(places["data"])
    with RunFolder(Path(places["out"])).writing(resume):
        pass


def _recorded(run: Path, places: dict[str, Any]) -> dict[str, Any]:
    """Model, data and options of a run that is to go on, as its folder has them; empty where none has begun.

    Args:
        places: those given, which count more.

    Raises:
        GispError: only the program that made the run has its model or data, or its options cannot be read.
    """
    if not _has_begun(run):
        return {}
    stored = read_yaml(run / CONFIG_FILE) if (run / CONFIG_FILE).is_file() else {}
    for name, shown in (("model", "MODEL"), ("data", "--data")):
        if not places[name] and stored.get(name) in (None, "", IN_MEMORY):
            raise GispError(
                f"{run} does not say where its {name} lies: give {shown}, or resume it from Python with "
                "gisp.prune(model, data, out=..., resume=True)"
            )
    return stored


def _has_begun(run: Path) -> bool:
    from gisp.run.record import RECORD

    return (run / RECORD).is_file()


def _how_to_go_on(out: Path) -> str:
    if not _has_begun(out):
        return "no step was finished, nothing is written"
    return f"finished steps are kept, continue with gisp prune --resume {shlex.quote(str(out))}"


def _shortfalls(trajectory: Any) -> list[str]:
    """What a finished run did not reach, one line each."""
    config, last = trajectory.config, trajectory.steps[-1]
    goal, lines = config["sparsity"], []
    if config["schedule"] == "structures" and goal is not None and last.sparsity < goal:
        lines.append(f"the schedule ended at {last.sparsity:.4f}, short of {goal}: give a higher --ratio")
    if not last.removed_parameters:
        wanted = f"--ratio {config['ratio']}" if goal is None else f"{goal} of the decoder parameters"
        lines.append(
            f"nothing was removed: {wanted} is less than the smallest removal "
            f"(widths go in multiples of --align {config['align']}): give more"
        )
    return lines
