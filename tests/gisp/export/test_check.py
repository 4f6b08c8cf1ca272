"""How near an export's logits must be: 1e-5, or the rounding of the masked model itself where that is larger."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from export_models import CHANNELS, HEADS, dense

from gisp.errors import GispError
from gisp.export import check
from gisp.export.check import Reference, exact_logits, relative_difference
from gisp.export.spec import TOLERANCE
from gisp.model.keep import Keep
from gisp.model.structures import map_model

ALL = Keep(4 * (tuple(range(HEADS)),), 4 * (tuple(range(CHANNELS)),))


@pytest.mark.parametrize(("rounding", "difference", "accepted"), [
    (1e-6, 0.9e-5, True),
    (1e-6, 1.1e-5, False),
    (1e-4, 1.9e-4, True),
    (1e-4, 2.1e-4, False),
])  # fmt: skip
def test_the_bound_follows_the_rounding(
    rounding: float, difference: float, accepted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = dense("llama-gqa")
    reference = Reference(base, map_model(base), ALL)
    largest = float(reference.logits.abs().max())
    shift = torch.zeros_like(reference.logits)
    shift[0, 0, 0] = largest
    exported = object()

    def logits(model: Any, *_: Any) -> torch.Tensor:
        return (
            reference.logits + shift * difference if model is exported else reference.logits.double() + shift * rounding
        )

    monkeypatch.setattr(check, "exact_logits", logits)
    if accepted:
        _, found, bound = reference.compare(exported)
        assert found == pytest.approx(difference, rel=0.05)
        assert bound == (TOLERANCE if difference < TOLERANCE else pytest.approx(2 * rounding, rel=0.05))
    else:
        with pytest.raises(GispError, match="logits of the exported model differ"):
            reference.compare(exported)


def test_logits_in_float64_are_those_of_a_float64_model() -> None:
    base = dense("llama-gqa", torch.bfloat16)
    reference = Reference(base, map_model(base), ALL)
    truth = exact_logits(base, reference.tokens, dtype=torch.float64)
    with torch.no_grad():
        # Its frequencies stay as loading computes them.
        wide = dense("llama-gqa", torch.bfloat16).double()
        wide.model.rotary_emb = type(wide.model.rotary_emb)(config=wide.config)
        expected = wide(input_ids=reference.tokens).logits
    assert truth.dtype == torch.float64
    assert torch.equal(truth, expected)
    assert 0 < relative_difference(truth, reference.logits) < TOLERANCE
    assert base.dtype == torch.bfloat16
