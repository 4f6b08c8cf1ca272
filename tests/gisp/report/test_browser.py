"""The report in a browser: headless Chromium at the width of a desk and of a phone."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from report_cases import LAYERS, make_run
from safetensors.numpy import load_file

from gisp.report.write import write_report

sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install playwright")
NAMES = ("chromium", "chromium-browser", "google-chrome")
DESK, PHONE = 1200, 400
# Numbers of 13B parameters need the most room.
SCALE = 20_000
# Runs of digits that lie on more than one line, or reach over the edge of what holds them.
BROKEN_NUMBERS = r"""() => {
  const broken = [], walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  for (let node = walk.nextNode(); node; node = walk.nextNode()) {
    if (node.parentElement.closest("script") || !node.parentElement.checkVisibility()) continue;
    const box = node.parentElement.closest(".scroll") ? null : document.documentElement;
    for (const found of node.textContent.matchAll(/[0-9][0-9.,]*/g)) {
      const range = document.createRange();
      range.setStart(node, found.index);
      range.setEnd(node, found.index + found[0].length);
      const rects = [...range.getClientRects()].filter((rect) => rect.width > 0);
      const lines = new Set(rects.map((rect) => Math.round(rect.top)));
      const outside = box && rects.some((rect) => rect.left < 0 || rect.right > box.clientWidth);
      if (lines.size > 1 || outside) broken.push(found[0] + " of " + node.textContent.trim());
    }
  }
  return broken;
}"""


@dataclass
class Opened:
    """A page and all that it complained about or asked for."""

    page: Any
    complaints: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Chromium of the system, else playwright's own."""
    path = next(filter(None, map(shutil.which, NAMES)), None)
    with sync_api.sync_playwright() as playwright:
        if path is None and not Path(playwright.chromium.executable_path).exists():
            pytest.skip("needs Chromium: make browser, or playwright install chromium")
        # Root, as in containers, has no sandbox.
        found = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield found
        found.close()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of large numbers and long names, with its report."""
    folder = tmp_path_factory.mktemp("run")
    make_run(folder, steps=60, evaluations=True, peak_bytes=3 * 2**35)
    record = json.loads((folder / "trajectory.json").read_text())
    for part in (record["base_model"], *record["steps"]):
        for name in ("parameters", "decoder_parameters", "removed_parameters"):
            if name in part:
                part[name] *= SCALE
    record["base_model"]["path"] = "/models/an-organisation/A-Model-With-A-Rather-Long-Name-13B-Instruct-v0.2"
    record["data"]["spec"] = "/data/" + "a_very_long_name_of_a_file_of_calibration_text_" * 3 + ".jsonl"
    (folder / "trajectory.json").write_text(json.dumps(record))
    write_report(folder)
    return folder


def opened(browser: Any, run: Path, width: int, scheme: str = "light") -> Opened:
    found = Opened(browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme))
    found.page.on("console", lambda message: found.complaints.append(message.text))
    found.page.on("pageerror", lambda error: found.complaints.append(str(error)))
    found.page.on("request", lambda request: found.requests.append(request.url))
    found.page.goto((run / "report.html").as_uri())
    return found


@pytest.mark.parametrize("width", [DESK, PHONE])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_fits_and_no_number_breaks(browser: Any, run: Path, width: int, scheme: str) -> None:
    found = opened(browser, run, width, scheme)
    page = found.page
    page.evaluate("document.querySelectorAll('details').forEach((part) => { part.open = true; })")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.evaluate(BROKEN_NUMBERS) == []
    pictures = page.evaluate("[...document.images].map((i) => [i.complete && i.naturalWidth > 0, i.clientWidth])")
    assert len(pictures) == 5
    assert all(drawn and 0.75 * min(width, 900) < shown <= width for drawn, shown in pictures)
    assert found.complaints == []
    assert [url for url in found.requests if not url.startswith(("file:", "data:"))] == []
    page.close()


def test_colour_scheme_and_width_pick_the_picture(browser: Any, run: Path) -> None:
    looks, surfaces = set(), []
    for width in (DESK, PHONE):
        for scheme in ("light", "dark"):
            page = opened(browser, run, width, scheme).page
            looks.add(page.evaluate("document.images[0].currentSrc"))
            surfaces.append(page.evaluate("getComputedStyle(document.body).backgroundColor"))
            page.close()
    assert len(looks) == 4
    assert surfaces == ["rgb(255, 255, 255)", "rgb(22, 27, 34)"] * 2


@pytest.mark.parametrize("width", [DESK, PHONE])
def test_the_slider_shows_every_size(browser: Any, run: Path, width: int) -> None:
    found = opened(browser, run, width)
    page = found.page
    removed_at = load_file(run / "trajectory.safetensors")
    steps = json.loads((run / "trajectory.json").read_text())["steps"]
    page.focus("#size")
    for key, step in (("End", 60), ("ArrowLeft", 59), ("Home", 0), ("ArrowRight", 1), (None, 31)):
        if key is None:
            page.locator("#size").fill(str(step))
        else:
            page.keyboard.press(key)
        sparsity = steps[step - 1]["sparsity"] if step else 0.0
        assert page.inner_text("#sizes output") == str(step)
        assert page.inner_text("[data-fact=sparsity]") == f"{100 * sparsity:.2f} %"
        for kind in ("heads", "channels"):
            texts = page.locator(f".layers td.{kind} span").all_inner_texts()
            bars = page.evaluate(
                f"[...document.querySelectorAll('.layers td.{kind} .bar')]"
                ".map((bar) => bar.firstChild.getBoundingClientRect().width / bar.getBoundingClientRect().width)"
            )
            for layer in range(LAYERS):
                at = removed_at[f"layers.{layer}.{kind}.removed_at"]
                kept = int(np.sum((at == 0) | (at > step)))
                assert texts[layer] == f"{kept:,} / {len(at):,}"
                assert bars[layer] == pytest.approx(kept / len(at), abs=0.01)
        if step == 0:
            assert "perplexity 5.8125" in page.inner_text("[data-fact=figures]")
    assert found.complaints == []
    page.close()
