"""Steps on a GPU: the same choices as on a CPU, one wait per step, and seconds that add up."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny import tiny_model, tiny_tokens

from gisp.config.options import make_config
from gisp.data import Sequences
from gisp.model.shrink import ShrinkableModel
from gisp.model.structures import map_model
from gisp.run.loop import PruningLoop
from gisp.run.metrics.measure import PhaseClock, score_histogram
from gisp.score.base import StepScores
from gisp.select.schedule import structure_ratio
from gisp.select.selector import Selector
from gisp_kernels import Compactor

pytestmark = pytest.mark.gpu


class RandomScores:
    """Stands in for the criterion: scores and loss are on the GPU and nobody has waited for them."""

    def score(self, step: int, groups: list[Any]) -> StepScores:
        generator = torch.Generator("cuda").manual_seed(step)
        scores = {g.name: torch.rand(g.count, generator=generator, device="cuda") for g in groups}
        loss = torch.ones((), dtype=torch.float64, device="cuda")
        return StepScores(scores, loss, torch.isfinite(loss), 1)


def make_loop(family: str = "llama-gqa", **options: Any) -> PruningLoop:
    config = make_config(**{"sparsity": 0.4, "steps": 8, "align": 4, "batch_tokens": 64, "dtype": "float32", **options})
    data = Sequences.plain([(row, row) for row in tiny_tokens(16, 16)])
    return PruningLoop(map_model(tiny_model(family, layers=5).cuda(), config.gqa), data, config, "tokens", "")


@pytest.mark.parametrize("gqa", ["query", "balanced", "group"])
@pytest.mark.parametrize("kind", ["spread", "ties", "zeros"])
@pytest.mark.parametrize("align", [1, 8])
def test_choices_equal_those_on_a_cpu(align: int, kind: str, gqa: str) -> None:
    options: dict[str, Any] = {"norm": "params", "protected": frozenset({3}), "align": align, "keep_minimum": align > 1}
    shape = {"num_attention_heads": 16, "num_key_value_heads": 4, "head_dim": 8, "intermediate_size": 3000}
    model = tiny_model("llama-gqa", **shape)
    here = Selector(map_model(model, gqa), **options)
    there = Selector(map_model(tiny_model("llama-gqa", **shape).cuda(), gqa), **options)
    decoder = map_model(model).decoder_parameters
    for step in range(1, 7):
        scores = torch.rand(len(here.removed), generator=torch.Generator().manual_seed(step))
        if kind == "ties":
            scores = (scores * 20).floor()
        elif kind == "zeros":
            scores = torch.where(scores < 0.3, 0.0, scores)
        choices = []
        for selector, values in ((here, scores), (there, scores.cuda())):
            ranking = selector.rank(values)
            if step % 2:
                selection = selector.within_target(ranking, 0.09 * step * decoder)
            else:
                selection = selector.below_threshold(ranking, structure_ratio(0.5, step, 6))
            counts = score_histogram(ranking, selector.first_channel)[1]
            removal = selector.removal(selection.removed.cpu(), float(selection.threshold))
            selector.apply(removal, selection)
            choices.append((removal.structures.tolist(), removal.threshold, removal.parameters, counts.sum(1).tolist()))
        assert choices[0] == choices[1]
    assert here.removed.any()


def count_waits(loop: PruningLoop) -> list[int]:
    """Let a fetch wait, and count them."""
    waits: list[int] = []
    fetch: Callable[..., Any] = loop._transfer.fetch

    def allowed(tensors: Any) -> Any:
        waits.append(len(tensors))
        torch.cuda.set_sync_debug_mode("default")
        try:
            return fetch(tensors)
        finally:
            torch.cuda.set_sync_debug_mode("error")

    loop._transfer.fetch = allowed  # type: ignore[method-assign]
    return waits


@pytest.mark.parametrize("engine", ["stand-in", "stream"])
@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("llama-mha", {}),
        ("llama-gqa", {}),
        ("llama-mha", {"criterion": "gisp"}),
        ("llama-gqa", {"criterion": "gisp"}),
        ("llama-gqa", {"first_order": "plain"}),
        ("llama-gqa", {"gqa": "balanced"}),
        ("llama-gqa", {"gqa": "group"}),
        ("qwen3", {"ema": 0.0}),
        ("llama-mha", {"preset": "official", "sparsity": None, "ratio": 0.5, "engine": "stream"}),
    ],
    ids=str,
)
def test_a_step_waits_for_the_gpu_once(family: str, options: dict[str, Any], engine: str) -> None:
    loop = make_loop(family, **options)
    if engine == "stand-in":
        loop.setup.scorer = RandomScores()
    device = torch.device("cuda", torch.cuda.current_device())
    # Kernels are compiled and pinned memory is taken in the first steps.
    for step in (1, 2):
        loop.trajectory.steps.append(loop._step(step, 8, PhaseClock(device))[0])
    waits = count_waits(loop)
    torch.cuda.set_sync_debug_mode("error")
    try:
        records = [loop._step(step, 8, PhaseClock(device))[0] for step in (3, 4, 5)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(waits) == 3
    assert records[-1].removed_parameters > records[0].removed_parameters > 0


def test_seconds_of_the_phases_add_up() -> None:
    loop = make_loop()
    device = torch.device("cuda", torch.cuda.current_device())
    for step in range(1, 5):
        clock = PhaseClock(device)
        record = loop._step(step, 8, clock)[0]
        assert sum(clock.seconds.values()) == pytest.approx(record.seconds, rel=1e-6)
        assert all(clock.seconds[phase] > 0 for phase in ("forward_backward", "select", "compact"))


def test_numbers_on_the_gpu_follow_every_step_and_back() -> None:
    model = tiny_model("llama-gqa").cuda()
    shrinkable = ShrinkableModel(map_model(model))
    removals = [
        {"layers.0.heads": torch.tensor([1]), "layers.1.channels": torch.tensor([0, 7, 23])},
        {"layers.0.heads": torch.tensor([0, 2]), "layers.2.channels": torch.arange(0, 24, 2)},
    ]

    def check() -> None:
        start = 0
        for group, count in counts.items():
            assert (shrinkable.numbers(group) - start).tolist() == shrinkable.order(group).tolist()
            start += count

    counts = {group.name: group.count for group in shrinkable.map.groups}
    for removal in removals:
        shrinkable.remove(removal)
        check()
    index = model.model.layers[0].self_attn.gisp_kv_index
    assert index.device.type == "cuda"
    assert index.tolist() == [1]
    shrinkable.rollback(2)
    check()


def test_pack_holds_one_tensor_twice() -> None:
    model = tiny_model("llama-mha", intermediate_size=40_000).cuda()
    map_ = map_model(model)
    compactor = Compactor(map_.groups)
    compactor.remove({item.channels.name: range(0, 40_000, 20) for item in map_.layers})
    largest = max(p.numel() * p.element_size() for p in model.parameters())
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    compactor.pack()
    torch.cuda.synchronize()
    assert torch.cuda.max_memory_allocated() - before <= largest
    assert torch.cuda.memory_allocated() < before
