"""The ``gisp`` command line: argument parsing, one-line errors and exit codes; the work is done elsewhere."""

from __future__ import annotations

from gisp.cli.stop import INTERRUPTED


def main(argv: list[str] | None = None) -> int:
    """As :func:`gisp.cli.app.main`, which is imported here: Ctrl-C before it is there ends without a traceback."""
    try:
        from gisp.cli.app import main as run
    except KeyboardInterrupt:
        return INTERRUPTED
    return run(argv)


__all__ = ["main"]
