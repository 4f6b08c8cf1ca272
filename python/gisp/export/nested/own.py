"""What milestones store: output projections (o_proj, down_proj) compensated for one size alone.

Of every projection that its compensation changed a milestone stores the weight at its size, in the order and the form
of the shared one; where the change is one factor a kept structure, these factors alone (float32 [kept]), which multiply
the shared weight; and the bias, where that is another. All names begin with ``milestones.{step}.``.
"""

from __future__ import annotations

import torch

from gisp.export.nested.files import NestedFiles
from gisp.export.nested.order import milestone_name, output_projections, stored_name
from gisp.run.record import corrupt
from gisp_kernels.groups import KINDS


class OwnRows:
    """Rows of an output projection's weight at the milestones that have their own.

    Attributes:
        steps: these milestones.
    """

    def __init__(self, files: NestedFiles, owner: str, stored: str) -> None:
        """
        Args:
            stored: name of the shared weight.
        """
        self._files, self._stored = files, stored
        self._factors = {step: milestone_name(step, f"{owner}.factors") for step in files.milestones}
        self._weights = {step: milestone_name(step, stored) for step in files.milestones}
        self.steps = frozenset(
            step for step in files.milestones if files.holds(self._factors[step]) or files.holds(self._weights[step])
        )

    def read(self, step: int, rows: int) -> torch.Tensor:
        """The rows of a milestone, [rows, D] in the dtype of the checkpoint, on the CPU.

        Raises:
            GispError: a file that cannot be read.
        """
        if not self._files.holds(self._factors[step]):
            return self._files.rows(self._weights[step], 0, rows)
        shared = self._files.rows(self._stored, 0, rows)
        kept = self._files.shape(self._factors[step])[0]
        factors = self._files.rows(self._factors[step], 0, kept)
        return (shared.float() * factors.repeat_interleave(rows // kept)[:, None]).to(shared.dtype)


def check_tensors(files: NestedFiles, head_dim: int) -> None:
    """Refuse milestones whose tensors have no place in the model, or another shape than it.

    Raises:
        GispError: names file and tensor.
    """
    for step in files.milestones:
        claimed = 0
        for layer, owner, item in output_projections(len(files.nesting.layers)):
            kept = int(files.nesting.prefixes[step, layer, KINDS.index(item.kind)])
            stored = stored_name(f"{owner}.weight", item)
            outputs = files.shape(stored)[1]
            shapes = {
                stored: (kept * item.block(head_dim), outputs),
                f"{owner}.factors": (kept,),
                f"{owner}.bias": (outputs,),
            }
            names = {milestone_name(step, name): shape for name, shape in shapes.items()}
            held = [name for name in names if files.holds(name)]
            for name in held:
                files.expect(name, names[name])
            weights = [name for name in held if not name.endswith(".bias")]
            if len(weights) > 1 or (weights and not kept):
                raise corrupt(files.record_path, ValueError(f"{weights[-1]} has no place"))
            claimed += len(held)
        if claimed != files.held_by(step):
            raise corrupt(files.record_path, ValueError(f"milestone {step} holds tensors that the model has not"))
