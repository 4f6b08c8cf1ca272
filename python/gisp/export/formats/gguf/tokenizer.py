"""The tokenizer of a GGUF file.

llama.cpp knows the way a byte-level tokenizer splits text into words by name only, so the split is recognised from the
tokenizer's own definition. Tokenizers that came from SentencePiece are written as such: their merges, which are all the
ways to put a token together, are replaced by the tokens' scores.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gisp.errors import GispError

_WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_TAIL = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_CASELESS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*|\p{{N}}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_GPT2 = "ByteLevel"
# llama.cpp's name of a split, by its parts and whether whole words found in the vocabulary are taken before merging.
_SPLITS: dict[tuple[tuple[str, ...], bool], str] = {
    ((_GPT2,), False): "gpt-2",
    (("Digits", _GPT2), False): "smollm",
    ((rf"{_CASELESS}|{_WORD}|\p{{N}}{{1,3}}|{_TAIL}",), True): "llama-bpe",
    ((rf"{_CASELESS}|{_WORD}|\p{{N}}{{1,3}}|{_TAIL}",), False): "smaug-bpe",
    ((rf"{_CASELESS}|{_WORD}|\p{{N}}|{_TAIL}",), False): "qwen2",
    ((_TEKKEN,), True): "tekken",
}
# Tokens whose text alone tells llama.cpp that a text ends there.
_KNOWN_ENDS = ("<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|endoftext|>", "<|eom_id|>", "<EOT>")
_SPACE = "\u2581"
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
# None starts with a space: SentencePiece and llama.cpp put another before it, transformers does not always.
CHECK_TEXTS = (
    "The quick brown fox's 12345 jumps, don't they? It'S 3.14 - WE'LL see!",
    "def main(argv: list[str]) -> int:\n    return 0  # done\n\n\n\tif x == 10**6: pass\r\n",
    "two  spaces,   three and trailing ones   ",
    "naïve café, Größe, Привет мир, 你好世界, こんにちは, 안녕하세요 — \u201cquoted\u201d …",
    '🙂 https://example.org/a_b?c=1&d=%20 {"key": [1, 2.5e-3, null]} <tag/> $x_{i}^2$',
)


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer in GGUF's terms.

    Attributes:
        model: ``gpt2`` (byte-level BPE) or ``llama`` (SentencePiece).
        split: llama.cpp's name of the way text is split into words.
        tokens: text of every token; ids the model has beyond the tokenizer's get placeholders.
        types: names of ``gguf.TokenType``.
        merges: of ``gpt2``.
        scores: of ``llama``.
        space_prefix: whether a space is put before text (``llama``).
        special: token ids by kind: bos, eos, unk, pad, and eot and eom, at which generation ends too.
        adds: whether encoding adds bos and eos.
        chat_templates: by name; the one used unless another is asked for is ``default``.
        check: token ids of :data:`CHECK_TEXTS`, computed by the tokenizer itself.
    """

    model: str
    split: str
    tokens: tuple[str, ...]
    types: tuple[str, ...]
    merges: tuple[str, ...]
    scores: tuple[float, ...]
    space_prefix: bool
    special: dict[str, int]
    adds: dict[str, bool]
    chat_templates: dict[str, str]
    check: tuple[tuple[int, ...], ...]


def read_vocabulary(folder: Path | None, vocab_size: int, ends: Sequence[int] = ()) -> Vocabulary | None:
    """The tokenizer of a model folder; None where there is none.

    Args:
        ends: tokens at which the model's generation ends. Beside the tokenizer's own and those llama.cpp knows, a file
            has places for two.

    Raises:
        GispError: a tokenizer llama.cpp has no way to express.
    """
    if folder is None or not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model")):
        return None
    from transformers import AutoTokenizer

    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        definition = json.loads(tokenizer.backend_tokenizer.to_str())
    except Exception as error:  # tokenizers raise many types for a missing or broken file
        reason = " ".join(str(error).split())[:200]
        raise GispError(f"the tokenizer in {folder} cannot be read: {reason}") from None
    model = definition["model"]
    if model["type"] != "BPE":
        raise _inexpressible(folder, f"model {model['type']}")
    ids = {**model["vocab"], **{item["content"]: item["id"] for item in definition["added_tokens"]}}
    added = {item["content"]: item["special"] for item in definition["added_tokens"]}
    highest = max(ids.values(), default=-1)
    if highest >= vocab_size:
        raise GispError(
            f"the tokenizer in {folder} has token id {highest}, the model {vocab_size} ids: give the model's tokenizer"
        )
    merges = [tuple(pair.split(" ", 1) if isinstance(pair, str) else pair) for pair in model["merges"]]
    from_sentencepiece = bool(model["byte_fallback"])
    if from_sentencepiece:
        split, space_prefix = "default", _space_prefix(folder, definition)
        scores = _scores(folder, set(model["vocab"]) - set(added), merges)
    else:
        split, space_prefix, scores = _split(folder, definition), False, {}
    tokens = [f"[PAD{index}]" for index in range(vocab_size)]
    types = ["UNUSED"] * vocab_size
    for text, index in ids.items():
        tokens[index] = text
        types[index] = _type(text, added, tokenizer.unk_token, from_sentencepiece)
    special = _special(tokenizer, ends, tokens)
    encoded = tokenizer.encode("a") or [None]
    templates = tokenizer.chat_template
    return Vocabulary(
        model="llama" if from_sentencepiece else "gpt2",
        split=split,
        tokens=tuple(tokens),
        types=tuple(types),
        # A space inside a token is written as llama.cpp's converter does; byte-level tokens have none.
        merges=() if from_sentencepiece else tuple(" ".join(pair) for pair in merges),
        scores=tuple(scores.get(text, 0.0) for text in tokens) if from_sentencepiece else (),
        space_prefix=space_prefix,
        special=special,
        adds={name: special.get(name, -1) == encoded[at] for name, at in (("bos", 0), ("eos", -1))},
        chat_templates={"default": templates} if isinstance(templates, str) else dict(templates or {}),
        check=tuple(tuple(tokenizer.encode(text)) for text in CHECK_TEXTS),
    )


def _special(tokenizer: Any, ends: Sequence[int], tokens: Sequence[str]) -> dict[str, int]:
    """Ids of special tokens by llama.cpp's names; further ends take the two places that a file has for them."""
    found = {name: getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "unk", "pad")}
    special = {name: index for name, index in found.items() if index is not None and index < len(tokens)}
    more = [index for index in ends if index < len(tokens) and tokens[index] not in _KNOWN_ENDS]
    special |= zip(("eot", "eom"), [index for index in more if index != special.get("eos")], strict=False)
    return special


def add_vocabulary(gguf: Any, writer: Any, vocabulary: Vocabulary | None) -> None:
    """Put the tokenizer into a file being written; without one llama.cpp takes token ids only."""
    if vocabulary is None:
        writer.add_tokenizer_model("none")
        return
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_tokenizer_pre(vocabulary.split)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types([gguf.TokenType[name] for name in vocabulary.types])
    if vocabulary.model == "llama":
        writer.add_token_scores(vocabulary.scores)
        writer.add_add_space_prefix(vocabulary.space_prefix)
    else:
        writer.add_token_merges(vocabulary.merges)
    for name, index in vocabulary.special.items():
        getattr(writer, f"add_{name}_token_id")(index)
    for name, value in vocabulary.adds.items():
        getattr(writer, f"add_add_{name}_token")(value)
    _add_templates(gguf.Keys.Tokenizer, writer, dict(vocabulary.chat_templates))


def _add_templates(keys: Any, writer: Any, templates: dict[str, str]) -> None:
    """Chat templates by name, in an order that is always the same, which the gguf package's own is not."""
    if "default" in templates:
        writer.add_chat_template(templates.pop("default"))
    for name in sorted(templates):
        writer.add_string(keys.CHAT_TEMPLATE_N.format(name=name), templates[name])
    if templates:
        writer.add_array(keys.CHAT_TEMPLATES, sorted(templates))


def _inexpressible(folder: Path, what: str) -> GispError:
    return GispError(f"the tokenizer in {folder} cannot be written as gguf: llama.cpp knows no {what}, use --format hf")


def _type(text: str, added: dict[str, bool], unknown: str | None, from_sentencepiece: bool) -> str:
    if from_sentencepiece and text == unknown:
        return "UNKNOWN"
    if text in added:
        return "CONTROL" if added[text] else "USER_DEFINED"
    return "BYTE" if from_sentencepiece and _BYTE.fullmatch(text) else "NORMAL"


def _split(folder: Path, definition: dict[str, Any]) -> str:
    """llama.cpp's name for the pre-tokenizer of a byte-level tokenizer."""
    top = definition["pre_tokenizer"] or {"type": "none"}
    parts: list[str] = []
    for item in top.get("pretokenizers", [top]):
        if item["type"] == "ByteLevel" and not item["add_prefix_space"]:
            # Without its own pattern it only turns bytes into characters.
            parts += [_GPT2] if item["use_regex"] else []
        elif item["type"] == "Digits" and item["individual_digits"]:
            parts.append("Digits")
        elif item["type"] == "Split" and item["behavior"] == "Isolated" and not item["invert"]:
            parts.append(str(item["pattern"].get("Regex")))
        else:
            parts.append(f"{item['type']} step")
    name = _SPLITS.get((tuple(parts), bool(definition["model"].get("ignore_merges"))))
    # Qwen2 composes accents first; llama.cpp leaves that out, which shows in decomposed text only.
    normalizer = (definition["normalizer"] or {"type": "none"})["type"]
    if name is None or (normalizer != "none" and (name, normalizer) != ("qwen2", "NFC")):
        raise _inexpressible(folder, f"split {parts} after normalizer {normalizer!r}")
    return name


def _space_prefix(folder: Path, definition: dict[str, Any]) -> bool:
    """Whether a SentencePiece tokenizer puts a space before text; spaces must become the usual character."""
    steps = [definition["normalizer"] or {}, definition["pre_tokenizer"] or {}]
    steps = [part for step in steps for part in step.get("normalizers", step.get("pretokenizers", [step])) if part]
    prefix = replaced = False
    for step in steps:
        if step == {"type": "Prepend", "prepend": _SPACE}:
            prefix = True
        elif step["type"] == "Metaspace" and step["replacement"] == _SPACE and not step["split"]:
            prefix, replaced = step["prepend_scheme"] != "never", True
        elif step == {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}:
            replaced = True
        else:
            raise _inexpressible(folder, f"step {step['type']} before SentencePiece merges")
    if not replaced:
        raise _inexpressible(folder, "SentencePiece merges of plain spaces")
    return prefix


def _scores(folder: Path, vocab: set[str], merges: Sequence[Sequence[str]]) -> dict[str, float]:
    """Scores of tokens whose order is that of the merges.

    SentencePiece joins the two neighbours whose union is the best token, whatever the neighbours are. That is the same
    as merging by rank only if every pair of tokens that makes up a token is a merge, and a token's merges stand
    together. Runs of spaces may share a score, and then their merges are mixed.
    """
    ranks: dict[str, list[int]] = {}
    for rank, (left, right) in enumerate(merges):
        ranks.setdefault(left + right, []).append(rank)
    for token in vocab:
        pairs = sum(token[:i] in vocab and token[i:] in vocab for i in range(1, len(token)))
        if not _BYTE.fullmatch(token) and pairs != len(ranks.get(token, ())):
            raise _inexpressible(folder, f"merges that make {token!r} from some of its {pairs} pairs only")
    scores: dict[str, float] = {}
    end, best = -1, ""
    for token, at in ranks.items():
        if at[0] > end:
            best = token
        elif {*best, *token} != {_SPACE}:
            raise _inexpressible(folder, f"merges of {token!r} between those of {best!r}")
        end = max(end, at[-1])
        scores[token] = scores[best] if best in scores else -float(len(scores))
    return scores
