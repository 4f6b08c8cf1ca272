"""What can be a model's path, without a look into it."""

from __future__ import annotations

import re
from pathlib import Path

from gisp.errors import GispError
from gisp.files import check_names
from gisp.model.gguf import is_gguf, pretrained

HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


def check_model_path(path: str) -> None:
    """Refuse what is neither a model folder nor a possible hub name, before anything slow happens.

    Raises:
        GispError: it is none, or a run, with what to do.
    """
    if not path:
        raise GispError("model is '': give a model folder or a hub name like org/name")
    check_names(path, "model")
    folder = Path(path)
    if folder.is_dir():
        if (folder / "trajectory.json").is_file():
            raise GispError(f"{path} is a run: export one of its sizes, or gisp.Trajectory.load(RUN).at(SPARSITY)")
        if not (folder / "config.json").is_file():
            raise GispError(f"{path} is not a model folder: it has no config.json")
    elif folder.is_file() and is_gguf(folder):
        pretrained(path)
    elif folder.exists():
        raise GispError(f"{path} is a file: give a model folder or a .gguf file")
    elif not HUB_NAME.fullmatch(path):
        raise GispError(f"model {path} does not exist: give a model folder or a hub name like org/name")
