"""Calibration and evaluation text of a study: text files through the model's tokenizer, or token files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from gisp.data import Sequences, load_sequences, read_rows
from gisp.data.encode import PairEncoder, check_vocabulary, load_tokenizer
from gisp.data.tokenise import tokenise
from gisp.errors import GispError

TOKENS = ".safetensors"
# Of the order in which texts are joined; runs draw from the rows by seeds of their own.
_ORDER_SEED = 0


@dataclass(frozen=True)
class Text:
    """An evaluation text cut into windows.

    Attributes:
        name: of its file.
        window: tokens per window.
    """

    name: str
    window: int
    sequences: Sequences

    @property
    def label(self) -> str:
        """Names the perplexity on it in a result."""
        return f"perplexity {self.name} {self.window}"


def read_calibration(specs: Sequence[str], model: str, vocab_size: int, seq_len: int) -> Sequences:
    """Calibration rows of ``seq_len`` tokens.

    Rows of text files are shuffled, joined with the end-of-text token between them and cut; token files are taken as
    they are.

    Args:
        model: folder or name whose tokenizer reads text.

    Raises:
        GispError: unreadable files, token files beside text, too little text, or another vocabulary.
    """
    files = [spec.endswith(TOKENS) for spec in specs]
    if all(files):
        found = (load_sequences(spec, vocab_size=vocab_size, seq_len=None) for spec in specs)
        return Sequences.plain([row for each in found for row in each.rows])
    if any(files):
        raise GispError("--calibration names token files and text: give files of one kind")
    rows = [row for spec in specs for row in read_rows(spec)]
    named = ", ".join(specs)
    if not all(isinstance(row.get("text"), str) for row in rows):
        raise GispError(f"--calibration {named} has rows without text: give rows of text")
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(_ORDER_SEED)).tolist()
    encoder = PairEncoder(load_tokenizer(model, named))
    packed = tokenise([rows[i] for i in order], "text", encoder, seq_len, "lm", named)
    check_vocabulary(max(int(ids.max()) for ids, _ in packed.rows), vocab_size, named)
    return packed


def read_evaluation(
    specs: Sequence[str], model: str, vocab_size: int, windows: Sequence[int], rows: int | None
) -> list[Text]:
    """Every text in every window, in the order given; the first one's perplexity is the study's main figure.

    A ``.txt`` is one document cut into whole windows, as the papers read WikiText-2; rows of token files stay apart.

    Args:
        rows: windows of a text (rows of a token file) evaluated, the first ones; ``None`` = all.
    """
    found = []
    for spec in specs:
        for window in windows:
            length = None if spec.endswith(TOKENS) else window
            read = load_sequences(spec, vocab_size=vocab_size, seq_len=length, tokenizer_from=model, held_out=True)
            found.append(Text(Path(spec).stem, window, read.first(rows)))
    if len({text.label for text in found}) < len(found):
        raise GispError("two of the evaluation texts have one name: rename a file, or give each window once")
    return found
