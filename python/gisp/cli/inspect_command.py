"""``gisp inspect`` and ``gisp report``: what a run did, and which sizes are there, as tables and as a page."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from gisp.cli.output import plain_console
from gisp.export.sizes.options import FORMATS, option_text

if TYPE_CHECKING:
    from gisp.export.sizes.written import WrittenExport
    from gisp.run.evaluations import Evaluation

# More steps are shown evenly spaced.
_POINTS = 21
# What the card of an export says of the run, and of sizes that were changed.
_OF_RUN = ("calibration data", "preset", "criterion", "size of every layer", "made from")


def report(run: Annotated[Path, typer.Argument(help="Run folder.")]) -> None:
    """Write report.html and its plots into the run folder."""
    from gisp.target.check import check_run

    check_run(run)

    from gisp.report.write import write_report

    print(write_report(run).html)


def inspect(
    target: Annotated[
        str,
        typer.Argument(help="Run folder, export, nested checkpoint or dense model.", metavar="RUN|EXPORT|MODEL"),
    ],
) -> None:
    """Show the sizes of a run, what an export contains, or what can be removed from a model."""
    from gisp.export.nested.place import is_nested
    from gisp.model.gguf import EXPORTED
    from gisp.target.check import is_run

    console = plain_console()
    if is_nested(target):
        _show_nested(console, target)
    elif is_run(target) and not (Path(target) / EXPORTED).is_file():
        _show_run(console, Path(target))
    else:
        _show_files(console, target)


def _show_files(console: Console, target: str) -> None:
    """What is neither a run nor nested: an export or a dense model."""
    from gisp.model.gguf import EXPORTED
    from gisp.model.paths import check_model_path

    if not (Path(target) / EXPORTED).is_file():
        # Before torch is imported.
        check_model_path(target)

    from gisp.export.sizes.written import written_export

    found = written_export(target)
    if found is not None:
        _show_export(console, target, found)
        return
    check_model_path(target)
    _show_model(console, target)


def _show_model(console: Console, target: str) -> None:
    import torch

    from gisp.model.load import load_dense, resolve_device
    from gisp.model.structures import map_model

    model_map = map_model(load_dense(target, resolve_device("cpu"), torch.float32))
    table = Table("property", "value", title=target)
    for key, value in model_map.describe().items():
        table.add_row(key, f"{value:,}" if isinstance(value, int) else value)
    table.add_row("parameters of a removed head", f"{model_map.head_parameters:,}")
    table.add_row("parameters of a removed channel", f"{model_map.channel_parameters:,}")
    console.print(table)


def _show_run(console: Console, folder: Path) -> None:
    """A line about the run, its points, its layers and its evaluations; read without torch."""
    from gisp.run.evaluations import read_evaluations
    from gisp.run.record import read_trajectory

    record, removed_at = read_trajectory(folder)
    evaluations = read_evaluations(folder, str(record["base_model"]["fingerprint"]), removed_at)
    run, steps = shlex.quote(str(folder)), record["steps"]
    state = "complete" if record["complete"] else "unfinished"
    console.print(
        f"{record['base_model']['path'] or 'model in memory'}: preset {record['config']['preset']}, "
        f"{len(steps)} steps, {state}, decoder sparsity {steps[-1]['sparsity']:.4f}",
        soft_wrap=True,
    )
    console.print(_points_table(record, removed_at))
    console.print(
        f"gisp export {run} --sparsity S --out DIR takes the nearest of all {len(steps)} steps; stored is what its "
        "export holds, with the heads that unevenly shared keys and values need",
        soft_wrap=True,
    )
    table = Table("layer", "heads kept", "channels kept", "first removal at step")
    for layer in range(record["base_model"]["layers"]):
        removed = [removed_at[f"layers.{layer}.{kind}"] for kind in ("heads", "channels")]
        first = [int(at[at > 0].min()) for at in removed if bool((at > 0).any())]
        cells = [f"{int((at == 0).sum())} / {len(at)}" for at in removed]
        table.add_row(str(layer), *cells, str(min(first)) if first else "-")
    console.print(table)
    if evaluations:
        console.print(_evaluations_table(evaluations))
    else:
        console.print(f"not evaluated yet: gisp eval {run} --sparsities 0.2,0.3 --data HELDOUT", soft_wrap=True)


def _evaluations_table(evaluations: list[Evaluation]) -> Table:
    """What was measured on points of a run."""
    from gisp.report.evaluations import HEADER, evaluation_rows

    table = Table(*HEADER, title="evaluations")
    for row in evaluation_rows(evaluations):
        table.add_row(*row)
    return table


def _points_table(record: dict[str, Any], removed_at: dict[str, Any]) -> Table:
    """Sparsities that can be exported, with what was removed and what is stored."""
    from gisp.export.sizes.stored import element_bytes, stored_sizes

    base, config, steps = record["base_model"], record["config"], record["steps"]
    last = len(steps)
    shown = sorted({round(last * place / min(_POINTS, last)) for place in range(min(_POINTS, last) + 1)})
    heads, channels = (
        [removed_at[f"layers.{layer}.{kind}"] for layer in range(base["layers"])] for kind in ("heads", "channels")
    )
    removed = [step["removed_parameters"] for step in steps]
    sizes = stored_sizes(base, heads, channels, shown)
    number_bytes = element_bytes(base, heads, steps, config.get("dtype"))
    table = Table("sparsity", "step", "removed", "stored", "KV B/token", "loss")
    for step, size in zip(shown, sizes, strict=True):
        table.add_row(
            f"{steps[step - 1]['sparsity'] if step else 0.0:.4f}",
            str(step),
            f"{removed[step - 1] if step else 0:,}",
            f"{size.parameters:,}",
            f"{size.kv_bytes_per_token(number_bytes):,}" if number_bytes else "-",
            # The loss of a step is that of the model it began with.
            f"{steps[step]['loss']:.4f}" if step < last else "-",
        )
    return table


def _show_export(console: Console, target: str, found: WrittenExport) -> None:
    """What an export is, how it loads, and what every layer stores."""
    record, options = found.record, found.record.get("options")
    told = [
        ("format", f"{found.format}, {FORMATS[found.format].about}"),
        ("sparsity", f"{record['sparsity']:.4f} of the decoder layers, step {record['step']}"),
        ("sparsity of the whole model", f"{record['model_sparsity']:.4f}"),
        *([("options", option_text(options))] if options else []),
        ("compensation", record.get("compensation") or "none"),
        ("parameters stored", f"{found.parameters:,}"),
        ("bytes of the weights", f"{found.bytes:,} ({found.dtype})"),
        ("KV bytes/token", f"{found.kv_bytes_per_token:,}"),
    ]
    _show_facts(console, target, [*_origin(target, str(record["base_fingerprint"])), *told])
    table = Table("layer", "query heads", "key/value heads", "MLP channels", "bytes")
    for number, layer in enumerate(found.layers):
        counts = (layer.query_heads, layer.kv_heads, layer.channels, layer.bytes)
        table.add_row(str(number), *(f"{count:,}" for count in counts))
    console.print(table)
    _show_loading(console, FORMATS[found.format].loading, target)


def _show_nested(console: Console, folder: str) -> None:
    """What a nested checkpoint is, how it loads, and what every size of it takes."""
    from gisp.export.nested.files import NestedFiles
    from gisp.export.nested.sizes import kv_bytes, own_bytes, shared_bytes

    files = NestedFiles.open(folder)
    told = ("format", f"nested, {len(files.sparsities) - 1} sizes beside the dense one")
    _show_facts(console, folder, [*_origin(folder, str(files.record["base_model"]["fingerprint"])), told])
    own = {step: own_bytes(files, step) for step in files.milestones}
    beside = ("own bytes",) if own else ()
    table = Table("sparsity", "query heads", "key/value heads", "MLP channels", "bytes", "KV B/token", *beside)
    sizes = zip(files.nesting.prefixes.sum(1).tolist(), shared_bytes(files), kv_bytes(files), strict=True)
    for step, (sparsity, (counts, shared, cache)) in enumerate(zip(files.sparsities, sizes, strict=True)):
        stored = (f"{own[step]:,}" if step in own else "-",) if own else ()
        table.add_row(f"{sparsity:.4f}", *(f"{count:,}" for count in (*counts, shared, cache)), *stored)
    console.print(table)
    for step, text in files.milestones.items():
        console.print(f"sparsity {files.sparsities[step]:.4f}, compensation: {text}", soft_wrap=True)
    _show_loading(console, ("load: gisp.load({path}, sparsity=S)",), folder)


def _origin(target: str, fingerprint: str) -> list[tuple[str, str]]:
    """Where an export comes from, as its card says; the fingerprint tells a base model even without one."""
    from gisp.export.provenance import card_facts

    folder = Path(target)
    card = card_facts(folder if folder.is_dir() else folder.parent)
    base = card.get("base model", "not told: the folder has no model card")
    rows = [("base model", base), ("its fingerprint", fingerprint)]
    return rows + [(name, card[name]) for name in _OF_RUN if name in card]


def _show_facts(console: Console, title: str, facts: list[tuple[str, str]]) -> None:
    table = Table("property", "value", title=title)
    for row in facts:
        table.add_row(*row)
    console.print(table)


def _show_loading(console: Console, lines: tuple[str, ...], target: str) -> None:
    """Code or a command that loads it, with its place."""
    from gisp.model.gguf import EXPORTED

    path = Path(target)
    for line in lines:
        file = path if path.is_file() else path / EXPORTED
        console.print(line.format(path=repr(target), file=shlex.quote(str(file))), soft_wrap=True)
