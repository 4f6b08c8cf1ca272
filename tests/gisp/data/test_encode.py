"""One encoder: lm-eval's tokens on tokenizers of every kind, the same for calibration and evaluation."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from eval_cases import byte_tokenizer, write_rows
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from word_tokenizer import CHAT_TEMPLATE

from gisp.data import load_sequences
from gisp.data.encode import PairEncoder
from gisp.data.sequences import IGNORED
from gisp.errors import GispError
from gisp.evaluate.choices import read_question
from gisp.evaluate.completions import read_completion
from gisp.evaluate.pairs import RequestEncoder

LETTERS = " abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789:?.<>/\n"


def metaspace_tokenizer(scheme: str, *, start: bool, end: bool = False) -> Any:
    """As sentencepiece makes them: a space is a letter, and one may stand before every text; some merges."""
    letters = [letter.replace(" ", "▁") for letter in LETTERS]
    merges = [("▁", "4"), ("▁", "y"), (":", "▁"), ("e", "s"), ("▁y", "es"), ("a", "b")]
    words = ["<s>", "</s>", "<unk>", *letters, *("".join(pair) for pair in merges)]
    inner = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, merges, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    inner.decoder = decoders.Metaspace(prepend_scheme=scheme)
    if start:
        single = "<s> $A </s>" if end else "<s> $A"
        inner.post_processor = TemplateProcessing(single=single, special_tokens=[("<s>", 0), ("</s>", 1)])
    named = {"bos_token": "<s>"} if start else {}
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>", unk_token="<unk>", **named)


TOKENIZERS: dict[str, Callable[[], Any]] = {
    "bytes": byte_tokenizer,
    "bytes with BOS": lambda: byte_tokenizer(start=True),
    "prefix space": lambda: metaspace_tokenizer("always", start=False),
    "first prefix space with BOS": lambda: metaspace_tokenizer("first", start=True),
    "prefix space with BOS": lambda: metaspace_tokenizer("always", start=True),
    "no prefix space with BOS": lambda: metaspace_tokenizer("never", start=True),
    "BOS and EOS": lambda: metaspace_tokenizer("always", start=True, end=True),
}
PAIRS = [
    ("Answer:", " yes"),
    ("Answer: ", "4"),
    ("Answer:", "4"),
    ("Answer:  \n", "yes yes"),
    ("a", "bc cab"),
    ("<s>Answer:", " 4"),
    ("<end>cab", " 4"),
    ("", "yes"),
    ("", " yes"),
    ("", "<s>yes"),
]


@pytest.fixture(params=TOKENIZERS)
def tokenizer(request: pytest.FixtureRequest) -> Any:
    made = TOKENIZERS[request.param]()
    made.chat_template = CHAT_TEMPLATE
    return made


def lm_eval_tokens(tokenizer: Any, pairs: list[tuple[str, str]]) -> list[tuple[list[int], list[int]]]:
    """What lm-eval's own HFLM hands to its model."""
    base: Any = pytest.importorskip("lm_eval.models.huggingface").HFLM
    found: list[tuple[list[int], list[int]]] = []

    class Recorder(base):
        backend = "causal"
        add_bos_token = None
        custom_prefix_token_id = None
        enable_thinking = False

        def __init__(self) -> None:
            self.tokenizer = tokenizer

        def _loglikelihood_tokens(self, requests: Any, **_: Any) -> list[Any]:
            found.extend((context, continuation) for _, context, continuation in requests)
            return []

    Recorder().loglikelihood([SimpleNamespace(args=pair) for pair in pairs], disable_tqdm=True)
    return found


def test_pairs_have_the_tokens_of_lm_eval(tokenizer: Any) -> None:
    encoder = PairEncoder(tokenizer)
    chat = [{"role": "user", "content": "a cab"}, {"role": "assistant", "content": "yes"}]
    pairs = [*PAIRS, encoder.last_turn(chat, "row 0")]
    found = [encoder.pair(*pair, "row 0") for pair in pairs]
    assert [(list(pair.context), list(pair.continuation)) for pair in found] == lm_eval_tokens(tokenizer, pairs)


def test_a_bos_is_there_once_and_a_space_at_the_seam_is_counted_once() -> None:
    encoder = PairEncoder(TOKENIZERS["prefix space with BOS"]())
    ids = encoder.tokenizer.convert_tokens_to_ids
    for context, continuation in (("Answer: ", "4"), ("Answer:", " 4"), ("<s>Answer:", " 4")):
        pair = encoder.pair(context, continuation, "row 0")
        assert pair.context.count(0) == 1 and pair.context[0] == 0
    one, other = encoder.pair("Answer:", " yes", "row 0"), encoder.pair("Answer: ", "yes", "row 0")
    assert one == other and one.continuation == (ids("▁yes"),)
    assert encoder.pair("", "yes", "row 0").continuation == (ids("▁yes"),)


ROWS: dict[str, dict[str, Any]] = {
    "completion": {"prompt": "Answer: ", "completion": "4"},
    "completion behind nothing": {"prompt": "", "completion": "yes"},
    "choices": {"context": "Answer: ", "choices": ["4", "yes"], "answer": 1},
    "contexts": {"contexts": ["a cab ", "yes"], "choices": [" 4", " 4"], "answer": 0},
    "messages": {"messages": [{"role": "user", "content": "a cab"}], "choices": ["yes", "4"], "answer": 0},
}


@pytest.mark.parametrize("kind", ROWS)
def test_calibration_and_evaluation_read_a_row_alike(kind: str, tokenizer: Any, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    row = ROWS[kind]
    data = write_rows(tmp_path / "rows.jsonl", [row])
    calibrated = load_sequences(
        data,
        vocab_size=len(tokenizer),
        seq_len=64,
        tokenizer_from=str(tmp_path / "model"),
        objective="margin" if "choices" in row else "completion",
    )
    encoder = RequestEncoder(tokenizer, 64, len(tokenizer))
    if "choices" in row:
        requests = read_question(row, encoder, "row 0").requests
    else:
        requests = (read_completion(row, encoder, "row 0").request,)
    evaluated = [([*r.inputs, r.targets[-1]], list(r.targets)) for r in requests]
    scored = [(ids.tolist(), labels[labels != IGNORED].tolist()) for ids, labels in calibrated.rows]
    assert scored == evaluated


def test_conversations_scored_whole_begin_as_lm_eval_begins_them(tokenizer: Any, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    row = {"messages": [{"role": "user", "content": "a cab"}, {"role": "assistant", "content": "yes"}]}
    data = write_rows(tmp_path / "rows.jsonl", [row])
    found = load_sequences(data, vocab_size=99, seq_len=64, tokenizer_from=str(tmp_path / "model"))
    assert found.rows[0][0].tolist() == tokenizer.encode("user a cab stop assistant yes stop ")


def test_a_tokenizer_with_code_of_its_own_is_not_asked_about(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = {}

    def refuse(_: str, **options: Any) -> None:
        given.update(options)
        raise ValueError("contains custom code")

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", refuse)
    data = write_rows(tmp_path / "rows.jsonl", [{"text": "a cab"}])
    with pytest.raises(GispError, match="has no usable tokenizer: contains custom code"):
        load_sequences(data, vocab_size=99, seq_len=8, tokenizer_from="somewhere")
    assert given["trust_remote_code"] is False
