"""From a run folder to an exported model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from gisp.errors import GispError
from gisp.export import ExportReport, PrunedSpec, export_gguf, export_hf, export_masked
from gisp.export.gguf_file import require_gguf
from gisp.nested import NestedReport, export_nested
from gisp.run_spec import pruned_spec
from gisp.trajectory import Trajectory

FORMATS: dict[str, Callable[..., ExportReport]] = {"hf": export_hf, "gguf": export_gguf, "masked": export_masked}


@dataclass(frozen=True)
class RunExport:
    """What was exported and how it compares with the masked model."""

    spec: PrunedSpec
    report: ExportReport


def export_run(
    run: str | Path,
    sparsity: float | None,
    out: str | Path,
    *,
    format: str = "hf",
    device: str = "auto",
    dtype: str | None = None,
) -> RunExport:
    """Export the step of a run whose sparsity is nearest to ``sparsity`` (``None`` = its end).

    Args:
        dtype: of the matrices of a ``gguf`` export: ``f32``, ``f16`` or ``bf16``.

    Raises:
        GispError: no run there, unknown format, ``out`` taken, another base model, or logits that do not agree.
    """
    if format not in FORMATS:
        raise GispError(f"format {format!r} is not available: choose one of {', '.join(FORMATS)}")
    if format == "gguf":
        require_gguf()  # before a large model is loaded
    elif dtype is not None:
        raise GispError(f"--dtype {dtype} is for --format gguf: {format} keeps the dtype of the base model")
    options = {"dtype": dtype} if format == "gguf" else {}
    trajectory = Trajectory.load(run)
    step = trajectory.step_for(sparsity)
    base = trajectory.load_base(device=device, dtype="auto")
    spec = pruned_spec(trajectory, step)
    folder = Path(str(trajectory.base_model["path"]))
    report = FORMATS[format](base, spec, Path(out), tokenizer_from=folder if folder.is_dir() else None, **options)
    return RunExport(spec, report)


def export_nested_run(run: str | Path, out: str | Path, *, device: str = "auto") -> NestedReport:
    """Write the nested checkpoint of a run: every sparsity it passed in one set of weights.

    Raises:
        GispError: no run there, ``out`` taken, another base model, or logits that do not agree.
    """
    trajectory = Trajectory.load(run)
    base = trajectory.load_base(device=device, dtype="auto")
    folder = Path(str(trajectory.base_model["path"]))
    return export_nested(base, trajectory, Path(out), tokenizer_from=folder if folder.is_dir() else None)
