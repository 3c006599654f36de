"""The tests that docs/batch.md names exist."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_every_named_test_exists() -> None:
    """In the folder that it names."""
    named = set(re.findall(r"`(test_\w+)`", (ROOT / "docs" / "batch.md").read_text()))
    sources = "".join(path.read_text() for path in (ROOT / "tests" / "scoring").rglob("test_*.py"))

    assert len(named) > 20
    assert [name for name in sorted(named) if f"def {name}(" not in sources] == []
