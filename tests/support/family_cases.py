"""Tiny dense models of every family, position encoding and setting that exports support, and sets that cover them."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from itertools import combinations, product
from typing import Any, NamedTuple

import torch
from export_models import CHANNELS, HEADS, VOCAB
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING

from gisp.export.modeling_gisp import FAMILIES

ORIGINAL, CONTEXT, LENGTH = 16, 32, 48
# Without "default": what each needs beside its name.
ROPES: dict[str, dict[str, Any]] = {
    "default": {},
    "linear": {"factor": 2.0},
    "dynamic": {"factor": 2.0},
    "yarn": {"factor": 2.0, "original_max_position_embeddings": ORIGINAL},
    "longrope": {"factor": 2.0, "original_max_position_embeddings": ORIGINAL},
    "llama3": {
        "factor": 4.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": ORIGINAL,
    },
    "proportional": {"factor": 2.0},
}
_BIASES = ("attention_bias", "mlp_bias", "use_qkv_bias", "use_bias")
# Their attention takes head_dim from the hidden size, or their o_proj is square.
_FIXED_HEAD_DIM = ("stablelm", "helium")


class Case(NamedTuple):
    """One model."""

    family: str
    rope: str
    bias: bool
    tied: bool
    window: bool
    head_dim: int


VALUES: tuple[Sequence[Any], ...] = (
    tuple(FAMILIES),
    tuple(ROPES),
    (False, True),
    (False, True),
    (False, True),
    (8, 16),
)


def covering(values: Sequence[Sequence[Any]] = VALUES) -> list[tuple[Any, ...]]:
    """Rows in which every pair of values of two columns occurs; all rows with ``GISP_TEST_MATRIX=full``.

    Greedy: each row takes the first pair that is left and adds the values that cover most others.
    """
    if os.environ.get("GISP_TEST_MATRIX") == "full":
        return list(product(*values))
    columns = range(len(values))
    sizes = [range(len(each)) for each in values]
    left = {(i, a, j, b): None for i, j in combinations(columns, 2) for a in sizes[i] for b in sizes[j]}
    rows = []
    while left:
        i, a, j, b = next(iter(left))
        row = {i: a, j: b}
        for column in columns:
            if column not in row:
                # The value that covers most pairs with those chosen.
                row[column] = max(sizes[column], key=lambda v: sum(_pair(column, v, *c) in left for c in row.items()))
        for i, j in combinations(columns, 2):
            left.pop((i, row[i], j, row[j]), None)
        rows.append(tuple(values[column][row[column]] for column in columns))
    return rows


def _pair(i: int, a: int, j: int, b: int) -> tuple[int, int, int, int]:
    return (i, a, j, b) if i < j else (j, b, i, a)


def cases(family: str) -> Iterator[Case]:
    """The cases of a family in the covering set."""
    return (Case(*row) for row in _ROWS if row[0] == family)


# StableLM rotates a part of each head; this encoding always spans the whole.
_ROWS = [row for row in covering() if row[:2] != ("stablelm", "proportional")]


def build(case: Case) -> Any:
    """Four layers, hidden size 64, 8 query heads on 2 key/value heads, made for 32 positions."""
    config_class = CONFIG_MAPPING[case.family]
    fields = config_class.__dataclass_fields__
    head_dim = case.head_dim if "head_dim" in fields and case.family not in _FIXED_HEAD_DIM else 8
    settings: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": 64,
        "intermediate_size": CHANNELS,
        "num_hidden_layers": 4,
        "num_attention_heads": HEADS,
        "num_key_value_heads": 2,
        "max_position_embeddings": CONTEXT,
        "initializer_range": 0.15,
        "tie_word_embeddings": case.tied,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
        **{name: case.bias for name in _BIASES if name in fields},
    }
    if "head_dim" in fields:
        settings["head_dim"] = head_dim
    if "sliding_window" in fields:
        settings["sliding_window"] = 6 if case.window else 4 * LENGTH
        settings |= {"use_sliding_window": True, "max_window_layers": 2} if "use_sliding_window" in fields else {}
    plain = config_class(**settings).rope_parameters
    per_type = "rope_theta" not in plain
    parts = {key: _rope(value, case.rope, head_dim) for key, value in plain.items()} if per_type else None
    settings["rope_parameters"] = parts or _rope(plain, case.rope, head_dim)
    torch.manual_seed(3)
    classes: Any = MODEL_FOR_CAUSAL_LM_MAPPING
    model = classes[config_class](config_class(**settings)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("bias", "norm.weight")):
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def _rope(plain: dict[str, Any], kind: str, head_dim: int) -> dict[str, Any]:
    """A family's own settings with another rope type."""
    own = ("rope_theta", "partial_rotary_factor", "llama_4_scaling_beta")
    kept = {key: value for key, value in plain.items() if key in own}
    if "original_max_position_embeddings" in plain:
        # Ministral 3 scales queries by it, whatever the rope type.
        kept["original_max_position_embeddings"] = ORIGINAL
    if "partial_rotary_factor" in kept:
        # A quarter of these small heads is a single pair, for which dynamic NTK divides by zero.
        kept["partial_rotary_factor"] = 0.5
    pairs = range(int(head_dim * kept.get("partial_rotary_factor", 1.0)) // 2)
    lists = {"short_factor": [1 + 0.1 * i for i in pairs], "long_factor": [1.5 + 0.2 * i for i in pairs]}
    return {**kept, "rope_type": kind, **ROPES[kind], **(lists if kind == "longrope" else {})}
