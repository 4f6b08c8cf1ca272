"""Weight files of several processes under one index."""

from __future__ import annotations

import json
from pathlib import Path

from gisp.export.folder import check_room, shards_of, write_index, write_shard
from gisp.export.relayout import LaidOut
from gisp.replicas.agreement import refusing_together
from gisp.stages.group import Stages


def write_shards(state: LaidOut, folder: Path, stages: Stages) -> int:
    """Write this process's weights, and in the first one the index of all; bytes of all files."""
    exchange = stages.processes.exchange
    size = sum(tensor.numel() * tensor.element_size() for tensor in state.shapes.values())
    total = sum(int(answer) for answer in exchange(str(size).encode()))
    with refusing_together(stages.processes):
        if stages.processes.first:
            check_room(folder, total)
    shards = [*shards_of(state.shapes).values()]
    counts = [int(answer) for answer in exchange(str(len(shards)).encode())]
    before = sum(counts[: stages.processes.rank])
    places: dict[str, str] = {}
    with refusing_together(stages.processes):
        for number, names in enumerate(shards, start=before + 1):
            file = f"model-{number:05d}-of-{sum(counts):05d}.safetensors"
            write_shard(folder / file, state, names)
            places |= dict.fromkeys(names, file)
    answers = exchange(json.dumps(places).encode())
    if stages.processes.first:
        write_index(folder, total, {name: file for answer in answers for name, file in json.loads(answer).items()})
    exchange(b"")
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))
