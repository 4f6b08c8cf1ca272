"""Other tile configurations of the Triton kernel that takes pointers: what its fixed choice was taken from."""

from __future__ import annotations

from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING

import torch

from benchmarks.common.registry import Case, quick_cases
from benchmarks.common.task import Implementation, Prepared, Task, random_matrix
from benchmarks.kernels.tasks.importance import within_budget
from gisp_kernels import wgrad_importance
from gisp_kernels.testing import wgrad_truth

if TYPE_CHECKING:
    from gisp_kernels.triton.wgrad_importance import TileConfig

TOKENS = (2048, 8192)


def tasks() -> list[Task]:
    """A task per shape; its implementations are the configurations."""
    return [
        Task("sweep", {**asdict(case), "tokens": tokens}, partial(_prepare, case, tokens))
        for case in quick_cases()[1:3]
        for tokens in TOKENS
    ]


def _prepare(case: Case, tokens: int) -> Prepared:
    from gisp_kernels.triton.abs_weighted_reduce import finish
    from gisp_kernels.triton.wgrad_importance import choose_config, partial_sums

    dy, x = random_matrix(tokens, case.rows), random_matrix(tokens, case.width)
    weight = random_matrix(case.rows, case.width)
    expected = wgrad_importance(dy, x, weight, axis=case.axis, block=case.block, backend="reference")

    def run(config: TileConfig, dy: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        out = torch.zeros_like(expected)
        finish(out, partial_sums(dy, x, weight, case.axis, config), case.block)
        return out

    usual = choose_config(case.rows, case.width, weight.dtype)
    found: dict[str, Implementation] = {}
    for config in dict.fromkeys([usual, *_configs()]):
        if _fits(partial(run, config), dy, x, weight):
            found[_name(config)] = partial(run, config)
    return Prepared(
        inputs=(dy, x, weight),
        implementations=found,
        check=within_budget((dy, x, weight), expected, wgrad_truth(dy, x, weight, case.axis, case.block)),
        baseline=_name(usual),
        flops=2 * tokens * case.rows * case.width,
    )


def _configs() -> list[TileConfig]:
    """Configurations worth comparing for 16-bit operands."""
    from gisp_kernels.triton.wgrad_importance import SMALL_16BIT, TileConfig

    large = [
        TileConfig(bo, bi, bt, group, 8, stages)
        for bo, bi in ((128, 256), (256, 128), (128, 128))
        for bt in (32, 64)
        for group in (4, 8, 16)
        for stages in (3, 4)
    ]
    return [*large, SMALL_16BIT, TileConfig(128, 128, 64, 8, 4, 3), TileConfig(128, 64, 64, 8, 4, 4)]


def _name(config: TileConfig) -> str:
    return " ".join(str(value) for value in asdict(config).values())


def _fits(run: Implementation, *operands: torch.Tensor) -> bool:
    """Whether the GPU has the shared memory and registers for a configuration."""
    from triton.runtime.errors import OutOfResources

    try:
        run(*operands)
    except OutOfResources:
        return False
    return True
