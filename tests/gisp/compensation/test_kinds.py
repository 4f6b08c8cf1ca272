"""No compensation raises the loss of any kind of text that the model was pruned on."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from demo_pages import DEMO, pages
from run_cases import OPTIONS, cut_after
from safetensors.torch import save_file
from tiny import tiny_model, tiny_tokens
from torch.nn import functional

import gisp
from gisp.compensation import make_request
from gisp.data import Sequences, Task, load_sequences
from gisp.data.held_out import held_out_of_run, remember_run_text
from gisp.errors import GispError
from gisp.evaluate import perplexity
from gisp.export.run import export_nested_run, export_run
from gisp.model.load import load_dense
from gisp.model.shrink import ShrinkableModel
from gisp.model.structures import map_model
from gisp.target import evaluate_target

pytestmark = pytest.mark.usefixtures("loss_counts")
STEPS: dict[str, dict[str, Any]] = {
    "kfac": {"steps": 1},
    "gates": {"steps": 5, "batch_tokens": 1024, "learning_rate": 0.3},
    "distil": {"steps": 5, "batch_tokens": 1024, "learning_rate": 0.003},
}


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


@pytest.fixture(scope="module")
def other() -> Sequences:
    return backwards(pages("heldout.jsonl", range(24)))


# A fit and training stand for the others, whose way the loss of a kind limits below.
@pytest.mark.parametrize("method", ["lsq", "gates"])
def test_calibration_text_alone_says_nothing_of_another_kind(
    method: str, taught: dict[str, torch.Tensor], other: Sequences
) -> None:
    model = pruned(taught)
    before = perplexity(model, other, 128).perplexity
    done = gisp.compensate(model, pages("calibration.jsonl", range(40)), method=method, **STEPS.get(method, {}))
    assert done.against == () and perplexity(model, other, 128).perplexity > 1.02 * before


@pytest.mark.parametrize("method", ["lsq", "kfac", "gates", "distil"])
def test_text_of_another_kind_is_predicted_no_worse(
    method: str, taught: dict[str, torch.Tensor], other: Sequences
) -> None:
    calibration, more = pages("calibration.jsonl", range(40)), pages("calibration.jsonl", range(76, 108))
    parts = {"pages": more, "backwards": backwards(more)}
    run = Sequences.mixture([(Task(f"{name}.jsonl", "lm", 0.5, 32), text) for name, text in parts.items()])
    model = pruned(taught)
    before = perplexity(model, other, 128).perplexity
    remember_run_text(model, held_out_of_run(run))
    done = gisp.compensate(model, calibration, method=method, **STEPS.get(method, {}))
    assert perplexity(model, other, 128).perplexity <= 1.005 * before
    told = done.describe()
    assert "kind backwards.jsonl of the run's own text" in done.results[-1].limited and "limited by the loss of" in told
    assert "kind pages.jsonl of the run's own text (" in told
    # A part of the way is taken, also where the whole of it costs the other kind too much.
    assert done.results[-1].kept and done.results[-1].after < done.results[-1].before


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two kinds of token rows."""
    root = tmp_path_factory.mktemp("run")
    tiny_model("llama-gqa").save_pretrained(root / "model")
    for seed, name in enumerate(("one", "two", "other")):
        save_file({"input_ids": tiny_tokens(20, 16, seed=seed)}, root / f"{name}.safetensors")
    (root / "mix.yaml").write_text("tasks: [{data: one.safetensors}, {data: two.safetensors}]")
    gisp.prune(root / "model", root / "mix.yaml", out=root / "run", **OPTIONS)
    return root / "run"


def held_against(text: str) -> list[str]:
    return re.findall(r"(?:kind \w+\.safetensors of )?the run's own text(?= \()", text)


OWN = ["the run's own text", *(f"kind {name}.safetensors of the run's own text" for name in ("one", "two"))]


def test_every_way_from_a_run_holds_against_its_text(run: Path, tmp_path: Path) -> None:
    request = make_request("lsq", str(run.parent / "other.safetensors"))
    assert request is not None
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    (copy / "state" / "held-out.safetensors").unlink()
    for folder, wanted in ((run, OWN), (copy, [])):
        out = tmp_path / folder.name
        exported = export_run(folder, None, out / "hf", device="cpu", compensation=request)
        uniform = export_run(folder, None, out / "uniform", format="uniform", device="cpu", compensation=request)
        nested = export_nested_run(folder, out / "nested", device="cpu", compensation=request, sparsities=[0.3])
        figures = evaluate_target(
            str(folder), data=str(run.parent / "one.safetensors"), device="cpu", compensation=request
        )
        away = export_run(folder, None, out / "away", device="cpu", compensation=request, offload=True)
        told = [exported.spec.compensation, uniform.spec.compensation, nested.milestones[0].compensation]
        for text in (*told, figures["compensation"], away.spec.compensation):
            assert held_against(text) == wanted
        assert [text["name"] for text in figures.get("held_against", [])] == wanted


def test_text_that_is_fitted_to_is_not_held_against_twice(run: Path) -> None:
    trajectory = gisp.Trajectory.load(run)
    done = gisp.compensate(trajectory.at(None), run.parent / "mix.yaml", method="lsq")
    assert [text.name for text in done.against] == [
        f"kind {name}.safetensors of the calibration text" for name in ("one", "two")
    ]


def test_a_model_pruned_in_memory_knows_its_text(run: Path) -> None:
    model = tiny_model("llama-gqa")
    gisp.prune(model, load_sequences(run.parent / "mix.yaml", vocab_size=256, seq_len=16), **OPTIONS)
    done = gisp.compensate(model, run.parent / "other.safetensors", method="lsq")
    assert [text.name for text in done.against] == OWN


def test_the_text_is_written_once_and_a_damaged_one_is_refused(run: Path, tmp_path: Path) -> None:
    out, path = tmp_path / "cut", tmp_path / "cut" / "state" / "held-out.safetensors"
    with pytest.raises(KeyboardInterrupt):
        gisp.prune(run.parent / "model", run.parent / "mix.yaml", out=out, on_step=cut_after(2), **OPTIONS)
    inode = path.stat().st_ino
    gisp.prune(run.parent / "model", run.parent / "mix.yaml", out=out, resume=True, **OPTIONS)
    assert path.stat().st_ino == inode and path.read_bytes() == (run / "state" / path.name).read_bytes()
    path.write_bytes(path.read_bytes()[:-4] + b"\0\0\0\1")
    trajectory = gisp.Trajectory.load(out)
    with pytest.raises(GispError, match=r"held-out\.safetensors is corrupt: restore it, or remove it"):
        gisp.compensate(trajectory.at(None), run.parent / "other.safetensors", method="lsq")
