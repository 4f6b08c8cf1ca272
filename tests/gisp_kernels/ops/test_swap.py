"""Swapping blocks in place: every backend against indexing, exact to the bit, and nothing else touched."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from interpreter import shuffled_grid
from partition_cases import BACKENDS, NEEDS_INTERPRETER, NO_CORE, bits, random_bits, random_pairs, swap_blocks, swapped

from gisp_kernels import _ext
from gisp_kernels.ops import swap
from gisp_kernels.ops.swap import PreparedSwaps

DTYPES = [torch.int8, torch.bfloat16, torch.float16, torch.float32, torch.float64]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("shape", "axis", "block"),
    [
        ((12, 32), "row", 1),
        ((12, 33), "row", 3),
        ((14, 7), "row", 2),
        ((5, 24), "column", 1),
        ((9, 39), "column", 3),
        ((17, 64), "column", 16),
        ((10, 1), "row", 1),
        ((1, 10), "column", 2),
        ((12,), "row", 1),
        ((21,), "row", 3),
    ],
    ids=str,
)
def test_equals_gather(backend: str, dtype: torch.dtype, shape: tuple[int, ...], axis: str, block: int) -> None:
    tensor = random_bits(shape, dtype)
    count = shape[0 if axis == "row" else 1] // block
    pairs = random_pairs(count, count // 2 if count < 8 else 3)
    expected = swapped(tensor, pairs, axis, block)
    before = bits(tensor).clone()
    pointer = tensor.data_ptr()
    swap_blocks([tensor], [pairs], [axis], [block], backend=backend)
    assert torch.equal(bits(tensor), bits(expected))
    assert tensor.data_ptr() == pointer
    swap_blocks([tensor], [pairs.flip(1)], [axis], [block], backend=backend)
    assert torch.equal(bits(tensor), before)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("offset", [0, 1, 3, 8])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(("axis", "block"), [("row", 2), ("column", 1), ("column", 4)])
@pytest.mark.parametrize(("width", "pitch"), [(16, 32), (12, 19)])
def test_leaves_the_rest_of_the_storage_alone(
    backend: str, offset: int, dtype: torch.dtype, axis: str, block: int, width: int, pitch: int
) -> None:
    storage = random_bits((offset + 10 * pitch + 40,), dtype)
    view = storage.as_strided((10, width), (pitch, 1), offset)
    pairs = torch.tensor([[0, 2], [3, 1]]) if (axis, block) == ("column", 4) and width == 16 else torch.tensor([[0, 2]])
    expected_storage = storage.clone()
    expected_storage.as_strided((10, width), (pitch, 1), offset).copy_(swapped(view, pairs, axis, block))
    swap_blocks([view], [pairs], [axis], [block], backend=backend)
    assert torch.equal(bits(storage), bits(expected_storage))


@pytest.mark.parametrize("backend", BACKENDS)
def test_many_tensors_of_different_kinds_in_one_call(backend: str) -> None:
    kinds = [
        ((40, 24), torch.float32, "row", 4, 3),
        ((24, 40), torch.float16, "column", 4, 5),
        ((40,), torch.float16, "row", 4, 2),
        ((30, 0), torch.float32, "row", 1, 4),
        ((0, 30), torch.float32, "column", 1, 4),
        ((31, 29), torch.float64, "row", 1, 0),
        ((31, 29), torch.int8, "column", 1, 7),
        ((3, 2100), torch.float16, "row", 1, 1),
    ]
    tensors = [random_bits(shape, dtype) for shape, dtype, *_ in kinds]
    pairs = [random_pairs(shape[0 if axis == "row" else 1] // block, n) for shape, _, axis, block, n in kinds]
    axes = [kind[2] for kind in kinds]
    blocks = [kind[3] for kind in kinds]
    expected = [swapped(*entry) for entry in zip(tensors, pairs, axes, blocks, strict=True)]
    swap_blocks(tensors, pairs, axes, blocks, backend=backend)
    for tensor, right in zip(tensors, expected, strict=True):
        assert torch.equal(bits(tensor), bits(right))


@pytest.mark.parametrize("backend", BACKENDS)
def test_random_shapes(backend: str) -> None:
    generator = torch.Generator().manual_seed(5)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=generator))

    for _ in range(40):
        block, count, other = draw(1, 6), draw(2, 14), draw(1, 40)
        axis = ("row", "column")[draw(0, 2)]
        shape = (block * count, other) if axis == "row" else (other, block * count)
        full = random_bits((shape[0], shape[1] + draw(0, 20)), DTYPES[draw(0, len(DTYPES))])
        view = full[:, : shape[1]]
        pairs = random_pairs(count, draw(0, count // 2 + 1))
        expected = full.clone()
        expected[:, : shape[1]] = swapped(view, pairs, axis, block)
        swap_blocks([view], [pairs], [axis], [block], backend=backend)
        assert torch.equal(bits(full), bits(expected)), (shape, axis, block, full.dtype, pairs)


@pytest.mark.skipif(NO_CORE is not None, reason=str(NO_CORE))
@pytest.mark.parametrize("threads", [2, 3, 64])
def test_threads_share_tensors_and_part_none(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    launched = []
    launch = swap._launch_native

    def counted(device: torch.device, entries: Any, pairs: torch.Tensor) -> None:
        launched.append(len(entries))
        launch(device, entries, pairs)

    monkeypatch.setattr(swap, "_launch_native", counted)
    monkeypatch.setattr(swap, "_MANY_LINES", 0)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    tensors = [torch.randn(6 + i, 12) for i in range(7)]
    axes = ["row", "column"] * 3 + ["row"]
    pairs = [torch.tensor([[0, 4], [2, 5]]), torch.tensor([[1, 3]])] * 3 + [torch.empty(0, 2, dtype=torch.int64)]
    expected = [t.clone() for t in tensors]
    swap_blocks(expected, pairs, axes, [1] * 7, backend="reference")
    swap_blocks(tensors, pairs, axes, [1] * 7, backend="native")
    assert all(torch.equal(found, wanted) for found, wanted in zip(tensors, expected, strict=True))
    assert len(launched) == min(threads, 6) and sum(launched) == 6


def test_nothing_to_do() -> None:
    swap_blocks([], [], [], [])
    tensor = torch.ones(3, 3)
    swap_blocks([tensor], [torch.empty(0, 2, dtype=torch.int64)], ["row"], [1])
    assert torch.equal(tensor, torch.ones(3, 3))


@NEEDS_INTERPRETER
@pytest.mark.parametrize("seed", range(3))
def test_order_of_programs_does_not_matter(seed: int) -> None:
    tensor = random_bits((64, 300), torch.float16)
    pairs = random_pairs(64, 20)
    expected = swapped(tensor, pairs, "row", 1)
    with shuffled_grid(seed):
        swap_blocks([tensor], [pairs], ["row"], [1], backend="triton")
    assert torch.equal(bits(tensor), bits(expected))


def test_autograd_notices_the_change() -> None:
    weight = torch.randn(4, 3, requires_grad=True)
    loss = (weight * weight).sum()
    swap_blocks([weight], [torch.tensor([[0, 1]])], ["row"], [1])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


PAIR = torch.tensor([[0, 1]])
SHARED = torch.zeros(6, 8)


@pytest.mark.parametrize(
    ("tensors", "axes", "blocks", "message"),
    [
        ([torch.zeros(4, 4)], ["rows"], [1], "'row' or 'column', got 'rows'"),
        ([torch.zeros(4, 4)], ["row"], [0], "at least 1, got 0"),
        ([torch.zeros(4, 5)], ["column"], [2], "block 2 does not divide the 5 columns"),
        ([torch.zeros(4)], ["column"], [1], r"columns of \(4,\)"),
        ([torch.zeros(2, 2, 2)], ["row"], [1], r"rows of \(2, 2, 2\)"),
        ([torch.zeros(4, 6).t()], ["row"], [1], "stride 1 along its last dimension"),
        ([torch.zeros(6).as_strided((4, 4), (0, 1))], ["row"], [1], "must not overlap"),
        ([torch.zeros(4, 4, dtype=torch.complex128)], ["row"], [1], "1, 2, 4 or 8 bytes"),
        ([torch.zeros(4, 4).to_sparse()], ["row"], [1], "dense tensor with memory"),
        ([torch.zeros(4, 4, device="meta")], ["row"], [1], "dense tensor with memory"),
        ([SHARED, SHARED[2:]], ["row"] * 2, [1, 1], r"tensors\[0\] and tensors\[1\] overlap"),
    ],
)
def test_bad_arguments(tensors: list[torch.Tensor], axes: list[str], blocks: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PreparedSwaps(tensors, axes, blocks)


@pytest.mark.skipif(NO_CORE is not None, reason=str(NO_CORE))
@pytest.mark.parametrize(
    ("layout", "message"),
    [
        ((0, 3, 4, 1, 8, 8, 8, 1), "element size must be 1, 2, 4 or 8 bytes, got 3"),
        ((1, 2, 4, 1, 8, 8, 8, 1), "address 1 is not a multiple of 2"),
        ((0, 2, 1, 1, 8, 8, 8, 1), r"pair \(0, 1\) is outside its 1 blocks"),
        ((0, 2, 4, -1, 8, 8, 8, 1), "negative extent"),
    ],
)
def test_the_core_checks_what_it_is_given(layout: tuple[int, ...], message: str) -> None:
    core = _ext.core()
    size = core.swap_table_bytes(1, 1)
    table = torch.zeros(size, dtype=torch.uint8)
    with pytest.raises(ValueError, match=message):
        core.plan_swaps([layout], PAIR.data_ptr(), table.data_ptr(), size)
    with pytest.raises(ValueError, match=f"holds {size - 1} bytes but needs {size}"):
        core.plan_swaps([layout], PAIR.data_ptr(), table.data_ptr(), size - 1)
