"""What the processes of one run hold in common before the first step."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from gisp.config.options import PLACE_OPTIONS
from gisp.files import write_atomic
from gisp.replicas.agreement import agree, machine
from gisp.replicas.group import Replicas
from gisp.run.folder import RunFolder
from gisp.run.loop import PruningLoop
from gisp.run.trajectory import Trajectory
from gisp.stages.load import files_digest


def check_alike(loop: PruningLoop, replicas: Replicas) -> None:
    """Require that all processes have the same code, options, data, model and kind of device.

    Raises:
        GispError: names what differs.
    """
    if replicas.size == 1:
        return
    stages = loop.setup.context.stages
    run = loop.trajectory
    # No process sees the whole of a split model: its fingerprint is made of the parts.
    path = str(run.base_model["path"]) if stages else ""
    files = {"files of the model": files_digest(path)} if path else {}
    options = {f"option {name}": value for name, value in run.config.items() if name not in PLACE_OPTIONS}
    agree(
        replicas,
        {
            **machine(loop.setup.context.device, run.versions),
            **options,
            "stages": stages.count if stages else 1,
            "data": run.data["sha256"],
            "model": run.base_model["fingerprint"],
            **files,
            "weights of": str(loop.setup.context.weight.dtype),
        },
    )


def restore_all(loop: PruningLoop, folder: RunFolder | None, resuming: bool, replicas: Replicas) -> None:
    """Restore a cut run in every process, from the files of the first one's folder.

    Args:
        folder: of the first process; others have none.
        resuming: whether there is a run in it.
    """
    if folder is not None and resuming:
        loop.restore(Trajectory.load(folder.path), folder)
    if replicas.size == 1:
        return
    files = folder.committed() if folder is not None and resuming else {}
    names = json.loads(replicas.from_first(json.dumps([*files]).encode()))
    found = {name: replicas.from_first(files.get(name, b"")) for name in names}
    if not found or replicas.first:
        return
    with tempfile.TemporaryDirectory() as place:
        for name, data in found.items():
            path = Path(place) / name
            path.parent.mkdir(exist_ok=True)
            write_atomic(path, data)
        loop.restore(Trajectory.load(place), RunFolder(Path(place)))
