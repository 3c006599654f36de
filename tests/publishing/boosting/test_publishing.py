"""Pipelines with estimators of the three libraries are published and answer as before; the estimators inside of others do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import catboost as cb
import lightgbm as lgb
import numpy as np
import pandas as pd
import pytest
import skops.io
import xgboost as xgb
from scipy.sparse import csr_matrix
from sklearn.base import clone
from sklearn.calibration import CalibratedClassifierCV
from sklearn.compose import make_column_transformer
from sklearn.ensemble import BaggingClassifier, StackingClassifier, StackingRegressor, VotingClassifier, VotingRegressor
from sklearn.feature_selection import SelectKBest
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV
from sklearn.multiclass import OneVsRestClassifier
from sklearn.multioutput import ClassifierChain, MultiOutputClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import MaxAbsScaler, OneHotEncoder, StandardScaler

from splitserve import PublishError, publish
from splitserve.publishing.boosting import boosted, catboost, lightgbm, xgboost
from splitserve.publishing.convert import outputs_of, to_onnx
from splitserve.publishing.estimator_files import read_skops
from tests.publishing.boosting.cases import NAMES, REAL, ROWS, THREE, TWO, WHOLE
from tests.publishing.boosting.test_options import run
from tests.publishing.test_publishing import answer

pytestmark = [pytest.mark.boosting, pytest.mark.filterwarnings("ignore")]

SMALL: dict[str, Any] = {"n_estimators": 6}
LIBRARIES: dict[str, tuple[Any, Any]] = {
    "xgboost": (xgb.XGBClassifier(**SMALL), xgb.XGBRegressor(**SMALL)),
    "lightgbm": (lgb.LGBMClassifier(verbose=-1, **SMALL), lgb.LGBMRegressor(verbose=-1, **SMALL)),
    "catboost": tuple(
        kind(depth=3, verbose=0, allow_writing_files=False, **SMALL) for kind in (cb.CatBoostClassifier, cb.CatBoostRegressor)
    ),
}
CLASSIFIERS = {
    "voting": lambda one: VotingClassifier([("boosted", one), ("linear", LogisticRegression(max_iter=500))], voting="soft"),
    "hard voting": lambda one: VotingClassifier([("boosted", one), ("linear", LogisticRegression(max_iter=500))]),
    "stacking": lambda one: StackingClassifier([("boosted", one), ("linear", LogisticRegression(max_iter=500))], cv=2),
    "stacked on": lambda one: StackingClassifier([("linear", LogisticRegression(max_iter=500))], one, cv=3),
    "calibrated": lambda one: CalibratedClassifierCV(one, cv=3),
    "one against the rest": OneVsRestClassifier,
    "bagging": lambda one: BaggingClassifier(one, n_estimators=2, random_state=0),
    "grid search": lambda one: GridSearchCV(one, {"n_estimators": [2, 4]}, cv=2),
}
REGRESSORS = {
    "voting": lambda one: VotingRegressor([("boosted", one), ("again", one)]),
    "stacking": lambda one: StackingRegressor([("boosted", one), ("again", one)], cv=3),
}
FRAME = pd.DataFrame(
    {
        "amount": np.exp(ROWS[:, 0]),
        "count": np.arange(len(ROWS)) % 9,
        "purpose": np.array(["car", "house", "other"])[THREE],
    }
)


def classifier(library: str) -> Any:
    return clone(LIBRARIES[library][0])


def assert_served(pipeline: Any, rows: Any, repository: Path) -> None:
    publish(pipeline, rows, name="m", repository=repository)
    found = answer(repository, "m", rows)
    expected = np.asarray(pipeline.predict(rows))
    if "label" in found:
        have = [each.decode() if isinstance(each, bytes) else each for each in found["label"].tolist()]
        assert have == expected.reshape(-1).tolist()
        if hasattr(pipeline, "predict_proba"):
            np.testing.assert_allclose(found["probabilities"], pipeline.predict_proba(rows), rtol=0, atol=1e-6)
    else:
        np.testing.assert_allclose(found["prediction"].reshape(expected.shape), expected, rtol=1e-6)


@pytest.mark.parametrize("library", LIBRARIES)
def test_a_classifier_is_served(tmp_path: Path, library: str) -> None:
    """With missing numbers, columns of text that are encoded before, and text as classes where the library takes that."""
    transforms = make_column_transformer(("passthrough", ["amount", "count"]), (OneHotEncoder(), ["purpose"]))
    labels = THREE if library == "xgboost" else NAMES[THREE]

    assert_served(make_pipeline(transforms, classifier(library)).fit(FRAME, labels), FRAME, tmp_path)


@pytest.mark.parametrize("library", LIBRARIES)
def test_a_skops_file_is_read_without_more_trust(tmp_path: Path, library: str) -> None:
    """Its types are those of estimators that become graphs, which no service loads."""
    pipelines = [make_pipeline(clone(one)).fit(WHOLE, TWO) for one in LIBRARIES[library]]

    for number, pipeline in enumerate(pipelines):
        path = tmp_path / f"{number}.skops"
        skops.io.dump(pipeline, path)
        assert read_skops(path, "file", ()).predict(WHOLE).tolist() == pipeline.predict(WHOLE).tolist()


@pytest.mark.parametrize("library", LIBRARIES)
def test_a_regressor_is_served(tmp_path: Path, library: str) -> None:
    """After transforms that scale, so that thresholds are met only through them."""
    assert_served(make_pipeline(StandardScaler(), clone(LIBRARIES[library][1])).fit(ROWS, REAL), ROWS, tmp_path)


@pytest.mark.parametrize("kind", [xgb.XGBRanker, lgb.LGBMRanker, cb.CatBoostRanker])
def test_a_ranker_is_served(tmp_path: Path, kind: Any) -> None:
    """Its scores are predictions."""
    quiet: dict[str, Any] = {"verbose": -1} if kind is lgb.LGBMRanker else {}
    if kind is cb.CatBoostRanker:
        quiet = {"verbose": 0, "allow_writing_files": False}
    name = "group_id" if kind is cb.CatBoostRanker else "group" if kind is lgb.LGBMRanker else "qid"
    groups = [10] * (len(ROWS) // 10) if kind is lgb.LGBMRanker else np.arange(len(ROWS)) // 10
    pipeline = make_pipeline(StandardScaler(), kind(n_estimators=6, **quiet))

    pipeline.fit(ROWS, THREE / 2 if kind is cb.CatBoostRanker else THREE, **{f"{kind.__name__.lower()}__{name}": groups})

    assert_served(pipeline, ROWS, tmp_path)


@pytest.mark.parametrize("outer", CLASSIFIERS)
@pytest.mark.parametrize("library", LIBRARIES)
def test_a_classifier_inside_of_another_is_equal(library: str, outer: str) -> None:
    """Labels are text, those of the outer estimator."""
    if (library, outer) == ("catboost", "hard voting"):
        pytest.skip("scikit-learn cannot count CatBoost's labels, which are columns")
    is_passed_on = library == "xgboost" and outer in ("stacked on", "calibrated", "bagging", "grid search")
    assert_equal(CLASSIFIERS[outer](classifier(library)).fit(WHOLE, THREE if is_passed_on else NAMES[THREE]))


@pytest.mark.parametrize("outer", REGRESSORS)
@pytest.mark.parametrize("library", LIBRARIES)
def test_a_regressor_inside_of_another_is_equal(library: str, outer: str) -> None:
    assert_equal(REGRESSORS[outer](clone(LIBRARIES[library][1])).fit(WHOLE, REAL))


def assert_equal(estimator: Any) -> None:
    """On rows of training, and on others with and without repetitions."""
    rows = np.concatenate([WHOLE, np.random.default_rng(2).normal(size=(200, WHOLE.shape[1])) * 3, WHOLE[:3]])
    found = run(to_onnx(estimator, rows.shape[1], input_name="features", precision="FP64").SerializeToString(), rows)
    for answer_ in outputs_of(estimator):
        want, have = answer_.expected(estimator, rows), found[answer_.name]
        if want.dtype.kind == "f":
            np.testing.assert_allclose(have.reshape(want.shape), want, rtol=0, atol=1e-6)
        else:
            assert have.tolist() == want.tolist()


def sparse_transforms() -> Any:
    """They give a sparse matrix, without the zeros of ``count``."""
    return make_column_transformer(("passthrough", ["count"]), (OneHotEncoder(), ["purpose"]), sparse_threshold=1.0)


@pytest.mark.parametrize("library", LIBRARIES)
def test_zeros_of_a_sparse_matrix_are_what_the_library_takes_them_for(tmp_path: Path, library: str) -> None:
    """XGBoost: missing values, the others: zeros."""
    labels = (FRAME["count"] < 3).to_numpy() ^ (FRAME["purpose"] == "car").to_numpy()
    pipeline = make_pipeline(sparse_transforms(), classifier(library)).fit(FRAME, labels)
    rows = pipeline[:-1].transform(FRAME)
    is_same = np.array_equal(pipeline[-1].predict_proba(rows), pipeline[-1].predict_proba(rows.toarray()))

    assert is_same == (library != "xgboost")
    assert_served(pipeline, FRAME, tmp_path)


@pytest.mark.parametrize("outer", [*CLASSIFIERS, "pipeline", "chain", "passed on"])
def test_zeros_of_a_sparse_matrix_are_missing_inside_of_another_estimator(outer: str) -> None:
    """Also to those that get scaled columns, or columns with answers beside them."""
    one = classifier("xgboost")
    makers: dict[str, Any] = {
        **CLASSIFIERS,
        "pipeline": lambda one: VotingClassifier([("a", make_pipeline(MaxAbsScaler(), SelectKBest(k=2), one))], voting="soft"),
        "chain": lambda one: ClassifierChain(one, order=[1, 0]),
        "passed on": lambda one: StackingClassifier([("a", LogisticRegression())], one, cv=3, passthrough=True),
    }
    rows = csr_matrix(np.random.default_rng(3).integers(0, 3, size=(200, 3)).astype(np.float64))
    labels = (rows.toarray()[:, 0] < 1).astype(int) ^ (rows.toarray()[:, 1] > 1)
    estimator = makers[outer](one).fit(
        rows, np.stack([labels, labels ^ (rows.toarray()[:, 2] > 0)], 1) if outer == "chain" else labels
    )

    model = to_onnx(estimator, 3, input_name="features", precision="FP64", is_sparse=True)
    found = run(model.SerializeToString(), rows.toarray())

    for answer_ in outputs_of(estimator):
        want = answer_.expected(estimator, rows)
        np.testing.assert_allclose(found[answer_.name].reshape(want.shape), want, rtol=0, atol=1e-6)


def test_several_targets_of_a_classifier_are_served_one_by_one(tmp_path: Path) -> None:
    """The way out that the refusal names."""
    y = np.stack([TWO, THREE], axis=1)
    pipeline = make_pipeline(MultiOutputClassifier(xgb.XGBClassifier(**SMALL))).fit(WHOLE, y)

    publish(pipeline, WHOLE, name="m", repository=tmp_path)
    found = answer(tmp_path, "m", WHOLE)

    assert np.stack([found["label_0"], found["label_1"]], axis=1).tolist() == pipeline.predict(WHOLE).tolist()


def test_lightgbm_on_numbers_between_two_float32_is_published_as_float64(tmp_path: Path) -> None:
    """It compares float64 numbers: cents of large amounts, seconds since 1970."""
    rows = np.stack([1.7e9 + np.arange(200.0), 1e7 + np.arange(200) / 100], axis=1)
    pipeline = make_pipeline(lgb.LGBMClassifier(verbose=-1, **SMALL)).fit(rows, np.arange(200) % 40 < 17)

    assert_served(pipeline, rows, tmp_path)


@pytest.mark.parametrize("form", [xgboost.XGBoostClassifier, lightgbm.LightGBMClassifier, catboost.CatBoostClassifier])
def test_an_untested_version_of_a_library_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: Any) -> None:
    """The message has the versions that are tested."""
    monkeypatch.setattr(form, "versions", ("0.1", "0.2"))
    pipeline = make_pipeline(classifier(form.library)).fit(WHOLE, TWO)

    with pytest.raises(PublishError, match=rf"{form.library} [\d.]+: publishing is tested with 0.1 up to, not including, 0.2"):
        publish(pipeline, WHOLE, name="m", repository=tmp_path)

    assert form.library in boosted.LIBRARIES
