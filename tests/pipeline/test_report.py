"""The HTML report of a run."""

from __future__ import annotations

import base64
import io
import json
from html.parser import HTMLParser
from pathlib import Path

from PIL import Image

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


def test_wrongly_classified_images_are_in_the_page(tmp_path: Path):
    """As data: the page needs nothing else. What is no PNG file is left out, and labels are text."""
    content = io.BytesIO()
    Image.new("RGB", (2, 2), "red").save(content, "PNG")
    shown = [
        {"png": base64.b64encode(data).decode(), "true": "<i>shirt", "found": "coat"} for data in (content.getvalue(), b"<svg/>")
    ]
    (tmp_path / "wrong.json").write_text(json.dumps(shown))
    step = Finished("evaluate", "0" * 64, {}, "r", str(tmp_path), {"wrong.json": "ab"}, [], 1.5, "now")
    run = RunState("1" * 32, "tiny", "finished", 1, "h", "now", {}, [StepState("evaluate", "finished", "0" * 64)])

    page = Read()
    page.feed(render(run, {"evaluate": step}))

    (link,) = page.links
    assert base64.b64decode(link.removeprefix("data:image/png;base64,")) == content.getvalue()
    assert "coatin truth <i>shirt" in page.text
    assert "i" not in page.tags
