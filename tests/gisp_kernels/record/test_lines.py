"""record_lines, projections by an index, second powers and scores of elements, against autograd's weight gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from recorder_oracle import Attention, Block, grad_of
from torch import nn

from gisp_kernels import Projection, StructureGroup, record_importance, record_lines
from gisp_kernels.ops import products
from gisp_kernels.record import scored
from gisp_kernels.record.targets import Mode

MODES: tuple[Mode, ...] = ("stream", "exact")


class Conv1D(nn.Module):
    """As transformers has it: the weight is [inputs, outputs]."""

    def __init__(self, outputs: int, inputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(inputs, outputs))
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.addmm(self.bias, x.view(-1, x.shape[-1]), self.weight).view(*x.shape[:-1], -1)


def product(weight: Any, power: int = 1) -> torch.Tensor:
    """``|W * G| ** power`` of a weight whose gradient autograd left, float64."""
    return (weight.double() * grad_of(weight).double()).abs().detach() ** power


@pytest.mark.parametrize("keep_grad", [False, True])
@pytest.mark.parametrize("power", [1, 2])
@pytest.mark.parametrize("mode", MODES)
def test_rows_columns_and_elements_of_one_product(mode: Mode, power: int, keep_grad: bool) -> None:
    layers = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 4))
    batches = torch.randn(2, 5, 6)
    truth = [torch.zeros(9, 6, dtype=torch.float64), torch.zeros(4, 9, dtype=torch.float64)]
    for batch in batches:
        if mode == "stream":
            layers.zero_grad()
        layers(batch).pow(2).sum().backward()
        for total, linear in zip(truth, (layers[0], layers[2]), strict=True):
            new = product(linear.weight, power)
            total.copy_(new if mode == "exact" else total + new)
    layers.zero_grad()
    with record_lines(layers, ("row", "column", "element"), mode=mode, power=power, keep_grad=keep_grad) as recorder:
        for batch in batches:
            layers(batch).pow(2).sum().backward()
    assert set(recorder.scores()) == {f"{name}.{axis}" for name in "02" for axis in ("row", "column", "element")}
    for total, linear in zip(truth, (layers[0], layers[2]), strict=True):
        for axis, expected in (("row", total.sum(1)), ("column", total.sum(0)), ("element", total)):
            found = recorder.scores_of(linear, axis)  # type: ignore[arg-type]
            # Terms of a single element may cancel.
            atol = 1e-6 * float(expected.max()) if axis == "element" else 0.0
            torch.testing.assert_close(found.double(), expected, rtol=2e-5, atol=atol)


def test_both_axes_cost_one_product(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []

    def counted(*args: torch.Tensor) -> torch.Tensor:
        made.append(args)
        return products.weight_grad(*args)

    monkeypatch.setattr(scored, "weight_grad", counted)
    monkeypatch.setattr(scored, "wgrad_importance", None)
    linear = nn.Linear(6, 4)
    with record_lines({"own": linear}) as recorder:
        linear(torch.randn(5, 6)).sum().backward()
    assert len(made) == 1
    assert recorder.scores()["own.column"].shape == (6,)


def test_scores_of_names_what_is_not_scored() -> None:
    linear = nn.Linear(6, 4)
    recorder = record_lines([linear], ["row"])
    with pytest.raises(KeyError, match="weight of this Linear is not scored by columns"):
        recorder.scores_of(linear, "column")
    with pytest.raises(KeyError, match="not scored by rows"):
        recorder.scores_of(nn.Linear(6, 4), "row")
    twice = [StructureGroup(n, (Projection(linear, "row", b),)) for n, b in (("a", 1), ("b", 2))]
    with pytest.raises(KeyError, match="in 2 ways by rows"):
        record_importance(twice).scores_of(linear, "row")


def test_what_lines_cannot_be() -> None:
    with pytest.raises(ValueError, match="not for lines"):
        record_lines([nn.Linear(2, 2)], mode="second-order")
    with pytest.raises(ValueError, match=r"no nn.Linear found in ReLU"):
        record_lines(nn.ReLU())
    with pytest.raises(ValueError, match="power 2 is for modes"):
        record_lines([nn.Linear(2, 2)], mode="signed", power=2)
    with pytest.raises(ValueError, match="elements are scored in modes"):
        record_lines([nn.Linear(2, 2)], ["element"], mode="signed")


@pytest.mark.parametrize("mode", ["stream", "exact", "signed", "second-order"])
def test_fused_weights_by_an_index_score_as_their_parts(mode: Mode) -> None:
    apart, x = Attention(16, 3, 8, bias=True), torch.randn(2, 7, 16)
    fused = nn.Linear(16, 72)
    parts = (apart.q_proj, apart.k_proj, apart.v_proj)
    with torch.no_grad():
        fused.weight.copy_(torch.cat([p.weight for p in parts]))
        fused.bias.copy_(torch.cat([p.bias for p in parts]))
    rows = torch.arange(72).view(3, 3, 8).transpose(0, 1).flatten(1)
    groups = [
        StructureGroup("apart", tuple(Projection(p, "row", 8) for p in parts)),
        StructureGroup("fused", (Projection(fused, "row", index=rows),)),
    ]
    if mode == "second-order":
        # It reads one projection: the same heads, interleaved and in blocks.
        groups = [StructureGroup("apart", (Projection(apart.q_proj, "row", 8),))]
        groups += [StructureGroup("fused", (Projection(fused, "row", index=rows[:, :8]),))]
    with record_importance(groups, mode=mode) as recorder:
        for q, k, v in ([p(x) for p in parts], fused(x).chunk(3, -1)):
            (q.sin() * k.cos() * v).pow(2).mean().backward()
    scores = recorder.scores()
    torch.testing.assert_close(scores["fused"], scores["apart"], rtol=1e-4, atol=1e-6)


def test_columns_by_an_index_may_be_closed() -> None:
    linear, x = nn.Linear(6, 4, bias=False), torch.randn(2, 3, 6)
    index = torch.tensor([[0, 3], [1, 4], [2, 5]])
    group = StructureGroup("g", (Projection(linear, "column", index=index),))
    closed = torch.tensor([False, True, False])
    with record_importance([group], mode="second-order", closed={"g": closed}):
        output = linear(x)
    kept = [0, 2, 3, 5]
    torch.testing.assert_close(output, x[..., kept] @ linear.weight[:, kept].T)


def test_lines_that_no_structure_owns_count_for_none() -> None:
    linear, x = nn.Linear(3, 5), torch.randn(4, 3)
    linear(x).pow(2).sum().backward()
    truth = product(linear.weight).sum(1)[[4, 1]]
    projection = Projection(linear, "row", index=torch.tensor([[4], [1]]))
    with record_importance([StructureGroup("g", (projection,))]) as recorder:
        linear(x).pow(2).sum().backward()
    torch.testing.assert_close(recorder.scores()["g"].double(), truth, rtol=1e-5, atol=0.0)


@pytest.mark.parametrize("keep_grad", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_conv1d_is_read_outputs_first(mode: Mode, keep_grad: bool) -> None:
    layer, x = Conv1D(5, 3), torch.randn(2, 4, 3)
    layer(x).pow(2).sum().backward()
    truth = product(layer.weight).T
    kept = grad_of(layer.weight).clone()
    with record_lines([layer], mode=mode, keep_grad=keep_grad) as recorder:
        layer(x).pow(2).sum().backward()
    torch.testing.assert_close(recorder.scores_of(layer, "row").double(), truth.sum(1), rtol=1e-5, atol=0.0)
    torch.testing.assert_close(recorder.scores_of(layer, "column").double(), truth.sum(0), rtol=1e-5, atol=0.0)
    assert torch.equal(grad_of(layer.weight), 2 * kept if keep_grad else kept)


def test_own_forwards_have_no_uses_to_predict_from() -> None:
    with pytest.raises(ValueError, match=r"scores the forward of a plain nn.Linear"):
        record_importance([Conv1D(5, 3)], mode="second-order")


def test_projections_are_equal_by_what_they_own() -> None:
    linear = nn.Linear(4, 4)
    index = torch.tensor([[0, 1]])
    assert Projection(linear, "row", 2) == Projection(linear, "row", 2)
    assert hash(Projection(linear, "row", 2)) == hash(Projection(linear, "row", 2))
    assert Projection(linear, "row", index=index) == Projection(linear, "row", index=index.clone())
    different = (
        Projection(linear, "row", 2),
        Projection(linear, "column"),
        Projection(nn.Linear(4, 4), "row"),
        Projection(linear, "row", index=index),
    )
    assert all(Projection(linear, "row") != other for other in different)
    assert Projection(linear, "row", index=index) != Projection(linear, "row", index=index + 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"axis": "rows"}, "axis must be 'row', 'column' or 'element'"),
        ({"axis": "row", "block": 0}, "block must be at least 1"),
        ({"axis": "element", "block": 2}, "elements stand alone"),
        ({"axis": "row", "block": 2, "index": torch.zeros(1, 1).long()}, "takes the place of block"),
        ({"axis": "element", "index": torch.zeros(1, 1).long()}, "takes the place of block"),
        ({"axis": "row", "index": torch.zeros(1, 1)}, "must be an int64 tensor"),
        ({"axis": "row", "index": torch.zeros(1).long()}, "must be an int64 tensor"),
        ({"axis": "row", "index": torch.tensor([[4]])}, "must name rows from 0 to 3"),
        ({"axis": "column", "index": torch.tensor([[-1]])}, "must name columns from 0 to 2"),
    ],
)
def test_projections_that_do_not_fit(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Projection(nn.Linear(3, 4), **options)  # type: ignore[arg-type]


def test_groups_compare_indexed_and_blocked_counts() -> None:
    linear = nn.Linear(3, 4)
    with pytest.raises(ValueError, match=r"by rows of an index of 3, .* by columns of 2"):
        StructureGroup(
            "g", (Projection(linear, "row", index=torch.tensor([[0], [1], [2]])), Projection(linear, "column", 2))
        )


@pytest.mark.parametrize("axes", [("row", "column"), ("column",), ("row", "element")])
def test_lines_agree_with_groups(axes: tuple[str, ...]) -> None:
    model, batch = Block(), torch.randn(2, 7, 16)
    with record_lines(model, axes) as lines:  # type: ignore[arg-type]
        model.loss(batch).backward()
    with record_importance(model) as groups:
        model.loss(batch).backward()
    if axes == ("row", "column"):
        mlp = model.mlp
        total = sum(lines.scores_of(m, "row") for m in (mlp.gate_proj, mlp.up_proj)) + lines.scores_of(
            mlp.down_proj, "column"
        )
        torch.testing.assert_close(total, groups.scores()["mlp"])
    assert len(lines.scores()) == 7 * len(axes)
