"""No compensation raises the loss of any kind of text that the model was pruned on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional

import gisp
from gisp.data import Sequences, Task, load_sequences
from gisp.data.held_out import held_out_of_run, remember_run_text
from gisp.evaluate import perplexity
from gisp.model.load import load_dense
from gisp.model.shrink import ShrinkableModel
from gisp.model.structures import map_model

DEMO = Path(gisp.__file__).parent / "demo"
pytestmark = pytest.mark.usefixtures("loss_counts")


def pages(name: str, documents: range) -> Sequences:
    """Beginnings of documents of the demo."""
    found = load_sequences(str(DEMO / name), vocab_size=2**20, seq_len=128, tokenizer_from=str(DEMO / "decoder"))
    return Sequences.plain([found.rows[found.examples[number][0]] for number in documents])


def backwards(data: Sequences) -> Sequences:
    """Text of another kind: the same words from the last to the first."""
    return Sequences.plain([(ids.flip(0), ids.flip(0)) for ids, _ in data.rows])


def loss(model: Any, data: Sequences) -> torch.Tensor:
    ids, labels = data.batch(list(range(len(data))))
    logits = model(ids).logits
    return functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


@pytest.fixture(scope="module")
def taught() -> dict[str, torch.Tensor]:
    """A decoder in whose first layer every second channel helps with pages and harms them when read backwards."""
    model = load_dense(str(DEMO / "decoder"), torch.device("cpu"), "float32")
    item = map_model(model).layers[0]
    mlp = item.layer.mlp
    with torch.no_grad():
        # They follow what channels that stay compute, so that a fit can bring them back.
        for linear in (mlp.up_proj, mlp.gate_proj):
            linear.weight[::2] = linear.weight[1::2]
        mlp.down_proj.weight[:, ::2] = 0
    model.requires_grad_(False)
    weight = mlp.down_proj.weight.requires_grad_()
    optimizer = torch.optim.Adam([weight], lr=0.003)
    text = pages("calibration.jsonl", range(60, 72))
    for _ in range(6):
        optimizer.zero_grad()
        (loss(model, text) - loss(model, backwards(text))).backward()
        weight.grad[:, 1::2] = 0
        optimizer.step()
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def pruned(weights: dict[str, torch.Tensor]) -> Any:
    model = load_dense(str(DEMO / "decoder"), torch.device("cpu"), "float32")
    model.load_state_dict(weights)
    item = map_model(model).layers[0]
    ShrinkableModel(map_model(model)).remove({item.channels.name: torch.arange(0, item.channels.count, 2)})
    return model


@pytest.mark.parametrize("method", ["lsq", "kfac"])
def test_text_of_another_kind_is_predicted_no_worse(method: str, taught: dict[str, torch.Tensor]) -> None:
    calibration, more = pages("calibration.jsonl", range(40)), pages("calibration.jsonl", range(76, 108))
    parts = {"pages": more, "backwards": backwards(more)}
    run = Sequences.mixture([(Task(f"{name}.jsonl", "lm", 0.5, 32), text) for name, text in parts.items()])
    other = backwards(pages("heldout.jsonl", range(24)))
    options: dict[str, Any] = {"steps": 1} if method == "kfac" else {}
    model = pruned(taught)
    before = perplexity(model, other, 128).perplexity
    done = gisp.compensate(model, calibration, method=method, **options)
    assert done.against == () and perplexity(model, other, 128).perplexity > 1.02 * before
    model = pruned(taught)
    remember_run_text(model, held_out_of_run(run))
    done = gisp.compensate(model, calibration, method=method, **options)
    assert perplexity(model, other, 128).perplexity <= 1.005 * before
    told = done.describe()
    assert "limited by the loss of kind backwards.jsonl of the run's own text" in told
    assert "kind pages.jsonl of the run's own text (" in told
