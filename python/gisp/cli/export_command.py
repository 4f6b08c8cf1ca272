"""``gisp export``: a point of a run, or all of them, as a folder that loads elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from gisp.cli.flags import flag, flag_text, numbers, with_flags
from gisp.cli.options.compensation import COMPENSATION, compensation_request
from gisp.cli.options.gpus import GPUS, processes, run_as_processes, start_processes
from gisp.cli.options.offload import OFFLOAD
from gisp.cli.output import shows_progress
from gisp.config.memory import check_gpu_memory
from gisp.data.sources import check_spec
from gisp.errors import GispError
from gisp.export.folder import check_place
from gisp.export.nested.request import check_request, milestone_steps
from gisp.export.sizes.options import FORMATS, SizeOptions, check_options, option_text
from gisp.replicas.environment import launched, rank

_HUB = "Hub"
_FORM = "; ".join(f"{name}: {format.about}" for name, format in FORMATS.items()) + "."
_STAGES = flag("stages", "Stages that the layers are split into, one process each; format hf only.", kind=int, min=1)


@shows_progress
@with_flags((GPUS, _STAGES, *OFFLOAD, *COMPENSATION))
def export(
    context: typer.Context,
    run: Annotated[Path, typer.Argument(help="Run folder.")],
    sparsity: Annotated[float | None, typer.Option(help="Sparsity to export; the nearest step is taken.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder to write.")] = None,
    nested: Annotated[
        Path | None, typer.Option(help="Folder to write all sizes to, in one set of weights; replaces --out.")
    ] = None,
    sparsities: Annotated[
        str | None, typer.Option(help="With --nested: sparsities to compensate, as 0.2,0.3,0.5.")
    ] = None,
    format: Annotated[str, typer.Option(help=_FORM)] = "hf",
    round_mlp: Annotated[int | None, typer.Option(help="Round MLP widths up to multiples of this.")] = None,
    align_heads: Annotated[int | None, typer.Option(help="Pad query heads per layer to multiples of this.")] = None,
    min_heads: Annotated[int | None, typer.Option(help="Pad query heads per layer to at least this many.")] = None,
    data: Annotated[str | None, typer.Option(help="Evaluation data, for a perplexity in the model card.")] = None,
    window: Annotated[int | None, typer.Option(help="Tokens per window of this evaluation, as for eval.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    dtype: Annotated[str | None, typer.Option(help="Of gguf: f32, f16 or bf16 (f16 for 16-bit models).")] = None,
    push_to_hub: Annotated[
        str | None,
        typer.Option(help="Repository of the Hugging Face hub to upload the export to.", rich_help_panel=_HUB),
    ] = None,
    public: Annotated[
        bool, typer.Option("--public", help="Make a public repository, not a private one.", rich_help_panel=_HUB)
    ] = False,
    **compensation: Any,
) -> None:
    """Write a size of a run as a checkpoint that loads elsewhere, and check its logits."""
    hub = _hub(push_to_hub, public)
    sizes = SizeOptions(round_mlp, align_heads, min_heads)
    given: dict[str, Any] = {"dtype": dtype, **vars(sizes), "data": data, "window": window}
    if (stages := compensation.pop("stages")) is not None:
        others = {**given, "nested": nested, "sparsities": sparsities, "push_to_hub": push_to_hub, **compensation}
        _export_stages(context, stages, run, *_one_size(sparsity, out, None), device, format, others)
        return
    gpus, place = compensation["gpus"], _place(compensation)
    _check_shared(gpus, data, compensation["compensate"])
    common: dict[str, Any] = {"device": device, "together": partial(processes, gpus, device)}
    start = partial(start_processes, context, gpus, device)
    if nested is not None:
        others = {"sparsity": sparsity, "out": out, **given, "offload": place["offload"] or None}
        _refuse("--nested has its own form of a size", format, others)
        _export_nested(run, nested, sparsities, compensation, start, hub, **common)
        return
    sparsity, out = _one_size(sparsity, out, sparsities)
    check_options(format, sizes, dtype, data, window)
    request = compensation_request(compensation)
    _check_given(run, sparsity, out, (data, compensation["calibration"]))
    start()

    from gisp.export.run import export_run, take_part

    asked: dict[str, Any] = {"format": format, "sizes": sizes, "data": data, "window": window, "compensation": request}
    if rank():
        take_part(run, sparsity, **asked, **common)
    else:
        done = export_run(run, sparsity, out, dtype=dtype, **asked, **common, **place, **hub)
        _print_export(done, out, format, sizes)


def _hub(repository: str | None, public: bool) -> dict[str, Any]:
    """Where to upload to, if anywhere."""
    if public and repository is None:
        raise GispError("--public is about --push-to-hub: give a repository or leave it out")
    return {"push_to_hub": repository, "private": not public}


def _place(flags: dict[str, Any]) -> dict[str, Any]:
    """Where the base model lies, taken out of the flags.

    Raises:
        GispError: something that layers in host memory do not go with.
    """
    offload, gpu_memory = bool(flags.pop("offload")), flags.pop("gpu_memory")
    check_gpu_memory(gpu_memory, offload)
    if offload:
        from gisp.stages.rules import Sharing, check_sharing

        check_sharing(Sharing(flags["gpus"] or 1, offload="always"))
        request = compensation_request(flags)
        if request is not None:
            request.options.check_streamed()
    return {"offload": offload, "gpu_memory": gpu_memory}


def _check_shared(gpus: int | None, data: str | None, compensate: str | None) -> None:
    """Refuse several processes that have nothing to share."""
    if (gpus is not None or launched()) and data is None and compensate is None:
        what = "torchrun" if gpus is None else f"--gpus {gpus}"
        raise GispError(f"{what} shares --compensate and --data, and neither is given: leave it out")


def _export_stages(
    context: typer.Context,
    stages: int,
    run: Path,
    sparsity: float,
    out: Path,
    device: str,
    format: str,
    others: dict[str, Any],
) -> None:
    """Start the processes of an export in stages, or be one of them.

    Args:
        others: what such an export does not follow, but for as many GPUs.
    """
    from gisp.replicas.environment import joined

    gpus = others.pop("gpus")
    request = compensation_request(others)
    if request is not None:
        request.options.check_stages(stages)
    _refuse(f"--stages {stages} writes the point of the run as hf", format, others)
    if gpus not in (None, stages):
        raise GispError(f"--gpus is {gpus}, --stages {stages} starts as many processes: leave it out")
    if not launched():
        _check_given(run, sparsity, out, ())
        _check_layers(run, stages)
        run_as_processes(context, stages, device, again="give the command again")
    from gisp.export.staged import export_staged

    with joined(device) as group:
        assert group is not None
        done = export_staged(run, sparsity, out, process_group=group, device=device)
    if not rank():
        _print_export(done, out, "hf", SizeOptions())


def _check_layers(run: Path, stages: int) -> None:
    """Refuse more stages than the model of a run has layers."""
    from gisp.run.record import read_record
    from gisp.stages.rules import Sharing, check_sharing

    check_sharing(Sharing(stages, stages, int(read_record(run)["base_model"]["layers"])))


def _refuse(why: str, format: str, options: dict[str, Any]) -> None:
    """Refuse other formats, and options that a kind of export does not follow."""
    named = [f"--format {format}"] if format != "hf" else []
    named += [flag_text(name, value) for name, value in options.items() if value is not None]
    if named:
        raise GispError(f"{why}: leave {', '.join(named)} out")


def _one_size(sparsity: float | None, out: Path | None, sparsities: str | None) -> tuple[float, Path]:
    """The size of an export that is not nested, and its place.

    Raises:
        GispError: names what is missing or too much.
    """
    if sparsities is not None:
        raise GispError(f"--sparsities {sparsities} is for --nested DIR: give --sparsity S for one size")
    if sparsity is None or out is None:
        missing = "--sparsity" if sparsity is None else "--out"
        raise GispError(
            f"{missing} is missing: gisp export RUN --sparsity S --out DIR, or gisp export RUN --nested DIR"
        )
    return sparsity, out


def _check_given(run: Path, sparsity: float, out: Path, specs: tuple[str | None, ...]) -> None:
    """Refuse a run, a point or data that are not there, and a place that is taken."""
    from gisp.target.check import check_run

    check_place(out)
    check_run(run, sparsity)
    for spec in specs:
        if spec is not None:
            check_spec(spec)


def _export_nested(
    run: Path,
    folder: Path,
    sparsities: str | None,
    compensation: dict[str, Any],
    start: Callable[[], None],
    hub: dict[str, Any],
    **options: Any,
) -> None:
    from gisp.target.check import run_points

    wanted = () if sparsities is None else numbers(sparsities)
    request = compensation_request(compensation)
    check_request(request, wanted)
    check_place(folder)
    points, goal = run_points(run)
    milestone_steps(points, wanted, goal)
    if request is not None:
        check_spec(request.calibration)
    start()

    from gisp.export.run import export_nested_run, take_part_nested

    if rank():
        take_part_nested(run, compensation=request, sparsities=wanted, **options)
        return
    written = export_nested_run(run, folder, compensation=request, sparsities=wanted, **options, **hub)
    print(
        f"{folder}: dense and {written.steps} sparsities in {written.bytes / 1e6:,.1f} MB, "
        f"logits differ by {max(written.relative_differences.values()):.1e} relative"
    )
    for item in written.milestones:
        print(f"  sparsity {item.sparsity:.4f}: {item.bytes:,} bytes beside the shared weights, {item.compensation}")
    _print_url(written.url)


def _print_export(done: Any, out: Path, format: str, sizes: SizeOptions) -> None:
    """What was written; its format and sizes where they are not the usual ones."""
    own = [f"format {format}"] if format != "hf" else []
    own += [option_text(sizes.given())] if sizes.given() else []
    print(
        f"{out}: {''.join(f'{text}, ' for text in own)}"
        f"decoder sparsity {done.spec.sparsity:.4f} (step {done.spec.step}), "
        f"{done.report.parameters_pruned:,} of {done.report.parameters_dense:,} parameters, "
        f"logits differ by {done.report.relative_difference:.1e} relative"
    )
    if done.spec.compensation:
        print(f"  compensation: {done.spec.compensation}")
    for what, value in done.spec.notes:
        print(f"  {what}: {value}")
    _print_url(done.url)


def _print_url(url: str) -> None:
    if url:
        print(f"  pushed to {url}")
