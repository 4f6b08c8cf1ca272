"""`gisp bench`: refusals, the count of operations, identity, and a tiny run that really happens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import gisp
from benchmarks.common.command import Budget, read_json, table
from benchmarks.common.flops import Widths, pass_flops
from benchmarks.common.identity import identity
from benchmarks.common.measure import Ceilings
from benchmarks.common.plots import write_kernel_plots, write_prune_plots
from benchmarks.common.registry import MODELS, Model
from benchmarks.common.synthetic import build_model, random_tokens
from benchmarks.common.task import with_speedups
from benchmarks.prune import run as bench_prune
from benchmarks.prune.paper_step import run_hours, time_paper_step
from benchmarks.prune.timed_run import Setting, phase_totals, summary, timed_run
from gisp.cli import main
from gisp.errors import GispError

CPU = torch.device("cpu")
TINY = MODELS["tiny"]


def test_every_product_of_a_pass_is_counted() -> None:
    model = Model(layers=3, hidden=10, heads=4, kv_heads=4, head_dim=2, channels=6, vocabulary=50)
    head, attention, mlp = 2 * 7 * 10 * 50, 2 * 7 * 10 * 8, 2 * 7 * 10 * 6
    every = pass_flops(model, [Widths(4, 6)] * 3, tokens=7)
    assert every.forward == head + 3 * (4 * attention + 3 * mlp)
    # The lowest layer needs the gradient of what o reads, and of the whole MLP, but not of what q, k and v read.
    assert every.input_grad == head + 2 * (4 * attention + 3 * mlp) + attention + 3 * mlp
    assert every.weight_grad == 3 * (4 * attention + 3 * mlp)
    assert every.total == every.forward + every.input_grad + every.weight_grad


def test_unscored_layers_cost_less() -> None:
    model = Model(layers=4, hidden=10, heads=4, kv_heads=2, head_dim=2, channels=6, vocabulary=50)
    head, query, key, mlp = 2 * 7 * 10 * 50, 2 * 7 * 10 * 8, 2 * 7 * 10 * 4, 2 * 7 * 10 * 6
    layer = 2 * query + 2 * key + 3 * mlp
    layers = [Widths(4, 6, scored=False), Widths(4, 6), Widths(4, 6), Widths(4, 6, scored=False)]
    found = pass_flops(model, layers, tokens=7)
    assert found.forward == head + 4 * layer
    # Nothing below the lowest scored layer, everything through the protected last one.
    assert found.input_grad == head + 2 * layer + query + 3 * mlp
    # k and v are shared: they are not scored.
    assert found.weight_grad == 2 * (2 * query + 3 * mlp)


@pytest.mark.parametrize(
    ("lowest", "input_products", "weight_products"),
    [(Widths(0, 6), (0, 1), (0, 3)), (Widths(4, 0), (1, 0), (4, 0)), (Widths(2, 3), (0.5, 1.5), (2, 1.5))],
    ids=["channels alone", "heads alone", "half"],
)
def test_empty_blocks_of_the_lowest_layer(
    lowest: Widths, input_products: tuple[float, float], weight_products: tuple[float, float]
) -> None:
    model = Model(layers=1, hidden=10, heads=4, kv_heads=4, head_dim=2, channels=6, vocabulary=50)
    head, attention, mlp = 2 * 7 * 10 * 50, 2 * 7 * 10 * 8, 2 * 7 * 10 * 6
    found = pass_flops(model, [lowest], tokens=7)
    assert found.input_grad == head + input_products[0] * attention + input_products[1] * mlp
    assert found.weight_grad == weight_products[0] * attention + weight_products[1] * mlp


def test_nothing_scored_needs_no_backward() -> None:
    found = pass_flops(TINY, [Widths(4, 128, scored=False)] * 4, tokens=8)
    assert found.input_grad == found.weight_grad == 0 < found.forward


def test_dense_pass_of_the_13b_stays_below_six_operations_per_parameter() -> None:
    model = MODELS["llama-2-13b"]
    layers = [Widths(40, 13824, scored=4 <= i < 39) for i in range(40)]
    per_token = pass_flops(model, layers, 8192).total / 8192
    parameters = 40 * (4 * 5120 * 5120 + 3 * 5120 * 13824) + 5120 * 32000
    assert 5.4 < per_token / parameters < 5.6


def test_identity_names_commit_and_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GISP_COMMIT", "abc1234")
    found = identity(CPU)
    assert found["commit"] == "abc1234" and found["torch"] == torch.__version__ and found["driver"] is None
    json.dumps(found)
    monkeypatch.delenv("GISP_COMMIT")
    monkeypatch.setenv("PATH", "")
    assert identity(CPU)["commit"] == "unknown"


@pytest.fixture(scope="module")
def tiny_result(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    out = tmp_path_factory.mktemp("bench") / "new" / "tiny.json"
    assert main(["bench", "prune", "--model", "tiny", "--device", "cpu", "--steps", "4", "--out", str(out)]) == 0
    return out, json.loads(out.read_text())


def test_tiny_run_writes_its_result(tiny_result: tuple[Path, dict[str, Any]]) -> None:
    _, result = tiny_result
    assert result["benchmark"] == "prune" and result["identity"]["torch"] == torch.__version__
    (run,) = result["runs"]
    assert run["model"] == "tiny" and run["steps"] == 4 and 0.3 < run["sparsity"] <= 0.5
    assert not run["full"] and not run["stopped_by_budget"]
    assert run["peak_bytes"] is None and run["percent_of_matmul_dense"] is None
    sparsities = [row["sparsity_before"] for row in run["step_rows"]]
    assert sparsities[0] == 0 and sparsities == sorted(set(sparsities))
    assert set(run["phases"]) == {"forward_backward", "select", "compact", "write"}
    assert sum(row["step_seconds"] for row in run["step_rows"]) < run["seconds"]
    assert run["setup_seconds"] + run["first_step_seconds"] < run["seconds"]
    assert run["paper"]["tokens_per_second"] > 0 and run["paper"]["hours"] > 0


def test_operations_fall_with_sparsity(tiny_result: tuple[Path, dict[str, Any]]) -> None:
    (run,) = tiny_result[1]["runs"]
    work = [row["tflops"] * row["seconds"]["forward_backward"] for row in run["step_rows"]]
    layers = [Widths(4, 128, scored=i < 3) for i in range(4)]
    assert run["criterion"] == "second-order"
    first = pass_flops(TINY, layers, run["batch_tokens"], weight_grads=False)
    assert first.weight_grad == 0 and work[0] == pytest.approx(first.total / 1e12)
    assert work == sorted(work, reverse=True) and work[-1] < 0.9 * work[0]


def test_earlier_results_are_shown_and_drawn(
    tiny_result: tuple[Path, dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copied = tmp_path / "tiny.json"
    copied.write_text(tiny_result[0].read_text())
    assert main(["bench", "prune", "--from", str(copied), "--goals", "--plot"]) == 0
    shown = capsys.readouterr().out
    assert "forward_backward" in shown and "not measured" in shown
    assert (tmp_path / "tiny-run.png").read_bytes().startswith(b"\x89PNG")


def test_a_run_is_compensated(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "r.json"
    given = ["--compensate", "kfac", "--compensation-steps", "2", "--calibration-tokens", "512"]
    asked = ["bench", "prune", "--model", "tiny", "--device", "cpu", "--steps", "2", "--no-paper", "--out", str(out)]
    assert main([*asked, *given]) == 0
    assert "nats a token" in capsys.readouterr().out
    (run,) = json.loads(out.read_text())["runs"]
    found = run["compensation"]
    assert found["method"] == "kfac" and found["fit_tokens"] == 512 and 0 < found["fit_seconds"] < found["seconds"]
    # The last layer is protected, and the first tenth of four layers is none.
    assert found["blocks"] == 6 and 0 < found["squares_left"] < 1
    assert [step["tokens"] for step in found["steps"]] == [512, 512]
    assert found["steps"][-1]["after"] <= found["steps"][0]["before"]
    assert main(["bench", "prune", "--from", str(out), "--goals"]) == 0
    assert capsys.readouterr().out.count("\ngoal ") == 1
    for wrong in (["--compensation-steps", "2"], ["--compensate", "lsq", "--compensation-steps", "2"]):
        assert main([*asked, *wrong]) == 2
        assert "--compensat" in capsys.readouterr().err


def test_a_spent_budget_ends_a_run_after_a_step() -> None:
    setting = Setting.make(CPU, 0.5, 5, 512)
    assert Setting.make(CPU, 0.5, 5, 512, criterion="gisp").criterion == "gisp"
    model = build_model(TINY, CPU, torch.float32)
    run = timed_run(TINY, model, random_tokens(TINY, 8, 256), setting, None, Budget(1e-9))
    assert run["criterion"] == "second-order"
    assert run["stopped_by_budget"] and run["steps"] == 1 and len(run["step_rows"]) == 1
    assert 0 < run["sparsity"] < 0.2


def test_synthetic_models_are_reproducible_and_finite() -> None:
    one, other = (build_model(TINY, CPU, torch.bfloat16, seed=3) for _ in range(2))
    assert torch.get_default_dtype() == torch.float32
    assert all(p.dtype == torch.bfloat16 for p in one.parameters())
    assert torch.equal(one.lm_head.weight, other.lm_head.weight)
    ids = random_tokens(TINY, 2, 32)
    loss = one(input_ids=ids, labels=ids).loss
    assert float(loss.detach()) == pytest.approx(5.545, abs=0.2), "near the log of 256"


def test_paper_step_leaves_no_gradient_behind() -> None:
    model = build_model(TINY, CPU, torch.float32)
    found = time_paper_step(model, random_tokens(TINY, 4, 256), batches=2)
    assert all(p.grad is None for p in model.parameters())
    assert found["hours"] == run_hours(found["tokens_per_second"], found["extraction_seconds"])
    assert found["peak_bytes"] is None


def test_hours_of_the_papers_schedule() -> None:
    # 280 steps of 512,000 tokens.
    assert run_hours(512_000, 0) == pytest.approx(280 / 3600)
    assert run_hours(512_000, 1) == pytest.approx(560 / 3600)


def test_first_step_does_not_stand_for_the_dense_model() -> None:
    rows = [{"tokens_per_second": float(v), "tflops": float(v), "percent_of_matmul": None} for v in (1, *range(10, 22))]
    found = summary(rows)
    assert found["tokens_per_second_dense"] == 12 and found["tokens_per_second_end"] == 19
    assert found["percent_of_matmul_end"] is None
    assert summary(rows[:1])["tflops_dense"] == 1
    assert phase_totals([{"seconds": {"a": 1.0, "b": 2.0}}, {"seconds": {"a": 0.5}}]) == {"a": 1.5, "b": 2.0}


def test_full_means_the_run_of_the_goals() -> None:
    assert Setting.make(torch.device("cuda"), 0.5, None, None).full
    assert not Setting.make(torch.device("cuda"), 0.5, 100, None).full
    assert not Setting.make(CPU, 0.5, None, None).full


def test_every_model_runs_in_a_process_of_its_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    commands: list[list[str]] = []

    class Done:
        returncode = 0

    def run(command: list[str], **_: Any) -> Done:
        commands.append(command)
        name = command[command.index("--model") + 1]
        done = Done()
        if name == "llama-3-8b":
            done.returncode = 9
        else:
            result = {"benchmark": "prune", "identity": {"commit": "abc"}, "runs": [{"model": name}]}
            Path(command[command.index("--out") + 1]).write_text(json.dumps(result))
        return done

    monkeypatch.setattr(bench_prune.subprocess, "run", run)
    args = bench_prune.parser().parse_args(["--steps", "7", "--no-paper", "--compensate", "lsq"])
    result = bench_prune.measure_apart(["llama-2-13b", "llama-3-8b"], args)
    assert [run["model"] for run in result["runs"]] == ["llama-2-13b", "llama-3-8b"]
    assert result["identity"] == {"commit": "abc"} and "exit code 9" in result["runs"][1]["error"]
    assert all(command[command.index("--steps") + 1] == "7" and "--no-paper" in command for command in commands)
    # What is passed on is understood.
    bench_prune.parser().parse_args(commands[0][3:])
    assert "exit code 9" in bench_prune.show(result["runs"][1:])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["kernels"], "needs a CUDA device"),
        (["kernels", "--only", "softmax"], "matches no benchmark"),
        (["kernels", "--budget", "-1"], "--budget"),
        (["kernels", "--plot"], "--plot writes beside a result"),
        (["kernels", "--from", "nowhere.json"], "cannot read nowhere.json"),
        (["prune"], "needs a CUDA device"),
        (["prune", "--model", "llama-2-13b", "--device", "cpu"], "needs a CUDA device"),
        (["prune", "--model", "gpt"], "unknown model 'gpt': choose one of llama-2-13b"),
        (["prune", "--model", "tiny", "--device", "cpu", "--sparsity", "1.5"], "--sparsity is 1.5"),
        (["prune", "--model", "tiny", "--device", "cpu", "--steps", "0"], "--steps"),
        (["prune", "--model", "tiny", "--device", "cpu", "--out", "."], "is a folder"),
        (["prune", "--bogus"], "unrecognized arguments: --bogus"),
    ],
)
def test_refusals_are_one_line(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["bench", *arguments]) == 2
    captured = capsys.readouterr()
    assert message in captured.err and captured.err.count("\n") == 1
    assert captured.out == ""


def test_without_a_checkout_it_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(gisp, "__file__", str(tmp_path / "lib" / "gisp" / "__init__.py"))
    assert main(["bench", "kernels"]) == 2
    assert "needs a source checkout" in capsys.readouterr().err


def test_help_is_that_of_the_module(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "kernels", "--help"]) == 0
    shown = capsys.readouterr().out
    assert "usage: gisp bench kernels" in shown and "--budget" in shown


def test_results_that_are_none_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    of_another = json.dumps({"benchmark": "kernels", "identity": {}, "rows": []})
    for content, message in (("{", "is no JSON"), ("[]", "no result of gisp bench"), (of_another, "gisp bench prune")):
        path.write_text(content)
        with pytest.raises(GispError, match=message):
            read_json(path, "prune")


def test_table_lines_up() -> None:
    lines = table(("name", "n"), [["a", "1"], ["bb", "100"]]).splitlines()
    assert lines == ["name    n", "----  ---", "a       1", "bb    100"]


def test_pictures_of_kernels(tmp_path: Path) -> None:
    shape = {"model": "llama-2-13b", "rows": 64, "width": 32, "kept": 1.0}
    rows: list[dict[str, Any]] = []
    for tokens in (512, 2048):
        rows += with_speedups(
            [
                {**shape, "op": "wgrad_importance", "projection": "o", "tokens": tokens, "implementation": name}
                | {"median_ms": ms, "percent_of_matmul": 50.0 / ms}
                for name, ms in (("auto", 1.0), ("cublas + eager", 2.0), ("cublas alone", 0.9))
            ],
            "cublas + eager",
        )
    rows += [{**shape, "op": "swiglu", "implementation": "auto", "median_ms": 1.0, "percent_of_copy": 90.0}]
    rows += [{**shape, "op": "rotary", "implementation": "auto", "red": "wrong"}]
    peak = Ceilings(800, 4000)
    result = {"identity": {}, "ceilings": vars(peak), "rows": rows}
    paths = write_kernel_plots(result, tmp_path / "k.json")
    assert [path.name for path in paths] == ["k-scores.png", "k-elementwise.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths)
    assert write_prune_plots({"runs": [{"model": "tiny", "error": "gone"}]}, tmp_path / "p.json") == []
