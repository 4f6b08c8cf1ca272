"""Draw docs/images/smollm2-135m.png from the raw results; run from the root of the repository."""

from __future__ import annotations

import json
from pathlib import Path

import matplotlib.pyplot as plt

RAW = Path("benchmarks/results/h100")
OUT = Path("docs/images/smollm2-135m.png")
# Name in the raw file -> label and colour.
LINES = {
    "fast": ("preset fast", "#1f5fa8"),
    "group-last0-95-16k": ("fast with the four options", "#d1661b"),
    "paper": ("preset paper (one seed)", "#7a7a7a"),
}
TOKENS = 64 * 1024


def perplexities() -> tuple[float, dict[str, list[tuple[float, float]]]]:
    """Dense perplexity and, for every setting, (sparsity in %, mean perplexity over seeds)."""
    rows = [json.loads(line) for line in (RAW / "real-smollm2-options.jsonl").read_text().splitlines()]
    dense = next(row["dense"]["ppl1024"] for row in rows if "dense" in row)
    points: dict[str, list[tuple[float, float]]] = {}
    for name in LINES:
        seeds = [row["points"] for row in rows if row["name"] == name]
        means = [(100 * p[0]["sparsity"], sum(q["ppl1024"] for q in p) / len(p)) for p in zip(*seeds, strict=True)]
        points[name] = sorted(means)
    return dense, points


def main() -> None:
    plt.rcParams.update({"font.size": 11, "axes.spines.top": False, "axes.spines.right": False})
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.2), dpi=110, facecolor="white")
    dense, points = perplexities()
    for name, (label, colour) in LINES.items():
        x, y = zip((0.0, dense), *points[name], strict=True)
        left.plot(x, y, "o-", color=colour, label=label)
    left.set(title="Perplexity, lower is better", xlabel="parameters of the decoder layers removed, %")
    left.set(ylabel="WikiText-2, windows of 1,024", ylim=(0, None))
    left.legend(frameon=False)
    speeds = json.loads((RAW / "real-smollm2-speed.json").read_text())["rows"]
    x = [100 * row["sparsity"] for row in speeds]
    y = [TOKENS / row["ms_64x1024"] / 1000 for row in speeds]
    right.plot(x, y, "o-", color="#2c7a4b")
    for at, value in zip(x, y, strict=True):
        right.annotate(f"{value / y[0]:.2f}x", (at, value), (0, 8), textcoords="offset points", ha="center")
    right.set(title="Speed of a large batch, higher is better", ylabel="million tokens a second, 64 x 1,024")
    right.set(xlabel="parameters of the decoder layers removed, %", ylim=(0, max(y) * 1.15), xlim=(-3, 54))
    for axes in (left, right):
        axes.grid(alpha=0.25)
    figure.suptitle("SmolLM2-135M-Instruct, pruned without training, one H100")
    figure.tight_layout()
    figure.savefig(OUT)


if __name__ == "__main__":
    main()
