"""Plans of an export whose base model is larger than the GPU: for what is measured and fitted, and for the files."""

from __future__ import annotations

from dataclasses import dataclass, replace

from gisp.compensation.apply import calibration_sequences
from gisp.compensation.demand import COMPENSATING, demand
from gisp.data import Sequences
from gisp.data.held_out import stored_run_text
from gisp.evaluate import EvalOptions
from gisp.evaluate.data import Measure, prepare
from gisp.export.beside import base_folder
from gisp.export.check import CHECKED_TOKENS
from gisp.export.folder import SHARD_BYTES
from gisp.export.quality.wanted import Wanted
from gisp.export.spec import PrunedSpec
from gisp.model.keep import Keep
from gisp.model.load import resolve_device
from gisp.model.structures import ModelMap
from gisp.offload.plan import Advice, Demand, Plan
from gisp.run.resources.placement import weights_of
from gisp.run.trajectory import Trajectory

_EXPORTING = Advice(device="give more --gpu-memory, or --device cpu", host="free some")
# Bytes of a widened parameter while its module runs: in float64; an output projection again without what was removed.
_WIDE, _MASKED = 8, 16
# A file is written with about so much more than it holds.
_WRITING = 1.1


@dataclass(frozen=True)
class Plans:
    """Where the base model lies; nothing is planned where it lies on one device.

    Attributes:
        measuring: while a compensation is fitted and perplexities are measured; ``None`` if neither is.
        writing: while files are written and checked.
        measure: what measures perplexity, ready for its plan.
        calibration: data of the compensation, read for its plan.
    """

    measuring: Plan | None = None
    writing: Plan | None = None
    measure: Measure | None = None
    calibration: Sequences | None = None


UNPLANNED = Plans()


def make_plans(trajectory: Trajectory, wanted: Wanted, point: PrunedSpec) -> Plans:
    """The plans of an export, before anything is loaded.

    Args:
        point: of the run, as it is before sizes are rounded.

    Raises:
        GispError: data cannot be read, it does not fit, or a compensation that layers in host memory have no place for.
    """
    place, data, request = wanted.place, wanted.data, wanted.compensation
    if not place.offload:
        return UNPLANNED
    calibration = measuring = measure = None
    source = str(trajectory.base_model["path"])
    if request is not None or data is not None:
        outline, device = place.outline(trajectory), resolve_device(place.device)
        asked = weights_of(outline.model)
        if request is not None:
            request.options.check_streamed()
            options = wanted.compensation_options(request, outline)
            calibration = calibration_sequences(outline, request.calibration, source)
            keep, run_text = wanted.rounded(outline.model, point).keep, stored_run_text(trajectory.held_out)
            asked = demand(outline, keep, options, calibration, device, run_text)
        if data is not None:
            measure = prepare(data, EvalOptions(window=wanted.window), outline.model, source)
            asked = replace(asked, working=max(asked.working, measure.working(outline.model, device)))
        measuring = place.plan(asked, COMPENSATING if request else _EXPORTING)
    outline = place.outline(trajectory, dtype="auto")
    keep = wanted.rounded(outline.model, point).keep
    asked = _writing(outline, keep, compensated=request is not None)
    if not _mapped(trajectory):
        asked = replace(asked, beside=asked.beside + sum(asked.layers))
    writing = place.plan(asked, _EXPORTING)
    return Plans(measuring, writing, measure, calibration)


def _mapped(trajectory: Trajectory) -> bool:
    """Whether the base model is read from safetensors, which are mapped; the weights of other files are held."""
    folder = base_folder(trajectory.base_path)
    return folder is None or (folder.is_dir() and any(folder.glob("*.safetensors")))


def _writing(model_map: ModelMap, keep: Keep, *, compensated: bool) -> Demand:
    """What an export asks of memory beside the files it maps: one file of it, and what a compensation changed.

    While it is checked the exported model visits the device beside the base model, as large as that at most.
    """
    weights = weights_of(model_map.model)
    hidden, size = model_map.hidden_size, next(model_map.model.parameters()).element_size()
    largest = max(p.numel() for p in model_map.model.parameters())
    working = max(_WIDE * largest, _MASKED * weights.largest // size)
    working += CHECKED_TOKENS * _WIDE * (16 * hidden + 4 * model_map.intermediate_size + 2 * model_map.vocab_size)
    working += weights.rest + 2 * max(weights.layers) + weights.largest
    beside = int(_WRITING * min(sum(weights.layers) + weights.rest, max(SHARD_BYTES, largest * size)))
    if compensated:
        outputs = sum(linear.weight.numel() for linear, _ in model_map.outputs.values())
        kept = [len(c) for i in range(len(keep.heads)) for c in keep.columns(i, model_map.head_dim)]
        beside += size * (outputs + hidden * sum(kept))
    # Embedding and output projection stay on the device, where the modules of a check find them.
    return replace(weights, working=working, embedding=0, head=0, beside=beside, mapped=True)
