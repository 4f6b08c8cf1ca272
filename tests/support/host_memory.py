"""Memory that a process of its own takes while it exports, with and apart from files it maps; JSON on standard output.

Called with a folder to work in. Every allocation of weights is one of the system's own, so that what is let go counts
no longer; see :data:`ENVIRONMENT`.
"""

from __future__ import annotations

import gc
import json
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0", "OMP_NUM_THREADS": "1"}
FORMATS = ("hf", "masked", "uniform", "stages")
SHARD = 12 * 2**20


def held_now() -> tuple[int, int]:
    """Bytes of this process in memory that no file backs, and in all of its memory."""
    lines = Path("/proc/self/status").read_text().splitlines()
    anonymous, whole = (
        next(1024 * int(line.split()[1]) for line in lines if line.startswith(name)) for name in ("RssAnon", "VmRSS")
    )
    return anonymous, whole


@contextmanager
def peak() -> Iterator[list[int]]:
    """Inside, the most this process holds is looked for; bytes above what it held before, as :func:`held_now`."""
    # What is let go inside must not hide what is taken there.
    gc.collect()
    before, found, over = held_now(), [0, 0], threading.Event()

    def look() -> None:
        while not over.wait(0.001):
            found[:] = (max(most, now - was) for most, now, was in zip(found, held_now(), before, strict=True))

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield found
    finally:
        over.set()
        thread.join()


def run_of(folder: Path, layers: int, hidden: int, channels: int) -> tuple[Path, int]:
    """A run over a model whose weights lie in host memory, and the bytes of the model."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    import gisp

    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": hidden, "intermediate_size": channels, "num_hidden_layers": layers}
    config = LlamaConfig(**sizes, num_attention_heads=8, num_key_value_heads=8, vocab_size=64)
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder / "model", max_shard_size=SHARD)
    tokens = torch.randint(0, 64, (8, 16))
    options: dict[str, Any] = {"sparsity": 0.2, "steps": 1, "batch_tokens": 32, "device": "cpu", "offload": "always"}
    gisp.prune(folder / "model", tokens, out=folder / "run", dtype="float32", **options)
    return folder / "run", sum(p.numel() * p.element_size() for p in model.parameters())


def export(run: Path, out: Path, name: str) -> None:
    """Export by a format, or as one of several stages."""
    from gisp.export.run import export_run
    from gisp.export.staged import export_staged

    if name == "stages":
        export_staged(run, 0.2, out, process_group=None, device="cpu")
    elif name == "offload":
        export_run(run, 0.2, out, device="cpu", offload=True)
    else:
        export_run(run, 0.2, out, device="cpu", format=name)


def main(folder: Path) -> None:
    from gisp.export import folder as files
    from gisp.run.trajectory import Trajectory

    files.SHARD_BYTES = SHARD
    # Imports and what they hold are not counted.
    small, _ = run_of(folder / "small", 3, 64, 64)
    names = (*FORMATS, "offload", *["gguf"] * bool(find_spec("gguf")))
    for name in names:
        export(small, folder / "small" / name, name)
    run, size = run_of(folder / "large", 12, 512, 1536)
    gc.collect()
    before = held_now()
    base = Trajectory.load(run).load_base(device="cpu", dtype="auto")
    found: dict[str, Any] = {"model": size, "held": held_now()[0] - before[0], "peaks": {}, "resident": {}, "files": {}}
    found["layer"] = sum(p.numel() * p.element_size() for p in base.model.layers[0].parameters())
    del base
    for name in names:
        out = folder / "large" / name
        with peak() as most:
            export(run, out, name)
        found["peaks"][name], found["resident"][name] = most
        found["files"][name] = [path.stat().st_size for path in sorted(out.glob("*.safetensors"))]
    print(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
