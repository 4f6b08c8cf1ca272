"""Tokenizers in GGUF terms: byte-level ones by the name of their split, SentencePiece ones by scores."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from export_models import VOCAB, dense, spec_of
from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE, WordLevel
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerFast

from gisp.errors import GispError
from gisp.export.formats.gguf import check as gguf_check
from gisp.export.formats.gguf.tokenizer import CHECK_TEXTS, read_vocabulary
from gisp.export.formats.gguf.write import export_gguf

gguf = pytest.importorskip("gguf")

needs_llama_cpp = pytest.mark.skipif(
    importlib.util.find_spec("llama_cpp") is None, reason="llama-cpp-python is not installed"
)
# As in the tokenizer.json of the models.
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|"
    r"\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SIZE = 600
SPACES = ("\u2581\u2581\u2581", "\u2581\u2581")
ORDERED = ("\u2581t", "th", "\u2581th", "in", "the", "\u2581the", "ing", "qu", "ic", "ick", "quick", *SPACES)


def _split_by(pattern: str) -> Any:
    plain = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), plain])


def _gpt2() -> Any:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)


SPLITS: dict[str, tuple[Any, bool]] = {
    "gpt-2": (_gpt2(), False),
    "smollm": (pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _gpt2()]), False),
    "llama-bpe": (_split_by(LLAMA3), True),
    "smaug-bpe": (_split_by(LLAMA3), False),
    "qwen2": (_split_by(QWEN2), False),
    "tekken": (_split_by(TEKKEN), True),
}


def _save(tokenizer: Tokenizer, folder: Path, **special: str) -> Path:
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    return folder


def _byte_level(folder: Path, name: str, *, adds_bos: bool = False) -> Path:
    split, ignore_merges = SPLITS[name]
    tokenizer = Tokenizer(BPE(ignore_merges=ignore_merges))
    tokenizer.pre_tokenizer, tokenizer.decoder = split, decoders.ByteLevel()
    if name == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<s>", "</s>"]
    trainer = BpeTrainer(vocab_size=SIZE, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    text = Path(__file__).read_text(encoding="utf-8").splitlines()
    tokenizer.train_from_iterator([*text, *CHECK_TEXTS], trainer)
    tokenizer.add_tokens(["<tool>"])
    if adds_bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return _save(tokenizer, folder, bos_token="<s>", eos_token="</s>")


def _sentencepiece(folder: Path, *, prefix: str = "always", skip: int = 0, last: tuple[str, str] | None = None) -> Path:
    """A tokenizer as transformers makes it of a SentencePiece model: tokens in the order of their scores.

    Args:
        skip: merges to leave out at the beginning.
        last: merge to move to the end.
    """
    characters = sorted({c for word in (*ORDERED, *CHECK_TEXTS) for c in word.replace(" ", "\u2581")})
    vocab = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *characters]
    vocab += ORDERED
    ids = {text: i for i, text in enumerate(vocab)}
    merges = [(word[:i], word[i:]) for word in ORDERED for i in range(1, len(word)) if {word[:i], word[i:]} <= set(ids)]
    merges.sort(key=lambda pair: pair == last)
    tokenizer = Tokenizer(BPE(ids, merges[skip:], unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("\u2581", prefix, split=False)
    tokenizer.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return _save(tokenizer, folder, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


@pytest.mark.parametrize("name", SPLITS)
def test_byte_level_tokenizers(name: str, tmp_path: Path) -> None:
    folder = _byte_level(tmp_path, name, adds_bos=name == "llama-bpe")
    vocabulary = read_vocabulary(folder, SIZE + 5)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    assert vocabulary is not None
    assert (vocabulary.model, vocabulary.split) == ("gpt2", name)
    assert vocabulary.tokens[: SIZE + 1] == tuple(tokenizer.convert_ids_to_tokens(range(SIZE + 1)))
    assert vocabulary.tokens[SIZE + 1 :] == ("[PAD601]", "[PAD602]", "[PAD603]", "[PAD604]")
    assert vocabulary.types[:3] == ("CONTROL", "CONTROL", "NORMAL")
    assert vocabulary.types[SIZE:] == ("USER_DEFINED", *["UNUSED"] * 4)
    assert len(vocabulary.merges) == SIZE - 2 - 256
    left, right = vocabulary.merges[-1].split(" ")
    assert left + right in vocabulary.tokens
    assert vocabulary.special == {"bos": 0, "eos": 1}
    assert vocabulary.adds == {"bos": name == "llama-bpe", "eos": False}
    assert vocabulary.check == tuple(tuple(tokenizer.encode(text)) for text in CHECK_TEXTS)


def test_sentencepiece_tokenizers(tmp_path: Path) -> None:
    folder = _sentencepiece(tmp_path)
    vocabulary = read_vocabulary(folder, 500)
    assert vocabulary is not None
    assert (vocabulary.model, vocabulary.split, vocabulary.merges) == ("llama", "default", ())
    scores = dict(zip(vocabulary.tokens, vocabulary.scores, strict=True))
    assert [scores[word] for word in ORDERED] == [-float(rank) for rank in range(len(ORDERED))]
    assert vocabulary.types[:4] == ("UNKNOWN", "CONTROL", "CONTROL", "BYTE")
    assert vocabulary.special == {"bos": 1, "eos": 2, "unk": 0}
    assert vocabulary.adds == {"bos": True, "eos": False}
    assert vocabulary.space_prefix
    plain = read_vocabulary(_sentencepiece(tmp_path / "plain", prefix="never"), 500)
    assert plain is not None
    assert not plain.space_prefix


def test_runs_of_spaces_may_share_a_score(tmp_path: Path) -> None:
    """Of one score in SentencePiece, they leave their merges mixed; here one run's stand around the other's."""
    folder = _sentencepiece(tmp_path, last=("\u2581", "\u2581\u2581"))
    vocabulary = read_vocabulary(folder, 500)
    assert vocabulary is not None
    scores = dict(zip(vocabulary.tokens, vocabulary.scores, strict=True))
    assert [scores[run] for run in SPACES] == [-11.0, -11.0]
    assert scores["quick"] == -10.0


def test_what_llama_cpp_cannot_express_is_refused(tmp_path: Path) -> None:
    words = Tokenizer(WordLevel({"a": 0, "?": 1}, unk_token="?"))
    _save(words, tmp_path / "words", unk_token="?")
    other = Tokenizer.from_file(str(_byte_level(tmp_path / "fine", "gpt-2") / "tokenizer.json"))
    other.pre_tokenizer = _split_by(r"\w+|\W+")
    _save(other, tmp_path / "split")
    other.pre_tokenizer = _gpt2()
    other.normalizer = normalizers.Lowercase()
    _save(other, tmp_path / "lower")
    spaces = Tokenizer.from_file(str(_sentencepiece(tmp_path / "pieces") / "tokenizer.json"))
    spaces.pre_tokenizer = pre_tokenizers.Sequence([])
    _save(spaces, tmp_path / "spaces")
    for folder, size, message in (
        (tmp_path / "words", 10, "llama.cpp knows no model WordLevel"),
        (tmp_path / "split", SIZE + 1, "llama.cpp knows no split"),
        (tmp_path / "lower", SIZE + 1, "after normalizer 'Lowercase'"),
        (tmp_path / "fine", SIZE, f"token id {SIZE}, the model {SIZE} ids"),
        (tmp_path / "spaces", 500, "SentencePiece merges of plain spaces"),
        (_sentencepiece(tmp_path / "some", skip=1), 500, "from some of its 1 pairs only"),
        (_sentencepiece(tmp_path / "ranks", last=("\u2581", "the")), 500, "between those of '\u2581the'"),
    ):
        with pytest.raises(GispError, match=message) as error:
            read_vocabulary(folder, size)
        assert "\n" not in str(error.value)
    (tmp_path / "words" / "tokenizer.json").write_text("{")
    with pytest.raises(GispError, match="cannot be read"):
        read_vocabulary(tmp_path / "words", 10)


def test_no_tokenizer_is_no_vocabulary(tmp_path: Path) -> None:
    assert read_vocabulary(None, 10) is None
    assert read_vocabulary(tmp_path, 10) is None


@pytest.mark.parametrize("kind", ["byte level", "sentencepiece"])
def test_the_file_holds_the_tokenizer(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf_check, "has_llama_cpp", lambda: False)
    byte_level = kind == "byte level"
    folder = _byte_level(tmp_path / "base", "llama-bpe") if byte_level else _sentencepiece(tmp_path / "base")
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    size = SIZE + 1
    export_gguf(dense("llama-mha", vocab_size=size), spec_of(), tmp_path / "out", tokenizer_from=folder)
    fields = gguf.GGUFReader(tmp_path / "out" / "model.gguf").fields
    entries = {key.removeprefix("tokenizer."): field.contents() for key, field in fields.items() if "tokenizer" in key}
    vocabulary = read_vocabulary(folder, size)
    assert vocabulary is not None
    assert entries["ggml.model"] == vocabulary.model
    assert entries["ggml.pre"] == vocabulary.split
    assert tuple(entries["ggml.tokens"]) == vocabulary.tokens
    assert [gguf.TokenType(value).name for value in entries["ggml.token_type"]] == list(vocabulary.types)
    assert entries["ggml.bos_token_id"] == vocabulary.special["bos"]
    assert entries["ggml.eos_token_id"] == vocabulary.special["eos"]
    assert entries["ggml.add_bos_token"] is (not byte_level)
    assert entries["ggml.add_eos_token"] is False
    assert entries["chat_template"] == "{{ messages }}"
    if byte_level:
        assert tuple(entries["ggml.merges"]) == vocabulary.merges
        assert "ggml.scores" not in entries
    else:
        assert tuple(entries["ggml.scores"]) == vocabulary.scores
        assert entries["ggml.add_space_prefix"] is True
        assert "ggml.merges" not in entries
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"| tokenizer | {vocabulary.model} ({vocabulary.split}) |" in card
    assert "llama-cli -m model.gguf" in card


def test_the_file_holds_all_templates_and_all_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf_check, "has_llama_cpp", lambda: False)
    folder, size = _byte_level(tmp_path / "base", "gpt-2"), SIZE + 1
    plain = read_vocabulary(folder, size)
    assert plain is not None and plain.chat_templates == {}
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    texts = {"default": "{{ messages }}", "tool_use": "{{ tools }}", "rag": "{{ documents }}"}
    settings["chat_template"] = [{"name": name, "template": text} for name, text in texts.items()]
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    base = dense("llama-mha", vocab_size=size)
    base.generation_config.eos_token_id = [plain.special["eos"], 7, 9, size]
    export_gguf(base, spec_of(), tmp_path / "out", tokenizer_from=folder)
    fields = gguf.GGUFReader(tmp_path / "out" / "model.gguf").fields
    entries = {key.removeprefix("tokenizer."): field.contents() for key, field in fields.items() if "tokenizer" in key}
    assert entries["chat_template"] == texts["default"]
    assert entries["chat_templates"] == ["rag", "tool_use"]
    assert {name: entries[f"chat_template.{name}"] for name in ("rag", "tool_use")} | {
        "default": texts["default"]
    } == texts
    ends = [entries[f"ggml.{name}_token_id"] for name in ("eos", "eot", "eom")]
    assert ends == [plain.special["eos"], 7, 9]


def test_ends_that_llama_cpp_knows_by_their_text_take_no_place(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_file(str(_byte_level(tmp_path / "plain", "gpt-2") / "tokenizer.json"))
    tokenizer.add_special_tokens(["<|im_end|>", "<|stop|>"])
    folder = _save(tokenizer, tmp_path / "chat", eos_token="<|im_end|>")
    known, own = (tokenizer.token_to_id(text) for text in ("<|im_end|>", "<|stop|>"))
    assert known is not None and own is not None
    vocabulary = read_vocabulary(folder, SIZE + 9, [known, own])
    assert vocabulary is not None
    assert vocabulary.special["eos"] == known and vocabulary.special["eot"] == own
    assert "eom" not in vocabulary.special


def test_other_ids_of_llama_cpp_leave_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = _byte_level(tmp_path / "base", "gpt-2")
    base, spec = dense("llama-mha", vocab_size=SIZE + 1), spec_of()
    vocabulary = read_vocabulary(folder, SIZE + 1)
    assert vocabulary is not None
    ids = [list(row) for row in vocabulary.check]

    def answer(file: Path, tokens: torch.Tensor, texts: Any) -> tuple[str, torch.Tensor, list[list[int]]]:
        model = gguf_check.read_model(file, base)
        with torch.no_grad():
            return "0.0", model(input_ids=tokens).logits, ids

    monkeypatch.setattr(gguf_check, "has_llama_cpp", lambda: True)
    monkeypatch.setattr(gguf_check, "run_llama_cpp", answer)
    export_gguf(base, spec, tmp_path / "fine", tokenizer_from=folder)
    assert "llama.cpp splits 5 check texts into the same tokens" in (tmp_path / "fine" / "README.md").read_text()
    ids[1][4] += 1
    with pytest.raises(GispError, match=r"llama\.cpp splits 'def main.* first at token 4: nothing was written"):
        export_gguf(base, spec, tmp_path / "out", tokenizer_from=folder)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "fine"]


@needs_llama_cpp
@pytest.mark.parametrize("name", [*SPLITS, "sentencepiece", "none"])
def test_llama_cpp_gives_the_same_ids(name: str, tmp_path: Path) -> None:
    """On the check texts when exporting, and on this file's lines, which are no such texts."""
    folder: Path | None
    if name == "sentencepiece":
        folder = _sentencepiece(tmp_path / "base")
    else:
        folder = _byte_level(tmp_path / "base", name) if name in SPLITS else None
    size = SIZE + 1 if folder else VOCAB
    export_gguf(dense("llama-mha", vocab_size=size), spec_of(), tmp_path / "out", tokenizer_from=folder)
    if folder is None:
        return
    lines = [line.strip() for line in Path(__file__).read_text(encoding="utf-8").splitlines()]
    # Control tokens in text are text to llama.cpp unless it is asked to see them.
    lines = [line for line in lines if line and not any(token in line for token in ("<s>", "</s>", "<unk>"))]
    _, _, ids = gguf_check.run_llama_cpp(tmp_path / "out" / "model.gguf", torch.zeros(1, 2, dtype=torch.int64), lines)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    assert ids == [tokenizer.encode(line) for line in lines]
