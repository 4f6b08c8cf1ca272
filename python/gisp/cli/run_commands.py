"""Commands on finished runs and models: export, report, inspect."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from gisp.cli.compensation_options import COMPENSATION, compensation_request
from gisp.cli.flags import with_flags
from gisp.errors import GispError

_HUB = "Hub"


@with_flags(COMPENSATION)
def export(
    run: Annotated[Path, typer.Argument(help="Run folder.")],
    sparsity: Annotated[float | None, typer.Option(help="Sparsity to export; the nearest step is taken.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder to write.")] = None,
    nested: Annotated[
        Path | None, typer.Option(help="Folder to write all sparsities to, in one set of weights; instead of --out.")
    ] = None,
    format: Annotated[str, typer.Option(help="hf (default), gguf (llama.cpp), uniform or masked.")] = "hf",
    round_mlp: Annotated[int | None, typer.Option(help="Round MLP widths up to multiples, with real weights.")] = None,
    align_heads: Annotated[int | None, typer.Option(help="Query heads per layer: a multiple of it.")] = None,
    min_heads: Annotated[int | None, typer.Option(help="Fewest query heads per layer.")] = None,
    data: Annotated[str | None, typer.Option(help="Evaluation data: measure perplexity for the model card.")] = None,
    window: Annotated[int | None, typer.Option(help="Tokens per window of the evaluation, as for eval.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    dtype: Annotated[str | None, typer.Option(help="gguf only: f32, f16 or bf16; 16-bit models give f16.")] = None,
    push_to_hub: Annotated[
        str | None,
        typer.Option(help="Repository of the Hugging Face hub to upload the export to.", rich_help_panel=_HUB),
    ] = None,
    public: Annotated[
        bool, typer.Option("--public", help="Let everyone read it; else it is private.", rich_help_panel=_HUB)
    ] = False,
    **compensation: Any,
) -> None:
    """Write a pruned model as a checkpoint that loads elsewhere, its logits checked."""
    if public and push_to_hub is None:
        raise GispError("--public is about --push-to-hub: give a repository or leave it out")
    hub: dict[str, Any] = {"push_to_hub": push_to_hub, "private": not public}
    if nested is not None:
        others = (sparsity, out, dtype, round_mlp, align_heads, min_heads, data, window)
        _check_nested(format, others, compensation)
        _export_nested(run, nested, device, hub)
        return
    if sparsity is None or out is None:
        missing = "--sparsity" if sparsity is None else "--out"
        raise GispError(
            f"{missing} is missing: gisp export RUN --sparsity S --out DIR, or gisp export RUN --nested DIR"
        )

    from gisp.export.rounding import SizeOptions, option_text
    from gisp.export.run import export_run

    sizes = SizeOptions(round_mlp, align_heads, min_heads)
    done = export_run(
        run,
        sparsity,
        out,
        format=format,
        device=device,
        sizes=sizes,
        data=data,
        window=window,
        dtype=dtype,
        compensation=compensation_request(compensation),
        **hub,
    )
    own = [f"format {format}"] if format != "hf" else []
    own += [option_text(sizes.given())] if sizes.given() else []
    _print_export(done, out, own)


def _check_nested(format: str, others: tuple[Any, ...], compensation: dict[str, Any]) -> None:
    """Refuse options that are about one size."""
    if compensation["compensate"] is not None:
        raise GispError(
            f"--compensate {compensation['compensate']} fits the weights to one sparsity, --nested holds one set "
            "of weights for all: leave one of them out"
        )
    if format != "hf" or any(other is not None for other in (*others, *compensation.values())):
        raise GispError("--nested has a form of its own for every sparsity: leave the other options out")


def _export_nested(run: Path, folder: Path, device: str, hub: dict[str, Any]) -> None:
    from gisp.export.run import export_nested_run

    written = export_nested_run(run, folder, device=device, **hub)
    print(
        f"{folder}: dense and {written.steps} sparsities in {written.bytes / 1e6:,.1f} MB, "
        f"logits differ by {max(written.relative_differences.values()):.1e} relative"
    )
    _print_url(written.url)


def _print_export(done: Any, out: Path, own: list[str]) -> None:
    """What was written.

    Args:
        own: what its format and sizes are, where they are not the usual ones.
    """
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


def report(run: Annotated[Path, typer.Argument(help="Run folder.")]) -> None:
    """Write report.html and its pictures into the run folder."""
    from gisp.report.write import write_report

    print(write_report(run).html)


def inspect(
    target: Annotated[str, typer.Argument(help="Run folder, nested checkpoint or dense model.", metavar="RUN|MODEL")],
) -> None:
    """Show what a run removed, which sizes a nested checkpoint holds, or what could be removed from a model."""
    from gisp.export.nested.files import is_nested
    from gisp.model.load import load_dense, resolve_device
    from gisp.model.structures import map_model
    from gisp.run.trajectory import Trajectory
    from gisp.target.open import is_run

    console = Console(highlight=False)
    if is_nested(target):
        _show_nested(console, target)
        return
    if is_run(target):
        trajectory = Trajectory.load(target)
        _show_run(console, trajectory)
        _show_evaluations(console, Path(target), str(trajectory.base_model["fingerprint"]))
        return
    import torch

    model_map = map_model(load_dense(target, resolve_device("cpu"), torch.float32))
    table = Table("property", "value", title=target)
    for key, value in model_map.describe().items():
        table.add_row(key, f"{value:,}" if isinstance(value, int) else value)
    table.add_row("parameters of a removed head", f"{model_map.head_parameters:,}")
    table.add_row("parameters of a removed channel", f"{model_map.channel_parameters:,}")
    console.print(table)


def _show_run(console: Console, trajectory: Any) -> None:
    last = len(trajectory.steps)
    state = "complete" if trajectory.complete else "unfinished"
    console.print(
        f"{trajectory.base_model['path'] or 'model in memory'}: preset {trajectory.config['preset']}, "
        f"{last} steps, {state}, decoder sparsity {trajectory.sparsity_at(last):.4f}",
        soft_wrap=True,
    )
    table = Table("layer", "heads kept", "channels kept", "first removal at step")
    for layer in range(trajectory.layers):
        names = (f"layers.{layer}.heads", f"layers.{layer}.channels")
        removed = [trajectory.removed_at[name] for name in names]
        steps = [int(at[at > 0].min()) for at in removed if bool((at > 0).any())]
        cells = [f"{int((at == 0).sum())} / {len(at)}" for at in removed]
        table.add_row(str(layer), *cells, str(min(steps)) if steps else "-")
    console.print(table)


def _show_evaluations(console: Console, run: Path, fingerprint: str) -> None:
    """What was measured on points of the run."""
    from gisp.report.evaluations import HEADER, evaluation_rows
    from gisp.run.evaluations import read_evaluations

    rows = evaluation_rows(read_evaluations(run, fingerprint))
    if not rows:
        console.print(f"not evaluated yet: gisp eval {run} --sparsities 0.2,0.3 --data HELDOUT", soft_wrap=True)
        return
    table = Table(*HEADER, title="evaluations")
    for row in rows:
        table.add_row(*row)
    console.print(table)


def _show_nested(console: Console, folder: str) -> None:
    from gisp.export.nested.files import NestedFiles

    files = NestedFiles.open(folder)
    table = Table("sparsity", "query heads", "key/value heads", "MLP channels", title=folder)
    rows = zip(files.sparsities, files.nesting.prefixes.sum(1).tolist(), strict=True)
    for sparsity, counts in rows:
        table.add_row(f"{sparsity:.4f}", *(f"{count:,}" for count in counts))
    console.print(table)
