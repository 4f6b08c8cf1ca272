"""The check of a GGUF file: read back with torch, and run by llama.cpp where llama-cpp-python is installed.

Reading back compares what was stored, tightly; llama.cpp's arithmetic rounds more, but shows that it understands the
file. It ends the whole process when an assertion of its fails, so it runs in a process of its own.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gisp.errors import GispError
from gisp.export.check import (
    TOLERANCE,
    Reference,
    compare_logits,
    exact_logits,
    planned_sizes,
    report_of,
    weight_dtype,
)
from gisp.export.formats.gguf.file import count_parameters, read_model
from gisp.export.formats.gguf.tokenizer import CHECK_TEXTS, Vocabulary
from gisp.export.sizes.layout import AttentionLayout
from gisp.export.spec import ExportReport, PrunedSpec
from gisp.model.structures import ModelMap

AGREEMENT = 0.999
_CACHE = torch.float16  # llama.cpp's default
_RUNNER = "gisp.export.formats.gguf.llama_cpp"
_TIES = ", elsewhere another that is as likely but for rounding"
# Stored and base dtypes where storing rounds every weight.
_ROUNDED = {(torch.float16, torch.float32), (torch.bfloat16, torch.float32), (torch.bfloat16, torch.float16)}


def checked_gguf_report(
    base: Any,
    model_map: ModelMap,
    spec: PrunedSpec,
    layouts: Sequence[AttentionLayout],
    file: Path,
    out: Path,
    dtype: torch.dtype,
    vocabulary: Vocabulary | None,
) -> tuple[ExportReport, list[tuple[str, str]]]:
    """Compare a file's logits with the masked base model's and count what it holds.

    Args:
        out: where the file's folder will be in the end.
        dtype: of the matrices in the file.

    Returns:
        The report, and lines for the model card: what, value.

    Raises:
        GispError: llama.cpp does not load the file, the logits do not agree, or the tokenizer gives other ids.
    """
    reference = Reference(base, model_map, spec.keep)
    # Weights of a bfloat16 model that float16 does not hold exactly are too small to show here; else it is refused.
    rounded = (dtype, weight_dtype(base)) in _ROUNDED
    stored = read_model(file, base)
    if rounded:
        tolerance = rounding_error(dtype, model_map)
        absolute, relative = compare_logits(reference.logits, exact_logits(stored, reference.tokens), tolerance)
    else:
        absolute, relative, tolerance = reference.compare(stored)
    facts = [("matrices stored as", _storage(dtype, weight_dtype(base)))]
    facts += _llama_cpp_facts(file, model_map, dtype, reference.tokens, reference.logits, vocabulary)
    sizes, parameters = planned_sizes(spec.keep, layouts), count_parameters(file)
    difference = absolute, relative, tolerance
    report = report_of(model_map, out, file.stat().st_size, parameters, sizes, difference, _CACHE)
    return report, facts


def _llama_cpp_facts(
    file: Path,
    model_map: ModelMap,
    dtype: torch.dtype,
    tokens: torch.Tensor,
    wanted: torch.Tensor,
    vocabulary: Vocabulary | None,
) -> list[tuple[str, str]]:
    """What llama.cpp makes of the file, for the model card.

    Raises:
        GispError: it does not load the file, its logits do not agree or its tokens are not the tokenizer's.
    """
    split = f"{vocabulary.model} ({vocabulary.split})" if vocabulary else "none: token ids only"
    if not has_llama_cpp():
        return [
            ("tokenizer", split),
            ("llama.cpp", "**was not run**: llama-cpp-python was not installed; the logits are of the file read back"),
        ]
    version, got, ids = run_llama_cpp(file, tokens, CHECK_TEXTS if vocabulary else ())
    tolerance = rounding_error(dtype, model_map)
    _, relative = compare_logits(wanted, got, tolerance)
    same, agreement = first_choices(wanted, got, tolerance / math.sqrt(_products(model_map)))
    if agreement < AGREEMENT:
        raise GispError(
            f"llama.cpp's most likely token is the masked model's at {agreement:.1%} of positions only, less than "
            f"{AGREEMENT:.1%}: nothing was written, report this model type"
        )
    if vocabulary:
        _check_ids(vocabulary, ids)
        split += f"; llama.cpp splits {len(ids)} check texts into the same tokens"
    return [
        ("tokenizer", split),
        (
            "logits of llama.cpp",
            f"differ by at most {relative:.2e} relative (accepted up to {tolerance:.0e}); the most likely token is the "
            f"same at {same} of {tokens.numel()} positions{_TIES if same < tokens.numel() else ''} (llama-cpp-python "
            f"{version} on a CPU, float32 cache, no flash attention)",
        ),
    ]


def has_llama_cpp() -> bool:
    """Whether llama-cpp-python is installed."""
    return importlib.util.find_spec("llama_cpp") is not None


def rounding_error(dtype: torch.dtype, model_map: ModelMap) -> float:
    """Largest relative difference of logits that rounding explains.

    With 16-bit matrices every product rounds one of its factors, relative to itself: llama.cpp the inputs, a narrower
    file the weights. At worst the errors of the products that follow each other, 4 a layer and the output projection,
    add up; independent ones grow with the square root of their number. In float32 it is the partial sums that are
    rounded, and their errors are independent.
    """
    unit = torch.finfo(dtype).eps / 2
    terms = max(model_map.hidden_size, model_map.intermediate_size) if dtype == torch.float32 else 1
    return max(TOLERANCE, unit * _products(model_map) * math.sqrt(terms))


def _products(model_map: ModelMap) -> int:
    """Matrix products that follow each other from the embeddings to the logits."""
    return 4 * len(model_map.layers) + 1


def first_choices(wanted: torch.Tensor, got: torch.Tensor, tie: float) -> tuple[int, float]:
    """Positions with the same most likely token, and the fraction where it is the same or as likely but for rounding.

    Args:
        wanted, got: logits [..., V].
        tie: a token whose wanted logit is below the largest by no more than this, relative to the largest absolute
            logit, is as likely: rounding decides between the two.
    """
    best = wanted.max(-1)
    choice = got.argmax(-1)
    behind = best.values - wanted.gather(-1, choice.unsqueeze(-1)).squeeze(-1)
    return int((choice == best.indices).sum()), float((behind <= tie * wanted.abs().max()).float().mean())


def run_llama_cpp(file: Path, tokens: torch.Tensor, texts: Sequence[str]) -> tuple[str, torch.Tensor, list[list[int]]]:
    """llama.cpp's version, its logits (float32 [rows, tokens, vocabulary]) and its token ids of the texts.

    Raises:
        GispError: it does not load the file, or fails on it.
    """
    import gisp

    package = str(Path(gisp.__file__).parents[1])
    paths = [package, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    # Without a backtrace: llama.cpp would start a debugger for it.
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "GGML_NO_BACKTRACE": "1"}
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        (place / "request.json").write_text(json.dumps({"rows": tokens.tolist(), "texts": list(texts)}))
        command = [sys.executable, "-m", _RUNNER, str(file), str(place)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode != 0:
            lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
            reason = next((line for line in lines if "error" in line or "ASSERT" in line), lines[-1])
            raise GispError(f"llama.cpp cannot use the exported model: {reason[:240]}: nothing was written")
        answer = json.loads((place / "answer.json").read_text())
        logits = torch.from_numpy(np.load(place / "logits.npy"))
    return answer["version"], logits, answer["ids"]


def _check_ids(vocabulary: Vocabulary, ids: Sequence[Sequence[int]]) -> None:
    for text, wanted, got in zip(CHECK_TEXTS, vocabulary.check, ids, strict=True):
        if list(wanted) != list(got):
            at = next((i for i, pair in enumerate(zip(wanted, got, strict=False)) if pair[0] != pair[1]), -1)
            raise GispError(
                f"llama.cpp splits {text[:40]!r} otherwise than the base's tokenizer, first at token {at}: nothing was "
                "written, use --format hf and report this tokenizer"
            )


def _storage(stored: torch.dtype, base: torch.dtype) -> str:
    """How the base model's matrices are stored, for the model card."""
    names = [str(dtype).removeprefix("torch.") for dtype in (stored, base)]
    if stored in (base, torch.float32):
        return f"{names[0]}, exactly the base model's {names[1]}"
    if (stored, base) == (torch.float16, torch.bfloat16):
        return "float16, exactly the base model's bfloat16 but for weights below 2^-14, which are within 2^-25"
    return f"{names[0]}, rounded from the base model's {names[1]}"
