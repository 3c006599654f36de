"""The HTML report of a run."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path

from splitserve.pipeline.index import Finished, RunState, StepState
from splitserve.pipeline.report import render


class Read(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.text = ""
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attributes if name in ("src", "href")]

    def handle_data(self, data: str) -> None:
        self.text += data


def test_a_report_has_curves_and_a_confusion_matrix_and_needs_no_network(tmp_path: Path):
    """Names of classes and parameters are text, whatever is in them."""
    classes = ["A:B", "<script>alert(1)</script>", "été"]
    (tmp_path / "confusion.json").write_text(json.dumps({"classes": classes, "counts": [[5, 1, 0], [0, 0, 0], [0, 2, 4]]}))
    metrics = [{"name": "loss <b>", "value": 1 / at, "at": at, "time": 0.0} for at in (2, 1, 4)]
    train = Finished("train", "0" * 64, {"lock": None}, "r", str(tmp_path), {"confusion.json": "ab"}, metrics, 1.5, "now")
    run = RunState("1" * 32, "tiny", "finished", 1, "h", "now", {"name": "<i>"}, [StepState("train", "finished", "0" * 64)])

    page = Read()
    page.feed(render(run, {"train": train}))

    assert {"script", "i", "b"}.isdisjoint(page.tags)
    assert page.links == []
    assert page.tags.count("polyline") == 1
    assert "loss <b>: 1 at 1, 0.25 at 4; lowest 0.25, highest 1" in page.text
    assert all(name in page.text for name in classes)
