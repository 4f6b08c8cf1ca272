"""A short run of a tiny model, whole or cut."""

from __future__ import annotations

import torch
from tiny import tiny_tokens

import gisp

OPTIONS = {"sparsity": 0.3, "steps": 4, "align": 4, "batch_tokens": 64, "device": "cpu", "dtype": "float32"}


def run_into(out, model_folder, token_file, **options):
    return gisp.prune(model_folder, token_file, out=out, **{**OPTIONS, **options})


def logits(model):
    with torch.no_grad():
        return model(tiny_tokens(2)).logits


def cut_after(step):
    """An ``on_step`` that interrupts a run once a step is on disk."""

    def stop(record, steps):
        if record.step == step:
            raise KeyboardInterrupt

    return stop
