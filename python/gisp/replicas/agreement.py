"""All processes of a run do the same: one of other code, options or data would spoil it unseen.

Where each sees another part, what one refuses all refuse.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import torch

from gisp.errors import GispError
from gisp.replicas.group import Replicas
from gisp_kernels import backend


def agree(replicas: Replicas, facts: Mapping[str, object]) -> None:
    """Require that all processes hold the same facts as the first.

    Args:
        facts: what a run is made of, by what it is called in a message; JSON.

    Raises:
        GispError: names the first that differs, with both values.
    """
    if replicas.size == 1:
        return
    found = [json.loads(data) for data in replicas.exchange(json.dumps(facts).encode())]
    for rank, other in enumerate(found):
        # What both tell comes first: processes of other numbers of stages compare other things.
        for what, value in sorted(found[0].items(), key=lambda fact: fact[0] not in other):
            if other.get(what) != value:
                raise GispError(
                    f"rank {rank} has {what} {_short(other.get(what))}, rank 0 has {_short(value)}: "
                    "start all processes of a run with the same"
                )


@contextmanager
def refusing_together(replicas: Replicas) -> Iterator[None]:
    """What one process refuses inside, all refuse at the end: a collective, to be entered by all.

    Raises:
        GispError: of the first process that does.
    """
    refused = ""
    try:
        yield
    except GispError as error:
        refused = str(error)
    answers = replicas.exchange(refused.encode())
    found = next((answer.decode() for answer in answers if answer), None)
    if found is not None:
        raise GispError(found)


def machine(device: torch.device, versions: Mapping[str, str]) -> dict[str, object]:
    """Facts about what computes.

    Args:
        versions: of libraries, by their names.
    """
    return {
        "code": code_digest(),
        **{f"version of {name}": value for name, value in versions.items()},
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "backend": backend.requested(None),
    }


def code_digest() -> str:
    """SHA-256 of the sources of both packages."""
    digest = hashlib.sha256()
    for package in ("gisp", "gisp_kernels"):
        spec = find_spec(package)
        for folder in spec.submodule_search_locations or () if spec else ():
            for path in sorted(Path(folder).rglob("*.py")):
                digest.update(str(path.relative_to(folder)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def _short(value: object) -> str:
    text = str(value)
    # Of a digest a few digits tell it from another.
    return text[:12] if len(text) == 64 else text
