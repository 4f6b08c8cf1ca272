"""Draw docs/images/smollm2-135m.png from the raw results; run from the root of the repository."""

from __future__ import annotations

import json
from pathlib import Path

import matplotlib.pyplot as plt

RAW = Path("benchmarks/results")
OUT = Path("docs/images/smollm2-135m.png")
TOKENS = 64 * 1024
Line = list[tuple[float, float]]


def rows_of(name: str) -> list[dict]:
    return [json.loads(line) for line in (RAW / name).read_text().splitlines()]


def mean_of_seeds(runs: list[dict], figure: str) -> Line:
    """(Sparsity in %, perplexity) at every size, means over seeds."""
    sizes = zip(*(run["points"] for run in runs), strict=True)
    return [
        (100 * sum(p["sparsity"] for p in size) / len(size), sum(p[figure] for p in size) / len(size)) for size in sizes
    ]


def perplexities() -> tuple[float, dict[tuple[str, str], Line]]:
    """Dense perplexity, and the points of every (label, colour)."""
    h100 = rows_of("h100/real-smollm2-options.jsonl")
    dense = next(row["dense"]["ppl1024"] for row in h100 if "dense" in row)
    fast = [row for row in rows_of("h200/real-smollm2-runs.jsonl") if row["name"] == "200x8"]
    paper = [row for row in h100 if row["name"] == "paper"]
    varied = rows_of("h200/real-smollm2-more-text-1024.jsonl")
    distil = [
        (100 * row["asked"], row["perplexity wikitext2-test 1024"])
        for row in rows_of("h200/real-smollm2-distil-more-text.jsonl")
        if row.get("method") == "distil"
    ]
    return dense, {
        ("preset paper (one seed)", "#7a7a7a"): mean_of_seeds(paper, "ppl1024"),
        ("preset fast", "#1f5fa8"): mean_of_seeds(fast, "perplexity wikitext2-test 1024"),
        ("fast on varied text", "#2f9bb5"): mean_of_seeds(varied, "perplexity wikitext2-test 1024"),
        ("then trained by distil (one seed)", "#d1661b"): distil,
    }


def main() -> None:
    plt.rcParams.update({"font.size": 11, "axes.spines.top": False, "axes.spines.right": False})
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.2), dpi=110, facecolor="white")
    dense, points = perplexities()
    for (label, colour), line in points.items():
        x, y = zip((0.0, dense), *sorted(line), strict=True)
        left.plot(x, y, "o-", color=colour, label=label)
    left.set(title="Perplexity, lower is better", xlabel="parameters of the decoder layers removed, %")
    left.set(ylabel="WikiText-2, windows of 1,024", ylim=(0, None))
    left.legend(frameon=False)
    speeds = json.loads((RAW / "h100/real-smollm2-speed.json").read_text())["rows"]
    x = [100 * row["sparsity"] for row in speeds]
    y = [TOKENS / row["ms_64x1024"] / 1000 for row in speeds]
    right.plot(x, y, "o-", color="#2c7a4b")
    for at, value in zip(x, y, strict=True):
        right.annotate(f"{value / y[0]:.2f}x", (at, value), (0, 8), textcoords="offset points", ha="center")
    right.set(title="Speed on one H100, higher is better", ylabel="million tokens a second, 64 x 1,024")
    right.set(xlabel="parameters of the decoder layers removed, %", ylim=(0, max(y) * 1.15), xlim=(-3, 54))
    for axes in (left, right):
        axes.grid(alpha=0.25)
    figure.suptitle("SmolLM2-135M-Instruct; presets prune without training, distil trains")
    figure.tight_layout()
    figure.savefig(OUT)


if __name__ == "__main__":
    main()
