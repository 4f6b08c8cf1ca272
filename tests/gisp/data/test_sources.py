"""Conversations, folders saved by datasets, choices with contexts, and joins at a space."""

from __future__ import annotations

import json

import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from word_tokenizer import CHAT_TEMPLATE, save_tokenizer

from gisp.data import load_sequences, read_rows
from gisp.errors import GispError

ASKED = {"role": "user", "content": "the cat"}
CHAT = {"messages": [ASKED, {"role": "assistant", "content": "sat on"}]}
# user the cat stop assistant sat on stop
CHAT_IDS = [9, 1, 2, 11, 10, 3, 4, 11]


@pytest.fixture
def read(tmp_path):
    def read(rows, template=CHAT_TEMPLATE, **options):
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        tokenizer = save_tokenizer(tmp_path / "model", chat_template=template)
        given = {"vocab_size": 12, "seq_len": 32, "tokenizer_from": tokenizer, **options}
        found = load_sequences(tmp_path / "rows.jsonl", **given)
        return found, [(ids.tolist(), labels.tolist()) for ids, labels in found.rows]

    return read


def test_a_conversation_is_scored_whole_for_lm_and_by_its_last_turn_for_completion(read):
    assert read([CHAT])[1] == [(CHAT_IDS, CHAT_IDS)]
    _, rows = read([CHAT], objective="completion")
    assert rows == [(CHAT_IDS, [-100] * 5 + [3, 4, 11])]


def test_only_the_last_of_several_assistant_turns_is_scored(read):
    turns = [*CHAT["messages"], {"role": "user", "content": "a"}, {"role": "assistant", "content": "dog"}]
    _, [(ids, labels)] = read([{"messages": turns}], objective="completion")
    assert ids == [*CHAT_IDS, 9, 6, 11, 10, 7, 11]
    assert labels == [-100] * 12 + [7, 11]


def test_long_conversations_are_pieces_of_one_example(read):
    found, rows = read([CHAT, CHAT], seq_len=3)
    assert [ids for ids, _ in rows[:3]] == [CHAT_IDS[:3], CHAT_IDS[3:6], CHAT_IDS[6:]]
    assert found.examples == ((0, 1, 2), (3, 4, 5))
    _, [(ids, labels)] = read([CHAT], seq_len=3, objective="completion")
    assert (ids, labels) == (CHAT_IDS[-3:], [-100, 4, 11])


def test_a_byte_order_mark_is_no_part_of_the_text(tmp_path):
    for name, text in (("rows.jsonl", json.dumps({"text": "the cat"})), ("rows.txt", "the cat")):
        (tmp_path / name).write_text(text, encoding="utf-8-sig")
        assert list(read_rows(str(tmp_path / name))) == [{"text": "the cat"}]


@pytest.mark.parametrize(
    ("row", "options", "message"),
    [
        ({"text": 5}, {}, "row 0 has text 5: give a text"),
        ({"prompt": "a", "completion": 5}, {}, "row 0 has completion 5: give a text"),
        ({"context": "a", "choices": ["b"], "answer": 0}, {"objective": "margin"}, "no row has two: give wrong ones"),
    ],
)
def test_rows_that_lack_something_say_what(read, row, options, message):
    with pytest.raises(GispError, match=message):
        read([row], **options)


def test_choices_of_a_conversation_are_its_last_turn(read):
    row = {"messages": [ASKED], "choices": ["ran", "sat on"], "answer": 1}
    found, rows = read([row], objective="margin")
    assert found.signs == (-1, 1)
    assert rows == [([9, 1, 2, 11, 10, 8, 11], [-100] * 5 + [8, 11]), (CHAT_IDS, [-100] * 5 + [3, 4, 11])]


def test_contexts_differ_and_the_continuation_is_shared(read):
    row = {"contexts": ["the cat", "a dog"], "choices": [" ran", " ran"], "answer": 0}
    found, rows = read([row], objective="margin")
    assert found.signs == (1, -1)
    assert rows == [([1, 2, 8], [-100, -100, 8]), ([6, 7, 8], [-100, -100, 8])]


@pytest.mark.parametrize(
    ("row", "options", "message"),
    [
        (CHAT, {"template": None}, "the tokenizer has no chat template"),
        (CHAT, {"template": "{{ raise_exception('no system here') }}"}, "refuses a conversation: no system here"),
        (CHAT, {"objective": "margin"}, "margin needs rows of context"),
        ({"messages": [ASKED]}, {"objective": "completion"}, "does not end with an assistant's answer"),
        (
            CHAT,
            {"template": "{{ messages[-1].content }} stop", "objective": "completion"},
            "render the last turn behind",
        ),
        ({"messages": []}, {}, r"row 0 has messages \[\]"),
        ({"messages": [{"role": "user"}]}, {}, "row 0 has messages"),
        ({"contexts": ["a"], "choices": ["b", "c"], "answer": 0}, {}, "row 0 has contexts"),
    ],
)
def test_bad_conversations_end_in_one_line(read, row, options, message):
    with pytest.raises(GispError, match=message) as caught:
        read([row], **options)
    assert "\n" not in str(caught.value)


def test_a_completion_that_begins_with_a_space_is_read_behind_its_prompt(tmp_path):
    """A tokenizer that puts a space before every text sees two where such a completion is read alone."""
    words = ["<end>", "▁yes", "▁Answer:", "▁"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<end>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    folder = tmp_path / "model"
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>").save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    (tmp_path / "t.jsonl").write_text(json.dumps({"prompt": "Answer:", "completion": " yes"}))
    found = load_sequences(tmp_path / "t.jsonl", vocab_size=4, seq_len=8, tokenizer_from=str(folder))
    assert found.rows[0][0].tolist() == [2, 1]


def test_saved_datasets(tmp_path):
    datasets = pytest.importorskip("datasets")
    splits = {name: datasets.Dataset.from_list([{"text": f"the cat {name}"}]) for name in ("train", "validation")}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "both")
    splits["train"].save_to_disk(tmp_path / "one")
    assert list(read_rows(str(tmp_path / "both"))) == [{"text": "the cat train"}]
    assert list(read_rows(str(tmp_path / "both"), held_out=True)) == [{"text": "the cat validation"}]
    assert list(read_rows(str(tmp_path / "one"), held_out=True)) == [{"text": "the cat train"}]
    tokenizer = save_tokenizer(tmp_path / "model")
    found = load_sequences(tmp_path / "one", vocab_size=12, seq_len=4, tokenizer_from=tokenizer)
    assert found.rows[0][0].tolist() == [1, 2, 0, 0]
    datasets.DatasetDict({"validation": splits["validation"]}).save_to_disk(tmp_path / "half")
    with pytest.raises(GispError, match="has splits validation, no train"):
        list(read_rows(str(tmp_path / "half")))
    next((tmp_path / "one").glob("*.arrow")).write_bytes(b"broken")
    with pytest.raises(GispError, match="one cannot be read"):
        list(read_rows(str(tmp_path / "one")))


def test_rows_of_a_mixture_are_refused(tmp_path):
    with pytest.raises(GispError, match="is a mixture: it has no rows of its own"):
        list(read_rows("mix.yaml"))
