"""Tables of the rotation: made once for all slices of a step, and right for every length, dtype and kind."""

from __future__ import annotations

import pytest
import torch
from tiny import tiny_model

from gisp.score.fused import batch


def expected(decoder, length):
    like = torch.empty(0, dtype=decoder.embed_tokens.weight.dtype)
    cos, sin = decoder.rotary_emb(like, position_ids=torch.arange(length)[None])
    return cos[0], sin[0]


def test_tables_of_a_length_are_made_once():
    decoder, device = tiny_model().model, torch.device("cpu")
    for length in (8, 8, 5, 8):
        found = batch.rotary_tables(decoder, length, device)
        assert all(torch.equal(a, b) for a, b in zip(found, expected(decoder, length), strict=True))
        assert batch.rotary_tables(decoder, length, device)[0] is found[0]
    decoder.to(torch.bfloat16)
    assert batch.rotary_tables(decoder, 8, device)[0].dtype == torch.bfloat16
    assert len(batch._tables[decoder.rotary_emb]) == 1


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_tables_that_follow_what_was_seen_are_made_every_time(kind):
    decoder, device = tiny_model().model, torch.device("cpu")
    decoder.rotary_emb.rope_type = kind
    made: list[int] = []

    def make(like, position_ids):
        made.append(position_ids.shape[1])
        return torch.zeros(2, 1, 8, 4)

    decoder.rotary_emb.forward = make
    for _ in range(2):
        batch.rotary_tables(decoder, 8, device)
    assert made == [8, 8]
