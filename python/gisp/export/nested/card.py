"""The model card of a nested checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gisp.config.options import criterion_text
from gisp.export.card import facts_table, head, load_text
from gisp.export.nested.files import NestedFiles
from gisp.export.nested.sizes import shared_bytes
from gisp.export.provenance import BaseCard
from gisp.export.spec import NestedReport
from gisp.run.trajectory import Trajectory

_SHOWN = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)


def write_nested_card(
    folder: Path, base: Any, trajectory: Trajectory, files: NestedFiles, report: NestedReport
) -> None:
    """Write ``README.md``: what the folder holds, how exact it is, how to load it, and some of its sizes."""
    last = len(trajectory.steps)
    data = {**trajectory.data, "tokens": sum(step.tokens for step in trajectory.steps)}
    source = BaseCard.of(base, str(trajectory.base_model["path"]))
    name, end = source.name, trajectory.sparsity_at(last)
    parity = ", ".join(f"{found:.1e} at {sparsity:.2f}" for sparsity, found in report.relative_differences.items())
    versions = ", ".join(f"{key} {value}" for key, value in trajectory.versions.items())
    facts = (
        *source.facts(data),
        ("sparsities", f"0 to {trajectory.sparsity_at(last):.4f} of the decoder layers, {report.steps} steps"),
        ("weight files", f"{report.bytes / 1e6:,.1f} MB"),
        ("preset", trajectory.config.get("preset", "not recorded")),
        ("criterion", criterion_text(trajectory.config)),
        ("versions", versions),
        (
            "logits against the masked dense model (float32)",
            f"differ by {parity} relative (accepted up to {report.tolerance:.0e})",
        ),
    )
    lines = [
        *head(source.front(data), f"{name}, nested", "gisp-kernels", ("nested",)),
        f"`{name}` and its subnetworks of one pruning run (after [GISP](https://arxiv.org/abs/2510.18030)): every size "
        "is a prefix of the same matrices.",
        "",
        *facts_table(facts),
        "",
        "## Use",
        "",
        load_text("nested", folder, small=f"{0.7 * end:.3f}", large=f"{0.4 * end:.3f}"),
        "## Sizes",
        "",
        "| sparsity | of the whole model | query heads | key/value heads | MLP channels | shared weights, bytes |",
        "|---|---|---|---|---|---|",
    ]
    shown = {trajectory.step_for(s) for s in _SHOWN if s <= trajectory.sparsity_at(last)} | {last, *files.milestones}
    shared = shared_bytes(files)
    for step in sorted(shown):
        cells = " | ".join(f"{total:,}" for total in (*files.nesting.prefixes[step].sum(0).tolist(), shared[step]))
        lines.append(f"| {trajectory.sparsity_at(step):.4f} | {trajectory.model_sparsity_at(step):.4f} | {cells} |")
    lines += _compensated(report)
    (folder / "README.md").write_text("\n".join([*lines, ""]), encoding="utf-8")


def _compensated(report: NestedReport) -> list[str]:
    """Which sizes carry a compensation of their own, what it costs, and what was accepted."""
    if not report.milestones:
        return []
    return [
        "",
        "## Compensated sizes",
        "",
        "These sizes load with output projections of their own. All others are plain.",
        "",
        "| sparsity | beside the shared weights, bytes | compensation |",
        "|---|---|---|",
        *(f"| {item.sparsity:.4f} | {item.bytes:,} | {item.compensation} |" for item in report.milestones),
    ]
