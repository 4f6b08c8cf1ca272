"""The model card of an exported folder."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from gisp.config.options import criterion_text
from gisp.export.rounding import option_text
from gisp.export.spec import ExportReport, PrunedSpec

_RELAID = (
    "Query heads stored may exceed the heads kept: key/value heads must serve equally many query heads, so some are "
    "stored twice and missing query heads are zero. This changes no output."
)


@dataclass(frozen=True)
class CardKind:
    """What the card of a format says that others do not.

    Attributes:
        title: name of the format for the title; empty for the usual one.
        library: the hub's name of the library that loads it.
        tags: of the hub, beside those of every pruned model.
        load: name of the text in ``cards`` on how to load it.
        layers: what to know of the table of layers.
        facts: more lines for the table of facts: what, value.
    """

    load: str
    title: str = ""
    library: str = "transformers"
    tags: tuple[str, ...] = ()
    layers: str = _RELAID
    facts: tuple[tuple[str, str], ...] = ()


PRUNED = CardKind("hf")
MASKED = CardKind("masked", title="masked", layers="Shapes are those of the base model.")
UNIFORM = CardKind("uniform", title="one size for all layers", layers="All layers store the same, with real weights.")


def write_card(folder: Path, base: Any, spec: PrunedSpec, report: ExportReport, kind: CardKind = PRUNED) -> None:
    """Write ``README.md``: where the model comes from, what was removed, how exact the export is, how to load it."""
    name = base_name(base, spec.base_path)
    title = f"{name}, pruned by {spec.sparsity:.0%}" + (f" ({kind.title})" if kind.title else "")
    lines = head(name, title, kind.library, kind.tags)
    lines += [
        f"`{name}` with attention heads and MLP channels removed by iterative structured pruning "
        "(after [GISP](https://arxiv.org/abs/2510.18030), scores by the criterion below).",
        "",
        *_facts(spec, report, kind),
        "",
        "## Load",
        "",
        load_text(kind.load),
        "## Layers",
        "",
        *_table(report, kind),
        "",
    ]
    (folder / "README.md").write_text("\n".join(lines), encoding="utf-8")


def load_text(name: str) -> str:
    """A text of ``cards``, Markdown."""
    return (files("gisp.export") / "cards" / f"{name}.md").read_text(encoding="utf-8")


def head(name: str, title: str, library: str, tags: Sequence[str]) -> list[str]:
    """Lines of a card's front matter and its title."""
    front = {"library_name": library, "pipeline_tag": "text-generation", "tags": ["gisp", "pruned", *tags]}
    # JSON values are YAML values, quoted where a model's name needs it.
    lines = ["---", *(f"{key}: {json.dumps(value)}" for key, value in front.items())]
    if "/" in name:
        lines.append(f"base_model: {json.dumps(name)}")
    return [*lines, "---", "", f"# {title}", ""]


def facts_table(facts: Iterable[tuple[str, Any]]) -> list[str]:
    """A table of two columns without a header."""
    return ["| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in facts)]


def base_name(base: Any, path: str) -> str:
    """The base model's hub name, or the last part of its folder: a card should not tell local paths."""
    path = path or str(getattr(base.config, "_name_or_path", "") or "")
    if not path:
        return type(base).__name__
    is_hub_name = path.count("/") == 1 and not path.startswith(("/", ".", "~")) and not Path(path).exists()
    return path if is_hub_name else Path(path).name


def _facts(spec: PrunedSpec, report: ExportReport, kind: CardKind) -> list[str]:
    config = spec.run.get("config") or {}
    versions = spec.run.get("versions") or {}
    facts = [
        ("sparsity of the decoder layers", f"{spec.sparsity:.4f} (step {spec.step})"),
        ("sparsity of the whole model", f"{spec.model_sparsity:.4f}"),
        *([("options", f"`{option_text(spec.options)}`")] if spec.options else []),
        *([("compensation", spec.compensation)] if spec.compensation else []),
        *spec.notes,
        ("parameters stored", f"{report.parameters_pruned:,} of {report.parameters_dense:,}"),
        ("weight files", f"{report.bytes / 1e6:,.1f} MB"),
        ("key/value cache per token", f"{report.kv_bytes_per_token:,} of {report.kv_bytes_per_token_dense:,} bytes"),
        ("tensor parallelism", f"{', '.join(map(str, report.tensor_parallel))} devices share every layer evenly"),
        ("preset", config.get("preset", "not recorded")),
        ("criterion", criterion_text(config)),
        ("versions", ", ".join(f"{key} {value}" for key, value in versions.items()) or "not recorded"),
        (
            "logits against the masked dense model (float32)",
            f"differ by at most {report.absolute_difference:.2e} absolute, {report.relative_difference:.2e} relative "
            f"(accepted up to {report.tolerance:.0e})",
        ),
        *kind.facts,
    ]
    return facts_table(facts)


def _table(report: ExportReport, kind: CardKind) -> list[str]:
    rows = [
        f"| {layer} | {item.heads} | {item.query_heads} | {item.kv_heads} | {item.channels} |"
        for layer, item in enumerate(report.sizes)
    ]
    head = "| layer | heads kept | query heads stored | key/value heads stored | MLP channels stored |"
    return [kind.layers, "", head, "|---|---|---|---|---|", *rows]
