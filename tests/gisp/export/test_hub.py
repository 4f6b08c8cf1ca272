"""Exports pushed to a local stand-in of the hub."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hub_server import TOKEN, Hub, serve_hub
from run_cases import run_into

import gisp
from gisp.cli import main
from gisp.errors import GispError
from gisp.export.hub import push_folder
from gisp.export.run import export_run

REPO = "some-org/tiny-pruned"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with serve_hub() as found:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", found.url)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        # Xet is a service of its own; without it large files go the way of Git LFS.
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield found


@pytest.fixture(scope="module")
def run(model_folder: Path, token_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("run") / "run"
    run_into(out, model_folder, token_file)
    return out


def held(hub: Hub, repo: str) -> dict[str, bytes]:
    return {name: data for name, data in hub.repos[repo]["files"].items() if name != ".gitattributes"}


def files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_command_pushes_all_files_to_a_private_repository(run: Path, tmp_path: Path) -> None:
    """A process of its own, which finds hub and token as any program of the hub does."""
    out = tmp_path / "out"
    command = ["export", str(run), "--sparsity", "0.3", "--out", str(out), "--device", "cpu", "--push-to-hub", REPO]
    with serve_hub() as hub:
        settings = {"HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0"}
        settings |= {"HF_HUB_DISABLE_XET": "1"}
        env = {**os.environ, **settings, "PYTHONPATH": os.pathsep.join(sys.path)}
        done = subprocess.run([sys.executable, "-m", "gisp", *command], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    assert f"  pushed to {hub.url}/{REPO}\n" in done.stdout
    assert hub.repos[REPO]["private"] is True
    assert held(hub, REPO) == files(out)
    assert f'from_pretrained("{REPO}"' in (out / "README.md").read_text()
    assert "path/to/this/folder" not in (out / "README.md").read_text()
    assert any(name.startswith("PUT /lfs/") for name in hub.asked), "weights go the way of large files"
    gisp.load(out)


def test_python_pushes_to_a_public_repository_of_the_user(run: Path, tmp_path: Path, hub: Hub) -> None:
    done = export_run(run, 0.3, tmp_path / "out", device="cpu", push_to_hub="tiny", private=False)
    assert done.url == f"{hub.url}/me/tiny"
    assert hub.repos["me/tiny"]["private"] is False
    assert held(hub, "me/tiny") == files(tmp_path / "out")


def test_a_nested_checkpoint_is_pushed(run: Path, tmp_path: Path, hub: Hub, capfd: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "nested"
    assert main(["export", str(run), "--nested", str(out), "--device", "cpu", "--push-to-hub", REPO]) == 0
    assert f"pushed to {hub.url}/{REPO}" in capfd.readouterr().out
    assert held(hub, REPO) == files(out)


@pytest.mark.parametrize("fail", ["/api/repos/create", "/preupload/", "/lfs/", "/commit/"])
def test_a_hub_that_fails_leaves_the_export(
    fail: str, tmp_path: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The hub's library waits between its tries.
    monkeypatch.setattr("time.sleep", lambda _: None)
    hub.fail = fail
    card = 'from_pretrained("path/to/this/folder")'
    for name, text in {"README.md": card, "model.safetensors": "weights"}.items():
        (tmp_path / name).write_text(text)
    before = files(tmp_path)
    with pytest.raises(GispError) as caught:
        push_folder(tmp_path, REPO, private=True)
    message = str(caught.value)
    assert message.startswith(f"{tmp_path} is written, but was not pushed to {REPO}: ")
    assert "\n" not in message and TOKEN not in message
    assert files(tmp_path) == before
    assert REPO not in hub.repos or not held(hub, REPO)


def _taken(hub: Hub) -> None:
    hub.repos[REPO] = {"private": True, "files": {"model.safetensors": b""}}


def _public(hub: Hub) -> None:
    hub.repos[REPO] = {"private": False, "files": {".gitattributes": b""}}


REFUSED: dict[str, tuple[Any, str, dict[str, Any]]] = {
    "no name": (lambda hub: None, "--push-to-hub a b is no name on the hub", {"push_to_hub": "a b"}),
    "taken": (_taken, r"holds files \(model.safetensors\): give another name", {}),
    "open to others": (_public, "is public: add --public", {}),
    "out of order": (lambda hub: setattr(hub, "fail", "/api/models"), "cannot push to some-org", {}),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_pushed_is_refused_before_the_work(name: str, run: Path, tmp_path: Path, hub: Hub) -> None:
    prepare, message, options = REFUSED[name]
    prepare(hub)
    before = {repo: dict(found["files"]) for repo, found in hub.repos.items()}
    with pytest.raises(GispError, match=message) as caught:
        export_run(run, 0.3, tmp_path / "out", device="cpu", **{"push_to_hub": REPO, **options})
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()
    assert {repo: found["files"] for repo, found in hub.repos.items()} == before


@pytest.mark.parametrize("token", [None, "hf_wrong"])
def test_a_token_is_needed(
    token: str | None, run: Path, tmp_path: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    if token is None:
        monkeypatch.setattr("gisp.export.hub.get_token", lambda: None)
    else:
        monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(
        GispError, match="needs a token of the hub" if token is None else "cannot push to some-org"
    ) as caught:
        export_run(run, 0.3, tmp_path / "out", device="cpu", push_to_hub=REPO)
    assert "hf_wrong" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_public_needs_a_repository(run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["export", str(run), "--sparsity", "0.3", "--out", str(tmp_path / "out"), "--public"]) == 2
    assert "--public is about --push-to-hub" in capfd.readouterr().err
