"""``python -m tests.kills --kills N --seed S``: more kills than a test has time for."""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path


def main() -> int:
    """Prints how commands ended and everything that should not have happened; 1 if there is any."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    # The shared cases of the tests, which pytest finds by its settings.
    sys.path[:0] = [str(Path(__file__).parents[1] / "support")]
    from .campaign import run

    with tempfile.TemporaryDirectory() as folder:
        result = run(Path(folder), arguments.kills, arguments.seed)
    for end, count in sorted(result.ends.items()):
        print(f"{count:5} {end}")
    print("\n".join(result.failures) or "no failures")
    return bool(result.failures)


if __name__ == "__main__":
    sys.exit(main())
