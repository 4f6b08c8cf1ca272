"""Losses of a model whose layers lie in several processes: hidden states go from stage to stage.

Every stage runs the model's own code over its own layers, so the bits are those of a model that is whole. While one
batch is in a later stage the next one is in this one.
"""

from __future__ import annotations

import json
from typing import Any

import torch

from gisp.errors import GispError
from gisp.score.objectives import sequence_nll
from gisp.stages.group import Stages
from gisp.stages.placement import Placement
from gisp.stages.stage_model import only_layers


class StagedLoss:
    """As :func:`gisp.score.objectives.sequence_nll` of one model, called in every process with the same batches.

    Args:
        model: its layers of this stage have weights; one chunk of layers a stage.

    Raises:
        GispError: layers of several kinds of attention, which the model counts from its first one.
    """

    def __init__(self, model: Any, stages: Stages, placement: Placement) -> None:
        kinds = sorted(set(getattr(model.config, "layer_types", None) or ()))
        if len(kinds) > 1:
            raise GispError(f"layers of this model have {' and '.join(kinds)}: --stages is for one kind, leave it out")
        self.processes = stages.processes
        self._model, self._stages = model, stages
        self._layers = [model.model.layers[i] for i in placement.held(stages.stage)]
        self._ends = stages.stage == stages.count - 1
        self._sent: list[tuple[Any, torch.Tensor]] = []

    def __call__(self, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Mean NLL of each sequence, fp32 [B]; zeros in all stages but the last."""
        weight = self._layers[0].mlp.gate_proj.weight
        given: dict[str, Any] = {"input_ids": ids}
        if self._stages.stage:
            states = torch.empty(*ids.shape, self._model.config.hidden_size, dtype=weight.dtype, device=weight.device)
            self._stages.wait(self._stages.receive(states, self._stages.stage - 1))
            given = {"inputs_embeds": states}
        with only_layers(self._model.model, self._layers, ends=self._ends) as decoder:
            if self._ends:
                return sequence_nll(lambda **_: self._model(**given, use_cache=False), ids, labels)
            states = decoder(**given, use_cache=False).last_hidden_state.contiguous()
        self._settle()
        self._sent = [(self._stages.send(states, self._stages.stage + 1), states)]
        return torch.zeros(len(ids), device=ids.device)

    def of_last(self, found: list[tuple[float, int]]) -> list[tuple[float, int]]:
        """What the last stage found, in every process."""
        self._settle()
        answers = self.processes.exchange(json.dumps(found).encode())
        return [(float(nll), int(count)) for nll, count in json.loads(answers[-1])]

    def _settle(self) -> None:
        """Wait for the last message: one at a time is under way."""
        for work, _ in self._sent:
            self._stages.wait(work)
        self._sent = []
