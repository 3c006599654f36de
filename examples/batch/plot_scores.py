"""Score the example's table and draw how sure the model is: python examples/batch/plot_scores.py [REPOSITORY]

Writes scores.parquet and scores.svg to the current folder.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pyarrow.parquet as pq

import splitserve

PENGUINS = Path(__file__).parents[1] / "penguins.csv"
N_BARS, WIDTH, HEIGHT = 20, 640, 240
COLOURS = ("#4477aa", "#ee6677", "#228833")


def main(repository: str = "./models") -> None:
    summary = splitserve.score("penguins", PENGUINS, "scores.parquet", repository=repository, keep=["id"], overwrite=True)
    print(summary)
    scores = pq.read_table("scores.parquet")
    names = [name for name in scores.column_names if name.startswith("probabilities_")]
    counts = {name: histogram(scores[name].to_pylist()) for name in names}
    Path("scores.svg").write_text(drawn(counts), encoding="utf-8")
    print("scores.svg: how many rows have which probability, by class")


def histogram(values: list[float]) -> list[int]:
    """How many values are in each of the equal parts of 0 to 1."""
    counts = [0] * N_BARS
    for value in values:
        counts[min(int(value * N_BARS), N_BARS - 1)] += 1
    return counts


def drawn(counts: dict[str, list[int]]) -> str:
    """Bars side by side for each class, as SVG."""
    highest = max(max(each) for each in counts.values())
    step = WIDTH / N_BARS
    bar = step / (len(counts) + 1)
    shapes = []
    for place, (name, values) in enumerate(counts.items()):
        colour = COLOURS[place % len(COLOURS)]
        shapes.append(f'<text x="{20 + 150 * place}" y="16" fill="{colour}">{name.removeprefix("probabilities_")}</text>')
        for number, count in enumerate(values):
            height = count / highest * HEIGHT
            x, y = number * step + place * bar, 24 + HEIGHT - height
            shapes.append(f'<rect x="{x:.1f}" y="{y:.1f}" width="{bar:.1f}" height="{height:.1f}" fill="{colour}"/>')
    axis = "".join(f'<text x="{WIDTH * at:.0f}" y="{HEIGHT + 40}">{at}</text>' for at in (0, 0.25, 0.5, 0.75))
    size = f'width="{WIDTH}" height="{HEIGHT + 48}"'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif" font-size="13">{"".join(shapes)}{axis}</svg>\n'
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
