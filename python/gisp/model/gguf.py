"""GGUF files as base models, read by transformers: weights dequantised, the tokenizer out of the same file."""

from __future__ import annotations

import importlib.util
import logging
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gisp.errors import GispError

EXPORTED = "model.gguf"
"""The file of an export of format ``gguf``."""
_LOG = logging.getLogger(__name__)


def is_gguf(path: str | Path) -> bool:
    """Whether a path names a GGUF file, there or not."""
    return Path(path).suffix == ".gguf"


def pretrained(path: str) -> tuple[str, dict[str, Any]]:
    """What transformers' ``from_pretrained`` is given for a model or a tokenizer: a folder or name, and options.

    Raises:
        GispError: a GGUF file, and the gguf package is missing.
    """
    if not is_gguf(path):
        return path, {}
    if importlib.util.find_spec("gguf") is None:
        raise GispError(f"{path} needs the gguf package: pip install 'gisp[gguf]'")
    return str(Path(path).parent), {"gguf_file": Path(path).name}


def dense_options(path: str) -> dict[str, Any]:
    """Options under which transformers unpacks the weights of a GGUF file; newer releases may keep them packed."""
    import transformers

    configuration: Any = getattr(transformers, "GgufConfig", None)
    return {"quantization_config": configuration(dequantize=True)} if is_gguf(path) and configuration else {}


def made_dense(model: Any, path: str) -> None:
    """Have a model read from a GGUF file say that it is dense, and where it is from; one line tells the user."""
    if not is_gguf(path):
        return
    for name in ("quantization_config", "_pre_quantization_dtype"):
        if hasattr(model.config, name):
            delattr(model.config, name)
    model.is_quantized, model.hf_quantizer = False, None
    model.config.name_or_path = model.name_or_path = path
    _LOG.warning("%s: weights are dequantised to %s", path, str(model.dtype).removeprefix("torch."))


@contextmanager
def tokenizer_folder(path: Path | None) -> Iterator[Path | None]:
    """A folder with the tokenizer's files of a base model: its own, or one written from a GGUF file for a while."""
    if path is None or not is_gguf(path):
        yield path
        return
    from transformers import AutoTokenizer

    folder, options = pretrained(str(path))
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, **options)
    with tempfile.TemporaryDirectory() as temporary:
        tokenizer.save_pretrained(temporary)
        yield Path(temporary)
