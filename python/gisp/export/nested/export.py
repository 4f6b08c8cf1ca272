"""Writing a nested checkpoint from a run, and checking what it gives at several sparsities."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from gisp.compensation.fold import folded_into_dense
from gisp.export.beside import copy_beside
from gisp.export.check import Reference, weight_dtype
from gisp.export.folder import check_room, dense_state, is_tied, new_folder
from gisp.export.nested.card import write_nested_card
from gisp.export.nested.files import MODEL_TYPE, NestedFiles, write_nesting, write_record, write_shards
from gisp.export.nested.milestones import Milestone, milestone_tensors
from gisp.export.nested.model import load_nested
from gisp.export.nested.order import Nesting, nest, stored_name
from gisp.export.nested.sizes import own_bytes
from gisp.export.spec import TOLERANCE, NestedMilestone, NestedReport, map_checked
from gisp.model.keep import block_columns
from gisp.model.structures import ModelMap, structure_parameters
from gisp.progress import track
from gisp.run.trajectory import Trajectory

# Fractions of the run's last sparsity at which logits are compared, before and behind the milestones.
_BEFORE, _BEHIND = (1.0, 0.4), (0.7, 0.0)


def export_nested(
    base: Any,
    trajectory: Trajectory,
    out: Path,
    *,
    tokenizer_from: Path | None = None,
    milestones: Sequence[Milestone] = (),
) -> NestedReport:
    """Write the dense weights with every matrix reordered so that each step of the run keeps a prefix of it.

    Args:
        base, out, tokenizer_from: as for :func:`gisp.export.check.write_checked`.
        milestones: steps that carry their own compensation, ascending.

    Raises:
        GispError: ``out`` is taken, full disk, or logits that do not agree; nothing is left at ``out``.
    """
    model_map = map_checked(base, trajectory.keep(len(trajectory.steps)))
    nesting, dtype = nest(trajectory), weight_dtype(base)
    with new_folder(out) as folder:
        shared = sum(t.numel() * t.element_size() for t in dense_state(base).values())
        check_room(folder, shared + sum(milestone.bytes(dtype) for milestone in milestones))
        where = write_shards(folder, reordered(base, model_map, nesting))
        write_nesting(folder, nesting)
        listed = []
        for milestone in milestones:
            tensors = milestone_tensors(milestone, nesting, model_map.head_dim, dtype)
            own = write_shards(folder, tensors, f"nested-milestone-{milestone.step}")
            listed.append({"step": milestone.step, "compensation": milestone.text, "tensors": len(own)})
            where |= own
        config = _base_config(base)
        record = {"base_config": config, **_record(trajectory)}
        write_record(folder, record | ({"milestones": listed} if listed else {}), where)
        # A model type that no stock class has: nothing takes this folder for a plain checkpoint.
        stub = {"model_type": MODEL_TYPE, "base_model_type": config["model_type"]}
        (folder / "config.json").write_text(json.dumps(stub, indent=1) + "\n", encoding="utf-8")
        copy_beside(folder, base, tokenizer_from)
        differences, tolerance = _check(base, model_map, trajectory, folder, milestones)
        files = NestedFiles.open(folder)
        size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
        told = tuple(
            NestedMilestone(trajectory.sparsity_at(m.step), own_bytes(files, m.step), m.text) for m in milestones
        )
        report = NestedReport(out, differences, size, len(trajectory.steps), tolerance, told)
        write_nested_card(folder, base, trajectory, files, report)
    return report


def _base_config(base: Any) -> dict[str, Any]:
    """The configuration of the base model without what is about its folder and its code."""
    config = {
        **base.config.to_dict(),
        "dtype": str(weight_dtype(base)).removeprefix("torch."),
        "tie_word_embeddings": is_tied(base),
    }
    for key in ("transformers_version", "_name_or_path", "auto_map"):
        config.pop(key, None)
    return config


def _record(trajectory: Trajectory) -> dict[str, Any]:
    """What ``nested.json`` says of the run."""
    steps = [{"sparsity": 0.0, "model_sparsity": 0.0}]
    steps += [{"sparsity": s.sparsity, "model_sparsity": s.model_sparsity} for s in trajectory.steps]
    base_model = {key: value for key, value in trajectory.base_model.items() if key != "path"}
    run = {"config": trajectory.config, "versions": trajectory.versions}
    return {"base_model": base_model, "run": run, "steps": steps}


def reordered(base: Any, model_map: ModelMap, nesting: Nesting) -> Iterator[tuple[str, torch.Tensor]]:
    """Stored names and tensors, one at a time."""
    state = dense_state(base)
    for layer, name, item in structure_parameters(len(model_map.layers)):
        if name in state:
            tensor = state.pop(name)
            index = block_columns(getattr(nesting.layers[layer], item.kind), item.block(model_map.head_dim))
            # Structures lie along the rows of what is stored.
            tensor = tensor.t() if item.dim else tensor
            yield stored_name(name, item), tensor.index_select(0, index.to(tensor.device))
    yield from state.items()


def _check(
    base: Any, model_map: ModelMap, trajectory: Trajectory, folder: Path, milestones: Sequence[Milestone]
) -> tuple[dict[float, float], float]:
    """Relative differences of logits at all milestones and a few other sparsities, and the bound.

    One model is resized from each to the next.
    """
    device = base.get_input_embeddings().weight.device
    last = trajectory.sparsity_at(len(trajectory.steps))
    done = {milestone.step: milestone.compensation for milestone in milestones}
    before, behind = ([trajectory.step_for(part * last) for part in parts] for parts in (_BEFORE, _BEHIND))
    model = load_nested(folder, last, device=device)
    found: dict[float, float] = {}
    tolerance = TOLERANCE
    for step in track(dict.fromkeys((*before, *done, *behind)), "comparing sizes"):
        with folded_into_dense(model_map, done[step]) if step in done else nullcontext():
            reference = Reference(base, model_map, trajectory.keep(step))
            model.resize(trajectory.sparsity_at(step))
            _, found[trajectory.sparsity_at(step)], accepted = reference.compare(model)
        tolerance = max(tolerance, accepted)
    return found, tolerance
