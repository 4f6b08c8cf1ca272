"""``gisp demo``: the whole way on the small decoder that ships with the project."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from gisp.cli.output import output, plain_console, shows_progress


@shows_progress
def demo(
    out: Annotated[Path, typer.Option(help="Folder to write.")] = Path("gisp-demo"),
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
) -> None:
    """Prune the shipped decoder to 50 %, export, reload and evaluate it beside one-shot pruning."""
    from gisp.demo.run import run_demo

    result = run_demo(out, device=device, say=output().say)
    table = Table(
        "decoder sparsity",
        "parameters",
        "perplexity",
        "one-shot perplexity",
        title=f"held-out text, window {result.window}, {result.tokens:,} tokens",
    )
    for row in result.rows:
        one_shot = "" if row.one_shot is None else f"{row.one_shot:.2f}"
        table.add_row(f"{row.sparsity:.3f}", f"{row.parameters:,}", f"{row.perplexity:.2f}", one_shot)
    plain_console().print(table)
    print(f"exports: {', '.join(str(path) for path in result.exports)}")
    print(f"report:  {result.report}")
