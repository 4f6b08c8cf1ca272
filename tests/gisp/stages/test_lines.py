"""The lines between stages: processes wait at them as long as the caller's group lets them."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import torch
from ranks import run_ranks
from torch import distributed

from gisp.replicas.group import Replicas
from gisp.stages.group import Stages


def lines_of_a_group(seconds: int) -> None:
    replicas = Replicas(distributed.new_group(timeout=timedelta(seconds=seconds)))
    assert replicas.timeout == timedelta(seconds=seconds)
    stages = Stages(replicas, 2)
    with stages.connected():
        found = {line._get_backend(torch.device("cpu")).options._timeout for line in stages._lines.values()}
    assert found == {timedelta(seconds=seconds)}


def test_lines_have_the_time_out_of_the_group(tmp_path: Path) -> None:
    run_ranks(2, tmp_path / "ranks", lines_of_a_group, 77)
