"""Where rows come from: jsonl, txt and parquet files, folders of ``datasets``, named datasets, lm-eval tasks."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gisp.data.lm_eval_tasks import LM_EVAL, NAMED_TASKS, task_rows
from gisp.data.mixture import MIXTURE_FILES
from gisp.data.rows import FORMATS
from gisp.errors import GispError, quoted
from gisp.files import as_text, check_names
from gisp.hub import is_reachable, unreachable


@dataclass(frozen=True)
class _HubDataset:
    """Where a dataset lies, the split to evaluate on, and whether its rows are the paragraphs of one document."""

    path: str
    configuration: str
    evaluation_split: str
    one_document: bool = False


# Datasets on the hub by a short name; calibration takes the train split.
NAMED_DATASETS = {
    "c4": _HubDataset("allenai/c4", "en", "validation"),
    "wikitext2": _HubDataset("Salesforce/wikitext", "wikitext-2-raw-v1", "test", one_document=True),
    "fineweb-edu": _HubDataset("HuggingFaceFW/fineweb-edu", "sample-10BT", "train"),
}
# Of a dataset of documents; one document is read whole.
_STREAMED_ROWS = 20000
_TEXT_FILES = (".jsonl", ".txt", ".parquet")
_TOKEN_FILES = (".safetensors",)
_SAVED_DATASET = ("state.json", "dataset_dict.json")
_HELD_OUT_SPLITS = ("test", "validation")


def read_rows(spec: str | Path, held_out: bool = False) -> Iterator[dict[str, Any]]:
    """Rows of a text SPEC as dictionaries, in their order.

    A row is ``{"text"}``, ``{"prompt", "completion"}``, ``{"messages"}`` or ``{"context", "choices", "answer"}``
    (``answer`` is the index of the gold choice), with ``{"contexts", "choices", "answer"}`` where each choice has a
    context of its own. A ``.txt`` and ``wikitext2`` are one row. Rows of lm-eval tasks also carry the name of their
    ``task``; what follows a prompt or a context begins with the task's delimiter.

    Args:
        spec: a file, a folder that ``save_to_disk`` wrote, a named dataset, or ``lm-eval:NAME[,NAME…][@FOLDER]``.
        held_out: take the rows to evaluate on, where a source has both.

    Raises:
        GispError: not there, not readable, or of no known format.
    """
    spec = as_text(spec, "data")
    check_spec(spec)
    path = Path(spec)
    if spec.startswith(LM_EVAL) or spec in NAMED_TASKS:
        yield from task_rows(spec, held_out)
    elif path.suffix in MIXTURE_FILES:
        raise GispError(f"{spec} is a mixture: it has no rows of its own, give the data of one of its tasks")
    elif any((path / name).is_file() for name in _SAVED_DATASET):
        yield from _saved_rows(path, held_out)
    elif path.suffix in _TEXT_FILES:
        yield from _file_rows(path)
    else:
        yield from _dataset_rows(spec, held_out)


def located(spec: str) -> str:
    """A SPEC that means the same from every working folder; names of datasets and tasks stay what they are."""
    if spec.startswith(LM_EVAL):
        names, at, folder = spec.partition("@")
        return f"{names}@{Path(folder).resolve()}" if at else spec
    path = Path(spec)
    # What has no suffix may be a dataset's name.
    is_file = bool(path.suffix) and path.is_file()
    return str(path.resolve()) if is_file or any((path / name).is_file() for name in _SAVED_DATASET) else spec


def check_spec(spec: str) -> None:
    """Refuse a SPEC that names nothing, before anything slow happens.

    Raises:
        GispError: a file that is not there, or a name that is not known.
    """
    path = Path(spec)
    if spec.startswith(LM_EVAL) or spec in NAMED_TASKS or spec in NAMED_DATASETS:
        return
    check_names(path, "data")
    if path.suffix in (*_TEXT_FILES, *_TOKEN_FILES):
        if not path.is_file():
            kind = "token file" if path.suffix in _TOKEN_FILES else "data file"
            raise GispError(f"{kind} {path} does not exist: give an existing .safetensors, .jsonl, .txt or .parquet")
    elif path.suffix not in MIXTURE_FILES and not any((path / name).is_file() for name in _SAVED_DATASET):
        known = ", ".join([*NAMED_DATASETS, *NAMED_TASKS])
        raise GispError(
            f"data {quoted(spec)} is neither a .safetensors, .jsonl, .txt, .parquet or .yaml file nor a folder saved "
            f"by datasets, {LM_EVAL}TASK or a named dataset ({known})"
        )


def is_document(spec: str) -> bool:
    """Whether a SPEC's text is one document, not a row each."""
    return Path(spec).suffix == ".txt" or (spec in NAMED_DATASETS and NAMED_DATASETS[spec].one_document)


def _file_rows(path: Path) -> Iterator[dict[str, Any]]:
    try:
        if path.suffix == ".txt":
            text = path.read_text(encoding="utf-8-sig")
            # Latin letters of UTF-16 are UTF-8 too, with a NUL beside each.
            if 4 * text.count("\0") > len(text):
                raise GispError(f"{path} is no text, or of UTF-16: save it as UTF-8")
            yield from ([{"text": text}] if text.strip() else [])
        elif path.suffix == ".jsonl":
            yield from _json_rows(path)
        else:
            yield from _parquet_rows(path)
    except UnicodeDecodeError as error:
        raise GispError(f"{path} is not UTF-8 text: {error.reason} at byte {error.start}") from None
    except OSError as error:
        raise GispError(f"cannot read {path}: {error.strerror or error}") from None


def _json_rows(path: Path) -> Iterator[dict[str, Any]]:
    # A byte order mark at the start is no part of the first row.
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                if "\\u" in line:
                    # Half of a surrogate pair passes for JSON, and for text until a tokenizer reads it.
                    json.dumps(row, ensure_ascii=False).encode()
            except (ValueError, RecursionError) as error:
                reason = getattr(error, "msg", None) or " ".join(str(error).split())[:120]
                raise GispError(f"{path} line {number} is not JSON: {reason}") from None
            if not isinstance(row, dict):
                raise GispError(f"{path} line {number} holds a {type(row).__name__}: give an object with {FORMATS}")
            yield row


def _parquet_rows(path: Path) -> Iterable[dict[str, Any]]:
    try:
        import pyarrow.parquet
    except ImportError:
        raise GispError(f"{path}: reading parquet needs pyarrow: pip install 'gisp[data]'") from None
    try:
        return list(pyarrow.parquet.read_table(path).to_pylist())
    except (pyarrow.lib.ArrowException, ValueError) as error:
        raise GispError(f"{path} is not a readable parquet file: {' '.join(str(error).split())}") from None


def _saved_rows(path: Path, held_out: bool) -> Iterator[dict[str, Any]]:
    datasets = _datasets(f"folder {path}")
    try:
        saved = datasets.load_from_disk(str(path))
    except Exception as error:  # arrow, json and file errors have no common type
        raise _unreadable(f"folder {path}", error) from None
    if isinstance(saved, datasets.DatasetDict):
        wanted = _HELD_OUT_SPLITS if held_out else ("train",)
        split = next((name for name in wanted if name in saved), None)
        if split is None:
            raise GispError(f"{path} has splits {', '.join(saved)}, no {' or '.join(wanted)}: give the folder of one")
        saved = saved[split]
    yield from (dict(row) for row in saved)


def _dataset_rows(name: str, held_out: bool) -> Iterator[dict[str, Any]]:
    datasets = _datasets(f"dataset {quoted(name)}")
    if not is_reachable():
        raise GispError(unreachable(f"dataset {quoted(name)}"))
    dataset = NAMED_DATASETS[name]
    split = dataset.evaluation_split if held_out else "train"
    try:
        stream = datasets.load_dataset(
            dataset.path, dataset.configuration, split=split, streaming=True, trust_remote_code=False
        )
        if dataset.one_document:
            # The papers' protocol: every row counts, empty ones too, with a blank line between two.
            yield {"text": "\n\n".join(row["text"] for row in stream)}
        else:
            yield from (dict(row) for row in stream.take(_STREAMED_ROWS) if str(row.get("text", "")).strip())
    except Exception as error:  # network, hub and format failures have no common type
        raise _unreadable(f"dataset {quoted(name)}", error) from None


def _datasets(what: str) -> Any:
    try:
        import datasets
    except ImportError:
        raise GispError(f"{what} needs the datasets library: pip install 'gisp[data]'") from None
    return datasets


def _unreadable(what: str, error: Exception) -> GispError:
    return GispError(f"{what} cannot be read: {' '.join(str(error).split())[:200]}")
