"""The callback of a Trainer scores what a recorder does, and training stays what it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

pytest.importorskip("accelerate", reason="needs accelerate, which a Trainer does")

from gisp_kernels import record_importance
from gisp_kernels.adapters.trainer import ImportanceCallback

ROWS = [{"input_ids": row, "labels": row} for row in torch.arange(48).view(4, 12)]


def decoder() -> Any:
    torch.manual_seed(0)
    shape: dict[str, Any] = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2}
    return LlamaForCausalLM(LlamaConfig(num_attention_heads=4, tie_word_embeddings=False, **shape))


def train(model: Any, folder: Path, *callbacks: TrainerCallback, rate: float = 0.01) -> None:
    args = TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=1,
        per_device_train_batch_size=2,
        learning_rate=rate,
        weight_decay=0.0,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        seed=0,
    )
    Trainer(model, args, train_dataset=ROWS, callbacks=list(callbacks)).train()


def test_scores_and_training(tmp_path: Path) -> None:
    plain, model = decoder(), decoder()
    callback = ImportanceCallback()
    train(plain, tmp_path)
    train(model, tmp_path, callback)
    for one, other in zip(plain.parameters(), model.parameters(), strict=True):
        assert torch.equal(one, other)
    assert callback.recorder.backward_calls == 2
    assert "forward" not in model.model.layers[0].mlp.up_proj.__dict__, "nothing is left on the layers"


def test_scores_are_those_of_a_recorder(tmp_path: Path) -> None:
    model = decoder()
    callback = ImportanceCallback(mode="exact")
    train(model, tmp_path, callback, rate=0.0)
    with record_importance(model, mode="exact") as recorder:
        for half in (ROWS[:2], ROWS[2:]):
            ids = torch.stack([row["input_ids"] for row in half])
            model(input_ids=ids, labels=ids).loss.backward()
    for name, scores in recorder.scores().items():
        torch.testing.assert_close(callback.recorder.scores()[name], scores, rtol=1e-4, atol=1e-8)


class Failing(TrainerCallback):
    def on_step_begin(self, *args: Any, **more: Any) -> None:
        raise KeyError("on purpose")


def test_a_training_that_failed_can_be_begun_anew(tmp_path: Path) -> None:
    model, callback = decoder(), ImportanceCallback()
    with pytest.raises(RuntimeError, match="no training has begun"):
        _ = callback.recorder
    with pytest.raises(KeyError):
        train(model, tmp_path, callback, Failing())
    train(model, tmp_path, callback)
    assert callback.recorder.backward_calls == 2
