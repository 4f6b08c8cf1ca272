"""``gisp.prune``: from a model, data and options to a run."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from contextlib import nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed import ProcessGroup

from gisp.config.options import IN_MEMORY, OPTIONS, SLICES, STAGE_SLICES, PruneConfig, make_config
from gisp.config.reference import with_options
from gisp.data import Sequences, load_sequences
from gisp.errors import GispError, quoted
from gisp.files import as_path
from gisp.model.checks import check_autocast, check_weights, warn_beyond_positions
from gisp.model.load import load_dense, resolve_device, resolve_dtype
from gisp.model.modes import default_device
from gisp.model.paths import check_model_path
from gisp.model.probe import PROVEN
from gisp.model.shrink import ShrinkableModel
from gisp.model.structures import ModelMap, first_bad_parameter, map_model
from gisp.offload.place import place
from gisp.offload.stream import LayerStream
from gisp.progress import reporting
from gisp.progress.track import Report
from gisp.replicas.group import Replicas
from gisp.run.folder import RunFolder
from gisp.run.loop import OnStep, PruningLoop
from gisp.run.processes import check_alike, restore_all
from gisp.run.record import read_record
from gisp.run.resources.placement import plan_of, skeleton_of
from gisp.run.trajectory import Trajectory
from gisp.score.objectives import SequenceLoss, check_built_in, objective_name
from gisp.score.questions import check_objective
from gisp.stages.group import Stages
from gisp.stages.rules import Sharing, check_count, check_sharing
from gisp.stages.stage_model import stage_model


def prune(
    model: nn.Module | str | Path,
    data: Any,
    *,
    out: str | Path | None = None,
    resume: bool = False,
    on_step: OnStep | None = None,
    progress: bool | Report | None = None,
    process_group: ProcessGroup | None = None,
    stages: int = 1,
    preset: str | None = None,
    sparsity: float | None = None,
    steps: int | None = None,
    ratio: float | None = None,
    samples: int | None = None,
    seq_len: int | None = None,
    batch_size: int | str | None = None,
    batch_tokens: int | None = None,
    slices: int | None = None,
    objective: str | SequenceLoss | None = None,
    criterion: str | None = None,
    allocator: str | None = None,
    first_order: str | None = None,
    gate_steps: int | None = None,
    gate_rate: float | None = None,
    one_shot: bool | None = None,
    norm: str | None = None,
    engine: str | None = None,
    regrow: int | None = None,
    schedule: str | None = None,
    protect_first: float | None = None,
    protect_last: int | None = None,
    align: int | None = None,
    keep_minimum: bool | None = None,
    ema: float | None = None,
    gqa: str | None = None,
    seed: int | None = None,
    device: str | None = None,
    dtype: str | None = None,
    fp8: bool | None = None,
    offload: str | None = None,
    gpu_memory: str | None = None,
) -> Trajectory:
    """Prune a causal language model in place; the run has it as ``model``, and ``at(sparsity)`` moves it along the run.

    Args:
        model: a dense causal language model, or the folder or hub name of one.
        data: int tensor [N, S], ``input_ids`` and ``labels`` in a mapping, or a SPEC (:mod:`gisp.data.load`).
        out: run folder, written after every step; ``None`` writes nothing.
        resume: continue the run in ``out`` if there is one. The result is that of a run that was never interrupted.
        on_step: function of the record of every step and the number of steps.
        progress: ``True``, ``False`` or a function (:func:`gisp.progress.reporting`); ``None``: a bar on a terminal.
        process_group, stages: processes that share the run (:mod:`gisp.replicas`, :mod:`gisp.stages`); ``None``: one.
        objective: name of a loss, or a function of your own (``SequenceLoss`` of :mod:`gisp.score.objectives`).

    Raises:
        GispError: bad input or an impossible request; nothing is written before the first step.
    """
    return _prune({**locals()})


prune.__doc__ = with_options(prune.__doc__ or "")


def _prune(given: dict[str, Any]) -> Trajectory:
    """:func:`prune` with its arguments in one mapping."""
    options = {name: value for name, value in given.items() if name in OPTIONS}
    replicas = Replicas(given["process_group"])
    check_count(given["stages"])
    if given["out"] is not None:
        as_path(given["out"], "out")
    if given["on_step"] is not None and not callable(given["on_step"]):
        raise GispError(f"on_step is {quoted(given['on_step'])}: give a function of a record and a number of steps")
    if given["process_group"] is not None and options["slices"] is None:
        options["slices"] = _slices(given)
    config, loss = _config(options)
    stages = _stages(given["stages"], replicas, config, loss)
    start = partial(_start, given["model"], given["data"], config, loss, replicas, stages)
    with (
        default_device(),
        reporting(given["progress"] if replicas.first else False),
        replicas.watched(),
        stages.connected() if stages else nullcontext(),
    ):
        return _run(given["out"], given["resume"], given["on_step"], start, replicas)


def _slices(given: dict[str, Any]) -> int:
    """Parts of the steps of a run that several processes share: those it was begun with, where it goes on."""
    begun = None
    if given["resume"] and given["out"] is not None:
        # What cannot be read is refused later, by all processes together.
        with suppress(GispError):
            begun = read_record(as_path(given["out"], "out"))["config"].get("slices")
    return int(begun or (SLICES if given["stages"] == 1 else STAGE_SLICES))


def _stages(count: Any, replicas: Replicas, config: PruneConfig, loss: SequenceLoss | None) -> Stages | None:
    """The stages of a run, ``None`` where every process holds the whole model."""
    check_sharing(Sharing.of(config, replicas.size, count, own_loss=objective_name(loss) if loss else ""))
    return Stages(replicas, count) if count > 1 else None


def _config(options: dict[str, Any]) -> tuple[PruneConfig, SequenceLoss | None]:
    """Resolved options, and a user's own loss."""
    if torch.is_inference_mode_enabled():
        raise GispError("torch.inference_mode is on, in which no gradient is computed: prune outside of it")
    check_autocast("pruning")
    loss = options["objective"] if callable(options["objective"]) else None
    if loss is not None:
        options["objective"] = objective_name(loss)
    config = make_config(**options)
    if loss is None:
        check_built_in(config.objective)
    return config, loss


def _run(
    out: str | Path | None,
    resume: bool,
    on_step: OnStep | None,
    start: Callable[[], PruningLoop],
    replicas: Replicas,
) -> Trajectory:
    """A whole run, or what is left of one; written to its folder where there is one, by the first process."""
    folder = None if out is None or not replicas.first else RunFolder(as_path(out, "out"))
    with folder.writing(resume) if folder else nullcontext(False) as resuming:
        loop = start()
        check_alike(loop, replicas)
        restore_all(loop, folder, resuming, replicas)
        return loop.run(folder, on_step)


def _start(
    model: nn.Module | str | Path,
    data: Any,
    config: PruneConfig,
    loss: SequenceLoss | None,
    replicas: Replicas,
    stages: Stages | None,
) -> PruningLoop:
    """A run ready for its first step."""
    # Layers that lie in host memory already stay where they are.
    if stages is not None or config.offload == "never" or LayerStream.of(model) is not None:
        dense, path = _stage_model(model, config, stages) if stages else _dense_model(model, config)
        model_map = map_model(dense, config.gqa)
        sequences = _sequences(data, config, dense, model_map, path, loss)
    else:
        outline, path = (model, "") if isinstance(model, nn.Module) else (skeleton_of(str(model), config), str(model))
        # The plan is made before anything is loaded, and needs the lengths of sequences.
        sequences = _sequences(data, config, outline, map_model(outline), path, loss)
        plan = plan_of(outline, sequences, config)
        dense, path = _dense_model(model, config, None if plan is None else torch.device("cpu"))
        if plan is not None:
            inputs, ends = plan.inputs_on_host, plan.ends_on_host
            place(dense, plan.streamed, resolve_device(config.device), inputs_on_host=inputs, ends_on_host=ends)
        model_map = map_model(dense, config.gqa)
    samples = len(sequences.examples) if config.samples is None else config.samples
    spare = sequences.chosen(range(samples, len(sequences.examples))) if samples < len(sequences.examples) else None
    sequences = check_objective(sequences.first(config.samples), config)
    warn_beyond_positions(dense.config, max(len(ids) for ids, _ in sequences.rows))
    if model_map.model_type not in PROVEN:
        warnings.warn(
            f"model type {model_map.model_type!r} can be exported with --format masked alone, which is no smaller",
            stacklevel=3,
        )
    spec = IN_MEMORY if isinstance(data, (torch.Tensor, Mapping, Sequences)) else str(data)
    loop = PruningLoop(model_map, sequences, config, spec, path, loss, replicas, stages)
    loop.spare = spare
    return loop


def _sequences(
    data: Any, config: PruneConfig, dense: Any, model_map: ModelMap, path: str, loss: SequenceLoss | None
) -> Sequences:
    """The calibration data, for the vocabulary of a model."""
    if isinstance(data, Sequences):
        return data.checked(model_map.vocab_size)
    return load_sequences(
        data,
        vocab_size=model_map.vocab_size,
        seq_len=config.seq_len,
        tokenizer_from=path or str(getattr(dense, "name_or_path", "")) or None,
        objective="lm" if loss else config.objective,
        seed=config.seed,
    )


def _stage_model(model: nn.Module | str | Path, config: PruneConfig, stages: Stages) -> tuple[Any, str]:
    """As :func:`_dense_model`, with the layers of this stage alone."""
    if isinstance(model, nn.Module):
        return stage_model(model, config, stages), ""
    path = str(model)
    return stage_model(path, config, stages), str(Path(path).resolve()) if Path(path).exists() else path


def _dense_model(model: nn.Module | str | Path, config: PruneConfig, to: torch.device | None = None) -> tuple[Any, str]:
    """The model to prune and the path a later session finds it at (empty for a model in memory).

    Args:
        to: where it is loaded to if not to where it computes.
    """
    if isinstance(model, nn.Module):
        if any(parameter.dtype == torch.float16 for parameter in model.parameters()):
            warnings.warn(
                "the model is float16: gradients of large calibration sets underflow and blur the scores, "
                "load it in bfloat16 or float32",
                stacklevel=6,
            )
        previous = ShrinkableModel.of(model)
        if previous is not None and previous.history:
            raise GispError(
                "this model is already pruned: take it back by at(0) of its trajectory (after a run that failed "
                "gisp.Trajectory.load(RUN).at(0, model)), or load it anew"
            )
        map_model(model)
        check_weights(model.named_parameters())
        bad = first_bad_parameter(model)
        if bad is not None:
            raise GispError(f"the model holds NaN or infinite weights in {bad}: give a sound model")
        return model, ""
    path = str(model)
    check_model_path(path)
    device = resolve_device(config.device)
    loaded = load_dense(path, to or device, resolve_dtype(config.dtype, device))
    return loaded, str(Path(path).resolve()) if Path(path).exists() else path
