"""Names of the criteria, and the options each is published with."""

from __future__ import annotations

from typing import Any, Literal

# What a criterion sets where an option is not given; the preset has the rest.
CRITERIA: dict[str, dict[str, Any]] = {
    "gisp": {"allocator": "global"},
    "second-order": {"allocator": "global", "first_order": "shrunk"},
    "magnitude": {"allocator": "global"},
    # Divided by parameters every head would go before any channel.
    "random": {"allocator": "global", "norm": "none"},
    "taylor-local": {"allocator": "uniform"},
    "signed": {"allocator": "global"},
    "wanda-sp": {"allocator": "uniform"},
    "flap": {"allocator": "global", "norm": "zscore"},
    # A layer goes whole: no width is left to align and no minimum to keep.
    "block-influence": {"allocator": "global", "norm": "none", "align": 1, "keep_minimum": False},
}
ALLOCATORS = ("global", "uniform", "owl")
# Criteria made of gradients of the loss, and what the engine sums for them.
ScoreKind = Literal["absolute", "signed", "second-order"]
GRADIENT: dict[str, ScoreKind] = {
    "gisp": "absolute",
    "second-order": "second-order",
    "taylor-local": "absolute",
    "signed": "signed",
}
# Among them those of the written-out pass, which alone has 8-bit products.
WRITTEN_OUT = tuple(name for name, kind in GRADIENT.items() if kind != "signed")
WHOLE_LAYERS = "block-influence"
