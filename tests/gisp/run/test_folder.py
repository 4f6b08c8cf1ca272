"""Run folders that are damaged, foreign or of another run: refused in one line, and left as they are."""

from __future__ import annotations

import concurrent.futures
import json
import shutil

import pytest
import torch
from run_cases import OPTIONS, cut_after, logits, run_into
from safetensors.torch import load_file, save_file
from tiny import tiny_model, tiny_tokens

import gisp
from gisp.cli import main
from gisp.errors import GispError
from gisp.files import temporary_path


def test_a_record_nested_too_deeply_is_corrupt(tmp_path, model_folder, token_file):
    run_into(tmp_path / "run", model_folder, token_file)
    (tmp_path / "run" / "trajectory.json").write_text("[" * 100000)
    with pytest.raises(GispError, match=r"trajectory\.json is corrupt"):
        gisp.Trajectory.load(tmp_path / "run")


def test_files_of_two_runs_do_not_mix(tmp_path, model_folder, token_file):
    run_into(tmp_path / "a", model_folder, token_file)
    run_into(tmp_path / "b", model_folder, token_file, norm="none")
    shutil.copy(tmp_path / "b" / "trajectory.safetensors", tmp_path / "a" / "trajectory.safetensors")
    with pytest.raises(GispError, match="different runs"):
        gisp.Trajectory.load(tmp_path / "a")


def test_tensors_of_other_layers_are_foreign(tmp_path, model_folder, token_file):
    run_into(tmp_path / "r", model_folder, token_file)
    path = tmp_path / "r" / "trajectory.safetensors"
    tensors = load_file(path)
    for name in ("foo", "layers.9.heads.removed_at"):
        save_file({**tensors, name: torch.zeros(4, dtype=torch.int32)}, path)
        with pytest.raises(GispError, match=f"it holds {name}"):
            gisp.Trajectory.load(tmp_path / "r")


def test_a_run_without_its_record_is_not_begun_anew(tmp_path, model_folder, token_file):
    out = tmp_path / "r"
    run_into(out, model_folder, token_file)
    (out / "trajectory.json").unlink()
    left = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    for resume in (False, True):
        with pytest.raises(GispError, match=r"trajectory\.json is missing: put it back"):
            run_into(out, model_folder, token_file, resume=resume)
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == left


def test_a_run_that_did_not_count_biases_goes_on_with_sizes_that_do(tmp_path, token_file):
    tiny_model("qwen2").save_pretrained(tmp_path / "model")
    whole = run_into(tmp_path / "whole", tmp_path / "model", token_file)
    with pytest.raises(KeyboardInterrupt):
        run_into(tmp_path / "r", tmp_path / "model", token_file, on_step=cut_after(2))
    path = tmp_path / "r" / "trajectory.json"
    record = json.loads(path.read_text())
    assert record["base_model"].pop("biases") == ["k_proj", "q_proj", "v_proj"]
    for step in record["steps"]:
        step["removed_parameters"] -= 8
        step["sparsity"] = step["removed_parameters"] / record["base_model"]["decoder_parameters"]
        step["model_sparsity"] = step["removed_parameters"] / record["base_model"]["parameters"]
    path.write_text(json.dumps(record))
    run_into(tmp_path / "r", tmp_path / "model", token_file, resume=True)
    done = gisp.Trajectory.load(tmp_path / "r")
    assert done.base_model["biases"] == ["k_proj", "q_proj", "v_proj"]
    assert [step.sparsity for step in done.steps] == [step.sparsity for step in whole.steps]
    assert [step.removed_parameters for step in done.steps] == [step.removed_parameters for step in whole.steps]


@pytest.mark.parametrize("value", [float("nan"), 1.0])
@pytest.mark.parametrize("checksums", [True, False])
def test_a_state_the_run_did_not_write_is_not_resumed(tmp_path, model_folder, token_file, value, checksums):
    out = tmp_path / "r"
    with pytest.raises(KeyboardInterrupt):
        run_into(out, model_folder, token_file, on_step=cut_after(2))
    path, record = out / "state" / "step-00002.safetensors", out / "trajectory.json"
    save_file({name: torch.full_like(at, value) for name, at in load_file(path).items()}, path)
    if not checksums:
        _without_checksums(record)
    before = record.read_bytes()
    if not checksums and value == 1.0:
        run_into(out, model_folder, token_file, resume=True)
        return
    with pytest.raises(GispError, match="is corrupt: its SHA-256" if checksums else "not finite: it is corrupt"):
        run_into(out, model_folder, token_file, resume=True)
    assert record.read_bytes() == before


@pytest.mark.parametrize("checksums", [True, False])
def test_layers_that_were_swapped_are_noticed_by_the_checksum(tmp_path, model_folder, token_file, checksums):
    run_into(tmp_path / "r", model_folder, token_file)
    path = tmp_path / "r" / "trajectory.safetensors"
    tensors = load_file(path)
    one, other = (f"layers.{layer}.channels.removed_at" for layer in (1, 2))
    assert not torch.equal(tensors[one], tensors[other])
    tensors[one], tensors[other] = tensors[other], tensors[one]
    save_file(tensors, path)
    if checksums:
        with pytest.raises(GispError, match="SHA-256 of its values"):
            gisp.Trajectory.load(tmp_path / "r")
    else:
        _without_checksums(tmp_path / "r" / "trajectory.json")
        gisp.Trajectory.load(tmp_path / "r")


def _without_checksums(path):
    """The record as earlier versions wrote it."""
    record = json.loads(path.read_text())
    del record["removed_at_sha256"], record["state_sha256"]
    path.write_text(json.dumps(record))


def _set(record, path, value):
    *parents, last = path.split(".")
    for name in parents:
        record = record[int(name) if name.isdigit() else name]
    if value is None:
        del record[last]
    else:
        record[last] = value


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("base_model.layers", "abc"),
        ("base_model.path", None),
        ("base_model.fingerprint", None),
        ("versions", "ab"),
        ("config", {}),
        ("steps.1.sparsity", "x"),
        ("steps.1.sparsity", 0.9),
        ("steps.0.sparsity", -0.2),
        ("steps.0.removed_parameters", 10**9),
        ("base_model.biases", 3),
        ("base_model.biases", [3]),
        ("steps.1.loss", float("nan")),
        ("steps.0.step", 2),
        ("complete", "yes"),
        ("complete", False),
        ("config.steps", 3),
        ("config.steps", 5),
        ("config.steps", None),
        ("config.gqa", []),
        ("config.ema", 10**400),
        ("base_model.parameters", 5),
        ("base_model.layers", True),
        ("base_model.hidden_size", 10**400),
        ("steps.1.removed_parameters", 0),
        ("steps.0.heads_removed", 10**400),
        ("steps.0.seconds", 10**400),
        ("steps.1.model_sparsity", 0.5),
        ("structures.heads", 1),
        ("data.spec", 5),
        ("data.sequences", 0),
        ("removed_at_sha256", "0"),
        ("state_sha256", 0),
        ("version", 2),
    ],
)
def test_a_corrupt_record_is_one_line(tmp_path, model_folder, token_file, path, value, capsys):
    run_into(tmp_path / "r", model_folder, token_file)
    file = tmp_path / "r" / "trajectory.json"
    record = json.loads(file.read_text())
    _set(record, path, value)
    file.write_text(json.dumps(record))
    for arguments in (["inspect"], ["report"], ["eval", "--data", str(token_file), "--sparsity", "0.2"]):
        assert main([arguments[0], str(tmp_path / "r"), *arguments[1:]]) == 2
        captured = capsys.readouterr()
        assert captured.err.count("\n") == 1
        assert captured.err.startswith("error: ")
        assert "corrupt" in captured.err
        assert len(captured.err) < 1000


def test_an_out_folder_that_cannot_be_is_refused_before_any_work(tmp_path, token_file):
    (tmp_path / "file").write_text("")
    model = tiny_model()
    before = logits(model)
    with pytest.raises(GispError, match="is not a folder this user may write to"):
        gisp.prune(model, token_file, out=tmp_path / "file" / "run", **OPTIONS)
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("spoiled", [None, b"\xff\xfe\n", b"[" * 100000])
def test_lost_metrics_do_not_stop_a_resumed_run(tmp_path, model_folder, token_file, spoiled):
    run_into(tmp_path / "whole", model_folder, token_file)
    with pytest.raises(KeyboardInterrupt):
        run_into(tmp_path / "cut", model_folder, token_file, on_step=cut_after(2))
    metrics = tmp_path / "cut" / "metrics.jsonl"
    metrics.unlink() if spoiled is None else metrics.write_bytes(spoiled)
    run_into(tmp_path / "cut", model_folder, token_file, resume=True)
    files = [(tmp_path / name / "trajectory.safetensors").read_bytes() for name in ("whole", "cut")]
    assert files[0] == files[1]


def test_a_run_with_other_labels_is_another_run(tmp_path, model_folder):
    ids = tiny_tokens(16, 16)
    labels = ids.clone()
    labels[:, :4] = -100
    path = tmp_path / "t.safetensors"

    save_file({"input_ids": ids}, path)
    with pytest.raises(KeyboardInterrupt):
        run_into(tmp_path / "r", model_folder, path, on_step=cut_after(1))
    save_file({"input_ids": ids, "labels": labels}, path)
    with pytest.raises(GispError, match="made with another"):
        run_into(tmp_path / "r", model_folder, path, resume=True)


def test_a_run_folder_has_one_writer(tmp_path, model_folder, token_file):
    refused = []

    def also_write(record, steps):
        with (
            pytest.raises(GispError, match="is being written by another process") as error,
            concurrent.futures.ThreadPoolExecutor() as pool,
        ):
            pool.submit(run_into, tmp_path / "r", model_folder, token_file, resume=record.step % 2 == 0).result()
        refused.append(str(error.value))
        # Reading goes on while it is written.
        assert len(gisp.Trajectory.load(tmp_path / "r").steps) == record.step

    run_into(tmp_path / "r", model_folder, token_file, on_step=also_write)
    assert len(refused) == OPTIONS["steps"]
    assert not (tmp_path / "r" / ".lock").exists()
    run_into(tmp_path / "s", model_folder, token_file)
    files = [(tmp_path / name / "trajectory.safetensors").read_bytes() for name in ("r", "s")]
    assert files[0] == files[1]


def test_what_others_leave_in_a_run_folder_does_not_stop_it(tmp_path, model_folder, token_file):
    out = tmp_path / "r"
    with pytest.raises(KeyboardInterrupt):
        run_into(out, model_folder, token_file, on_step=cut_after(2))
    killed = [temporary_path(out / "trajectory.json"), temporary_path(out / "state" / "step-00003.safetensors")]
    foreign = [out / "notes", temporary_path(out / "small"), out / "state" / "mine"]
    for path in killed:
        path.write_text("half")
    for path in foreign:
        path.mkdir()
    of_report = temporary_path(out / "report.html")
    of_report.write_text("half")
    run_into(out, model_folder, token_file, resume=True)
    assert not any(path.exists() for path in killed)
    assert all(path.exists() for path in [*foreign, of_report])


def test_a_reader_of_a_run_that_goes_on_reads_one_moment(tmp_path, model_folder, token_file, monkeypatch):
    from gisp.run import record

    longer, last = tmp_path / "longer", OPTIONS["steps"]
    run_into(longer, model_folder, token_file)
    for name, options, step in (("shorter", {}, 1), ("changed", {"norm": "none"}, last)):
        with pytest.raises(KeyboardInterrupt):
            run_into(tmp_path / name, model_folder, token_file, on_step=cut_after(1), **options)
        # The record of step 1 is read, then the tensors of the last step. What they have ahead is left out. Where they
        # changed what was before, the record is read again.
        reads = iter([tmp_path / name, longer, longer])
        with monkeypatch.context() as patch:
            read_record = record.read_record
            patch.setattr(record, "read_record", lambda folder, reads=reads, read=read_record: read(next(reads)))
            found, removed_at = record.read_trajectory(longer)
        assert len(found["steps"]) == step
        assert max(at.max() for at in removed_at.values()) == step
