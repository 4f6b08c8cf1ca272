"""The ``gisp`` command line: argument parsing, one-line errors and exit codes; the work is done elsewhere."""

from gisp.cli.app import main

__all__ = ["main"]
