"""``gisp eval --sparsities``: one model moved along a run gives what models made for each sparsity give."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from eval_cases import GQA, byte_tokenizer, write_rows
from run_cases import EXACT_OPTIONS
from safetensors.torch import save_file
from tiny import tiny_model, tiny_tokens

import gisp
from gisp.cli import main
from gisp.compensation import make_request
from gisp.config.evaluation import EvalOptions
from gisp.config.options import GQA_MODES
from gisp.errors import GispError
from gisp.export.nested.export import export_nested
from gisp.report.plots import PICTURES
from gisp.report.points import draw_points
from gisp.report.write import write_report
from gisp.run.evaluations import EVALUATIONS, Evaluation, read_evaluations
from gisp.run.record import read_trajectory
from gisp.target import evaluate_along, evaluate_target
from gisp.target.open import stored_at

ROWS = [
    {"context": f"a {word}", "choices": [" cab", " big bag", " no"], "answer": number % 3}
    for number, word in enumerate(("cab", "bag", "tab", "12", "x"))
]
HIDDEN = 32
# Four layers of two key/value heads of eight numbers, float32.
KV_BYTES = 4 * 2 * 2 * 8 * 4
CPU = ("--device", "cpu", "--dtype", "float32")


@pytest.fixture(scope="module", params=GQA_MODES)
def places(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, its run, a nested checkpoint of it, and data."""
    root = tmp_path_factory.mktemp("along")
    tiny_model("llama-gqa", **GQA).save_pretrained(root / "model")
    byte_tokenizer().save_pretrained(root / "model")
    save_file({"input_ids": tiny_tokens(8, 16)}, root / "tokens.safetensors")
    write_rows(root / "rows.jsonl", ROWS)
    gisp.prune(root / "model", root / "tokens.safetensors", out=root / "run", gqa=request.param, **EXACT_OPTIONS)
    trajectory = gisp.Trajectory.load(root / "run")
    base = trajectory.load_base(device="cpu")
    export_nested(base, trajectory, root / "nested", tokenizer_from=root / "model")
    return root


@pytest.mark.parametrize("data", ["tokens.safetensors", "rows.jsonl"])
def test_every_point_is_that_of_a_model_made_for_it(places: Path, data: str) -> None:
    spec = str(places / data)
    trajectory = gisp.Trajectory.load(places / "run")
    # Whole groups of so small a model end well below what was aimed at.
    asked = [0.5, 0.21, min(0.6, trajectory.steps[-1].sparsity), 0.2]
    for target in ("run", "nested"):
        along = evaluate_along(str(places / target), spec, sparsities=asked, device="cpu", dtype="float32")
        points = along["points"]
        steps = sorted({0, *map(trajectory.step_for, asked)})
        assert [point["step"] for point in points] == steps
        for point, step in zip(points, steps, strict=True):
            one = evaluate_target(
                str(places / target), spec, sparsity=trajectory.sparsity_at(step), device="cpu", dtype="float32"
            )
            del one["data"]
            assert one == pytest.approx(point, rel=1e-6)
            assert point["sparsity"] == trajectory.sparsity_at(step)
            assert point["model_sparsity"] == trajectory.model_sparsity_at(step)
            size = stored_at(trajectory, [step])[0]
            removed = trajectory.steps[step - 1].removed_parameters if step else 0
            kv_bytes = trajectory.steps[step - 1].kv_bytes_per_token if step else KV_BYTES
            if target == "run":
                # What an export stores; tests/gisp/export/test_stored.py compares it with exports.
                assert point["kv_bytes_per_token"] == size.kv_bytes_per_token(4)
                assert point["parameters"] == size.parameters
                continue
            assert point["kv_bytes_per_token"] == kv_bytes
            if trajectory.config["gqa"] != "group":
                # Keys and values that no query head is left to read are not in the checkpoint's prefixes.
                removed += (KV_BYTES - kv_bytes) // 4 * HIDDEN
            assert point["parameters"] == trajectory.base_model["parameters"] - removed


def test_every_way_to_a_point_refuses_what_lies_beyond_the_end(
    places: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run, nested, spec = str(places / "run"), str(places / "nested"), str(places / "tokens.safetensors")
    trajectory = gisp.Trajectory.load(run)
    before, end = (trajectory.sparsity_at(step) for step in (len(trajectory.steps) - 1, len(trajectory.steps)))
    near, beyond = end + 0.45 * (end - before), end + 0.55 * (end - before)
    model = gisp.load(nested, sparsity=near)
    assert model.sparsity == model.resize(near).sparsity == end
    ways = (
        trajectory.step_for,
        trajectory.at,
        model.resize,
        lambda sparsity: gisp.load(nested, sparsity=sparsity),
        lambda sparsity: evaluate_target(run, spec, sparsity=sparsity, device="cpu"),
        lambda sparsity: evaluate_target(nested, spec, sparsity=sparsity, device="cpu"),
        lambda sparsity: evaluate_along(run, spec, sparsities=[sparsity], device="cpu"),
        lambda sparsity: evaluate_along(nested, spec, sparsities=[sparsity], device="cpu"),
    )
    for way in ways:
        with pytest.raises(GispError, match=f"the run ends at {end:.4f}: give at most that, or prune again with"):
            way(beyond)
    assert model.sparsity == end
    assert evaluate_target(run, spec, sparsity=near, device="cpu")["step"] == len(trajectory.steps)
    for command in (["eval", run, "--data", spec], ["export", run, "--out", str(tmp_path / "out")]):
        capfd.readouterr()
        assert main([*command, "--sparsity", str(beyond), "--device", "cpu"]) == 2
        assert f"the run ends at {end:.4f}" in capfd.readouterr().err
    assert not (tmp_path / "out").exists()


def test_json_file_table_and_picture(places: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    out, plot = tmp_path / "points.json", tmp_path / "points.png"
    common = ["eval", str(places / "run"), "--data", str(places / "rows.jsonl"), "--sparsities", "0.2,0.5", *CPU]
    capfd.readouterr()
    assert main([*common, "--out", str(out), "--plot", str(plot), "--json"]) == 0
    printed = json.loads(capfd.readouterr().out)
    assert printed == json.loads(out.read_text())
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert main(common) == 0
    table = capfd.readouterr().out
    for point in printed["points"]:
        (row,) = [line for line in table.splitlines() if line.startswith(f"│ {point['sparsity']:.4f} ")]
        for shown in (f"{point['parameters']:,}", f"{point['kv_bytes_per_token']:,}", f"{point['acc']:.4f}"):
            assert shown in row
        assert f"{point['perplexity']:.4f}" in row


def test_a_picture_shows_the_figures_it_is_given() -> None:
    points: list[dict[str, Any]] = [{"sparsity": s, "perplexity": 4 + 30 * s, "acc": 0.5} for s in (0.0, 0.2, 0.4)]
    assert draw_points(points) == draw_points(points)
    points[1]["perplexity"] = float("inf")
    without = draw_points(points)
    points[1]["perplexity"] = 9.0
    assert draw_points(points) != without
    assert draw_points([{"sparsity": 0.0, "lm_eval": {"a": {"acc": 0.1, "acc_stderr": None}, "b": {"bleu": 3.0}}}])


def test_one_point_keeps_its_old_form(places: Path, capfd: pytest.CaptureFixture[str]) -> None:
    common = ["eval", str(places / "run"), "--data", str(places / "tokens.safetensors"), "--sparsity", "0.3", *CPU]
    capfd.readouterr()
    assert main([*common, "--json"]) == 0
    found = json.loads(capfd.readouterr().out)
    assert {"perplexity", "tokens", "window", "sparsity"} <= found.keys()
    assert main(common) == 0
    assert capfd.readouterr().out.strip() == (
        f"perplexity {found['perplexity']:.4f} at decoder sparsity {found['sparsity']:.4f} (120 tokens, window 128)"
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sparsities", "0.2,0.8"], "--sparsities holds 0.8, the run ends at 0.5"),
        (["--sparsities", "0.2,1.5"], "--sparsities holds 1.5: give a value in [0, 1)"),
        (["--sparsities", "0.2;0.3"], "'0.2;0.3': give numbers"),
        (["--sparsities", "0.2", "--sparsity", "0.2"], "leave one out"),
        (["--sparsities", "0.2", "--plot", "nowhere/a.png"], "cannot write nowhere/a.png"),
        (["--sparsities", "0.2", "--plot", "a.pdf"], "--plot is a.pdf: give a .png file"),
        (["--plot", "a.png"], "--plot a.png draws several points: give --sparsities too"),
        (["--out", "nowhere/a.json"], "cannot write nowhere/a.json"),
        (["--out", "a.txt"], "--out is a.txt"),
        (["--stride", "0"], "--stride is 0"),
        (["--window", "8", "--stride", "9"], "--stride is 9: give 1 to the window of 8"),
        (["--extract", "("], "--extract belongs to --generate"),
        (["--generate", "--extract", "("], "--extract '(' is no regular expression"),
        (["--generate"], "--generate needs rows of prompt and completion"),
        (["--batch-size", "0"], "--batch-size is 0"),
        (["--lm-eval-include", "x"], "--lm-eval-include x belongs to --lm-eval"),
    ],
)
def test_one_line_each(
    arguments: list[str], message: str, places: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    capfd.readouterr()
    assert main(["eval", str(places / "run"), "--data", str(places / "tokens.safetensors"), *arguments, *CPU]) == 2
    printed = capfd.readouterr()
    assert printed.out == "" and message in printed.err and len(printed.err.strip().splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_paths_are_checked_before_anything_is_computed(
    places: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def never(*_: Any, **__: Any) -> None:
        pytest.fail("a model was opened")

    monkeypatch.setattr("gisp.target.evaluate.open_target", never)
    common = ["eval", str(places / "run"), "--data", "x.jsonl", "--sparsities", "0.2"]
    assert main([*common, "--plot", "nowhere/a.png"]) == 2
    assert main([*common, "--out", str(places)]) == 2
    model = ["eval", str(places / "model"), "--data", "x.jsonl", "--sparsities", "0.2"]
    assert main(model) == 2
    assert "needs a run folder or a nested checkpoint" in capfd.readouterr().err


def test_what_is_measured_on_a_run_reaches_its_folder(
    places: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    # How pictures are drawn has tests of its own; here the page's table counts.
    monkeypatch.setattr("gisp.report.write.render", lambda data, _: {p.name: b"" for p in PICTURES if p.has(data)})
    run = tmp_path / "run"
    shutil.copytree(places / "run", run)
    (run / EVALUATIONS).unlink(missing_ok=True)
    tokens, rows = str(places / "tokens.safetensors"), str(places / "rows.jsonl")
    capfd.readouterr()
    assert main(["eval", str(run), "--data", tokens, "--sparsities", "0.2,0.4", "--window", "8", "--json", *CPU]) == 0
    points = json.loads(capfd.readouterr().out)["points"]
    assert main(["eval", str(run), "--data", rows, "--sparsity", "0.2", "--limit", "4", "--json", *CPU]) == 0
    choices = json.loads(capfd.readouterr().out)
    assert set(choices) == set(evaluate_target(str(run), rows, sparsity=0.2, device="cpu")), "what is printed stays"
    fingerprint = gisp.Trajectory.load(run).base_model["fingerprint"]
    found = evaluations_of(run)
    for point, evaluation in zip(points, found, strict=False):
        assert (evaluation.step, evaluation.sparsity) == (point["step"], point["sparsity"])
        assert evaluation.figures[0].value == pytest.approx(point["perplexity"])
        assert evaluation.conditions == "window 8, dtype float32"
        assert (evaluation.label, evaluation.data) == ("gisp", tokens)
    limited = found[len(points)]
    assert ("limit", "4") in limited.protocol
    assert {figure.name for figure in limited.figures} == {"perplexity", "acc", "acc_norm"}
    stored = json.loads((run / EVALUATIONS).read_text())[0]
    assert stored["fingerprint"] == fingerprint
    assert {"torch", "gisp-kernels"} <= set(stored["versions"])

    assert main(["inspect", str(run)]) == 0
    shown = capfd.readouterr().out
    assert "evaluations" in shown and f"{points[0]['perplexity']:,.4f}"[:5] in shown
    html = write_report(run).html.read_text()
    assert all(f">{point['perplexity']:,.4f}</td>" in html for point in points)
    assert f"{choices['acc']:,.4f}" in html

    before = (run / EVALUATIONS).read_text()
    (run / EVALUATIONS).write_text("{")
    assert main(["eval", str(run), "--data", tokens, *CPU]) == 2
    assert "evaluations.json is corrupt" in capfd.readouterr().err
    (run / EVALUATIONS).write_text(before)


def evaluations_of(run: Path) -> list[Evaluation]:
    record, removed_at = read_trajectory(run)
    return read_evaluations(run, record["base_model"]["fingerprint"], removed_at)


def test_a_step_that_lost_others_since_is_not_shown_with_its_old_figures(
    places: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run, tokens = tmp_path / "run", str(places / "tokens.safetensors")
    shutil.copytree(places / "run", run)
    (run / EVALUATIONS).unlink(missing_ok=True)
    evaluate_along(str(run), tokens, sparsities=[0.1, 0.9 * gisp.Trajectory.load(run).steps[-1].sparsity], device="cpu")
    dense, first, last = evaluations_of(run)
    figure = f"{last.figures[0].value:,.4f}"
    gisp.export_run(run, last.sparsity, tmp_path / "before", device="cpu")
    assert figure in (tmp_path / "before" / "README.md").read_text()
    # As a round of --regrow exchanges structures: one of the last step for one that was kept.
    trajectory = gisp.Trajectory.load(run)
    step = int(last.step or 0)
    at = next(at for at in trajectory.removed_at.values() if {0, step} <= {*at.tolist()})
    gone, kept = at.tolist().index(step), at.tolist().index(0)
    at[gone], at[kept] = 0, step
    trajectory.save(run)
    assert evaluations_of(run) == [dense, first]
    gisp.export_run(run, last.sparsity, tmp_path / "after", device="cpu")
    assert figure not in (tmp_path / "after" / "README.md").read_text()
    evaluate_target(str(run), tokens, sparsity=last.sparsity, device="cpu")
    assert len(evaluations_of(run)) == 3


def test_figures_are_given_where_they_cannot_be_recorded(places: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise GispError("cannot write evaluations.json: the disk is full")

    monkeypatch.setattr("gisp.target.record.add_evaluations", full)
    with pytest.warns(UserWarning, match="the figures are not recorded: .*disk is full"):
        found = evaluate_target(str(places / "run"), str(places / "tokens.safetensors"), device="cpu")
    assert found["perplexity"] > 1


@pytest.mark.parametrize("data", ["tokens.safetensors", "rows.jsonl"])
def test_layers_in_host_memory_give_the_same_figures(places: Path, data: str, tmp_path: Path) -> None:
    spec = str(places / data)
    common: dict[str, Any] = {"device": "cpu", "dtype": "float32"}
    gisp.export_run(places / "run", 0.3, tmp_path / "hf", device="cpu")
    for target in (places / "model", places / "run", tmp_path / "hf"):
        found = evaluate_target(str(target), spec, **common, offload=True)
        assert found == evaluate_target(str(target), spec, **common)
    along: dict[str, Any] = {"sparsities": [0.2, 0.4], **common}
    run = str(places / "run")
    assert evaluate_along(run, spec, **along, offload=True) == evaluate_along(run, spec, **along)


@pytest.mark.parametrize("method", ["lsq", "kfac"])
def test_compensations_of_layers_in_host_memory_give_the_same_figures(places: Path, method: str) -> None:
    tokens, run = str(places / "tokens.safetensors"), str(places / "run")
    common: dict[str, Any] = {"device": "cpu", "dtype": "float32", "compensation": make_request(method, tokens)}
    along: dict[str, Any] = {"sparsities": [0.2, 0.4], **common}
    found = evaluate_along(run, tokens, **along, offload=True)
    assert found == evaluate_along(run, tokens, **along)
    assert [point["compensation"].split()[0] for point in found["points"][1:]] == ["lsq", "lsq"]


def test_generation_works_with_layers_in_host_memory(places: Path, tmp_path: Path) -> None:
    data = tmp_path / "completions.jsonl"
    write_rows(data, [{"prompt": "a c", "completion": "ab"}, {"prompt": "ba", "completion": "g"}])
    given: dict[str, Any] = {
        "options": EvalOptions(generate=True, max_new_tokens=4),
        "device": "cpu",
        "dtype": "float32",
    }
    model = str(places / "model")
    assert evaluate_target(model, str(data), **given, offload=True) == evaluate_target(model, str(data), **given)


def test_what_does_not_go_with_layers_in_host_memory(places: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokens = str(places / "tokens.safetensors")
    assert main(["eval", str(places / "nested"), "--data", tokens, "--offload", *CPU]) == 2
    assert "is a nested checkpoint: leave it out" in capsys.readouterr().err
    for method, what in (("distil", "trains"), ("lsq+gates", "trains"), ("bias", "adds biases to")):
        given = ["--compensate", method, "--calibration", tokens]
        assert main(["eval", str(places / "run"), "--data", tokens, "--offload", *given, *CPU]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert f"--compensate {method} {what} layers that --offload leaves in host memory: choose lsq, " in line
    assert main(["eval", str(places / "run"), "--data", tokens, "--offload", *CPU]) == 0
