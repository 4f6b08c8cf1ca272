"""What a run leaves in its folder, to compare runs."""

from __future__ import annotations

import json
from pathlib import Path


def written(out: Path) -> dict[str, bytes]:
    """What a run leaves, without what depends on clock and memory."""
    record = json.loads((out / "trajectory.json").read_text())
    for step in record["steps"]:
        del step["seconds"]
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        del line["seconds"], line["tokens_per_second"]
    kept = [path for path in out.rglob("*") if path.suffix in (".safetensors", ".yaml")]
    left = {str(path.relative_to(out)): path.read_bytes() for path in kept}
    return left | {"trajectory.json": json.dumps(record).encode(), "metrics.jsonl": json.dumps(lines).encode()}
