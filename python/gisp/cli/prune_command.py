"""``gisp prune``: options to a run, with progress."""

from __future__ import annotations

import re
import shlex
import warnings
from pathlib import Path
from typing import Annotated, Any

import typer

from gisp.cli.flags import flag, with_flags
from gisp.cli.options.gpus import check_not_started, run_as_processes
from gisp.cli.output import output, shows_progress
from gisp.cli.prune_summary import closing_lines
from gisp.cli.stop import InterruptError
from gisp.config.declare import Option
from gisp.config.options import (
    CONFIG_FILE,
    IN_MEMORY,
    OPTIONS,
    SLICES,
    STAGE_SLICES,
    make_config,
    read_yaml,
    without_defaults,
)
from gisp.config.reference import help_text
from gisp.data.sources import check_spec
from gisp.errors import GispError
from gisp.model.paths import check_model_path
from gisp.replicas.environment import joined, launched, rank


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
    context: typer.Context,
    model: Annotated[str | None, typer.Argument(help="Folder, hub name or GGUF file of the dense model.")] = None,
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
            help="Continue the run in --out if there is one. `gisp prune --resume RUN` takes all options from RUN.",
        ),
    ] = False,
    log: Annotated[str | None, typer.Option(help="Also log steps to tensorboard, wandb or trackio.")] = None,
    config: Annotated[Path | None, typer.Option(help="YAML file of these options; flags override it.")] = None,
    gpus: Annotated[
        int | None, typer.Option(min=1, help="GPUs of this host that share each step; the result is that of one.")
    ] = None,
    stages: Annotated[
        int,
        typer.Option(min=1, help="Stages that the layers of the model are split into, each on one GPU; needs --gpus."),
    ] = 1,
    **flags: Any,
) -> None:
    """Prune a model step by step. Every sparsity on the way can be exported."""
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
    if gpus is not None or launched():
        options = _in_slices(options, stages, out if resume else None)
    make_config(**options)
    if resume and places["out"] and not places["model"] and not places["data"]:
        raise GispError(f"{places['out']} holds no run to resume: give the folder that gisp prune --out wrote")
    missing = [shown for shown, value in zip(("MODEL", "--data", "--out"), places.values(), strict=True) if not value]
    if missing:
        raise GispError(f"{missing[0]} is missing: gisp prune MODEL --data SPEC --out RUN")

    if not rank():
        _check_given(places, resume, log)
    if gpus is not None and gpus > 1:
        check_not_started(gpus)
    if not launched():
        _check_sharing(gpus or 1, stages, places["model"], options)
    if gpus is not None and gpus > 1:
        run_as_processes(context, gpus, str(options.get("device") or "auto"), again="add --resume to go on")
    _run(places, resume, log, options, stages)


def _run(places: dict[str, Any], resume: bool, log: str | None, options: dict[str, Any], stages: int) -> None:
    """Prune in this process, and tell how it went if it is the only or the first one of the run."""
    from gisp.run.metrics.trackers import logged
    from gisp.run.prune import prune as run_prune

    first = not rank()
    if first and options.get("ratio") is not None and options.get("sparsity") is not None:
        output().warn("warning: --sparsity is ignored beside --ratio, which alone says where the schedule ends")
    try:
        with (
            joined(str(options.get("device") or "auto")) as group,
            logged(log if first else None, Path(places["out"])) as on_step,
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("always" if first else "ignore", UserWarning)
            warnings.showwarning = lambda message, *_: output().warn(f"warning: {message}")
            options |= {"process_group": group, "stages": stages}
            trajectory = run_prune(**places, resume=resume, on_step=on_step, **options)
    except KeyboardInterrupt:
        raise InterruptError(_how_to_go_on(Path(places["out"]))) from None
    if not first:
        return
    for line in _shortfalls(trajectory):
        output().warn(f"warning: {line}")
    if not output().quiet:
        for line in closing_lines(trajectory, places["out"], places["data"], stages):
            output().say(line)


def _in_slices(options: dict[str, Any], stages: int, run: Path | None) -> dict[str, Any]:
    """Options of a run that several processes may share.

    Args:
        run: folder of a run that goes on, if there is one.

    Raises:
        GispError: it was begun without slices.
    """
    if options.get("slices") is not None:
        return options
    if run is not None and _has_begun(run):
        raise GispError(f"{run} was begun without --slices, which several GPUs need: go on without --gpus or torchrun")
    return {**options, "slices": SLICES if stages == 1 else STAGE_SLICES}


def _check_sharing(processes: int, stages: int, model: str, options: dict[str, Any]) -> None:
    """Refuse here what each of the processes would refuse, which takes long to start them."""
    if processes == stages == 1:
        return
    from gisp.model.load import shape_of
    from gisp.stages.rules import Sharing, check_sharing

    check_sharing(Sharing.of(make_config(**options), processes, stages, **shape_of(model)))


def _check_given(places: dict[str, Any], resume: bool, log: str | None) -> None:
    """Refuse a model, data or a log that is not there, and a folder that is taken."""
    from gisp.run.folder import RunFolder
    from gisp.run.metrics.trackers import check_log

    if log is not None:
        check_log(log)
    check_model_path(places["model"])
    check_spec(places["data"])
    with RunFolder(Path(places["out"])).writing(resume, looking=True):
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
    from gisp.run.record import read_record

    stored = read_yaml(run / CONFIG_FILE) if (run / CONFIG_FILE).is_file() else {}
    # Exports and evaluations read the path from there too, and who moves a model corrects it there.
    stored["model"] = read_record(run)["base_model"]["path"]
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
    # One unit may be more than a step: a key/value head of a small model, a whole layer.
    if config["schedule"] == "parameters" and goal - last.sparsity > goal / config["steps"] and last.sparsity:
        lines.append(f"the run ended at {last.sparsity:.4f}, short of {goal}: what would go next is more than was left")
    if not last.removed_parameters:
        wanted = f"--ratio {config['ratio']}" if goal is None else f"{goal} of the decoder parameters"
        lines.append(
            f"nothing was removed: {wanted} is less than the smallest removal "
            f"(widths go in multiples of --align {config['align']}): give more"
        )
    return lines
