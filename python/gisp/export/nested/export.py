"""Writing a nested checkpoint from a run, and checking what it gives at several sparsities."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from gisp.export.beside import copy_beside
from gisp.export.check import Reference, weight_dtype
from gisp.export.folder import check_room, dense_state, new_folder
from gisp.export.nested.card import write_nested_card
from gisp.export.nested.files import MODEL_TYPE, write_nesting, write_record, write_shards
from gisp.export.nested.model import load_nested
from gisp.export.nested.order import Nesting, nest, stored_name
from gisp.export.spec import TOLERANCE, NestedReport, map_checked
from gisp.model.keep import block_columns
from gisp.model.structures import ModelMap, structure_parameters
from gisp.progress import track
from gisp.run.trajectory import Trajectory

# Fractions of the run's last sparsity at which logits are compared.
_CHECKED = (1.0, 0.4, 0.7, 0.0)


def export_nested(base: Any, trajectory: Trajectory, out: Path, *, tokenizer_from: Path | None = None) -> NestedReport:
    """Write the dense weights with every matrix reordered so that each step of the run keeps a prefix of it.

    Args:
        base, out, tokenizer_from: as for :func:`gisp.export.check.write_checked`.

    Raises:
        GispError: ``out`` is taken, full disk, or logits that do not agree; nothing is left at ``out``.
    """
    model_map = map_checked(base, trajectory.keep(len(trajectory.steps)))
    nesting = nest(trajectory)
    with new_folder(out) as folder:
        check_room(folder, sum(t.numel() * t.element_size() for t in dense_state(base).values()))
        where = write_shards(folder, reordered(base, model_map, nesting))
        write_nesting(folder, nesting)
        steps = [{"sparsity": 0.0, "model_sparsity": 0.0}]
        steps += [{"sparsity": s.sparsity, "model_sparsity": s.model_sparsity} for s in trajectory.steps]
        config = {**base.config.to_dict(), "dtype": str(weight_dtype(base)).removeprefix("torch.")}
        for key in ("transformers_version", "_name_or_path", "auto_map"):
            config.pop(key, None)
        base_model = {key: value for key, value in trajectory.base_model.items() if key != "path"}
        run = {"config": trajectory.config, "versions": trajectory.versions}
        write_record(folder, {"base_config": config, "base_model": base_model, "run": run, "steps": steps}, where)
        # A model type that no stock class has: nothing takes this folder for a plain checkpoint.
        stub = {"model_type": MODEL_TYPE, "base_model_type": config["model_type"]}
        (folder / "config.json").write_text(json.dumps(stub, indent=1) + "\n", encoding="utf-8")
        copy_beside(folder, base, tokenizer_from)
        differences, tolerance = _check(base, model_map, trajectory, folder)
        size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
        report = NestedReport(out, differences, size, len(trajectory.steps), tolerance)
        write_nested_card(folder, base, trajectory, nesting, report)
    return report


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


def _check(base: Any, model_map: ModelMap, trajectory: Trajectory, folder: Path) -> tuple[dict[float, float], float]:
    """Relative differences of logits at a few sparsities, one model resized from each to the next, and the bound."""
    device = base.get_input_embeddings().weight.device
    last = trajectory.sparsity_at(len(trajectory.steps))
    model = load_nested(folder, last, device=device)
    found: dict[float, float] = {}
    tolerance = TOLERANCE
    for fraction in track(_CHECKED, "comparing sizes"):
        step = trajectory.step_for(fraction * last)
        reference = Reference(base, model_map, trajectory.keep(step))
        model.resize(trajectory.sparsity_at(step))
        _, found[trajectory.sparsity_at(step)], accepted = reference.compare(model)
        tolerance = max(tolerance, accepted)
    return found, tolerance
