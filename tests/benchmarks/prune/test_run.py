"""A tiny run that really happens, and real ones in processes of their own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.common.registry import MODELS
from benchmarks.prune import run as bench_prune
from benchmarks.prune.flops import Widths, pass_flops
from gisp.cli import main
from gisp.compensation import acceptance

TINY = MODELS["tiny"]


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
    parts = {"step", "forward_backward", "select", "launch_pass", "launch_select", "wait", "compact", "hand_over"}
    for where in ("step_dense", "step_end"):
        assert run[where].keys() == parts and all(value > 0 for value in run[where].values())
        # What a CPU launches it computes.
        assert run[where]["launch_pass"] <= run[where]["forward_backward"] < run[where]["step"]
    assert run["writes"]["count"] == 4 and run["writes"]["seconds"] > 0 and run["writes"]["bytes"] > 1000
    assert run["setup_seconds"] + run["first_step_seconds"] < run["seconds"]
    assert run["pass_gpu_time"] is None
    assert run["paper"]["tokens_per_second"] > 0 and run["paper"]["hours"] > 0


def test_a_step_is_shown_beside_the_work_of_the_gpu() -> None:
    times = {"dense": {"seconds": 0.03, "kernels": 1200}, "end": {"seconds": 0.02, "kernels": 1100}}
    run = {"model": "m", "step_dense": {"step": 0.05}, "step_end": {"step": 0.04}, "pass_gpu_time": times}
    *_, dense, end = bench_prune.show_steps([{"model": "other", "pass_gpu_time": None}, run]).splitlines()
    assert dense.split() == ["m,", "dense", "50.0", "30.0", "1,200"] and end.split()[-3:] == ["40.0", "20.0", "1,100"]
    assert not bench_prune.show_steps([{"model": "old"}])


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
    assert "forward_backward" in shown and "not measured" in shown and "4 of 4 steps" in shown
    assert (tmp_path / "tiny-run.png").read_bytes().startswith(b"\x89PNG")


def test_a_run_is_compensated(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # The tiny model is random: which one predicts random text best says nothing.
    monkeypatch.setattr(acceptance.Limit, "excess", lambda *_: -1.0)
    out = tmp_path / "r.json"
    given = ["--compensate", "kfac", "--compensation-steps", "2", "--calibration-tokens", "512"]
    asked = ["bench", "prune", "--model", "tiny", "--device", "cpu", "--steps", "2", "--no-paper", "--out", str(out)]
    assert main([*asked, *given]) == 0
    assert "nats a token" in capsys.readouterr().out
    (run,) = json.loads(out.read_text())["runs"]
    found = run["compensation"]
    assert found["method"] == "kfac" and found["fit_tokens"] == 512 and 0 < found["fit_seconds"] < found["seconds"]
    # Of eight blocks those that were pruned and whose fit was accepted.
    assert 0 < found["blocks"] <= 8 and 0 < found["squares_left"] < 1
    assert [step["tokens"] for step in found["steps"]] == [512, 512]
    assert found["steps"][-1]["after"] <= found["steps"][0]["before"]
    assert main(["bench", "prune", "--from", str(out), "--goals"]) == 0
    assert capsys.readouterr().out.count("\ngoal ") == 1
    for wrong in (["--compensation-steps", "2"], ["--compensate", "lsq", "--compensation-steps", "2"]):
        assert main([*asked, *wrong]) == 2
        assert "--compensat" in capsys.readouterr().err


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
    ("given", "told"),
    [
        (("--offload", "--stages", "2"), "--offload is for one GPU, --stages for several"),
        (("--offload", "--gpus", "2"), "--offload is for one GPU, --gpus for several"),
        (("--slices", "4"), "--slices is for runs shared by --gpus alone"),
        (("--gpus", "2", "--slices", "1"), "--slices 1 is less than 2 GPUs"),
        (("--gpu-memory", "8GB"), "--gpu-memory changes nothing without --offload"),
        (("--layers", "2"), "--layers changes nothing without --offload"),
    ],
)
def test_options_of_another_kind_of_run_are_refused(
    given: tuple[str, ...], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "prune", "--model", "tiny", "--device", "cpu", *given]) == 2
    assert told in " ".join(capsys.readouterr().err.split())
