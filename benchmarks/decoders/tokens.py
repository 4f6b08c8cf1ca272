"""A decoder's tokenizer and its token streams."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from gisp.errors import GispError

END_OF_TEXT = "<|endoftext|>"


def train_tokenizer(texts: Sequence[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer: every text survives encoding and decoding unchanged.

    Token 0 is the end of a text. Few texts may give fewer than ``vocab_size`` tokens.

    Raises:
        GispError: no room for the 256 bytes and the end of text.
    """
    if vocab_size < 257:
        raise GispError(f"vocab_size must be at least 257 (bytes, end of text), got {vocab_size}")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        clean_up_tokenization_spaces=False,
    )


def encode(tokenizer: PreTrainedTokenizerFast, texts: Sequence[str]) -> torch.Tensor:
    """All texts as one stream of token ids, int64, an end of text after each."""
    encodings = tokenizer.backend_tokenizer.encode_batch(list(texts), add_special_tokens=False)
    end = [tokenizer.eos_token_id]
    ids = np.concatenate([np.array(encoding.ids + end, dtype=np.int64) for encoding in encodings])
    return torch.from_numpy(ids)


def windows(stream: torch.Tensor, seq_len: int, offset: int = 0) -> torch.Tensor:
    """The stream from ``offset`` on, cut into rows of ``seq_len`` tokens.

    An incomplete last row is left out.

    Raises:
        GispError: not one complete row.
    """
    count = (len(stream) - offset) // seq_len
    if count < 1:
        raise GispError(f"the text has {len(stream)} tokens, fewer than a sequence of {seq_len}: give more text")
    return stream[offset : offset + count * seq_len].view(count, seq_len)
