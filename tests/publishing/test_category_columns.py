"""Columns of categories that reach the estimator: encoded by a step of the preprocessor as the fitted model encodes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from sklearn.base import clone
from sklearn.calibration import CalibratedClassifierCV
from sklearn.compose import make_column_transformer
from sklearn.ensemble import (
    HistGradientBoostingClassifier,
    HistGradientBoostingRegressor,
    StackingClassifier,
    StackingRegressor,
    VotingClassifier,
    VotingRegressor,
)
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.model_selection import GridSearchCV
from sklearn.multiclass import OneVsRestClassifier
from sklearn.multioutput import MultiOutputClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder

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


SMALL: dict[str, Any] = {"max_iter": 5, "min_samples_leaf": 5}
OUTER = {
    "voting": lambda one: VotingClassifier([("one", one), ("other", clone(one).set_params(max_iter=3))], voting="soft"),
    "stacking": lambda one: StackingClassifier([("one", one)], LogisticRegression(), cv=2),
    "calibrated": lambda one: CalibratedClassifierCV(one, cv=3),
    "one against the rest": OneVsRestClassifier,
    "several targets": MultiOutputClassifier,
    "search": lambda one: GridSearchCV(one, {"max_iter": [2, 4]}, cv=2),
}
LEVELS = np.digitize(TARGET, np.quantile(TARGET, [0.3, 0.7]))


@pytest.mark.parametrize("outer", OUTER)
@pytest.mark.parametrize("how", ["from_dtype", "numbers"])
def test_categories_of_histogram_boosting_inside_of_another_are_served(tmp_path: Path, outer: str, how: str) -> None:
    """Members that were fitted on other rows know other categories; numbers are categories in any order and column."""
    rows: Any = ROWS
    if how == "numbers":
        rows = np.stack([RANDOM.choice([-3.0, 0.1, 7.0, 1e6, np.nan], size=N), ROWS["amount"], ROWS["shop"].cat.codes], axis=1)
    chosen: Any = "from_dtype" if how == "from_dtype" else [2, 0]
    y = LEVELS if outer != "several targets" else np.stack([LEVELS, LEVELS > 1], axis=1)
    pipeline = make_pipeline(OUTER[outer](HistGradientBoostingClassifier(categorical_features=chosen, **SMALL))).fit(rows, y)

    published = publish(pipeline, rows, name="m", repository=tmp_path)

    assert published.hard_rows["thresholds"]
    for given in (rows, unusual() if how == "from_dtype" else np.array([[0.2, 1.0, 3.0], [-0.0, np.nan, 2.5], [1e6, 0.0, -1.0]])):
        found = answer(tmp_path, "m", given)
        labels = found["label"] if "label" in found else np.stack([found["label_0"], found["label_1"]], axis=1)
        assert labels.tolist() == pipeline.predict(given).tolist()


@pytest.mark.parametrize("outer", [VotingRegressor, lambda members: StackingRegressor(members, Ridge(), cv=2)])
def test_categories_of_histogram_regressors_inside_of_another_are_served(tmp_path: Path, outer: Any) -> None:
    """By name, where one of the members takes one of the columns as numbers."""
    rows = ROWS.assign(shop=ROWS["shop"].cat.codes.astype(float))
    members = [
        ("one", HistGradientBoostingRegressor(categorical_features=["colour", "shop"], **SMALL)),
        ("other", HistGradientBoostingRegressor(categorical_features=["colour"], **SMALL)),
    ]
    pipeline = make_pipeline(outer(members)).fit(rows, TARGET)

    publish(pipeline, rows, name="m", repository=tmp_path)

    for given in (rows, rows.assign(colour="violet", shop=2.5)):
        np.testing.assert_allclose(answer(tmp_path, "m", given)["prediction"].ravel(), pipeline.predict(given), rtol=1e-6)


def test_codes_of_unseen_categories() -> None:
    """A missing value is NaN in each case; XGBoost looks an unknown category up as the next known one."""
    known: list[list[Any] | None] = [None, ["b", "d", "a"]]
    rows = pd.DataFrame({"x": [1.0, 2.0, 3.0, 4.0], "c": ["d", None, "c", "b"]})

    assert CategoryCodes(known).transform(rows)[:, 1].tolist()[0] == 1
    assert np.isnan(CategoryCodes(known).transform(rows)[1:3, 1]).all()
    assert CategoryCodes(known, unseen="after").transform(rows)[2].tolist() == [3, 3]
    assert CategoryCodes(known, unseen="next").transform(rows)[2].tolist() == [3, 1]
    with pytest.raises(ValueError, match="'e' is not a category that the model knows"):
        CategoryCodes(known, unseen="next").transform(rows.assign(c="e"))


def test_the_next_category_of_numbers_is_the_next_number() -> None:
    """Not the next text."""
    codes = CategoryCodes([[-20, 9, 10]], unseen="next").transform(pd.DataFrame({"c": [-620, 9.5, 10]}))

    assert codes.ravel().tolist() == [0, 2, 2]


@pytest.mark.parametrize("golden", ["rows", "synthetic"])
@pytest.mark.parametrize(
    "steps",
    [
        (HistGradientBoostingClassifier(categorical_features="from_dtype", max_iter=10),),
        (make_column_transformer((OneHotEncoder(handle_unknown="ignore"), ["k"])), LogisticRegression()),
    ],
    ids=["of the estimator", "of an encoder"],
)
def test_categories_may_be_numbers(tmp_path: Path, steps: tuple[Any, ...], golden: str) -> None:
    """Unseen, missing, negative and fractional ones, and the same in another order."""
    known = np.array([-10, 0, 10, 20, 30])
    rows = pd.DataFrame({"k": pd.Categorical(known[RANDOM.integers(0, 5, N)])})
    pipeline = make_pipeline(*steps).fit(rows, rows["k"].astype(int) % 20 == 0)
    publish(pipeline, rows, name="m", repository=tmp_path, golden=golden)
    asked = [30, -10, np.nan, 999, -7, 2.5, 0]

    found = answer(tmp_path, "m", pd.DataFrame({"k": pd.Categorical(asked, categories=[*known[::-1], 999, -7, 2.5])}))
    expected = pipeline.predict_proba(pd.DataFrame({"k": pd.Categorical(asked, categories=[*known, 999, -7, 2.5])}))

    np.testing.assert_allclose(found["probabilities"], expected, atol=1e-6)
