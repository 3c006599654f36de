"""Columns of categories that reach the estimator: encoded by a step of the preprocessor as the fitted model encodes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from sklearn.ensemble import HistGradientBoostingClassifier, HistGradientBoostingRegressor
from sklearn.pipeline import make_pipeline

from splitserve import publish
from splitserve.transformers import CategoryCodes
from tests.publishing.test_publishing import answer

N = 400
RANDOM = np.random.default_rng(0)
MANY = [f"shop {number}" for number in range(200)]


def frame() -> pd.DataFrame:
    """Two numbers, a column of four categories of which one does not occur, one of 200, both with missing values."""
    colours, shops = np.array(["red", "blue", "green", None], dtype=object), np.array([*MANY, None], dtype=object)
    return pd.DataFrame(
        {
            "amount": np.where(RANDOM.random(N) < 0.1, np.nan, RANDOM.normal(size=N)),
            "colour": pd.Categorical(colours[RANDOM.integers(0, 4, N)], categories=["red", "green", "blue", "gone"]),
            "shop": pd.Categorical(shops[RANDOM.integers(0, 201, N)], categories=MANY),
            "count": RANDOM.integers(0, 9, N),
        }
    )


ROWS = frame()
TARGET = (
    3.0 * (ROWS.colour == "red")
    + (ROWS.colour == "blue")
    + ROWS.amount.fillna(1)
    + ROWS["shop"].cat.codes % 7
    + RANDOM.normal(size=N) / 9
).to_numpy()


def unusual() -> pd.DataFrame:
    """Rows with missing, unseen and unused categories, and the categories in another order."""
    rows = ROWS.iloc[:12].copy()
    colours = ["red", "blue", "green", "gone", None, np.nan, "violet", "Red", "", "gone", "red", "blue"]
    rows["colour"] = pd.Categorical(colours, categories=["violet", "gone", "blue", "", "Red", "red", "green"])
    return rows


@pytest.mark.parametrize("how", ["from_dtype", "names"])
def test_categories_of_histogram_boosting_are_served(tmp_path: Path, how: str) -> None:
    """Three and 200 categories; unseen ones as missing ones, whatever the order in the request."""
    chosen: Any = "from_dtype" if how == "from_dtype" else ["colour", "shop"]
    model = HistGradientBoostingRegressor(categorical_features=chosen, max_iter=10, min_samples_leaf=5)
    pipeline = make_pipeline(model).fit(ROWS, TARGET)

    published = publish(pipeline, ROWS, name="m", repository=tmp_path)

    assert published.hard_rows["unseen text"]
    assert published.hard_rows["thresholds"]
    for rows in (ROWS, unusual()):
        np.testing.assert_allclose(answer(tmp_path, "m", rows)["prediction"].ravel(), pipeline.predict(rows), rtol=1e-6)


def test_numeric_categories_of_histogram_boosting_are_served(tmp_path: Path) -> None:
    """Negative, fractional and unknown ones, too."""
    codes = RANDOM.choice([-3.0, 2.5, 7.0, 1e6, np.nan], size=N)
    rows = np.stack([RANDOM.normal(size=N), codes], axis=1)
    model = HistGradientBoostingClassifier(categorical_features=[1], max_iter=10, min_samples_leaf=5)
    pipeline = make_pipeline(model).fit(rows, np.where(codes == 2.5, "half", np.where(codes > 0, "more", "less")))
    unknown = np.array([[0.0, value] for value in (-3.0, 2.5, 2.0, 3.0, -1.0, np.nan, 1e6, 1e6 + 1, 0.0)])

    publish(pipeline, rows, name="m", repository=tmp_path)

    for given in (rows, unknown):
        found = answer(tmp_path, "m", given)
        assert [label.decode() for label in found["label"].tolist()] == pipeline.predict(given).tolist()
        np.testing.assert_allclose(found["probabilities"], pipeline.predict_proba(given), atol=1e-6)


def test_codes_of_unseen_categories() -> None:
    """A missing value is NaN in each case; XGBoost looks an unknown category up as the next known one."""
    known: list[list[Any] | None] = [None, ["b", "d", "a"]]
    rows = pd.DataFrame({"x": [1.0, 2.0, 3.0, 4.0], "c": ["d", None, "c", "b"]})

    assert CategoryCodes(known).transform(rows)[:, 1].tolist()[0] == 1
    assert np.isnan(CategoryCodes(known).transform(rows)[1:3, 1]).all()
    assert CategoryCodes(known, unseen="after").transform(rows)[2].tolist() == [3, 3]
    assert CategoryCodes(known, unseen="next").transform(rows)[2].tolist() == [3, 1]
    assert CategoryCodes(known, order=[1, 0]).transform(rows)[0].tolist() == [1, 1]
    with pytest.raises(ValueError, match="'e' is not a category that the model knows"):
        CategoryCodes(known, unseen="next").transform(rows.assign(c="e"))
