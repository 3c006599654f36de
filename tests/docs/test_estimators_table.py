"""The table of estimators says which scikit-learn a class needs."""

from __future__ import annotations

from pathlib import Path

import pytest
from packaging.version import Version

from docs import estimators


def rows() -> dict[str, str]:
    return {line.split("|")[1].strip(): line for line in estimators.table()}


def test_a_class_that_the_lowest_version_lacks_says_since_when(monkeypatch: pytest.MonkeyPatch) -> None:
    """As its docstring does."""
    monkeypatch.setattr(estimators, "lowest_version", lambda: Version("1.4"))

    found = rows()

    assert found["FixedThresholdClassifier"] == "| FixedThresholdClassifier | yes |  | since scikit-learn 1.5 |"
    assert "since" not in found["LogisticRegression"]


def test_the_page_names_the_lowest_version() -> None:
    """That of the extra."""
    page = (Path(__file__).parents[2] / "docs" / "publishing.md").read_text()

    assert f"The oldest scikit-learn that is supported is {estimators.lowest_version()};" in page
