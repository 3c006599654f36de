"""The extra publish-boosting has the versions that the forms accept, and those are the ones that tests run with."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

from splitserve.publishing.boosting.catboost import CatBoostClassifier
from splitserve.publishing.boosting.lightgbm import LightGBMClassifier
from splitserve.publishing.boosting.xgboost import XGBoostClassifier

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("form", [XGBoostClassifier, LightGBMClassifier, CatBoostClassifier])
def test_the_extra_and_the_forms_agree(form: type) -> None:
    lowest, beyond = form.versions
    extra = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]["publish-boosting"]

    assert f"{form.library}>={lowest},<{beyond}" in extra


@pytest.mark.parametrize("form", [XGBoostClassifier, LightGBMClassifier, CatBoostClassifier])
def test_the_lowest_and_a_version_below_the_bound_are_tested(form: type) -> None:
    lowest, beyond = ([int(part) for part in bound.split(".")] for bound in form.versions)
    tested = re.findall(rf"{form.library}(?:-cpu)?==([\d.]+)", (ROOT / "Makefile").read_text())
    found = sorted([int(part) for part in version.split(".")] for version in tested)

    assert found[0][: len(lowest)] == lowest
    assert lowest < found[-1] < beyond
