"""Layers that visit the device: when they come, what they look like there, and that they always go home."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from run_cases import logits
from tiny import tiny_model, tiny_tokens

from gisp.errors import GispError
from gisp.model.shrink import ShrinkableModel
from gisp.model.structures import channels_name, heads_name, map_model
from gisp.offload.host import HostMemory, available_bytes
from gisp.offload.place import place
from gisp.offload.stream import LayerStream
from gisp.score.fused import why_not

CPU = torch.device("cpu")
ALL = (0, 1, 2, 3)


def homes(model: Any) -> list[int]:
    return [p.data_ptr() for p in (*model.model.layers.parameters(), *model.lm_head.parameters())]


def crossed(stream: LayerStream, order: list[int]) -> list[int]:
    """Bytes that crossed before every visit of a pass, and after it."""
    found = []
    with stream.visiting(order):
        for i in order:
            found.append(stream.traffic.bytes)
            with stream.visit(i):
                pass
    return [*found, stream.traffic.bytes]


def test_each_layer_crosses_once_a_way_and_the_next_one_comes_early() -> None:
    model = tiny_model()
    stream = place(model, ALL, CPU)
    layer = sum(p.numel() * 4 for p in model.model.layers[0].parameters())
    found = [size // layer for size in crossed(stream, [0, 1, 2, 3, 3, 2, 1, 0])]
    # Two are there before the first visit. At the turn the last two stay.
    assert found == [2, 3, 4, 4, 4, 5, 6, 6, 6]
    stream = place(tiny_model(), (1, 3), CPU)
    assert crossed(stream, [0, 1, 2, 3, 3, 2, 1, 0])[-1] == 2 * layer


def test_the_output_projection_comes_once_a_step() -> None:
    model = tiny_model()
    stream = place(model, ALL, CPU, ends_on_host=True)
    layer, head = (sum(p.numel() * 4 for p in of.parameters()) for of in (model.model.layers[0], model.lm_head))
    found = crossed(stream, [0, 1, 2, 3, 4, 3, 2, 1, 0])
    # At the turn the last layer stays, the one before it makes room.
    assert found[:5] == [2 * layer, 3 * layer, 4 * layer, 4 * layer + head, 4 * layer + head]
    assert found[-1] == 7 * layer + head
    alone = place(tiny_model(), (), CPU, ends_on_host=True)
    assert crossed(alone, [0, 1, 2, 3, 4, 3, 2, 1, 0])[-1] == head
    tied = tiny_model("qwen2")
    assert not place(tied, (), CPU, ends_on_host=True).holds(tied.lm_head.weight)


@pytest.mark.parametrize("ends_on_host", [False, True])
@pytest.mark.parametrize("streamed", [(), (2,), ALL])
def test_a_whole_forward_pass_works_anywhere(streamed: tuple[int, ...], ends_on_host: bool) -> None:
    model = tiny_model()
    expected = logits(model)
    place(model, streamed, CPU, ends_on_host=ends_on_host)
    before = homes(model)
    for _ in range(2):
        assert torch.equal(logits(model), expected)
    with torch.inference_mode():
        assert torch.equal(model(tiny_tokens(2)).logits, expected)
    assert homes(model) == before
    assert why_not(map_model(model), 16) is None, "the hooks that bring weights change nothing"


def test_a_weight_looks_on_the_device_as_if_it_had_always_been_there() -> None:
    model = tiny_model("llama-bias")
    resident = tiny_model("llama-bias")
    stream = place(model, ALL, CPU)
    removal = {heads_name(1): torch.tensor([2]), channels_name(1): torch.tensor([1, 5, 7])}
    for of in (model, resident):
        ShrinkableModel(map_model(of)).remove(removal)
    ShrinkableModel.of(model).pack(in_place=True)  # type: ignore[union-attr]
    before = homes(model)
    with stream.visiting(ALL):
        for i in ALL:
            with stream.visit(i):
                pairs = zip(model.model.layers[i].parameters(), resident.model.layers[i].parameters(), strict=True)
                for found, expected in pairs:
                    assert torch.equal(found, expected) and found.stride() == expected.stride()
                    assert found.data_ptr() not in before
    assert homes(model) == before


def test_layers_go_home_whatever_happens() -> None:
    model = tiny_model()
    expected = logits(model)
    stream = place(model, ALL, CPU)
    before = homes(model)
    with pytest.raises(KeyboardInterrupt), stream.visiting([0, 1]), stream.visit(0):
        raise KeyboardInterrupt
    assert homes(model) == before
    handle = model.model.layers[2].mlp.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        logits(model)
    handle.remove()
    assert homes(model) == before
    assert torch.equal(logits(model), expected)
    with pytest.raises(RuntimeError, match="layer 2 is visited out of turn"), stream.visiting([0, 1]), stream.visit(2):
        pass
    with pytest.raises(GispError, match=r"under torch.no_grad\(\)"):
        model(tiny_tokens(1))


def test_only_other_hooks_speak_against_the_fused_pass() -> None:
    model = tiny_model()
    place(model, ALL, CPU)
    model.model.layers[1].register_forward_hook(lambda *_: None)
    assert why_not(map_model(model), 16) == "a module has hooks or a forward of its own"


@pytest.mark.parametrize("on_host", [False, True])
def test_inputs_come_back_as_they_were(on_host: bool) -> None:
    stream = place(tiny_model(), ALL, CPU, inputs_on_host=on_host)
    for size in (3, 5, 2):
        given = [[torch.randn(size, 8) for _ in range(2)] for _ in ALL]
        kept: list[list[Any]] = [[], [], [], []]
        with stream.visiting([*ALL, *reversed(ALL)]):
            for i in ALL:
                with stream.visit(i):
                    kept[i] = [stream.keep(i, states.clone()) for states in given[i]]
            for i in reversed(ALL):
                with stream.visit(i):
                    for take, states in zip(kept[i], given[i], strict=True):
                        assert torch.equal(take(), states)


def test_weights_are_filled_where_they_will_lie() -> None:
    source = tiny_model("qwen2")
    with torch.device("meta"):
        model = type(source)(source.config)
    model.model.rotary_emb = type(model.model.rotary_emb)(source.config)
    state = source.state_dict()
    place(model.eval(), (0, 2), CPU, fill=lambda name, memory: memory.copy_(state[name]))
    assert model.lm_head.weight is model.model.embed_tokens.weight, "tied weights stay tied"
    assert torch.equal(logits(model), logits(source))


def test_host_memory() -> None:
    memory = HostMemory(CPU)
    tensor = memory.empty((3, 5), torch.bfloat16)
    assert tensor.shape == (3, 5) and tensor.dtype == torch.bfloat16 and tensor.is_contiguous()
    del memory
    gc.collect()
    tensor.fill_(1)
    free = available_bytes()
    assert free is None or free > 0


def test_host_memory_lies_in_pages_of_its_own() -> None:
    memory = HostMemory(CPU)
    held = [memory.empty((size,), torch.float32) for size in (1, 3, 1024, 1025, 0)]
    pages: set[int] = set()
    for tensor in held:
        tensor.fill_(2)
        own = range(tensor.data_ptr() // 4096, -(-(tensor.data_ptr() + 4 * tensor.numel()) // 4096))
        assert not tensor.numel() or (tensor.data_ptr() % 4096 == 0 and not pages & {*own})
        pages |= {*own}
    memory.free(held[0])


class Runtime:
    """Registers as CUDA does: no page twice, and nothing that is not registered is given back.

    Attributes:
        current: the current device.
        used: the current device at every call.
    """

    def __init__(self, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
        self.held: dict[int, int] = {}
        self.most = most
        self.current = torch.device("cuda", 0)
        self.used: list[torch.device] = []
        monkeypatch.setattr(torch.cuda, "cudart", lambda: self)
        monkeypatch.setattr(torch.cuda, "device", self._on)

    @contextmanager
    def _on(self, device: torch.device) -> Iterator[None]:
        before, self.current = self.current, device
        yield
        self.current = before

    def cudaHostRegister(self, address: int, size: int, flags: int) -> int:  # noqa: N802 - CUDA's name
        self.used.append(self.current)
        begun = any(at < address + size and address < at + held for at, held in self.held.items())
        if begun or len(self.held) == self.most:
            return 712
        self.held[address] = size
        return 0

    def cudaHostUnregister(self, address: int) -> int:  # noqa: N802 - CUDA's name
        self.used.append(self.current)
        del self.held[address]
        return 0


def test_memory_is_registered_once_and_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = Runtime(100, monkeypatch)
    memory = HostMemory(torch.device("cuda", 1))
    held = [memory.empty((size,), torch.bfloat16) for size in (3, 5000, 7)]
    assert [runtime.held[t.data_ptr()] for t in held] == [4096, 12288, 4096]
    memory.free(held[1])
    assert len(runtime.held) == 2
    del memory
    gc.collect()
    assert not runtime.held
    assert runtime.used == [torch.device("cuda", 1)] * 6 and runtime.current == torch.device("cuda", 0)


def test_memory_that_cannot_be_registered_is_told_once(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = Runtime(1, monkeypatch)
    told: list[str] = []
    monkeypatch.setattr("gisp.offload.host.note", told.append)
    monkeypatch.setattr("gisp.offload.host._take_error", lambda _: None)
    memory = HostMemory(torch.device("cuda", 0))
    for size in (3, 5, 7):
        assert memory.empty((size,), torch.float32).numel() == size
    assert told == ["host memory cannot be registered with CUDA (error 712): transfers hold up the computation"]
    del memory
    gc.collect()
    assert not runtime.held
