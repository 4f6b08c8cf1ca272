"""``python -m tests.fuzz --mutations N --seed S``: more mutations than a test has time for."""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path


def main() -> int:
    """Prints outcomes by reader and every failure with the number that repeats it; 1 if there is any."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mutations", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    # The shared cases of the tests, which pytest finds by its settings.
    sys.path[:0] = [str(Path(__file__).parents[1] / "support")]
    from .campaign import run

    with tempfile.TemporaryDirectory() as folder:
        result = run(Path(folder), arguments.mutations, arguments.seed)
    for name, counts in result.outcomes.items():
        print(f"{name}: {', '.join(f'{count} {outcome}' for outcome, count in sorted(counts.items()))}")
    print("\n".join(result.failures) or "no failures")
    return bool(result.failures)


if __name__ == "__main__":
    sys.exit(main())
