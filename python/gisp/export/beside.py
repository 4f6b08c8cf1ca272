"""What stands beside the weights of a model folder travels with an export: tokenizer, templates, settings, licences."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from gisp.model.load import snapshot

# The exporter writes its own.
_OWN = ("config.json", "README.md", "model_index.json")
_WEIGHTS = (
    ".safetensors",
    ".bin",
    ".pt",
    ".pth",
    ".ckpt",
    ".gguf",
    ".ggml",
    ".h5",
    ".msgpack",
    ".onnx",
    ".npz",
    ".pkl",
)
_CODE = (".py", ".pyc", ".so", ".dll", ".dylib", ".sh")
_FOLDERS = ("additional_chat_templates",)


def base_folder(path: str) -> Path | None:
    """The folder or file of a base model, for a hub name the folder in the cache; ``None`` if there is none."""
    place = Path(path)
    return place if place.exists() else snapshot(path)


def copy_beside(folder: Path, base: Any, source: Path | None) -> None:
    """Copy everything beside the base model's weights but code, and its generation settings as far as it has them.

    Args:
        source: the base model's folder, if it has one.
    """
    for path in [] if source is None else sorted(_beside(source)):
        target = folder / path
        if not target.exists():
            target.parent.mkdir(exist_ok=True)
            shutil.copyfile(source / path, target)  # type: ignore[operator]
    generation = folder / "generation_config.json"
    if not generation.exists() and getattr(base, "generation_config", None) is not None:
        base.generation_config.to_json_file(generation)


def _beside(source: Path) -> list[Path]:
    """Files to copy, relative to the folder."""
    places = [source, *(source / name for name in _FOLDERS if (source / name).is_dir())]
    return [path.relative_to(source) for place in places for path in place.iterdir() if _travels(path)]


def _travels(path: Path) -> bool:
    """Whether a file is neither weights nor code nor the exporter's own."""
    name = path.name.lower()
    index = name.endswith(".index.json")
    return path.is_file() and not (
        name.startswith(".") or index or path.name in _OWN or name.endswith((*_WEIGHTS, *_CODE))
    )
