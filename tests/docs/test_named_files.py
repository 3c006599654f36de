"""Files that the documents name are there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [
    *(ROOT / name for name in ("README.md", "ARCHITECTURE.md", "CONTRIBUTING.md", "benchmarks/README.md", "protos/README.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
]
FILE = re.compile(r"`((?:splitserve|[a-z]+_service|proxy|protos|tests|docs|deploy|examples|training|benchmarks)/[\w./-]*)`")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_named_file_exists(page: Path) -> None:
    """A path in backticks, from the root of the repository."""
    missing = [name for name in FILE.findall(page.read_text()) if not (ROOT / name).exists()]

    assert missing == []
