"""What the end of a run says: quality before and after on text it has not seen, and what to do next."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gisp.errors import GispError

# A figure of orientation in seconds, not one to publish.
_TOKENS = {"cpu": 8192, "cuda": 65536}


def closing_lines(trajectory: Any, out: str, data: str, stages: int) -> Iterator[str]:
    """Where it ended, quality or why it was not measured, and the next two commands; the model is dense afterwards.

    Args:
        stages: the model lies in. What did not fit one GPU in the run does not fit it in the next commands.
    """
    from gisp.offload.stream import LayerStream

    last = trajectory.steps[-1]
    apart = " --offload" if LayerStream.of(trajectory.model) is not None else ""
    parts = f" --stages {stages}" if stages > 1 else apart
    yield (
        f"{out}: {len(trajectory.steps)} steps, decoder sparsity {last.sparsity:.4f}, "
        f"whole model {last.model_sparsity:.4f}"
    )
    yield quality_line(trajectory, data)
    sparsity = f"{last.sparsity:.4f}"
    run, beside = shlex.quote(out), shlex.quote(f"{_named(Path(out))}-{sparsity}")
    yield f"next: gisp eval {run} --sparsity {sparsity} --data TEXT{parts}"
    yield f"      gisp export {run} --sparsity {sparsity} --out {beside}{parts}"


def _named(folder: Path) -> Path:
    """A folder by a path that ends in its name: what is written beside ``.`` would lie in it."""
    return folder if folder.name not in ("", "..") else folder.resolve()


def quality_line(trajectory: Any, data: str) -> str:
    """One line; a figure that cannot be measured never fails a run that is written."""
    from gisp.evaluate.unseen import measure_unseen, some
    from gisp.offload.stream import LayerStream

    if trajectory.unseen is None:
        reason = "a mixture has no one figure" if trajectory.data.get("tasks") else f"the run has seen all of {data}"
        return f"quality not measured: {reason}, use gisp eval on other data"
    model = trajectory.model
    if any(parameter.is_meta for parameter in model.parameters()):
        return "quality not measured: the model lies in stages, use gisp eval"
    sequences = some(trajectory.unseen, _TOKENS[next(model.parameters()).device.type])
    before = ""
    try:
        name, after = measure_unseen(model, sequences)
        # Layers in host memory give up what was removed.
        if LayerStream.of(model) is None:
            before = f"{measure_unseen(trajectory.at(0.0), sequences)[1]:.4f} before, "
    except GispError as error:
        return f"quality not measured: {error}"
    tokens = sum(len(ids) for ids, _ in sequences.rows)
    return f"{name} {before}{after:.4f} after, on {tokens:,} tokens of {data} that no step has seen"
