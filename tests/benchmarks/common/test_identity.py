"""What a result says it was measured with."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks.common.identity import identity


def test_identity_names_commit_and_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GISP_COMMIT", "abc1234")
    device = torch.device("cpu")
    found = identity(device)
    assert found["commit"] == "abc1234" and found["torch"] == torch.__version__ and found["driver"] is None
    json.dumps(found)
    monkeypatch.delenv("GISP_COMMIT")
    monkeypatch.setenv("PATH", "")
    assert identity(device)["commit"] == "unknown"
