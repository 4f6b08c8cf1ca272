"""Cells of the study differ in what their names say."""

from __future__ import annotations

from pathlib import Path

from benchmarks.decoders.decoder import Decoder
from benchmarks.quality.cells import Sizes, fast_cells
from benchmarks.quality.runner import Bench, Runner

STEPS = 4


def decoder_in(files: Path) -> Decoder:
    return Decoder(files / "model", files / "calibration.safetensors", files / "evaluation.safetensors")


def test_the_parts_of_fast_change_what_they_name(files: Path) -> None:
    bench = Bench(
        decoder_in(files),
        (0.3,),
        104,
        None,
        "cpu",
    )
    runner = Runner(bench)
    found = {}
    named = ("as it is", "8 steps", "2,048 tokens a step", "align 1", "exact, 1 steps")
    made = [cell for cell in fast_cells(range(1), Sizes(steps=STEPS, exact_tokens=416)) if cell.name in named]
    assert len(made) == len(named)
    for cell in made:
        result = runner.run(cell)
        assert "error" not in result, result
        found[cell.name] = result["points"][0]
    assert found["8 steps"]["tokens"] == 2 * found["as it is"]["tokens"]
    assert found["2,048 tokens a step"]["perplexity"] == found["as it is"]["perplexity"]  # the set is smaller
    assert found["align 1"]["perplexity"] != found["as it is"]["perplexity"]


def test_a_distilled_cell_differs_from_the_plain_one(files: Path) -> None:
    decoder = decoder_in(files)
    runner = Runner(Bench(decoder, (0.3,), 104, None, "cpu"))
    plain, distilled = (
        runner.run(cell)["points"][0]["perplexity"]
        for cell in fast_cells(range(1), Sizes(steps=STEPS, exact_tokens=416))
        if cell.name in ("as it is", "distillation loss")
    )
    assert plain != distilled
