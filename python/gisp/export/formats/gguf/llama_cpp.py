"""A process that runs a GGUF file with llama.cpp: ``python -m gisp.export.formats.gguf.llama_cpp FILE FOLDER``.

It reads ``request.json`` ({"rows": token ids, "texts": texts}) from the folder and writes ``logits.npy`` (float32
[rows, tokens, vocabulary]) and ``answer.json`` ({"version", "ids" of the texts}) into it. It imports neither torch nor
transformers.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np

_F32 = 0  # GGML_TYPE_F32


def main(file: str, folder: str) -> None:
    """Run llama.cpp on the request in a folder, and leave the answer there."""
    import llama_cpp

    place = Path(folder)
    request = json.loads((place / "request.json").read_text())
    rows: list[list[int]] = request["rows"]
    length = max(len(row) for row in rows)
    model = llama_cpp.Llama(
        file,
        n_ctx=length,
        n_batch=length,
        n_ubatch=length,
        n_gpu_layers=0,
        logits_all=True,
        flash_attn=False,
        type_k=_F32,
        type_v=_F32,
        verbose=True,  # its log says why a file does not load
    )
    logits = []
    for row in rows:
        model.reset()
        model.eval(row)
        logits.append(np.array(model.scores[: len(row)], dtype=np.float32))
    np.save(place / "logits.npy", np.stack(logits))
    ids = [model.tokenize(text.encode(), add_bos=True, special=False) for text in request["texts"]]
    (place / "answer.json").write_text(json.dumps({"version": llama_cpp.__version__, "ids": ids}))


if __name__ == "__main__":
    main(*sys.argv[1:])
