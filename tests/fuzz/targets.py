"""Every reader of files, with a sound folder for it and what of its result a damaged file may not change."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from nested_cases import sound_checkpoint, sound_milestones
from safetensors.torch import save_file
from tiny import VOCAB, tiny_model, tiny_tokens
from word_tokenizer import save_tokenizer

import gisp
from gisp.config.options import make_config, read_yaml
from gisp.data import load_sequences
from gisp.data.cache import read_entry, write_entry
from gisp.data.held_out import stored_run_text
from gisp.export.provenance import card_facts
from gisp.export.sizes.written import written_export
from gisp.report.data import read_run
from gisp.run.folder import RunFolder

from .mutate import damaged_json, damaged_lines, damaged_tensors

Damage = Callable[[bytes, random.Random], bytes]


@dataclass(frozen=True)
class Target:
    """A file and its reader.

    Attributes:
        file: within the folder.
        damage: kinds of damage that fit the file; bytes always do.
        read: the folder's content as something that compares; ``None`` where a file of other content is sound too.
        share: of the mutations, relative to the other targets: readers that build models are slow.
    """

    name: str
    file: str
    damage: tuple[Damage, ...]
    read: Callable[[Path], Any]
    share: int = 10


def make_run(folder: Path) -> None:
    """A finished run of a tiny model, with metrics and evaluations."""
    options = {"sparsity": 0.3, "steps": 4, "align": 4, "batch_tokens": 64, "device": "cpu", "dtype": "float32"}
    gisp.prune(tiny_model(), tiny_tokens(16, 16), out=folder, **options)  # type: ignore[arg-type]
    point = {"label": "a", "data": "b", "sparsity": 0.1, "perplexity": 5.0, "tokens": 100, "window": 16}
    (folder / "evaluations.json").write_text(json.dumps([point, {**point, "sparsity": 0.2}]))


def make_data(folder: Path) -> None:
    """Token file, rows, a mixture of them, and a tokenizer."""
    folder.mkdir()
    save_tokenizer(folder / "tokenizer")
    save_file({"input_ids": tiny_tokens(8, 16), "labels": tiny_tokens(8, 16)}, folder / "tokens.safetensors")
    rows: list[dict[str, Any]] = [
        {"context": "a cab", "choices": [" stop", " yes"], "answer": 1},
        {"context": "yes", "choices": [" a cab", " stop"], "answer": 0},
    ]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows * 3)))
    tasks = [{"data": "rows.jsonl", "objective": "lm", "weight": 2.0}, {"data": "rows.jsonl", "samples": 2}]
    (folder / "mixture.yaml").write_text(json.dumps({"tasks": tasks, "tokens": 100}))
    write_entry(folder / "entry.safetensors", load_sequences(tiny_tokens(8, 16), vocab_size=VOCAB, seq_len=16))


def make_nested(folder: Path) -> None:
    """A nested checkpoint."""
    sound_checkpoint(folder)


def make_milestones(folder: Path) -> None:
    """A nested checkpoint in which two sizes have a compensation of their own."""
    sound_milestones(folder)


def make_export(folder: Path) -> None:
    """An export whose layers differ in size."""
    from export_models import dense, spec_of

    from gisp.export.formats.hf import export_hf

    export_hf(dense("llama-gqa"), spec_of(), folder)


MAKERS: dict[str, Callable[[Path], None]] = {
    "run": make_run,
    "data": make_data,
    "nested": make_nested,
    "milestones": make_milestones,
    "export": make_export,
}


def _trajectory(folder: Path) -> Any:
    found = gisp.Trajectory.load(folder)
    removed = {name: at.tolist() for name, at in found.removed_at.items()}
    return removed, [round(step.sparsity, 6) for step in found.steps], found.complete


def _held_out(folder: Path) -> Any:
    found = stored_run_text(folder / "state" / "held-out.safetensors")
    assert found is not None
    return found.digest(), found.examples, found.kinds


def _state(folder: Path) -> Any:
    done = gisp.Trajectory.load(folder)
    state = RunFolder(folder).load_state(len(done.steps), done.state_sha256)
    return {name: values.tolist() for name, values in state.items()}


def _report(folder: Path) -> Any:
    found = read_run(folder)
    steps = {step["step"]: step["loss"] for step in found.steps}
    assert all(steps[step] == entry["loss"] for step, entry in found.metrics.items())


def _config(folder: Path) -> None:
    options = read_yaml(folder / "config.yaml")
    for name in ("model", "data"):
        options.pop(name, None)
    make_config(**options)


def _sequences(folder: Path, file: str, **options: Any) -> None:
    found = load_sequences(
        str(folder / file), vocab_size=VOCAB, seq_len=16, tokenizer_from=str(folder / "tokenizer"), **options
    )
    assert len(found) > 0
    for ids, labels in found.rows:
        assert ids.dtype == labels.dtype == torch.int64 and ids.shape == labels.shape
        assert 0 <= int(ids.min()) <= int(ids.max()) < VOCAB


def _entry(folder: Path) -> Any:
    found = read_entry(folder / "entry.safetensors")
    # A cache entry that is not sound is made anew.
    return None if found is None else found.digest()


def _nested(folder: Path) -> None:
    _weights(gisp.load(folder, sparsity=0.2, verify=True))


def _milestones(folder: Path) -> None:
    model = gisp.load(folder, sparsity=0.0)
    for sparsity in model._nested.files.sparsities:
        _weights(model.resize(sparsity))


def _weights(model: Any) -> None:
    assert all(bool(parameter.isfinite().all()) for parameter in model.parameters())


def _export(folder: Path) -> None:
    _weights(gisp.load(folder))


def _written(folder: Path) -> None:
    written_export(str(folder))
    card_facts(folder)


TARGETS = (
    Target("trajectory.json", "run/trajectory.json", (damaged_json,), _trajectory),
    Target("trajectory.safetensors", "run/trajectory.safetensors", (damaged_tensors,), _trajectory),
    Target("held-out text", "run/state/held-out.safetensors", (damaged_tensors,), _held_out),
    Target("state", "run/state/step-00004.safetensors", (damaged_tensors,), _state),
    Target("metrics", "run/metrics.jsonl", (damaged_lines,), _report),
    Target("evaluations", "run/evaluations.json", (damaged_json,), _report),
    Target("config.yaml", "run/config.yaml", (), _config, share=3),
    Target("token file", "data/tokens.safetensors", (damaged_tensors,), lambda f: _sequences(f, "tokens.safetensors")),
    Target("jsonl", "data/rows.jsonl", (damaged_lines,), lambda f: _sequences(f, "rows.jsonl", objective="margin")),
    Target("mixture", "data/mixture.yaml", (damaged_json,), lambda f: _sequences(f, "mixture.yaml"), share=4),
    Target("cache", "data/entry.safetensors", (damaged_tensors,), _entry),
    Target("nested record", "nested/nested.json", (damaged_json,), _nested, share=2),
    Target("nested layout", "nested/nested-layout.safetensors", (damaged_tensors,), _nested, share=1),
    Target("nested weights", "nested/nested-00001.safetensors", (damaged_tensors,), _nested, share=1),
    Target("milestone record", "milestones/nested.json", (damaged_json,), _milestones, share=2),
    Target(
        "milestone weights",
        "milestones/nested-milestone-2-00001.safetensors",
        (damaged_tensors,),
        lambda f: _weights(gisp.load(f, verify=True)),
        share=1,
    ),
    Target("export config", "export/config.json", (damaged_json,), _export, share=2),
    Target("export weights", "export/model.safetensors", (damaged_tensors,), _export, share=1),
    Target("export told", "export/config.json", (damaged_json,), _written, share=4),
    Target("export card", "export/README.md", (), _written, share=4),
    Target("export sizes", "export/model.safetensors", (damaged_tensors,), _written, share=4),
)
