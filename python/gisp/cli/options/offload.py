"""``--offload`` of commands that read a model: its layers lie in host memory."""

from __future__ import annotations

from gisp.cli.flags import flag

OFFLOAD = (
    flag("offload", "Keep layers in host memory and copy them to the GPU in turn.", kind=bool, names=("--offload",)),
    flag("gpu_memory", "Most GPU memory to take, as 24GB; with --offload only."),
)
