"""The files that ship with the package."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import gisp.demo as demo
from benchmarks.decoders import corpus as corpora
from benchmarks.decoders.corpus import SourceFile

FOLDER = Path(demo.__file__).parent
SHIPPED = {name: FOLDER / f"{name}.jsonl" for name in ("calibration", "heldout")}


def shipped_rows(name: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in SHIPPED[name].read_text("utf-8").splitlines()]


@pytest.mark.parametrize(("name", "low", "high"), [("calibration", 900_000, 1_100_000), ("heldout", 300_000, 400_000)])
def test_shipped_text_is_valid(name: str, low: int, high: int) -> None:
    rows = shipped_rows(name)
    assert low < SHIPPED[name].stat().st_size < high
    assert all(set(row) == {"path", "text"} for row in rows)
    assert all(len(row["text"]) >= corpora.MIN_BYTES for row in rows)
    for row in rows:
        lowered = row["text"].lower()
        assert not any(word in lowered for word in corpora.SAMPLE_REFUSED_WORDS), row["path"]


def test_shipped_text_lies_on_its_side_of_the_split() -> None:
    calibration, heldout = shipped_rows("calibration"), shipped_rows("heldout")
    assert not any(SourceFile(**row).heldout for row in calibration)
    assert all(SourceFile(**row).heldout for row in heldout)
    assert not {row["text"] for row in calibration} & {row["text"] for row in heldout}


def test_shipped_licence_is_the_psf_one() -> None:
    assert "PYTHON SOFTWARE FOUNDATION LICENSE VERSION 2" in ((FOLDER / "LICENSE-PSF.txt").read_text("utf-8"))


def test_missing_checkpoint_names_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "files", lambda _: tmp_path)
    with pytest.raises(RuntimeError, match=r"python -m benchmarks\.decoders\.train --out"):
        demo.demo_files()


def test_missing_text_names_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "decoder").mkdir()
    for name in ("decoder/config.json", "decoder/model.safetensors", "decoder/tokenizer.json", "calibration.jsonl"):
        (tmp_path / name).touch()
    monkeypatch.setattr(demo, "files", lambda _: tmp_path)
    with pytest.raises(RuntimeError, match=r"heldout\.jsonl is missing.*benchmarks\.decoders\.corpus --samples"):
        demo.demo_files()
