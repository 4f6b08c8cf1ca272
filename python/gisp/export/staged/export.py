"""A point of a run exported by several processes: each reads, writes and checks its own layers alone.

So no process holds a model that is larger than its memory. The folder is that of one process but for the borders of its
weight files. The check is that of :mod:`gisp.export.check`: hidden states of the masked base model and of the reloaded
export go from stage to stage, in float32, and the last one compares the logits.
"""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

from torch.distributed import ProcessGroup

from gisp.errors import GispError
from gisp.export.beside import base_folder, copy_beside
from gisp.export.card import write_card
from gisp.export.check import check_tokens, planned_sizes, report_of
from gisp.export.folder import check_place, new_folder, write_config
from gisp.export.formats.hf import check_family, pruned_config, pruned_state
from gisp.export.load import register_models
from gisp.export.relayout import plan_layers
from gisp.export.run import RunExport, point_of
from gisp.export.spec import ExportReport, PrunedSpec, map_checked
from gisp.export.staged.compare import compare
from gisp.export.staged.shards import write_shards
from gisp.model.load import resolve_device
from gisp.model.structures import ModelMap
from gisp.replicas.agreement import agree, refusing_together
from gisp.replicas.group import Replicas
from gisp.run.staged_base import staged_base
from gisp.run.trajectory import Trajectory
from gisp.score.fused.support import why_not
from gisp.stages.group import Stages
from gisp.stages.load import skeleton
from gisp.stages.placement import Placement
from gisp.stages.stage_model import read_stage_model


def export_staged(
    run: str | Path,
    sparsity: float | None,
    out: str | Path,
    *,
    process_group: ProcessGroup | None,
    device: str = "auto",
) -> RunExport:
    """Export the step of a run whose sparsity is nearest to ``sparsity``, as format ``hf``.

    Args:
        run, out: on a disk that all processes share.
        process_group: that of all processes, each of which is a stage; ``None``: this one alone.

    Raises:
        GispError: as :func:`gisp.export.run.export_run`, in every process; nothing is left at ``out``.
    """
    processes = Replicas(process_group)
    stages = Stages(processes, processes.size)
    with processes.watched(), stages.connected():
        with refusing_together(stages.processes):
            if processes.first:
                check_place(Path(out))
            trajectory = Trajectory.load(run)
        agree(processes, {"sparsity": trajectory.sparsity_at(trajectory.step_for(sparsity))})
        spec = point_of(trajectory, Path(run), trajectory.step_for(sparsity))
        place = resolve_device(device)
        base, placement = staged_base(trajectory, stages, place, None)
        model_map = map_checked(base, spec.keep)
        check_family(model_map)
        tokens = check_tokens(model_map.vocab_size, int(base.config.max_position_embeddings))
        reason = why_not(model_map, tokens.shape[1])
        if reason is not None:
            raise GispError(f"this model is not passed on from stage to stage: {reason}, export it without --stages")
        with new_folder(Path(out)) if processes.first else nullcontext(Path()) as own:
            folder = Path(processes.from_first(str(own).encode()).decode())
            report = _write(base, model_map, spec, folder, Path(out), stages, placement)
            processes.exchange(b"")
        return RunExport(spec, spec, report)


def _write(
    base: Any,
    model_map: ModelMap,
    spec: PrunedSpec,
    folder: Path,
    out: Path,
    stages: Stages,
    placement: Placement,
) -> ExportReport:
    """Write and check the folder; the same report in every process."""
    layouts = plan_layers(model_map, spec.keep)
    config = pruned_config(base, model_map, spec, layouts)
    state = pruned_state(base, model_map, spec.keep, layouts)
    if stages.stage:
        # Tied embeddings are at both ends, and written once.
        state = state.without("model.embed_tokens")
    size = write_shards(state, folder, stages)
    with refusing_together(stages.processes):
        if stages.processes.first:
            write_config(folder, config)
            copy_beside(folder, base, base_folder(spec.base_path))
    register_models()
    exported = read_stage_model(skeleton(str(folder), None), str(folder), placement, stages, model_map.weight.device)
    difference = compare(base, exported, model_map, spec, stages, placement)
    parameters = sum(p.numel() for p in exported.parameters())
    sizes = planned_sizes(spec.keep, layouts)
    report = report_of(model_map, out, size, parameters, sizes, difference, model_map.weight.dtype)
    with refusing_together(stages.processes):
        if stages.processes.first:
            write_card(folder, base, spec, report)
    return report
