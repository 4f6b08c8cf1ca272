"""Compensations that several processes share: the same weights to the bit for any number of them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from compensation_oracle import REMOVED, kept_of
from ranks import run_ranks
from safetensors.torch import save_file
from tiny import tiny_model, tiny_tokens
from torch import distributed

import gisp
from gisp.cli import main
from gisp.compensation import Compensation, CompensationOptions, acceptance, fit_compensation, streams
from gisp.compensation.pruned import batch_sizes
from gisp.data import Sequences
from gisp.data.held_out import remember_run_text
from gisp.errors import GispError
from gisp.model.keep import Keep
from gisp.model.structures import map_model
from gisp.offload.place import stream_layers
from gisp.replicas.group import Replicas
from gisp.replicas.sharing import sharing

CASES: dict[str, dict[str, Any]] = {
    "bias": {"tokens": 300},
    "affine": {},
    "rescale": {},
    "lsq": {"target": "dense", "intercept": True},
    "kfac": {"steps": 2, "tokens": 200},
    "gates": {"steps": 3, "batch_tokens": 120},
    "distil": {"steps": 3, "batch_tokens": 120},
    "lsq+gates": {"steps": 3, "batch_tokens": 40},
    "lsq+kfac": {"steps": 1, "tokens": 200},
}
# With layers in host memory.
STREAMED = "lsq+kfac"
# Whose bits tell orders of sums apart.
TELLING = ("bias", "lsq", "kfac", "distil")


def texts(seed: int = 0) -> Sequences:
    """Rows of many lengths: slices of unequal sizes, and more batches of the run's text than processes."""
    tokens = tiny_tokens(24, 24, seed=seed)
    return Sequences.plain([(row[: 8 + i % 16],) * 2 for i, row in enumerate(tokens)])


@contextmanager
def small_batches() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(streams._TOKENS_PER_BATCH, "cpu", 40)
        patch.setattr(batch_sizes, "_TOKENS_PER_BATCH", 40)
        # The tiny models are random: what held-out text says of a compensation is not the subject.
        patch.setattr(acceptance.Difference, "falls", True)
        yield


def fitted(case: str) -> Compensation:
    model = tiny_model("llama-gqa")
    remember_run_text(model, texts(seed=1))
    if case == STREAMED:
        stream_layers(model, torch.device("cpu"))
    options = CompensationOptions(case, **CASES[case])
    return fit_compensation(map_model(model), Keep.of(kept_of(model, REMOVED)), texts(), options)


def told(found: Compensation) -> list[str]:
    """All that a compensation changes and says of itself."""
    digest = hashlib.sha256()
    for update in found.updates:
        for tensor in (update.weight, update.bias, update.factors):
            digest.update(b"-" if tensor is None else tensor.detach().contiguous().numpy().tobytes())
    assert found.updates
    return [digest.hexdigest(), repr(found.results), found.describe()]


def fit_all(folder: str) -> None:
    with small_batches(), sharing(Replicas(distributed.group.WORLD)) as replicas:
        found = {case: told(fitted(case)) for case in CASES}
        Path(folder, f"{replicas.rank}.json").write_text(json.dumps(found))


def fit_alone(folder: str) -> None:
    """The same by one process in slices, and by one that shares nothing."""
    with small_batches():
        plain = {case: told(fitted(case)) for case in TELLING}
        with sharing(Replicas()):
            sliced = {case: told(fitted(case)) for case in CASES}
    # What is summed in slices differs by rounding.
    assert sum(plain[case][0] != sliced[case][0] for case in TELLING) >= 2
    Path(folder, "one.json").write_text(json.dumps(sliced))


def test_the_number_of_processes_changes_nothing(tmp_path: Path) -> None:
    run_ranks(1, tmp_path / "ranks-1", fit_alone, str(tmp_path))
    wanted = json.loads((tmp_path / "one.json").read_text())
    for size in (2, 4):
        run_ranks(size, tmp_path / f"ranks-{size}", fit_all, str(tmp_path))
        for rank in range(size):
            assert json.loads((tmp_path / f"{rank}.json").read_text()) == wanted


def compensate_other(what: str) -> None:
    rank = distributed.get_rank()
    model = tiny_model("llama-gqa")
    gisp.prune(model, texts(), sparsity=0.4, steps=2, align=4, batch_tokens=200, device="cpu", progress=False)
    data = texts(seed=rank if what == "data" else 0)
    words = {"data": "rank 1 has calibration data ", "option": "rank 1 has option damping 0.5, rank 0 has 0.25"}[what]
    damping = 0.5 if what == "option" and rank else 0.25
    with pytest.raises(GispError, match=words):
        gisp.compensate(model, data, damping=damping, process_group=distributed.group.WORLD, progress=False)


@pytest.mark.parametrize("what", ["data", "option"])
def test_what_differs_is_named(what: str, tmp_path: Path) -> None:
    run_ranks(2, tmp_path / "ranks", compensate_other, what)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("shared")
    model = tiny_model("llama-gqa")
    model.save_pretrained(root / "model")
    save_file({"input_ids": tiny_tokens(40, 16)}, root / "tokens.safetensors")
    # Text the dense model is good at: nearer to it is better, also in processes that no test reaches into.
    own = model.generate(tiny_tokens(40, 4), max_new_tokens=12, min_new_tokens=12, do_sample=False, pad_token_id=0)
    save_file({"input_ids": own}, root / "own.safetensors")
    options: dict[str, Any] = {
        "steps": 4,
        "sparsity": 0.4,
        "align": 4,
        "batch_tokens": 128,
        "device": "cpu",
        "dtype": "float32",
    }
    gisp.prune(root / "model", root / "tokens.safetensors", out=root / "run", progress=False, **options)
    return root / "run"


def written(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.rglob("*") if path.suffix in (".safetensors", ".json")}


@pytest.fixture
def with_lsq(run: Path, forked_launch: None) -> list[str]:
    """Options of a compensation, for commands of several processes."""
    return ["--compensate=lsq", f"--calibration={run.parent / 'own.safetensors'}", "--device=cpu", "--quiet"]


@pytest.mark.usefixtures("loss_counts")
def test_exports_are_those_of_one_process(
    run: Path, tmp_path: Path, with_lsq: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    printed = []
    for gpus in ("1", "2"):
        out = tmp_path / gpus
        assert main(["export", str(run), "--sparsity=0.4", f"--out={out}", *with_lsq, f"--gpus={gpus}"]) == 0
        printed.append(capfd.readouterr().out.replace(str(out), "OUT"))
    assert printed[0] == printed[1] and printed[0].count("OUT") == 1
    assert written(tmp_path / "1") == written(tmp_path / "2")


@pytest.mark.usefixtures("loss_counts")
def test_evaluations_along_a_run_are_those_of_one_process(
    run: Path, with_lsq: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    data = str(run.parent / "tokens.safetensors")
    asked = ["eval", str(run), "--sparsities=0.2,0.4", f"--data={data}", "--dtype=float32", "--json", *with_lsq]
    printed = []
    for gpus in ("1", "2"):
        assert main([*asked, f"--gpus={gpus}"]) == 0
        printed.append(capfd.readouterr().out)
    assert printed[0] == printed[1] and len(printed[0].splitlines()) == 1
    told = [point["compensation"] for point in json.loads(printed[0])["points"][1:]]
    assert [each[:3] for each in told] == ["lsq", "lsq"] and "dropped" not in told[-1]


@pytest.mark.usefixtures("loss_counts")
def test_nested_exports_too(run: Path, tmp_path: Path, with_lsq: list[str]) -> None:
    for gpus in ("1", "2"):
        out = f"--nested={tmp_path / gpus}"
        assert main(["export", str(run), out, "--sparsities=0.2,0.4", *with_lsq, f"--gpus={gpus}"]) == 0
    assert written(tmp_path / "1") == written(tmp_path / "2")


def test_nothing_to_share_is_refused(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", str(run), "--sparsity=0.4", f"--out={tmp_path / 'out'}", "--gpus=2", "--device=cpu"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "--gpus 2 shares --compensate and --data, and neither is given: leave it out" in line


def test_sums_of_slices_take_any_shape() -> None:
    """Also in one process, where nothing travels."""
    parts = [[torch.full((), float(i)), torch.full((2, 3), 10.0**-i)] for i in range(8)]

    def fill(number: int, sums: Any) -> None:
        for total, part in zip(sums, parts[number], strict=True):
            total += part

    totals = [torch.zeros(()), torch.zeros(2, 3)]
    Replicas().add_up(totals, 8, fill)
    for total, kinds in zip(totals, zip(*parts, strict=True), strict=True):
        wanted = torch.zeros_like(total)
        for kind in kinds:
            wanted = wanted + kind
        assert torch.equal(total, wanted)
