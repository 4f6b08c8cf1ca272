"""Block swaps and compaction on the GPU: native and Triton against indexing on the CPU, exact to the bit.

Shapes are small, so that the file can also run under ``compute-sanitizer --tool memcheck`` and ``--tool racecheck``.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from partition_cases import bits, random_bits, random_pairs, swap_blocks, swapped
from torch import nn

from gisp_kernels import _ext
from gisp_kernels.backend import has_triton
from gisp_kernels.compaction.compactor import Compactor
from gisp_kernels.groups import Projection, StructureGroup

NO_CORE = _ext.why_not("cuda")
NATIVE = pytest.param("native", marks=pytest.mark.skipif(NO_CORE is not None, reason=str(NO_CORE)))
TRITON = pytest.param("triton", marks=pytest.mark.skipif(not has_triton(), reason="triton is not installed"))
BACKENDS = ["reference", NATIVE, TRITON]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]

pytestmark = pytest.mark.gpu


def check(full: torch.Tensor, view: torch.Tensor, pairs: torch.Tensor, axis: str, block: int, backend: str) -> None:
    """Swap in a copy of ``full`` on the GPU, at ``view``, and compare the whole storage."""
    on_gpu = full.cuda()
    # The same offset into the allocation, so that alignment is as asked for.
    there = on_gpu.as_strided(view.shape, view.stride(), view.storage_offset())
    view.copy_(swapped(view, pairs, axis, block))
    swap_blocks([there], [pairs], [axis], [block], backend=backend)
    assert torch.equal(bits(on_gpu.cpu()), bits(full))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [*DTYPES, torch.int8, torch.float64], ids=str)
@pytest.mark.parametrize(
    ("height", "width", "axis", "block"),
    [
        (12, 64, "row", 1),
        (12, 1030, "row", 3),
        (9, 257, "row", 1),
        (70, 33, "column", 3),
        (300, 41, "column", 1),
        (20, 96, "column", 16),
        (7, 22, "column", 11),
        (2, 1, "row", 1),
        (1, 2, "column", 1),
    ],
)
@pytest.mark.parametrize(("offset", "padding"), [(0, 0), (0, 16), (1, 0), (3, 5), (8, 8)])
def test_equals_gather(
    backend: str, dtype: torch.dtype, height: int, width: int, axis: str, block: int, offset: int, padding: int
) -> None:
    pitch = width + padding
    full = random_bits((offset + height * pitch + 64,), dtype)
    count = (height if axis == "row" else width) // block
    view = full.as_strided((height, width), (pitch, 1), offset)
    check(full, view, random_pairs(count, min(count // 2, 9)), axis, block, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("offset", [0, 1, 5])
def test_vectors(backend: str, offset: int) -> None:
    full = random_bits((offset + 120,), torch.bfloat16)
    check(full, full[offset : offset + 99], random_pairs(33, 10), "row", 3, backend)


def whole_model() -> tuple[list[torch.Tensor], list[torch.Tensor], list[str], list[int]]:
    """Many tensors of all kinds, some with nothing to do, more chunks than thread blocks run at once."""
    tensors, pairs, axes, blocks = [], [], [], []
    for layer in range(24):
        dtype = DTYPES[layer % 3]
        kinds = [((160, 48 + layer), "row", 4), ((48 + layer, 160), "column", 4), ((160,), "row", 4)]
        kinds += [((90 + layer, 64), "row", 1), ((64, 90 + layer), "column", 1), ((0, 90), "column", 1)]
        for shape, axis, block in kinds:
            count = shape[0 if axis == "row" else 1] // block
            tensors.append(random_bits(shape, dtype))
            pairs.append(random_pairs(count, layer % 7 if layer % 5 else 0))
            axes.append(axis)
            blocks.append(block)
    return tensors, pairs, axes, blocks


@pytest.mark.parametrize("backend", BACKENDS)
def test_whole_model_in_one_call(backend: str) -> None:
    tensors, pairs, axes, blocks = whole_model()
    expected = [swapped(*entry) for entry in zip(tensors, pairs, axes, blocks, strict=True)]
    on_gpu = [tensor.cuda() for tensor in tensors]
    for _ in range(5):
        swap_blocks(on_gpu, pairs, axes, blocks, backend=backend)
        for tensor, right in zip(on_gpu, expected, strict=True):
            assert torch.equal(bits(tensor.cpu()), bits(right))
        swap_blocks(on_gpu, pairs, axes, blocks, backend=backend)
        for tensor, right in zip(on_gpu, tensors, strict=True):
            assert torch.equal(bits(tensor.cpu()), bits(right))


@pytest.mark.skipif(NO_CORE is not None, reason=str(NO_CORE))
def test_whole_model_is_one_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors, pairs, axes, blocks = whole_model()
    on_gpu = [tensor.cuda() for tensor in tensors]
    core, chunks = _ext.core(), []

    def count(table: int, tensors: int, n_chunks: int, device: int, stream: int) -> None:
        chunks.append(n_chunks)
        core.swap_blocks_cuda(table, tensors, n_chunks, device, stream)

    fake = SimpleNamespace(swap_table_bytes=core.swap_table_bytes, plan_swaps=core.plan_swaps, swap_blocks_cuda=count)
    monkeypatch.setattr(_ext, "core", lambda: fake)
    swap_blocks(on_gpu, pairs, axes, blocks, backend="native")
    assert len(chunks) == 1
    assert chunks[0] > len(tensors) // 2


@pytest.mark.skipif(NO_CORE is not None, reason=str(NO_CORE))
def test_native_waits_for_nothing() -> None:
    tensors, pairs, axes, blocks = whole_model()
    on_gpu = [tensor.cuda() for tensor in tensors]
    swap_blocks(on_gpu, pairs, axes, blocks, backend="native")
    torch.cuda.set_sync_debug_mode("error")
    try:
        swap_blocks(on_gpu, pairs, axes, blocks, backend="native")
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("backend", [NATIVE, TRITON])
def test_runs_on_the_current_stream(backend: str) -> None:
    tensor = torch.zeros(64, 1 << 14, device="cuda")
    values = torch.arange(64.0, device="cuda")[:, None].expand_as(tensor)
    pairs = torch.tensor([[0, 63], [5, 9]])
    # Compiles outside of the timed order of events below.
    swap_blocks([tensor], [pairs], ["row"], [1], backend=backend)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)
        tensor.copy_(values)
        swap_blocks([tensor], [pairs], ["row"], [1], backend=backend)
        result = tensor[:, 0].clone()
    stream.synchronize()
    expected = torch.arange(64.0)
    expected[[0, 63, 5, 9]] = torch.tensor([63.0, 0.0, 9.0, 5.0])
    assert torch.equal(result.cpu(), expected)


class Mlp(nn.Module):
    def __init__(self, hidden: int, width: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.up = nn.Linear(hidden, width, dtype=dtype, device="cuda")
        self.down = nn.Linear(width, hidden, dtype=dtype, device="cuda")

    def group(self, name: str, block: int) -> StructureGroup:
        return StructureGroup(name, (Projection(self.up, "row", block), Projection(self.down, "column", block)))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("block", [1, 3, 8])
def test_compaction_steps_and_way_back(backend: str, dtype: torch.dtype, block: int) -> None:
    layers = [Mlp(33, 24, dtype), Mlp(64, 48, dtype)]
    before = [[p.detach().clone() for p in layer.parameters()] for layer in layers]
    compactor = Compactor([m.group(str(i), block) for i, m in enumerate(layers)], backend=backend)
    steps = [{"0": [0], "1": [1, 3]}, {}, {"1": [0, 5]}, {"0": list(range(1, 24 // block))}]
    for step in steps:
        compactor.remove(step)
        for i, layer in enumerate(layers):
            kept = compactor.order(str(i))[: compactor.kept(str(i))]
            lines = (kept[:, None] * block + torch.arange(block)).flatten().cuda()
            up, bias, down, _ = before[i]
            assert torch.equal(layer.up.weight, up[lines])
            assert torch.equal(layer.up.bias, bias[lines])
            assert torch.equal(layer.down.weight, down[:, lines])
    assert compactor.kept("0") == 0
    compactor.rollback(len(steps))
    for layer, expected in zip(layers, before, strict=True):
        for parameter, right in zip(layer.parameters(), expected, strict=True):
            assert torch.equal(parameter, right)


@pytest.mark.parametrize("backend", [NATIVE, TRITON])
def test_repeats_give_equal_bits(backend: str) -> None:
    torch.manual_seed(3)
    removals = [torch.randperm(512)[:100].tolist(), torch.randperm(256)[:40].tolist()]
    first: list[torch.Tensor] = []
    for _ in range(10):
        torch.manual_seed(1)
        layers = [Mlp(96, 512, torch.bfloat16), Mlp(40, 256, torch.float32)]
        compactor = Compactor([m.group(str(i), 1) for i, m in enumerate(layers)], backend=backend)
        compactor.remove({str(i): removal for i, removal in enumerate(removals)})
        result = [p.detach().clone() for layer in layers for p in layer.parameters()]
        first = first or result
        assert all(torch.equal(a, b) for a, b in zip(first, result, strict=True))


@pytest.mark.parametrize("backend", [NATIVE, TRITON])
def test_a_step_needs_almost_no_memory(backend: str) -> None:
    """40 layers and 35 channels of each, as one step of 0.25 % of a 13B model has."""
    layers = [Mlp(64, 2048, torch.bfloat16) for _ in range(40)]
    compactor = Compactor([m.group(str(i), 1) for i, m in enumerate(layers)], backend=backend)
    removal = {str(i): list(range(35)) for i in range(40)}
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    compactor.remove(removal)
    torch.cuda.synchronize()
    assert torch.cuda.max_memory_allocated() - before <= 1_000_000
    assert torch.cuda.memory_allocated() == before


def test_pack_frees_memory() -> None:
    layer = Mlp(1024, 4096, torch.bfloat16)
    compactor = Compactor([layer.group("g", 1)])
    compactor.remove({"g": list(range(2048))})
    before = torch.cuda.memory_allocated()
    compactor.pack()
    assert before - torch.cuda.memory_allocated() >= 2 * 2048 * 1024 * 2
    assert compactor.bytes_storage() == compactor.bytes_packed()


@pytest.mark.skipif(NO_CORE is not None, reason=str(NO_CORE))
def test_offsets_beyond_two_gigabytes() -> None:
    """The byte offset of the last row exceeds 2^31, that of the last element exceeds 2^32."""
    height, width = 70_000, 1 << 15
    if torch.cuda.mem_get_info()[0] < 3 * height * width:
        pytest.skip("needs 7 GB of free GPU memory")
    tensor = torch.zeros(height, width, dtype=torch.int16, device="cuda")
    tensor[-1] = 7
    tensor[:, -1] = 9
    swap_blocks([tensor], [torch.tensor([[0, height - 1]])], ["row"], [1], backend="native")
    assert bool((tensor[0, :-1] == 7).all())
    assert bool((tensor[-1, :-1] == 0).all())
    swap_blocks([tensor], [torch.tensor([[1, width - 1]])], ["column"], [1], backend="native")
    assert bool((tensor[:, 1] == 9).all())
    assert tensor[0, width - 1].item() == 7
    assert int(tensor[1:, width - 1].abs().max()) == 0
