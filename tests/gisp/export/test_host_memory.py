"""What an export takes of the host's memory beside the files it maps: one weight file, however large the model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import host_memory
import pytest


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Measured in a process of its own, whose memory nothing else used before."""
    if not Path("/proc/self/status").exists():
        pytest.skip("this system does not tell what memory is backed by files")
    paths = os.pathsep.join(path for path in sys.path if path)
    environment = {**os.environ, **host_memory.ENVIRONMENT, "PYTHONPATH": paths}
    command = [sys.executable, host_memory.__file__, str(tmp_path_factory.mktemp("memory"))]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def test_a_dense_model_is_mapped_and_not_held(found: dict[str, Any]) -> None:
    assert found["held"] < 0.05 * found["model"]


@pytest.mark.parametrize("name", host_memory.FORMATS)
def test_an_export_holds_one_of_its_files_at_a_time(found: dict[str, Any], name: str) -> None:
    sizes = found["files"][name]
    assert len(sizes) > 6 and max(sizes) <= 1.01 * host_memory.SHARD
    assert 0.5 * max(sizes) < found["peaks"][name] <= found["held"] + 1.1 * host_memory.SHARD


@pytest.mark.parametrize("name", host_memory.FORMATS)
def test_files_that_were_read_do_not_stay_in_memory(found: dict[str, Any], name: str) -> None:
    # A file of the export, and the weights it is made from; pages around them come along.
    assert found["resident"][name] <= found["held"] + 2.5 * host_memory.SHARD < 0.3 * found["model"]


def test_layers_in_their_files_are_not_held(found: dict[str, Any]) -> None:
    # On a CPU the slots that layers visit lie in host memory: two of the base model and two of the export.
    most = found["held"] + 1.1 * host_memory.SHARD + 5 * found["layer"]
    assert found["peaks"]["offload"] <= most < 0.6 * found["model"]


def test_a_gguf_export_holds_little_of_the_model(found: dict[str, Any]) -> None:
    pytest.importorskip("gguf")
    # The file is mapped to be checked; q_proj and k_proj, whose rows it has in another order, are held.
    assert found["peaks"]["gguf"] < 0.3 * found["model"]
