"""The parts of the kernel benchmark that need no GPU: shapes, checks before timing, rows and goals."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.common import task
from benchmarks.common.command import Budget, exit_code
from benchmarks.common.goals import Goal, goal_table, kernel_goals, prune_goals
from benchmarks.common.measure import Ceilings, Measurement
from benchmarks.common.registry import MODELS, Case, Model, all_cases, cases, odd_cases, quick_cases
from benchmarks.common.task import AUTO, COMPILED, Prepared, Task, checked, describe, run_task
from benchmarks.kernels import compaction_tasks, decoder_tasks, gate_tasks, importance_tasks, product_tasks, sweep_tasks
from benchmarks.kernels import run as kernels
from gisp.errors import GispError
from gisp_kernels import Compactor
from gisp_kernels.ops import decoder
from gisp_kernels.testing import reduce_truth

SMALL = Case("small", "down", 24, 32, "column", 4, 1.0)
PEAK = Ceilings(matmul_tflops=800.0, copy_gbs=4000.0)


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Operands of tasks in float32 on the CPU; nothing is timed."""

    def random_matrix(*shape: int) -> torch.Tensor:
        return torch.randn(shape)

    for module in (decoder_tasks, gate_tasks, importance_tasks, product_tasks, sweep_tasks):
        monkeypatch.setattr(module, "random_matrix", random_matrix)
    monkeypatch.setattr(task, "rotation", lambda inputs: [inputs])
    monkeypatch.setattr(task, "restorer", lambda inputs: None)
    timed = Measurement(2.0, 1.0, 3.0, 7, 2**20)
    monkeypatch.setattr(task, "measure_together", lambda functions, *_, **__: dict.fromkeys(functions, timed))


def right_ones(prepared: Prepared) -> list[str]:
    prepared.implementations.pop(COMPILED, None)
    prepared.implementations.pop("cublas + compiled", None)
    right, wrong = checked(prepared)
    assert not wrong
    return list(right)


@pytest.mark.parametrize(("width", "block"), [(48, 1), (96, 32)])
def test_gate_gradients_are_right_and_a_wrong_one_is_not_timed(on_cpu: None, width: int, block: int) -> None:
    prepared = gate_tasks._prepare(3, width, block)
    assert right_ones(prepared) == [AUTO, "eager"]
    prepared.implementations = {"short": lambda x, g: gate_tasks.gate_grads_eager(x[:, 1:], g[:, 1:], block)}
    assert checked(prepared)[0] == {}
    assert len(gate_tasks.tasks(False)) == 16 and len(gate_tasks.tasks(True)) == 2


def test_products_are_right_and_one_without_a_token_is_not_timed(on_cpu: None) -> None:
    prepared = product_tasks._prepare(33, 48, 17)
    assert right_ones(prepared) == [AUTO, product_tasks.FLOAT32] and prepared.flops == 2 * 33 * 48 * 17
    prepared.implementations = {"short": lambda x, g: product_tasks.product_float32(x[1:], g[1:])}
    assert checked(prepared)[0] == {}
    assert len(product_tasks.tasks(False)) == 8 and len(product_tasks.tasks(True)) == 2


def test_registry_shapes() -> None:
    shapes = {(c.projection, c.rows, c.width) for c in cases("llama-2-13b")}
    assert shapes == {("qkv", 5120, 5120), ("o", 5120, 5120), ("gate/up", 13824, 5120), ("down", 5120, 13824)}
    assert {c.projection for c in cases("llama-3-8b")} == {"q", "o", "gate/up", "down"}
    assert set(quick_cases()) <= set(all_cases())
    for case in all_cases():
        extent = case.rows if case.axis == "row" else case.width
        assert extent % case.block == 0
        assert case.rows % 16 == 0 and case.width % 16 == 0
    assert cases("llama-2-13b", 0.52)[2].rows < 0.53 * 13824
    assert {c.rows % 16 or c.width % 16 for c in odd_cases()} == {0, 13817 % 16}


@pytest.mark.parametrize("quick", [False, True])
def test_names_tell_tasks_apart(quick: bool) -> None:
    names = [task.name for task in kernels.all_tasks(quick)]
    assert len(set(names)) == len(names)
    ops = {task.op for task in kernels.all_tasks(quick)}
    assert {"wgrad_importance", "stacked_wgrad", "abs_weighted_reduce", "partition_step", "pack", "swiglu"} <= ops


def test_only_keeps_named_tasks() -> None:
    tasks = kernels.all_tasks()
    assert {task.op for task in kernels.chosen(tasks, ["swiglu"])} == {"swiglu", "swiglu_backward_"}
    assert kernels.chosen(tasks, []) == tasks
    with pytest.raises(GispError, match=r"--only 'softmax' matches no benchmark.*rotary"):
        kernels.chosen(tasks, ["swiglu", "softmax"])


@pytest.mark.parametrize("axis", ["row", "column"])
def test_importance_implementations_agree(on_cpu: None, axis: str) -> None:
    case = Case("small", "x", 24, 32, axis, 4, 1.0)
    assert right_ones(importance_tasks._prepare_wgrad(case, 20)) == [AUTO, "triton", "cublas + ours", "cublas + eager"]
    assert right_ones(importance_tasks._prepare_reduction(case)) == [AUTO, "eager"]
    if axis == "row":
        assert right_ones(importance_tasks._prepare_stacked(case, 3, 20)) == [AUTO, "one by one", "cublas + eager"]


def test_sweep_covers_the_usual_configuration_once(on_cpu: None) -> None:
    prepared = sweep_tasks._prepare(Case("small", "x", 24, 32, "row", 4, 1.0), 20)
    assert prepared.baseline in prepared.implementations and len(prepared.implementations) > 10
    prepared.check(prepared.implementations[prepared.baseline])


PREPARE: dict[str, Callable[[], Prepared]] = {
    "add_rms_norm": lambda: decoder_tasks._add_rms_norm(12, 40),
    "rms_norm_backward": lambda: decoder_tasks._rms_norm_backward(12, 40),
    "rotary": lambda: decoder_tasks._rotary(2 * decoder_tasks.LENGTH, 3 * 8, head_dim=8),
    "swiglu": lambda: decoder_tasks._swiglu(12, 40),
    "swiglu_backward": lambda: decoder_tasks._swiglu_backward(12, 40),
    "token_nll_grad": lambda: decoder_tasks._token_nll_grad(12, 40),
}


@pytest.mark.parametrize("op", PREPARE)
def test_decoder_implementations_agree(on_cpu: None, op: str) -> None:
    prepared = PREPARE[op]()
    before = [tensor.clone() for tensor in prepared.inputs]
    assert right_ones(prepared) == [AUTO, "eager"]
    assert all(torch.equal(a, b) for a, b in zip(prepared.inputs, before, strict=True)), "checks work on copies"
    results = prepared.implementations["eager"](*before)
    for number, result in enumerate(results):
        wrong = [r.clone() for r in results]
        wrong[number] = result * 1.01
        with pytest.raises(AssertionError, match=f"result {number} is off by"):
            prepared.check(lambda *_, wrong=wrong: wrong)


def test_a_plain_version_with_another_formula_is_noticed(on_cpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoder, "swiglu", lambda gate, up, backend: torch.sigmoid(gate) * up)
    with pytest.raises(AssertionError, match="plain versions are off"):
        prepared = decoder_tasks._swiglu(12, 40)
        prepared.check(prepared.implementations["eager"])


def test_wrong_implementations_are_reported_and_not_timed(on_cpu: None) -> None:
    weight, grad = torch.randn(24, 32), torch.randn(24, 32)
    truth = reduce_truth(weight, grad, "column", 4)
    timed = []

    def breaks(w: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("no such kernel\nat line 3")

    prepared = Prepared(
        inputs=(weight, grad),
        implementations={
            AUTO: lambda w, g: importance_tasks.reduce_eager(w, g, "column", 4),
            "half": lambda w, g: importance_tasks.reduce_eager(w, g, "column", 4) / 2,
            "broken": breaks,
        },
        check=importance_tasks.within_budget((weight, grad), truth.scores.float(), truth),
        baseline="half",
        bytes=1e9,
        parts={"part": lambda w, g: timed.append(w)},
    )
    rows = {row["implementation"]: row for row in run_task(Task("op", {"model": "m"}, lambda: prepared), PEAK)}
    assert "relative error" in rows["half"]["red"] and "median_ms" not in rows["half"]
    assert rows["broken"]["red"] == "no such kernel"
    assert rows[AUTO]["gbs"] == 500.0 and rows[AUTO]["percent_of_copy"] == 12.5
    assert "speedup" not in rows[AUTO], "its baseline was not timed"
    assert not timed, "parts compute something else and are not checked"
    assert "WRONG, not timed: no such kernel" in describe(rows["broken"])


def test_rows_hold_rates_and_speedups() -> None:
    rows = task.with_speedups(
        [
            {"implementation": AUTO, "median_ms": 2.0, **task.rates(8e11, 0, 2.0, PEAK)},
            {"implementation": "eager", "median_ms": 5.0},
            {"implementation": "bad", "red": "wrong"},
        ],
        "eager",
    )
    assert rows[0]["speedup"] == 2.5 and rows[1]["speedup"] == 1.0 and "speedup" not in rows[2]
    assert rows[0]["tflops"] == 400.0 and rows[0]["percent_of_matmul"] == 50.0
    line = describe({"op": "swiglu", "model": "m", "rows": 24, "width": 32, "extra_bytes": 2**20, **rows[0]})
    assert "24 x 32" in line and "2.0000 ms" in line and "50.0 % of matmul" in line and "2.50x" in line
    assert "1.0 MiB" in line


TINY = Model(layers=2, hidden=16, heads=4, kv_heads=2, head_dim=4, channels=24, vocabulary=32)


@pytest.mark.parametrize("model", [TINY, MODELS["tiny"]])
def test_partition_of_a_built_model(model: Model) -> None:
    groups = compaction_tasks.build_groups(model, "cpu", torch.float32)
    total = model.layers * (model.heads + model.channels)
    assert sum(group.count for group in groups) == total
    removals = compaction_tasks.choose(groups, 0.25, 0)
    assert sum(map(len, removals.values())) == round(0.25 * total)
    watch, compactor = compaction_tasks.Watch(groups), Compactor(groups)
    compactor.remove(removals)
    watch.check(compactor)
    groups[0].projections[0].linear.weight[0, 0] += 1
    with pytest.raises(AssertionError, match="kept weights differ"):
        watch.check(compactor)


def test_baseline_of_compaction_keeps_the_same_weights() -> None:
    groups = compaction_tasks.build_groups(TINY, "cpu", torch.float32)
    removals = compaction_tasks.choose(groups, 0.25, 0)
    compaction_tasks._gather_all(groups, [compaction_tasks._kept_indices(g, removals.get(g.name)) for g in groups])
    counts = {group.name: group.count for group in groups}
    for group in groups:
        for (index, dim), projection in zip(
            compaction_tasks._kept_indices(group, removals.get(group.name)), group.projections, strict=True
        ):
            left = counts[group.name] - len(removals.get(group.name, ()))
            assert len(index) == left * projection.block
            assert int(index.max()) < projection.linear.weight.shape[dim]


def score_rows(tokens: int, **milliseconds: float) -> list[dict[str, Any]]:
    where = {"op": "wgrad_importance", "model": "llama-3-8b", "projection": "q", "rows": 64, "width": 32, "kept": 1.0}
    names = {"auto": AUTO, "eager": "cublas + eager", "ours": "cublas + ours", "alone": "cublas alone"}
    return [{**where, "tokens": tokens, "implementation": names[n], "median_ms": ms} for n, ms in milliseconds.items()]


def test_kernel_goals_take_the_worst_shape() -> None:
    rows = score_rows(512, auto=1.0, eager=3.0, ours=1.2, alone=0.8)
    rows += [{**row, "projection": "o"} for row in score_rows(512, auto=1.0, eager=2.0, ours=1.4)]
    # Odd widths and models of no goal do not count.
    rows += [{**row, "rows": 63} for row in score_rows(512, auto=9.0, eager=1.0)]
    rows += [{**row, "model": "tiny"} for row in score_rows(512, auto=9.0, eager=1.0)]
    rows += score_rows(8192, auto=1.0, eager=1.5, alone=0.95)
    rows.append({"op": "partition_step", "model": "llama-2-13b", "implementation": AUTO, "median_ms": 3.0})
    rows[-1]["extra_bytes"] = 2**19
    goals = {goal.what: goal for goal in kernel_goals(rows)}
    eager = goals["scores, 512 tokens, over cublas + eager"]
    assert eager.worst == 2.0 and eager.median == 2.5 and eager.met is False and "llama-3-8b o" in eager.where
    assert eager.margin == pytest.approx((2.0 - 2.2) / 2.2)
    assert goals["scores, 512 tokens, over cublas + ours"].worst == 1.2
    assert goals["scores, 8192 tokens, speed of cublas alone"].met is True
    assert goals["scores, 2048 tokens, over cublas + eager"].met is None
    partition = goals["partition of the 13B, wall"]
    assert partition.met is False and partition.margin == pytest.approx(-0.5)
    assert goals["partition of the 13B, extra memory"].worst == 0.5
    table = goal_table(goals.values())
    assert "MISSED by 9 %" in table and "not measured" in table and "MISSED by 50 %" in table


def test_run_goals_need_the_full_run() -> None:
    run = {"model": "llama-2-13b", "full": True, "seconds": 160.0, "peak_bytes": 59e9, "percent_of_matmul_dense": 76.0}
    goals = {goal.what: goal for goal in prune_goals([run])}
    assert goals["13B to 50 %, whole loop"].met is True
    assert goals["13B to 50 %, whole loop (aim)"].met is False
    assert goals["13B to 50 %, peak memory"].met is True
    assert goals["13B importance pass, at the end, of matmul"].met is None
    assert all(goal.met is None for goal in prune_goals([{**run, "full": False}]))
    assert Goal("x", 2, "ms", 2.0, at_least=False).met is True


def test_a_spent_budget_keeps_what_is_done(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    budget = Budget(1000)
    out = tmp_path / "made" / "result.json"

    def one(task: Task, peak: Ceilings) -> list[dict[str, Any]]:
        budget.seconds = 0
        return [{"op": task.op, "implementation": AUTO, "median_ms": 1.0, "extra_bytes": 0}]

    for name, value in {
        "ceilings": lambda: PEAK,
        "run_task": one,
        "identity": lambda device: {"commit": "abc"},
        "require_gpu": lambda what: None,
        "Budget": lambda seconds: budget,
    }.items():
        monkeypatch.setattr(kernels, name, value)
    assert kernels.main(["--only", "swiglu", "--budget", "5", "--out", str(out)]) == 0
    result = json.loads(out.read_text())
    names = [task.name for task in kernels.chosen(kernels.all_tasks(), ["swiglu"])]
    assert len(result["rows"]) == 1 and result["left_out"] == names[1:] and result["identity"] == {"commit": "abc"}


def test_a_device_that_breaks_leaves_the_other_rows(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def broken(task: Task, peak: Ceilings) -> list[dict[str, Any]]:
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nmore")

    for name, value in {
        "ceilings": lambda: PEAK,
        "run_task": broken,
        "identity": lambda device: {},
        "require_gpu": lambda what: None,
    }.items():
        monkeypatch.setattr(kernels, name, value)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: broken(Task("x", {}), PEAK))
    out = tmp_path / "result.json"
    assert kernels.main(["--only", "rotary llama-2-13b", "--out", str(out)]) == 1
    rows = json.loads(out.read_text())["rows"]
    assert {row["red"] for row in rows} == {"CUDA error: an illegal memory access was encountered"}


def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert exit_code(lambda: kernels.main(["--quick"])) == 2
    assert capsys.readouterr().err.count("\n") == 1
    with pytest.raises(GispError, match="needs a CUDA device"):
        kernels.main([])
