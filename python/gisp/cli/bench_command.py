"""``gisp bench``: the benchmarks of a source checkout, under the names of their modules."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import typer

import gisp
from gisp.errors import GispError

bench = typer.Typer(name="bench", help="Measure kernels or a whole run (source checkout).", no_args_is_help=True)

# The options are those of the modules, which also run on their own; none is repeated here.
_OPTIONS_OF_THE_MODULE = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}


@bench.command(context_settings=_OPTIONS_OF_THE_MODULE)
def kernels(context: typer.Context) -> None:
    """Time the kernels on real shapes beside eager, torch.compile and cuBLAS; see --help."""
    _run("kernels", context.args)


@bench.command(context_settings=_OPTIONS_OF_THE_MODULE)
def embed(context: typer.Context) -> None:
    """Time scores around a backward pass beside the ways of other libraries; see --help."""
    _run("embed", context.args)


@bench.command(context_settings=_OPTIONS_OF_THE_MODULE)
def prune(context: typer.Context) -> None:
    """Time a whole run on models of real shape beside the paper's way; see --help."""
    _run("prune", context.args)


@bench.command(context_settings=_OPTIONS_OF_THE_MODULE)
def infer(context: typer.Context) -> None:
    """Time inference of pruned models beside the dense one; see --help."""
    _run("infer", context.args)


def _run(name: str, arguments: list[str]) -> None:
    """Run ``benchmarks.<name>`` of the checkout this package lies in.

    Raises:
        GispError: the package was installed without a checkout.
    """
    root = Path(gisp.__file__).resolve().parents[2]
    if not (root / "benchmarks" / name / "run.py").is_file():
        raise GispError(f"gisp bench needs a source checkout: {root} holds no benchmarks/{name}")
    # The checkout's own, not another package of this name.
    if sys.path[:1] != [str(root)]:
        sys.path.insert(0, str(root))
    module = importlib.import_module(f"benchmarks.{name}.run")
    try:
        code = module.main(arguments)
    except SystemExit as done:
        code = int(done.code or 0)
    if code:
        raise typer.Exit(code)
