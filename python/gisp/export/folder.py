"""Model folders that appear whole or not at all."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from gisp.config.memory import gigabytes
from gisp.errors import GispError
from gisp.files import lock_beside, one_writer, remove_stale, temporary_path
from gisp.mapped import give_back

if TYPE_CHECKING:
    import torch


def check_place(out: Path) -> Path:
    """The absolute path of a folder to be written.

    Raises:
        GispError: the place is taken.
    """
    out = Path(os.path.abspath(out))  # noqa: PTH100 - resolve() would follow a link that `out` itself may be
    if out.is_symlink() or (out.exists() and (not out.is_dir() or any(out.iterdir()))):
        raise GispError(f"{out} exists and is not an empty folder: choose another --out")
    return out


SHARD_BYTES = 5 * 10**9


@contextmanager
def export_place(out: Path) -> Iterator[Path]:
    """Be the only writer of a folder to be written, from before the work it is to hold; its absolute path.

    What killed writers of it left beside it is removed.

    Raises:
        GispError: the place is taken, or another process writes it.
    """
    out = check_place(out)
    with one_writer(out, lock_beside(out)) as alone:
        check_place(out)
        if alone:
            remove_stale(out)
        yield out


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A folder beside ``out`` to write into; it becomes ``out`` when the block ends well and vanishes otherwise.

    Raises:
        GispError: ``out`` is taken, the disk is full or the place cannot be written.
    """
    with export_place(out) as place:
        folder = temporary_path(place)
        try:
            folder.mkdir()
            yield folder
            folder.rename(place)
        except (OSError, SafetensorError) as error:
            raise GispError(_write_message(place, error)) from None
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def write_weights(folder: Path, state: Mapping[str, torch.Tensor], shapes: Mapping[str, torch.Tensor]) -> int:
    """Write safetensors files, sharded at 5 GB; returns their size in bytes.

    Args:
        state: weights by name; those of a shard are asked for together and let go before those of the next.
        shapes: of all of them, as tensors on ``meta``.

    Raises:
        GispError: the disk has too little room.
    """
    size = sum(t.numel() * t.element_size() for t in shapes.values())
    check_room(folder, size)
    shards = shards_of(shapes)
    for file, names in shards.items():
        write_shard(folder / file, state, names)
    if len(shards) > 1:
        places = {name: file for file, names in shards.items() for name in names}
        write_index(folder, size, places)
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def write_shard(file: Path, state: Mapping[str, torch.Tensor], names: Sequence[str]) -> None:
    """Write the weights of some names into one safetensors file; no memory is held for them afterwards."""
    from safetensors.torch import save_file

    held = {name: state[name].contiguous() for name in names}
    save_file(held, file, metadata={"format": "pt"})
    for tensor in held.values():
        give_back(tensor)


def shards_of(shapes: Mapping[str, torch.Tensor]) -> dict[str, list[str]]:
    """Files of at most ``SHARD_BYTES``, or of one larger weight, and the names of what each holds."""
    from huggingface_hub import split_torch_state_dict_into_shards

    found = split_torch_state_dict_into_shards(dict(shapes), max_shard_size=SHARD_BYTES)
    return {file: [*names] for file, names in found.filename_to_tensors.items()}


def write_index(folder: Path, size: int, places: Mapping[str, str]) -> None:
    """Write which file holds a weight."""
    index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(places.items()))}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def write_config(folder: Path, config: Any) -> None:
    """Write config.json; where older releases know the model type, position encodings stand under their names too.

    Before transformers 5 these were ``rope_theta`` and ``rope_scaling``. A reader that finds neither takes its default
    without a word.
    """
    config.save_pretrained(folder)
    if config.model_type.startswith("gisp_"):
        return
    path = folder / "config.json"
    values = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(older_rope(values) | values, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def older_rope(config: Mapping[str, Any]) -> dict[str, Any]:
    """Position encodings of a configuration in the words of transformers 4.

    Those of Gemma 3 differ by kind of layer: the words are for full attention, with one more for sliding windows.
    """
    rope = config.get("rope_parameters") or {}
    found: dict[str, Any] = {}
    if "sliding_attention" in rope:
        found["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
    rope = dict(rope.get("full_attention", rope))
    found |= {name: rope.pop(name) for name in ("rope_theta", "partial_rotary_factor") if name in rope}
    if rope.get("rope_type", "default") != "default":
        found["rope_scaling"] = rope
    return found


def check_room(folder: Path, size: int) -> None:
    """Refuse to begin writing ``size`` bytes where they do not fit.

    Raises:
        GispError: the disk has too little room.
    """
    free = shutil.disk_usage(folder).free
    if size > free:
        raise GispError(f"the export needs {gigabytes(size)}, {gigabytes(free)} are free: free some space")


def is_tied(model: Any) -> bool:
    """Whether the output embeddings are the input ones; a configuration can say so of a model that holds both."""
    return bool(model.get_output_embeddings().weight is model.get_input_embeddings().weight)


def dense_state(base: Any) -> dict[str, torch.Tensor]:
    """All weights of the base model by name, the output embeddings only when they are not the input ones.

    Of a model that is split over processes those of this one.
    """
    state = {name: tensor.detach() for name, tensor in base.state_dict().items() if not tensor.is_meta}
    if is_tied(base):
        state = {name: tensor for name, tensor in state.items() if not name.startswith("lm_head.")}
    return state


def _write_message(out: Path, error: Exception) -> str:
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    # numpy says how much of an array it wrote, and no reason.
    if full or "No space left" in str(error) or " requested and " in str(error):
        return f"cannot write {out}: the disk is full, free some space"
    reason = error.strerror if isinstance(error, OSError) and error.strerror else " ".join(str(error).split())
    return f"cannot write {out}: {reason}"
