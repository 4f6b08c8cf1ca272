"""Every size of a run: what each layer keeps, for the slider of the page."""

from __future__ import annotations

import json
from html import escape
from typing import Any

import numpy as np

from gisp.report.data import RunData
from gisp.run.evaluations import THIS_RUN, figure_text, method_text

NOTE = (
    "Move the slider through the sizes that the run passed. A bar is what a layer keeps of its heads or channels; "
    "layer 0 is at the input."
)


def sizes_section(run: RunData) -> str:
    """Slider, figures of a size and a bar per layer, showing the run's end; the page's script moves them."""
    end = size_of(run, len(run.steps))
    facts = "".join(
        f'<div><dt>{escape(name)}</dt><dd class="number" data-fact="{key}">{escape(end[key])}</dd></div>'
        for key, name in FACTS.items()
    )
    rows = "".join(_layer(run, end, layer) for layer in range(len(run.heads)))
    kinds = "".join(f'<th scope="col">{kind.capitalize()} kept</th>' for kind in ("heads", "channels"))
    # "<" cannot end the element early.
    data = json.dumps([size_of(run, step) for step in range(len(run.steps) + 1)]).replace("<", "\\u003c")
    last = len(run.steps)
    return (
        f'<section id="sizes"><h2>What each layer keeps</h2><p class="note">{escape(NOTE)}</p>'
        f'<div class="slider" hidden><label for="size">Size after step</label>'
        f'<input type="range" id="size" min="0" max="{last}" value="{last}" step="1">'
        f'<output class="number" for="size">{last}</output></div>'
        f'<dl class="facts">{facts}</dl><p class="note" data-fact="figures">{escape(end["figures"])}</p>'
        f'<table class="layers"><thead><tr><th scope="col" class="number">Layer</th>{kinds}</tr></thead>'
        f'<tbody>{rows}</tbody></table><script type="application/json" id="sizes-data">{data}</script></section>'
    )


FACTS = {
    "sparsity": "Decoder sparsity",
    "model_sparsity": "Whole-model sparsity",
    "parameters": "Parameters an export stores",
    "kv": "KV cache per token of an export",
}


def size_of(run: RunData, step: int) -> dict[str, Any]:
    """One size as it is shown: texts by the names of :data:`FACTS`, ``figures``, and counts kept per layer."""
    record = run.steps[step - 1] if step else {"sparsity": 0.0, "model_sparsity": 0.0}
    kv = run.stored_kv_bytes(step)
    return {
        "sparsity": f"{100 * record['sparsity']:.2f} %",
        "model_sparsity": f"{100 * record['model_sparsity']:.2f} %",
        "parameters": f"{run.stored([step])[0].parameters:,}",
        "kv": "not recorded" if kv is None else f"{kv:,} B",
        "figures": _figures(run, step, record["sparsity"]),
        "heads": _kept(run.heads, step),
        "channels": _kept(run.channels, step),
    }


def _kept(layers: list[np.ndarray], step: int) -> list[int]:
    return [int(((at == 0) | (at > step)).sum()) for at in layers]


def _figures(run: RunData, step: int, sparsity: float) -> str:
    """What was measured at this very size, in one line."""
    found = [
        f"{method_text(e)}: {figure.name} {figure_text(figure)} ({e.source})"
        for e in run.evaluations
        if e.label == THIS_RUN and (e.step == step if e.step is not None else abs(e.sparsity - sparsity) < 1e-9)
        for figure in e.figures
    ]
    return "; ".join(found) or "Not evaluated at this size."


def _layer(run: RunData, end: dict[str, Any], layer: int) -> str:
    cells = ""
    for kind in ("heads", "channels"):
        kept, whole = end[kind][layer], len(getattr(run, kind)[layer])
        share = 100 * kept / whole
        cells += (
            f'<td class="{kind}" data-whole="{whole}"><div class="bar"><i style="width:{share:.2f}%"></i></div>'
            f'<span class="number">{kept:,} / {whole:,}</span></td>'
        )
    return f'<tr><th scope="row" class="number">{layer}</th>{cells}</tr>'
