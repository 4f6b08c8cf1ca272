"""A made-up run folder of a given length, whose figures agree with one another."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

LAYERS, HEADS, KV_HEADS, HEAD_DIM, HIDDEN, CHANNELS = 6, 8, 4, 16, 128, 96
HEAD_PARAMETERS, CHANNEL_PARAMETERS = 2 * HEAD_DIM * HIDDEN, 3 * HIDDEN
FIXED_PARAMETERS = 2 * KV_HEADS * HEAD_DIM * HIDDEN + 2 * HIDDEN
DECODER = LAYERS * (HEADS * HEAD_PARAMETERS + CHANNELS * CHANNEL_PARAMETERS + FIXED_PARAMETERS)
PARAMETERS = DECODER + 2 * 512 * HIDDEN


def make_run(
    folder: Path,
    *,
    steps: int = 12,
    planned: int | None = None,
    sparsity: float = 0.5,
    empty_layer: int | None = None,
    evaluations: bool = False,
    metrics: bool = True,
    peak_bytes: int | None = None,
) -> dict[str, Any]:
    """A consistent run folder; its record."""
    planned = planned or steps
    rng = np.random.default_rng(0)
    removed_at = {}
    for layer in range(LAYERS):
        for kind, count in (("heads", HEADS), ("channels", CHANNELS)):
            # The last layer is protected; the share grows with depth.
            goes = rng.random(count) < sparsity * (0.4 + 1.2 * layer / LAYERS) * (layer < LAYERS - 1)
            when = rng.integers(1, planned + 1, count)
            if layer == empty_layer and kind == "heads":
                goes, when = np.ones(count, bool), rng.integers(1, steps + 1, count)
            removed_at[f"layers.{layer}.{kind}.removed_at"] = np.where(goes & (when <= steps), when, 0).astype(np.int32)
    records = []
    for step in range(1, steps + 1):
        gone = {
            kind: sum(int(((at > 0) & (at <= step)).sum()) for name, at in removed_at.items() if kind in name)
            for kind in ("heads", "channels")
        }
        kept = [np.flatnonzero((at == 0) | (at > step)) for name, at in removed_at.items() if "heads" in name]
        kv_heads = sum(len(np.unique(heads // (HEADS // KV_HEADS))) for heads in kept)
        parameters = gone["heads"] * HEAD_PARAMETERS + gone["channels"] * CHANNEL_PARAMETERS
        records.append(
            {
                "step": step,
                "sparsity": parameters / DECODER,
                "target": sparsity * step / planned,
                "model_sparsity": parameters / PARAMETERS,
                "removed_parameters": parameters,
                "heads_removed": gone["heads"],
                "channels_removed": gone["channels"],
                "loss": 1.8 + 1.1 * (step / planned) ** 2 + 0.03 * float(rng.standard_normal()),
                "tokens": 8192,
                "seconds": 1.25 + 0.01 * step,
                "kv_bytes_per_token": 2 * kv_heads * HEAD_DIM * 2,
            }
        )
    record = {
        "format": "gisp-trajectory",
        "version": 1,
        "complete": steps == planned,
        "base_model": {
            "path": "/models/tiny <decoder>",
            "fingerprint": "0" * 64,
            "model_type": "llama",
            "layers": LAYERS,
            "hidden_size": HIDDEN,
            "num_attention_heads": HEADS,
            "num_key_value_heads": KV_HEADS,
            "head_dim": HEAD_DIM,
            "intermediate_size": CHANNELS,
            "decoder_parameters": DECODER,
            "parameters": PARAMETERS,
        },
        "config": {
            "preset": "fast",
            "sparsity": sparsity,
            "steps": planned,
            "engine": "stream",
            "objective": "lm",
            "dtype": None,
        },
        "data": {"spec": "text.jsonl", "sequences": 384, "sha256": "1" * 64},
        "structures": {"heads": LAYERS * HEADS, "channels": LAYERS * CHANNELS},
        "steps": records,
        "versions": {"python": "3.12.3", "torch": "2.11.0", "gisp-kernels": "0.1.0"},
    }
    folder.mkdir(parents=True, exist_ok=True)
    save_file(removed_at, folder / "trajectory.safetensors")
    (folder / "trajectory.json").write_text(json.dumps(record))
    if metrics:
        lines = [json.dumps(_metrics(record, planned, rng, peak_bytes)) for record in records]
        (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    if evaluations:
        (folder / "evaluations.json").write_text(json.dumps(made_evaluations()))
    return record


def _metrics(record: dict[str, Any], planned: int, rng: np.random.Generator, peak_bytes: int | None) -> dict[str, Any]:
    step = record["step"]
    edges = np.linspace(-7 + 0.8 * step / planned, -2.5, 41)
    heads = rng.normal(-4.5 + 0.5 * step / planned, 0.6, LAYERS * HEADS * 4)
    channels = rng.normal(-5 + 0.7 * step / planned, 0.5, LAYERS * CHANNELS)
    return {
        "step": step,
        "loss": record["loss"],
        "sparsity": record["sparsity"],
        "threshold": 10 ** (-6.4 + 1.2 * step / planned),
        "seconds": {
            "data": 0.02,
            "forward_backward": 1.0 + 0.2 * step / planned,
            "select": 0.05,
            "compact": 0.03,
            "write": 0.11,
        },
        "tokens_per_second": 8000.0,
        "score_histogram": {
            "log10_edges": edges.tolist(),
            "heads": np.histogram(heads, edges)[0].tolist(),
            "channels": np.histogram(channels, edges)[0].tolist(),
            "not_positive": {"heads": 0, "channels": 0},
        },
        "peak_bytes": peak_bytes,
    }


def made_evaluations() -> list[dict[str, Any]]:
    """Two curves over the same sizes."""
    conditions = {"tokens": 20000, "window": 128, "data": "texts/heldout.jsonl"}
    gisp = {0.0: 5.8125, 0.1: 6.0, 0.2: 6.5, 0.3: 7.5, 0.4: 9.25, 0.5: 12.33}
    one_shot = {0.0: 5.8125, 0.1: 6.25, 0.2: 7.25, 0.3: 10.0, 0.4: 21.5, 0.5: 64.0}
    curves = {"gisp": gisp, "one-shot": one_shot}
    return [
        {"label": label, "sparsity": at, "perplexity": value, **conditions}
        for label, curve in curves.items()
        for at, value in curve.items()
    ]
