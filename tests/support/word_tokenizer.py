"""A tokenizer of whole words, saved as a model folder would hold it."""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

WORDS = ("<end>", "the", "cat", "sat", "on", "mat", "a", "dog", "ran", "user", "assistant", "stop")
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ m.role }} {{ m.content }} stop {% endfor %}"
    "{% if add_generation_prompt %}assistant {% endif %}"
)


def save_tokenizer(folder: Path, words: tuple[str, ...] = WORDS, chat_template: str | None = None) -> str:
    """Writes the folder and returns its name; token = place of the word, 0 ends a text and stands for any other."""
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<end>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")
    fast.chat_template = chat_template
    fast.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    return str(folder)
