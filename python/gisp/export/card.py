"""The model card of an exported folder."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

from gisp.config.options import criterion_text
from gisp.export.provenance import BaseCard
from gisp.export.sizes.options import option_text
from gisp.export.spec import ExportReport, PrunedSpec
from gisp.run.evaluations import THIS_RUN, Evaluation, amount_text, figure_text, method_text

_RELAID = (
    "More query heads may be stored than were kept. All key/value heads must serve equally many query heads, so some "
    "key/value heads are stored twice, and missing query heads are stored as zeros. The outputs are the same."
)
_NOT_EVALUATED = "Not measured. `gisp eval RUN --sparsity S --data DATA` before the export puts figures here."
FOLDER_ON_CARD = "path/to/this/folder"
"""What stands for the folder in the code of a card."""
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "tekken.json")
# What stands for the names in the texts of `cards`.
_WITH_TOKENIZER = {
    "torch": "",
    "tokenizer_class": ", AutoTokenizer",
    "tokenizer_import": "from transformers import AutoTokenizer\n",
    "generate": f"""\
tokenizer = AutoTokenizer.from_pretrained("{FOLDER_ON_CARD}")
inputs = tokenizer("The ", return_tensors="pt")
output = model.generate(inputs.input_ids, attention_mask=inputs.attention_mask, max_new_tokens=32)
print(tokenizer.decode(output[0], skip_special_tokens=True))""",
}
_WITH_IDS = {
    "torch": "import torch\n",
    "tokenizer_class": "",
    "tokenizer_import": "",
    "generate": """\
input_ids = torch.tensor([[1, 2, 3]])  # the base model came without a tokenizer
print(model.generate(input_ids, attention_mask=torch.ones_like(input_ids), max_new_tokens=32))""",
}


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
        exact: whether it holds the point of the run itself.
    """

    load: str
    title: str = ""
    library: str = "transformers"
    tags: tuple[str, ...] = ()
    layers: str = _RELAID
    facts: tuple[tuple[str, str], ...] = ()
    exact: bool = True


PRUNED = CardKind("hf")
MASKED = CardKind("masked", title="masked", layers="Shapes are those of the base model.")
UNIFORM = CardKind(
    "uniform",
    title="one size for all layers",
    layers="All layers have the same sizes, without zeroed heads.",
    exact=False,
)


def write_card(folder: Path, base: Any, spec: PrunedSpec, report: ExportReport, kind: CardKind = PRUNED) -> None:
    """Write ``README.md``: where the model comes from, what was removed, how exact the export is, how to load it."""
    source, calibration = BaseCard.of(base, spec.base_path), spec.run.get("data") or {}
    title = f"{source.name}, pruned by {spec.sparsity:.0%}" + (f" ({kind.title})" if kind.title else "")
    lines = head(source.front(calibration), title, kind.library, kind.tags)
    lines += [
        f"`{source.name}` with attention heads and MLP channels removed by iterative structured pruning "
        "(after [GISP](https://arxiv.org/abs/2510.18030), scores by the criterion below).",
        "",
        *facts_table([*source.facts(calibration), *_facts(spec, report, kind)]),
        "",
        "## Use",
        "",
        load_text(kind.load, folder),
        "## Quality",
        "",
        *_quality(spec, kind),
        "",
        "## Layers",
        "",
        *_table(report, kind),
        "",
    ]
    (folder / "README.md").write_text("\n".join(lines), encoding="utf-8")


def load_text(name: str, folder: Path, **values: str) -> str:
    """A text of ``cards``, Markdown, whose code goes through the folder's tokenizer if it has one.

    Args:
        values: what stands for further names of the text.
    """
    has_tokenizer = any((folder / file).is_file() for file in _TOKENIZER_FILES)
    kind = _WITH_TOKENIZER if has_tokenizer else _WITH_IDS
    text = (files("gisp.export") / "cards" / f"{name}.md").read_text(encoding="utf-8")
    return Template(text).substitute(kind, **values)


def head(front: dict[str, Any], title: str, library: str, tags: Sequence[str]) -> list[str]:
    """Lines of a card's front matter and its title.

    Args:
        front: entries beside library and tags.
    """
    front = {"library_name": library, "pipeline_tag": "text-generation", "tags": ["gisp", "pruned", *tags], **front}
    # JSON values are YAML values, quoted where a model's name needs it.
    return ["---", *(f"{key}: {json.dumps(value)}" for key, value in front.items()), "---", "", f"# {title}", ""]


def facts_table(facts: Iterable[tuple[str, Any]]) -> list[str]:
    """A table of two columns without a header."""
    return ["| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in facts)]


def quality_table(evaluations: Sequence[Evaluation]) -> list[str]:
    """Every figure beside the dense model's under the same conditions, where that was measured."""
    own = [e for e in evaluations if e.label == THIS_RUN]
    dense = {(e.source, e.conditions, f.name): figure_text(f) for e in own if e.sparsity == 0 for f in e.figures}
    rows = []
    for e in own:
        for figure in e.figures if e.sparsity else ():
            at_dense = dense.get((e.source, e.conditions, figure.name), "-")
            rows.append((method_text(e), figure.name, figure_text(figure), at_dense, amount_text(e), e.conditions))
    head = ("method", "figure", "value", "dense model", "measured on", "conditions")
    return [f"| {' | '.join(row)} |" for row in (head, ("---",) * len(head), *rows)] if rows else []


def _quality(spec: PrunedSpec, kind: CardKind) -> list[str]:
    table = quality_table(spec.evaluations)
    if not table:
        return [_NOT_EVALUATED]
    changed = spec.options or not kind.exact
    about = "the exact point of the run; sizes were changed for this export" if changed else "this size"
    notes = [f"Figures of {about}, measured by `gisp eval` on the run."]
    methods = {bool(e.compensation) for e in spec.evaluations if e.label == THIS_RUN and e.sparsity}
    if spec.compensation and False in methods:
        notes.append("Rows without `+` were measured without a compensation; this export is compensated.")
    if not spec.compensation and True in methods:
        notes.append("Rows with `+` were measured with a compensation; this export has none.")
    return [" ".join(notes), "", *table]


def _facts(spec: PrunedSpec, report: ExportReport, kind: CardKind) -> list[tuple[str, Any]]:
    config = spec.run.get("config") or {}
    versions = spec.run.get("versions") or {}
    return [
        ("sparsity of the decoder layers", f"{spec.sparsity:.4f} (step {spec.step})"),
        ("sparsity of the whole model", f"{spec.model_sparsity:.4f}"),
        *([("options", f"`{option_text(spec.options)}`")] if spec.options else []),
        *([("compensation", spec.compensation)] if spec.compensation else []),
        *spec.notes,
        ("parameters stored", f"{report.parameters_pruned:,} of {report.parameters_dense:,}"),
        ("weight files", f"{report.bytes / 1e6:,.1f} MB"),
        ("key/value cache per token", f"{report.kv_bytes_per_token:,} of {report.kv_bytes_per_token_dense:,} bytes"),
        ("devices for tensor parallelism", ", ".join(map(str, report.tensor_parallel))),
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


def _table(report: ExportReport, kind: CardKind) -> list[str]:
    rows = [
        f"| {layer} | {item.heads} | {item.query_heads} | {item.kv_heads} | {item.channels} |"
        for layer, item in enumerate(report.sizes)
    ]
    head = "| layer | heads kept | query heads stored | key/value heads stored | MLP channels stored |"
    return [kind.layers, "", head, "|---|---|---|---|---|", *rows]
