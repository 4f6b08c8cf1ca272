"""Seeded damage: of bytes, of JSON values, of tensors."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Iterator
from typing import Any

import torch
from safetensors.torch import load, save

# Other types, ends of ranges, and values that are costly to print, to compare or to allocate.
VALUES: tuple[Any, ...] = (
    None, True, False, -1, 0, 1, 2, 3, 255, 2**31, 2**63, 2**64, -(2**63), 10**400, 0.5, -0.0, 1e-320, 1.7e308,
    float("nan"), float("inf"), "", "x", "0", "a" * 10000, "../../etc", "\0", [], {}, [[]], [0], {"a": 1},
)  # fmt: skip


def damaged_bytes(data: bytes, rng: random.Random) -> bytes:
    """One to three changes: bits, bytes, or pieces cut out, repeated or put in."""
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 3))):
        at = rng.randrange(len(changed) + 1)
        end = min(len(changed), at + rng.choice((1, 2, 8, 64, len(changed))))
        kind = rng.randrange(5)
        if kind == 0 and changed:
            changed[at % len(changed)] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del changed[at:end]
        elif kind == 2:
            changed[at:at] = changed[at:end]
        elif kind == 3:
            changed[at:end] = rng.randbytes(end - at)
        else:
            changed[at:at] = rng.choice((b"\0", b"\xff\xfe", b"\n", b"[" * 2000, b"9" * 5000, b'{"a":', b"}", b","))
    return bytes(changed)


def damaged_json(data: bytes, rng: random.Random) -> bytes:
    """One value of a JSON file replaced, removed, doubled or exchanged with its neighbour."""
    whole = [json.loads(data)]
    holder, key = rng.choice(list(_places(whole)))
    kind = rng.randrange(6)
    if kind == 0 and holder is not whole:
        del holder[key]
    elif kind == 1 and isinstance(holder, list) and holder is not whole:
        holder.insert(key, copy.deepcopy(holder[key]))
    elif kind == 2 and isinstance(holder, list):
        other = rng.randrange(len(holder))
        holder[key], holder[other] = holder[other], holder[key]
    elif kind == 3 and isinstance(holder, dict):
        holder[rng.choice(("x", "", "a" * 10000, key + " "))] = holder.pop(key)
    else:
        holder[key] = rng.choice(VALUES)
    return json.dumps(whole[0]).encode()


def damaged_lines(data: bytes, rng: random.Random) -> bytes:
    """A file of JSON lines with one of them damaged, removed or doubled."""
    lines = data.splitlines()
    at = rng.randrange(len(lines))
    kind = rng.randrange(4)
    if kind == 0:
        del lines[at]
    elif kind == 1:
        lines.insert(at, lines[rng.randrange(len(lines))])
    else:
        lines[at] = damaged_json(lines[at], rng)
    return b"\n".join(lines)


def damaged_tensors(data: bytes, rng: random.Random) -> bytes:
    """A safetensors file with a tensor removed, renamed, exchanged, or of other values, dtype or shape."""
    tensors = load(data)
    name, other = rng.choice(list(tensors)), rng.choice(list(tensors))
    kind = rng.randrange(6)
    if kind == 0:
        del tensors[name]
    elif kind == 1:
        tensors[rng.choice(("x", f"{name}.", "layers.99.heads.removed_at"))] = tensors.pop(name)
    elif kind == 2:
        tensors[name], tensors[other] = tensors[other], tensors[name]
    elif kind == 3:
        kinds = (torch.bool, torch.int8, torch.int64, torch.float16, torch.float32, torch.float64, torch.bfloat16)
        tensors[name] = tensors[name].to(rng.choice(kinds))
    elif kind == 4:
        flat = tensors[name].flatten()
        tensors[name] = rng.choice((flat[:-1], flat[:0], flat[None], flat.repeat(2), tensors[name][..., None]))
    elif tensors[name].numel():
        flat = tensors[name].flatten()
        limits = torch.finfo(flat.dtype) if flat.is_floating_point() else None
        values = (limits.max, float("nan"), float("inf"), 0.0) if limits else (-1, 0, 1, 2, 127)
        flat[rng.randrange(flat.numel())] = rng.choice(values)
    return save({name: tensor.contiguous().clone() for name, tensor in tensors.items()})


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Holder and key of every value in a JSON structure."""
    keys = value.keys() if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    for key in keys:
        yield value, key
        yield from _places(value[key])
