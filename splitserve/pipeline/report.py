"""The report of a run: one HTML file that needs no network and no script."""

from __future__ import annotations

import base64
import json
import platform
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import splitserve
from splitserve.pipeline.index import Finished, RunState

CONFUSION_FILE = "confusion.json"
"""An output of this name, ``{"classes": […], "counts": [[…]]}`` with a row for each true class, is shown as a matrix."""

WRONG_FILE = "wrong.json"
"""An output of this name, ``[{"png": BASE64, "true": …, "found": …}, …]``, is shown as pictures with both classes."""

_WIDTH, _HEIGHT = 420, 160
_PNG = b"\x89PNG\r\n\x1a\n"

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 64rem; margin: 2rem auto; padding: 0 1rem; color: #222; background: #fff }
table { border-collapse: collapse; margin: .5rem 0 1rem }
td, th { padding: .15rem .7rem; text-align: left; border-bottom: 1px solid #ddd }
td.number { text-align: right; font-variant-numeric: tabular-nums } code { font-size: .85em } .failed { color: #b00020 }
.matrix td { text-align: center } svg { display: block }
figure { display: inline-block; margin: .3rem; text-align: center; font-size: .8em }
img { width: 96px; image-rendering: pixelated }
"""


def render(run: RunState, finished: Mapping[str, Finished]) -> str:
    """The report.

    Args:
        run: what ran.
        finished: the steps that have finished, by name.

    Returns:
        HTML. All text from data is escaped.
    """
    parts = [
        f"<h1>{escape(run.pipeline)}: {escape(run.state)}</h1>",
        f"<p>Run <code>{escape(run.id)}</code>, started {escape(run.started_at)}; splitserve {escape(splitserve.__version__)}, "
        f"Python {platform.python_version()}, {escape(platform.platform())}</p>",
        "<h2>Steps</h2>",
        _table(
            ("step", "state", "seconds", "digest", "note"),
            [(step.step, step.state, f"{step.seconds:.1f}", step.digest[:16], step.why) for step in run.steps],
        ),
        "<h2>Parameters</h2>",
        _table(("name", "value"), [(name, json.dumps(value)) for name, value in run.parameters.items()]),
    ]
    for name, step in finished.items():
        parts.append(f"<h2>{escape(name)}</h2>")
        if step.metrics:
            parts.append(_table(("metric", "last value"), [(key, f"{value:.6g}") for key, value in step.last_metrics().items()]))
            parts += [_curve(key, points) for key, points in _curves(step.metrics).items()]
        if CONFUSION_FILE in step.outputs:
            parts.append(_confusion(Path(step.folder) / CONFUSION_FILE))
        if WRONG_FILE in step.outputs:
            parts.append(_wrong(Path(step.folder) / WRONG_FILE))
        parts.append("<details><summary>outputs and what the step depended on</summary>")
        parts.append(_table(("output", "SHA-256"), step.outputs.items()))
        parts.append(f"<pre>{escape(json.dumps(step.depends_on, indent=1))}</pre></details>")
    title = escape(f"{run.pipeline} {run.id[:8]}")
    head = f'<meta charset="utf-8"><title>{title}</title><style>{_STYLE}</style>'
    return f'<!doctype html><html lang="en"><head>{head}</head><body>{"".join(parts)}</body></html>\n'


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
    body = "".join(f"<tr>{''.join(f'<td>{escape(str(cell))}</td>' for cell in row)}</tr>" for row in rows)
    return f"<table><tr>{head}</tr>{body}</table>"


def _curves(metrics: Iterable[Mapping[str, Any]]) -> dict[str, list[tuple[int, float]]]:
    """Metrics with several values, in the order of their steps."""
    found: dict[str, dict[int, float]] = {}
    for line in metrics:
        found.setdefault(line["name"], {})[line["at"]] = line["value"]
    return {name: sorted(points.items()) for name, points in found.items() if len(points) > 1}


def _curve(name: str, points: Sequence[tuple[int, float]]) -> str:
    (first, last), values = (points[0][0], points[-1][0]), [value for _, value in points]
    low, high = min(values), max(values)
    place = [
        (10 + (_WIDTH - 20) * (at - first) / (last - first), _HEIGHT - 25 - (_HEIGHT - 50) * (value - low) / ((high - low) or 1))
        for at, value in points
    ]
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in place)
    return (
        f'<svg width="{_WIDTH}" height="{_HEIGHT}" role="img" aria-label="{escape(name)}">'
        f'<text x="10" y="14" font-size="13">{escape(name)}: {values[0]:.4g} at {first}, {values[-1]:.4g} at {last}; '
        f"lowest {low:.4g}, highest {high:.4g}</text>"
        f'<polyline points="{path}" fill="none" stroke="#1a5fb4" stroke-width="2"/></svg>'
    )


def _confusion(file: Path) -> str:
    """Rows are the true classes, columns the found ones; a cell is as dark as its share of its row."""
    stored = json.loads(file.read_text())
    classes, rows = [escape(str(name)) for name in stored["classes"]], []
    for name, counts in zip(classes, stored["counts"], strict=True):
        total = sum(counts) or 1
        cells = "".join(
            f'<td style="background: rgba(26, 95, 180, {0.6 * count / total:.2f})">{int(count)}</td>' for count in counts
        )
        rows.append(f"<tr><th>{name}</th>{cells}</tr>")
    head = "".join(f"<th>{name}</th>" for name in classes)
    caption = "<caption>true class by row, found class by column</caption>"
    return f'<table class="matrix">{caption}<tr><th></th>{head}</tr>{"".join(rows)}</table>'


def _wrong(file: Path) -> str:
    """Pictures that were classified wrongly. The bytes are in the page, and are those of a PNG file or not shown."""
    figures = []
    for item in json.loads(file.read_text()):
        png = base64.b64decode(item["png"])
        if png.startswith(_PNG):
            source = f"data:image/png;base64,{base64.b64encode(png).decode()}"
            caption = f"{escape(str(item['found']))}<br>in truth {escape(str(item['true']))}"
            figures.append(f'<figure><img src="{source}" alt=""><figcaption>{caption}</figcaption></figure>')
    return f"<h3>Classified wrongly</h3><div>{''.join(figures)}</div>"
