"""Columns of pandas' categories into LightGBM, XGBoost and CatBoost."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import catboost as cb
import lightgbm as lgb
import numpy as np
import pandas as pd
import pytest
import xgboost as xgb
from sklearn.base import clone
from sklearn.compose import make_column_transformer
from sklearn.ensemble import HistGradientBoostingRegressor, StackingRegressor, VotingRegressor
from sklearn.frozen import FrozenEstimator
from sklearn.linear_model import Ridge
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from splitserve import PublishError, publish
from splitserve.publishing.boosting.boosted import parsed
from tests.publishing.test_category_columns import ROWS, TARGET, unusual
from tests.publishing.test_publishing import answer

pytestmark = [pytest.mark.boosting, pytest.mark.filterwarnings("ignore")]

HIGH = np.median(TARGET) < TARGET
MODELS: dict[str, Any] = {
    "lightgbm": lgb.LGBMRegressor(n_estimators=10, verbose=-1, min_data_per_group=3, cat_smooth=1.0),
    "lightgbm, one against the rest": lgb.LGBMRegressor(n_estimators=10, verbose=-1, max_cat_to_onehot=300),
    "xgboost": xgb.XGBRegressor(n_estimators=10, enable_categorical=True),
    "xgboost, one against the rest": xgb.XGBRegressor(n_estimators=10, enable_categorical=True, max_cat_to_onehot=300),
    "xgboost, partitions": xgb.XGBRegressor(n_estimators=10, enable_categorical=True, max_cat_to_onehot=1),
}


@pytest.mark.parametrize("model", MODELS)
def test_categories_are_served(tmp_path: Path, model: str) -> None:
    """Of 3 and of 200 values; missing, unused and unknown ones; the same in another order as far as the library knows its own."""
    pipeline = make_pipeline(MODELS[model]).fit(ROWS, TARGET)

    published = publish(pipeline, ROWS, name="m", repository=tmp_path)

    assert published.hard_rows["missing"]
    orders = [ROWS] if "xgboost" in model else [ROWS, unusual()]
    for rows in orders:
        np.testing.assert_allclose(answer(tmp_path, "m", rows)["prediction"].ravel(), pipeline.predict(rows), rtol=1e-6)


@pytest.mark.parametrize("model", ["lightgbm", "xgboost"])
def test_categories_may_be_numbers(tmp_path: Path, model: str) -> None:
    """Unknown ones are among the hard rows: XGBoost looks them up in the order of numbers."""
    codes = ROWS["shop"].cat.codes.to_numpy()
    numbers = pd.Categorical.from_codes(np.where(codes < 0, -1, codes % 12), categories=10 * np.arange(12) - 30)
    rows = ROWS[["amount"]].assign(number=numbers)
    pipeline = make_pipeline(clone(MODELS[model])).fit(rows, TARGET)

    published = publish(pipeline, rows, name="m", repository=tmp_path)

    assert published.hard_rows["far out of range"]
    np.testing.assert_allclose(answer(tmp_path, "m", rows)["prediction"].ravel(), pipeline.predict(rows), rtol=1e-6)


@pytest.mark.parametrize("model", ["lightgbm", "xgboost"])
def test_a_row_is_answered_the_same_whatever_else_is_in_its_frame(tmp_path: Path, model: str) -> None:
    """Its code does not depend on the categories of the frame at hand."""
    pipeline = make_pipeline(MODELS[model]).fit(ROWS, TARGET)
    publish(pipeline, ROWS, name="m", repository=tmp_path)
    together = answer(tmp_path, "m", ROWS)["prediction"]

    for row in range(0, 40, 7):
        alone = ROWS.iloc[[row]].assign(colour=lambda frame: frame["colour"].cat.remove_unused_categories())
        assert answer(tmp_path, "m", alone)["prediction"].tolist() == together[[row]].tolist()


@pytest.mark.parametrize("library", ["lightgbm", "xgboost"])
def test_categories_behind_transforms_that_keep_a_frame_are_served(tmp_path: Path, library: str) -> None:
    """Columns change their order and their names on the way."""
    kind = lgb.LGBMClassifier(n_estimators=8, verbose=-1) if library == "lightgbm" else None
    model = kind or xgb.XGBClassifier(n_estimators=8, enable_categorical=True)
    transforms = make_column_transformer(
        ("passthrough", ["shop"]), (StandardScaler(), ["count", "amount"]), ("passthrough", ["colour"])
    ).set_output(transform="pandas")
    pipeline = make_pipeline(transforms, model).fit(ROWS, HIGH.astype(int))

    publish(pipeline, ROWS, name="m", repository=tmp_path)

    found = answer(tmp_path, "m", ROWS)
    assert found["label"].tolist() == pipeline.predict(ROWS).tolist()
    np.testing.assert_allclose(found["probabilities"], pipeline.predict_proba(ROWS), atol=1e-6)


SMALL: dict[str, Any] = {"n_estimators": 5}
OUTER: dict[str, Any] = {
    "lightgbm beside histograms": VotingRegressor(
        [
            ("one", HistGradientBoostingRegressor(categorical_features="from_dtype", max_iter=5)),
            ("other", lgb.LGBMRegressor(verbose=-1, min_data_per_group=3, **SMALL)),
        ]
    ),
    "lightgbm stacked": StackingRegressor([("one", lgb.LGBMRegressor(verbose=-1, **SMALL))], Ridge(), cv=2),
    "xgboost": VotingRegressor([(name, xgb.XGBRegressor(enable_categorical=True, **SMALL)) for name in ("one", "other")]),
}


@pytest.mark.parametrize("outer", OUTER)
def test_categories_inside_of_another_estimator_are_served(tmp_path: Path, outer: str) -> None:
    """Each member computes with its own codes."""
    pipeline = make_pipeline(OUTER[outer]).fit(ROWS, TARGET)

    publish(pipeline, ROWS, name="m", repository=tmp_path)

    for rows in [ROWS] if outer == "xgboost" else [ROWS, unusual()]:
        np.testing.assert_allclose(answer(tmp_path, "m", rows)["prediction"].ravel(), pipeline.predict(rows), rtol=1e-6)


def test_members_that_treat_unknown_categories_differently_are_refused(tmp_path: Path) -> None:
    """LightGBM takes them as missing, XGBoost does not."""
    members = [("one", lgb.LGBMRegressor(verbose=-1, **SMALL)), ("other", xgb.XGBRegressor(enable_categorical=True, **SMALL))]
    pipeline = make_pipeline(VotingRegressor(members)).fit(ROWS, TARGET)

    with pytest.raises(PublishError, match=r"XGBRegressor has other codes of categories \(colour\) than LGBMRegressor beside it"):
        publish(pipeline, ROWS, name="m", repository=tmp_path)


@pytest.mark.parametrize("model", ["lightgbm", "xgboost"])
def test_text_in_place_of_categories_is_refused(tmp_path: Path, model: str) -> None:
    """As a CSV file gives it."""
    pipeline = make_pipeline(clone(MODELS[model])).fit(ROWS, TARGET)

    with pytest.raises(
        PublishError, match=r"columns of text \(colour, shop\): if training had them as categories, publish with rows"
    ):
        publish(pipeline, ROWS.astype({"colour": object, "shop": object}), name="m", repository=tmp_path)


def test_categories_that_xgboost_damages_are_refused(tmp_path: Path) -> None:
    """From 3.1 on it stores them, and counts characters where UTF-8 has more bytes: with them it answers otherwise."""
    rows = ROWS.assign(colour=ROWS["colour"].cat.rename_categories(lambda name: f"{name}é"))
    pipeline = make_pipeline(clone(MODELS["xgboost"])).fit(rows, TARGET)

    if parsed(xgb.__version__) < (3, 1):
        publish(pipeline, rows, name="m", repository=tmp_path)
        return
    with pytest.raises(
        PublishError, match='stored categories of "colour" as .*damages text that is not ASCII; encode the column'
    ):
        publish(pipeline, rows, name="m", repository=tmp_path)


PLAIN = pd.DataFrame(
    {
        "amount": ROWS["amount"],
        "colour": ROWS["colour"].astype(object).fillna("é <none>"),
        "count": ROWS["count"],
        "shop": ROWS["shop"].astype(object).fillna("").str[:7],
    }
)


def catboost(kind: Any, **given: Any) -> Any:
    return kind(iterations=6, depth=4, verbose=0, allow_writing_files=False, thread_count=1, **given)


@pytest.mark.parametrize("policy", ["SymmetricTree", "Depthwise", "Lossguide"])
@pytest.mark.parametrize("kind", [cb.CatBoostRegressor, cb.CatBoostClassifier])
def test_catboosts_comparisons_with_categories_are_served(tmp_path: Path, kind: Any, policy: str) -> None:
    """Of text and of whole numbers, behind a step that changes the order; a category that training did not have equals none."""
    columns = ["shop", "amount", "colour", "count"]
    keep = make_column_transformer(("passthrough", columns), verbose_feature_names_out=False).set_output(transform="pandas")
    model = catboost(kind, cat_features=["colour", "shop", "count"], one_hot_max_size=99, grow_policy=policy)
    pipeline = make_pipeline(keep, model).fit(PLAIN, TARGET if kind is cb.CatBoostRegressor else np.digitize(TARGET, [2, 5]))

    publish(pipeline, PLAIN, name="m", repository=tmp_path)

    unseen = PLAIN.iloc[:9].assign(colour="violet", shop="", count=77)
    for rows in (PLAIN, unseen, PLAIN.iloc[[3]]):
        found, want = answer(tmp_path, "m", rows), pipeline.predict(rows).ravel()
        if kind is cb.CatBoostRegressor:
            np.testing.assert_allclose(found["prediction"].ravel(), want, rtol=1e-6)
        else:
            assert found["label"].tolist() == want.tolist()
            np.testing.assert_allclose(found["probabilities"], pipeline.predict_proba(rows), atol=1e-6)


def test_a_category_that_catboost_knows_has_to_be_in_the_rows(tmp_path: Path) -> None:
    """Its models have hashes instead of categories."""
    pipeline = make_pipeline(catboost(cb.CatBoostRegressor, cat_features=["colour"], one_hot_max_size=9))
    rows = PLAIN[["amount", "colour"]]
    pipeline.fit(rows, TARGET)

    with pytest.raises(
        PublishError, match=r'knows a category of "colour" that X does not have; publish with rows that have every'
    ):
        publish(pipeline, rows[rows["colour"] != "red"], name="m", repository=tmp_path)


@pytest.mark.parametrize("is_inside", [False, True])
def test_catboosts_other_categories_are_refused_by_name(tmp_path: Path, is_inside: bool) -> None:
    """Statistics of the target, and any inside of another estimator; with the way out, before anything is converted."""
    rows = PLAIN[["amount", "colour"]]
    model = catboost(cb.CatBoostRegressor, cat_features=["colour"], **({"one_hot_max_size": 9} if is_inside else {}))
    model.fit(rows, TARGET)
    pipeline = make_pipeline(FrozenEstimator(model) if is_inside else model)

    with pytest.raises(PublishError, match=r"cat_features \(colour\) has no ONNX form; encode these columns.*one_hot_max_size"):
        publish(pipeline, rows, name="m", repository=tmp_path)
