"""Importance recorded while a ``transformers.Trainer`` trains.

::

    callback = ImportanceCallback()
    Trainer(model, args, train_dataset=data, callbacks=[callback]).train()
    scores = callback.recorder.scores()  # {"model.layers.0.mlp": float32 [channels], ...}
"""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from gisp_kernels.record.importance import record_importance
from gisp_kernels.record.recorder import ImportanceRecorder

__all__ = ["ImportanceCallback"]


class ImportanceCallback(TrainerCallback):
    """Scores structures from the backward passes of a training; gradients and steps stay what they are.

    Args:
        target: as of :func:`gisp_kernels.record_importance`, without one the model that is trained.
        options: further ones of :func:`gisp_kernels.record_importance`; ``keep_grad`` is always set.
    """

    def __init__(self, target: Any = None, **options: Any) -> None:
        self._target = target
        self._options = {**options, "keep_grad": True}
        self._recorder: ImportanceRecorder | None = None
        self._active = False

    @property
    def recorder(self) -> ImportanceRecorder:
        """Of the training that runs or ran last.

        Raises:
            RuntimeError: none has begun.
        """
        if self._recorder is None:
            raise RuntimeError("no training has begun that this callback belongs to: give it to a Trainer")
        return self._recorder

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **more: Any
    ) -> None:
        """Begin to record, anew."""
        self.close()
        self._recorder = record_importance(model if self._target is None else self._target, **self._options)
        self._recorder.__enter__()
        self._active = True

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **more: Any) -> None:
        """Stop recording; scores stay."""
        self.close()

    def close(self) -> None:
        """Stop recording, for a training that ended with an error."""
        if self._active:
            self._active = False
            self.recorder.__exit__(None, None, None)
