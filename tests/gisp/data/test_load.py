"""Sequences from token files and text: shapes, labels, signs and one clear line for bad input."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from gisp.data import Sequences, load_sequences, read_rows
from gisp.data.sequences import IGNORED
from gisp.errors import GispError

WORDS = ["<end>", "the", "cat", "sat", "on", "mat", "a", "dog", "ran"]


@pytest.fixture
def tokenizer_folder(tmp_path):
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<end>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    folder = tmp_path / "model"
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>").save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    return str(folder)


def read(spec, tokenizer=None, **options):
    return load_sequences(spec, **{"vocab_size": 9, "seq_len": None, "tokenizer_from": tokenizer, **options})


def lists(sequences: Sequences) -> list[tuple[list[int], list[int]]]:
    return [(ids.tolist(), labels.tolist()) for ids, labels in sequences.rows]


def test_token_rows_stay_as_they_are_unless_a_length_is_given(tmp_path):
    path = tmp_path / "t.safetensors"
    save_file({"input_ids": torch.tensor([[1, 2, 3, 4, 5]], dtype=torch.int16)}, path)
    assert lists(read(str(path))) == [([1, 2, 3, 4, 5], [1, 2, 3, 4, 5])]
    cut = read(str(path), seq_len=2)
    assert [ids for ids, _ in lists(cut)] == [[1, 2], [3, 4]]


def test_labels_are_kept_and_checked(tmp_path):
    path = tmp_path / "t.safetensors"
    ids = torch.tensor([[1, 2, 3]])
    save_file({"input_ids": ids, "labels": torch.tensor([[IGNORED, IGNORED, 3]])}, path)
    assert lists(read(str(path))) == [([1, 2, 3], [IGNORED, IGNORED, 3])]
    save_file({"input_ids": ids, "labels": torch.tensor([[3, IGNORED, IGNORED]])}, path)
    with pytest.raises(GispError, match="sequence 0 has no scored token"):
        read(str(path))
    save_file({"input_ids": ids, "labels": torch.tensor([[1, 2]])}, path)
    with pytest.raises(GispError, match="must have one shape"):
        read(str(path))


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (torch.ones(2, 3), "must hold integers"),
        (torch.ones(2, 3, dtype=torch.bool), "must hold integers"),
        (torch.ones(6, dtype=torch.int64), r"must be \[sequences, tokens\]"),
        (torch.ones(0, 3, dtype=torch.int64), "at least one sequence"),
        (torch.ones(3, 1, dtype=torch.int64), "at least one sequence"),
        (torch.tensor([[1, 9]]), "holds 9, outside"),
        (torch.tensor([[1, -1]]), "holds -1, outside"),
    ],
)
def test_bad_tokens_name_the_value(tensor, message):
    with pytest.raises(GispError, match=message):
        read(tensor)


def test_text_is_packed_with_end_tokens(tmp_path, tokenizer_folder):
    path = tmp_path / "t.jsonl"
    path.write_text('{"text": "the cat sat"}\n\n{"text": "a dog ran"}\n')
    assert [ids for ids, _ in lists(read(str(path), tokenizer_folder, seq_len=4))] == [
        [1, 2, 3, 0],
        [6, 7, 8, 0],
    ]
    plain = tmp_path / "t.txt"
    plain.write_text("the cat sat on the mat")
    assert [ids for ids, _ in lists(read(str(plain), tokenizer_folder, seq_len=3))] == [
        [1, 2, 3],
        [4, 1, 5],
    ]


def test_completions_score_the_completion_alone(tmp_path, tokenizer_folder):
    path = tmp_path / "t.jsonl"
    path.write_text(json.dumps({"prompt": "the cat", "completion": " sat on"}) + "\n")
    assert lists(read(str(path), tokenizer_folder)) == [([1, 2, 3, 4], [IGNORED, IGNORED, 3, 4])]


def test_choices_carry_signs_for_margin_and_the_gold_answer_for_lm(tmp_path, tokenizer_folder):
    path = tmp_path / "t.jsonl"
    row = {"context": "the cat", "choices": [" ran", " sat", " mat"], "answer": 1}
    path.write_text(json.dumps(row) + "\n")
    margin = read(str(path), tokenizer_folder, objective="margin")
    assert margin.signs == (-1, 1, -1)
    assert margin.examples == ((0, 1, 2),)
    gold = read(str(path), tokenizer_folder, objective="lm")
    assert lists(gold) == [([1, 2, 3], [IGNORED, IGNORED, 3])]


def test_parquet_equals_jsonl(tmp_path, tokenizer_folder):
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    rows = [{"text": "the cat sat on a mat"}, {"text": "a dog ran"}]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "t.parquet")
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = [lists(read(str(tmp_path / f"t.{kind}"), tokenizer_folder, seq_len=4)) for kind in ("parquet", "jsonl")]
    assert found[0] == found[1]
    assert len(found[0]) == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no rows"),
        ('{"text": ""}\n{"text": " \\n"}', "holds no text: its rows are empty"),
        ('{"text": "the cat', "line 1 is not JSON"),
        ('["the cat"]', "line 1 holds a list"),
        ('{"body": "the cat"}', "row 0 has keys body"),
        ('{"text": "the cat"}\n{"prompt": "a", "completion": "dog"}', "row 1 is not of the same kind"),
        ('{"context": "a", "choices": ["dog"], "answer": 3}', "row 0 has answer 3"),
        ('{"prompt": "the", "completion": ""}', "empty prompt or completion"),
    ],
)
def test_bad_text_names_the_row(tmp_path, tokenizer_folder, text, message):
    path = tmp_path / "t.jsonl"
    path.write_text(text)
    with pytest.raises(GispError, match=message):
        read(str(path), tokenizer_folder)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le"])
@pytest.mark.parametrize("kind", ["txt", "jsonl"])
def test_text_of_another_encoding_is_refused(tmp_path, tokenizer_folder, encoding, kind):
    path = tmp_path / f"t.{kind}"
    path.write_bytes(('{"text": "the cat sat"}' if kind == "jsonl" else "the cat sat\n").encode(encoding))
    with pytest.raises(GispError, match=r"is not UTF-8 text|save it as UTF-8|is not JSON"):
        read(str(path), tokenizer_folder)


def test_padding_in_a_token_file_is_right_and_not_scored_or_refused(tmp_path):
    path = tmp_path / "t.safetensors"
    ids = torch.tensor([[1, 2, 3, 0], [1, 2, 3, 4]])
    mask = (ids > 0).long()
    labels = torch.where(mask > 0, ids, IGNORED)
    save_file({"input_ids": ids, "labels": labels, "attention_mask": mask}, path)
    assert lists(read(str(path)))[0] == ([1, 2, 3, 0], [1, 2, 3, IGNORED])
    save_file({"input_ids": ids, "attention_mask": torch.ones_like(mask)}, path)
    assert len(lists(read(str(path)))) == 2
    left = {
        "input_ids": ids.flip(1),
        "labels": labels.flip(1).contiguous(),
        "attention_mask": mask.flip(1).contiguous(),
    }
    scored = {"input_ids": ids, "attention_mask": mask}
    for bad in (left, scored):
        save_file({name: tensor.contiguous() for name, tensor in bad.items()}, path)
        with pytest.raises(GispError, match="attention_mask leaves out tokens that are scored or stand before others"):
            read(str(path))
    save_file({"input_ids": ids, "attention_mask": mask[:1].contiguous()}, path)
    with pytest.raises(GispError, match="differ in shape"):
        read(str(path))


def test_tensors_in_memory_are_read_as_their_file(tmp_path):
    ids = torch.tensor([[1, 2, 3, 0], [4, 5, 6, 7]])
    labels = torch.tensor([[-100, 2, 3, -100], [4, 5, 6, 7]])
    for tensors in (
        {"input_ids": ids},
        {"input_ids": ids, "labels": labels},
        {"input_ids": ids, "labels": labels, "attention_mask": (ids != 0).long()},
    ):
        save_file(tensors, tmp_path / "t.safetensors")
        for seq_len in (None, 2):
            assert lists(read(tensors, seq_len=seq_len)) == lists(read(tmp_path / "t.safetensors", seq_len=seq_len))
    assert lists(read({"input_ids": ids, "labels": None})) == lists(read(ids))
    assert len(read({"input_ids": ids, "labels": labels}, objective="completion")) == 2


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"text": ["a"]}, "the mapping of token tensors holds text: it must hold input_ids"),
        ({}, "holds nothing: it must hold input_ids"),
        ({"input_ids": [[1, 2]]}, "input_ids is a list, it must be a tensor"),
        ({"input_ids": None}, "input_ids is None, it must be a tensor"),
        ({"input_ids": torch.ones(1, 4).long(), "labels": torch.ones(1, 3).long()}, "must have one shape"),
        ({"input_ids": torch.ones(1, 4).long(), "attention_mask": torch.tensor([[0, 1, 1, 1]])}, "pad on the right"),
    ],
)
def test_bad_tensors_in_memory_name_the_value(tensors, message):
    with pytest.raises(GispError, match=message):
        read(tensors)


def test_text_without_a_tokenizer_and_unknown_names_are_refused(tmp_path):
    path = tmp_path / "t.txt"
    path.write_text("the cat")
    with pytest.raises(GispError, match="no tokenizer is known"):
        read(str(path))
    with pytest.raises(GispError, match="is neither a"):
        read("no-such-data")
    with pytest.raises(GispError, match="margin needs rows of context"):
        read(torch.tensor([[1, 2]]), objective="margin")


def test_padding_is_on_the_right_and_not_scored():
    rows = [(torch.tensor([1, 2, 3]), torch.tensor([1, 2, 3])), (torch.tensor([4, 5]), torch.tensor([4, 5]))]
    ids, labels = Sequences.plain(rows).batch([0, 1])
    assert ids.tolist() == [[1, 2, 3], [4, 5, 0]]
    assert labels.tolist() == [[1, 2, 3], [4, 5, IGNORED]]


def test_pieces_of_a_row_count_as_one_sample_and_need_one_scored_token_together(tmp_path):
    path = tmp_path / "t.safetensors"
    ids = torch.tensor([[1, 2, 3, 4, 5, 6], [6, 5, 4, 3, 2, 1]])
    labels = ids.clone()
    labels[0, :4] = IGNORED
    save_file({"input_ids": ids, "labels": labels}, path)
    sequences = read(str(path), seq_len=3)
    assert [ids for ids, _ in lists(sequences)] == [[4, 5, 6], [6, 5, 4], [3, 2, 1]]
    assert sequences.examples == ((0,), (1, 2))
    assert len(sequences.first(1)) == 1


@pytest.mark.parametrize("line", ['{"text": "\\ud800 abc"}', '{"text": ' + "1" * 5000 + "}", "[" * 100000])
def test_json_that_only_looks_like_it_names_its_line(line, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "sound"}\n' + line + "\n")
    with pytest.raises(GispError, match="line 2 is not JSON"):
        list(read_rows(str(path)))
