"""Model cards: where a model comes from, how good it is, and code that runs."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from export_models import dense
from huggingface_hub import ModelCard, ModelCardData
from run_cases import run_into
from tiny import tiny_model
from word_tokenizer import save_tokenizer

import gisp
from gisp.export.card import PRUNED, _quality
from gisp.export.provenance import BaseCard
from gisp.export.run import export_nested_run, export_run, point_of
from gisp.run.evaluations import add_evaluations
from gisp.target import evaluate_along

BASE_CARD = """---
license: other
license_name: llama-licence
license_link: LICENSE
language: [en, no]
datasets:
- some-org/some-text
tags: [x]
---
# The base
"""


class Hub:
    """In place of the hub's interface: one card, or no network."""

    def __init__(self, card: ModelCardData | None) -> None:
        self.card, self.asked = card, list[str]()

    def model_info(self, name: str, timeout: float) -> Any:
        self.asked.append(name)
        if self.card is None:
            raise OSError("no network")
        return SimpleNamespace(card_data=self.card)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model folder with a tokenizer and a card."""
    folder = tmp_path_factory.mktemp("base") / "Tiny-Base"
    save_tokenizer(folder)
    tiny_model("llama-gqa").save_pretrained(folder)
    (folder / "README.md").write_text(BASE_CARD)
    return folder


@pytest.fixture(scope="module")
def run(base: Path, token_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("run") / "run"
    run_into(out, base, token_file)
    return out


def front(folder: Path) -> dict[str, Any]:
    """The front matter, which the hub's own reader takes, too."""
    text = (folder / "README.md").read_text()
    ModelCard(text)
    found = yaml.safe_load(text.split("---\n")[1])
    assert isinstance(found, dict)
    return found


def blocks(folder: Path) -> list[str]:
    """Python code of a card, at home in its folder."""
    found = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    return [block.replace("path/to/this/folder", str(folder)) for block in found]


def test_the_card_of_the_base_is_carried(run: Path, tmp_path: Path) -> None:
    export_run(run, 0.3, tmp_path / "out", device="cpu")
    found = front(tmp_path / "out")
    assert found["base_model"] == "Tiny-Base"
    assert (found["license"], found["license_name"], found["license_link"]) == ("other", "llama-licence", "LICENSE")
    assert found["language"] == ["en", "no"]
    assert found["datasets"] == ["some-org/some-text"]
    assert found["pipeline_tag"] == "text-generation"
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| base model | `Tiny-Base` (its name on the hub, if it has one, is not known) |" in card
    assert "| licence | other llama-licence LICENSE |" in card
    assert "| calibration data | `t.safetensors`, 16 sequences, 256 tokens scored in all steps |" in card
    assert str(tmp_path.parent) not in card


@pytest.mark.parametrize(
    "text", ["", "no front matter", "---\n[: broken\n---\n", "---\n- a\n---\n", "---\nlicense:\n---\n"]
)
def test_what_no_one_knows_is_said(text: str, tmp_path: Path) -> None:
    folder = tmp_path / "base"
    folder.mkdir()
    if text:
        (folder / "README.md").write_text(text)
    source = BaseCard.of(dense("llama-gqa"), str(folder))
    assert source.front({})["license"] == "unknown"
    assert source.front({})["language"] == ["und"]
    assert source.front({})["datasets"] == []
    facts = dict(source.facts({}))
    for what in ("licence", "languages", "training data of the base model"):
        assert facts[what].startswith("not known"), what
    assert facts["calibration data"] == "not recorded"


@pytest.mark.parametrize(
    "path, name",
    [
        ("some-org/some-model", "some-org/some-model"),
        ("/home/me/hub/models--some-org--some-model/snapshots/0123abcd", "some-org/some-model"),
        ("/home/me/models/some-model", "some-model"),
        ("", "LlamaForCausalLM"),
    ],
)
def test_a_name_tells_the_hub_and_no_local_path(path: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = Hub(None)
    monkeypatch.setattr("gisp.export.provenance.HfApi", lambda: hub)
    source = BaseCard.of(dense("llama-gqa"), path)
    assert (source.name, source.on_hub) == (name, "/" in name)
    assert hub.asked == ([name] if source.on_hub else []), "asked once"
    assert source.front({})["base_model"] == name


def test_the_card_of_a_base_on_the_hub_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    hub = Hub(ModelCardData(license="mit", language="en"))
    monkeypatch.setattr("gisp.export.provenance.HfApi", lambda: hub)
    source = BaseCard.of(dense("llama-gqa"), "some-org/some-model")
    assert (source.license, source.languages) == ("mit", ("en",))


def test_calibration_data_of_the_hub_are_named(tmp_path: Path) -> None:
    source = BaseCard("x", False, datasets=("a/b",))
    tasks = {"spec": "mix.yaml", "tasks": [{"name": "c/d"}, {"name": "/x/rows.jsonl"}, {"name": "a/b"}]}
    assert source.front(tasks)["datasets"] == ["a/b", "c/d"]
    assert dict(source.facts(tasks))["calibration data"] == "`c/d`, `rows.jsonl`, `a/b`"


def test_cards_of_one_size_and_of_all_tell_the_run_alike(run: Path, tmp_path: Path) -> None:
    export_run(run, 0.3, tmp_path / "one", device="cpu")
    export_nested_run(run, tmp_path / "all", device="cpu")
    told = [
        [line for line in (tmp_path / name / "README.md").read_text().splitlines() if line.startswith(facts)]
        for name in ("one", "all")
        for facts in [("| base model", "| licence", "| preset", "| criterion", "| versions")]
    ]
    assert told[0] == told[1] and len(told[0]) == 5


def test_the_quality_of_the_size_is_on_the_card(run: Path, token_file: Path, tmp_path: Path) -> None:
    export_run(run, 0.3, tmp_path / "before", device="cpu")
    assert "Not measured. `gisp eval RUN" in (tmp_path / "before" / "README.md").read_text()
    points = evaluate_along(str(run), str(token_file), sparsities=[0.1, 0.3], window=8, device="cpu")["points"]
    dense_value, other, here = (f"{point['perplexity']:,.4f}" for point in points)
    export_run(run, 0.3, tmp_path / "out", device="cpu")
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"| gisp | perplexity | {here} | {dense_value} | t.safetensors, " in card
    assert other not in card
    assert "Figures of this size" in card and "compensated" not in card
    add_evaluations(run, [{**points[-1], "label": "gisp", "data": "x.jsonl", "compensation": "lsq (damping 0.5)"}])
    export_run(run, 0.3, tmp_path / "beside", device="cpu")
    card = (tmp_path / "beside" / "README.md").read_text()
    assert "| gisp + lsq | perplexity |" in card and "with a compensation; this export has none" in card
    spec = replace(point_of(gisp.Trajectory.load(run), run, points[-1]["step"]), compensation="lsq (damping 0.5)")
    assert "Rows without `+` were measured without a compensation" in "".join(_quality(spec, PRUNED))
    export_run(run, 0.3, tmp_path / "one-size", format="uniform", device="cpu")
    assert (
        "Figures of the exact point of the run; sizes were changed" in (tmp_path / "one-size" / "README.md").read_text()
    )


def test_the_code_of_cards_runs(run: Path, model_folder: Path, token_file: Path, tmp_path: Path) -> None:
    run_into(tmp_path / "run", model_folder, token_file)
    for form in ("hf", "masked", "uniform"):
        export_run(run, 0.3, tmp_path / form, format=form, device="cpu")
    export_run(tmp_path / "run", 0.3, tmp_path / "hf without a tokenizer", device="cpu")
    export_nested_run(run, tmp_path / "nested", device="cpu")
    # Each block by itself, those with this package last, and nothing may ask anything.
    code = ["import sys"]
    for form in ("hf", "masked", "uniform", "hf without a tokenizer", "nested"):
        found = blocks(tmp_path / form)
        assert len(found) == (2 if form.startswith("hf") else 1)
        code += [f"print({form!r}, flush=True); exec({block!r}, {{}})" for block in found]
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(code)], capture_output=True, text=True, env=env, stdin=subprocess.DEVNULL
    )
    assert done.returncode == 0, done.stdout[-500:] + done.stderr[-2000:]
    assert len(done.stdout.splitlines()) >= 2 * (len(code) - 1), "a block prints nothing"
