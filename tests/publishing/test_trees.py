"""Converted trees choose scikit-learn's leaf, and add its numbers in its order."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from sklearn.ensemble import (
    BaggingClassifier,
    ExtraTreesClassifier,
    GradientBoostingClassifier,
    GradientBoostingRegressor,
    HistGradientBoostingClassifier,
    HistGradientBoostingRegressor,
    RandomForestClassifier,
    RandomForestRegressor,
    VotingClassifier,
)
from sklearn.multiclass import OneVsRestClassifier
from sklearn.tree import DecisionTreeClassifier, DecisionTreeRegressor, ExtraTreeClassifier

from splitserve.publishing.convert import to_onnx
from splitserve.publishing.estimators.trees import float32_at_most

RANDOM = np.random.default_rng(0)
GRID = RANDOM.integers(0, 4, size=(300, 5)).astype(float)
GAPS = np.where(RANDOM.random(GRID.shape) < 0.1, np.nan, GRID)
CLASSES = RANDOM.integers(0, 3, 300)
FAR = 1.7e9 + 10 * GRID[:, 0] + RANDOM.normal(size=300)
ROWS = RANDOM.integers(0, 5, size=(1000, 5)).astype(float)
ROWS_WITH_GAPS = np.where(RANDOM.random(ROWS.shape) < 0.1, np.nan, ROWS)
THREADS = (1, 3)

CLASSIFIERS: dict[str, tuple[Any, Any, Any]] = {
    "tree": (DecisionTreeClassifier(max_depth=4), GAPS, CLASSES),
    "extra tree": (ExtraTreeClassifier(max_depth=4, random_state=0), GAPS, CLASSES),
    "forest": (RandomForestClassifier(20, random_state=0), GAPS, CLASSES),
    "forest of two classes": (RandomForestClassifier(100, random_state=0), GAPS, CLASSES > 0),
    "forest with text labels": (RandomForestClassifier(20, random_state=0), GAPS, np.array(["a", "b", "c"])[CLASSES]),
    "forest of one class": (RandomForestClassifier(3), GAPS, CLASSES * 0),
    "extra trees": (ExtraTreesClassifier(20, random_state=0), GAPS, CLASSES),
    "boosted": (GradientBoostingClassifier(n_estimators=10), GRID, CLASSES),
    "boosted, two classes": (GradientBoostingClassifier(n_estimators=10), GRID, CLASSES > 0),
    "boosted, exponential": (GradientBoostingClassifier(n_estimators=10, loss="exponential"), GRID, CLASSES > 0),
    "histograms": (HistGradientBoostingClassifier(max_iter=10), GAPS, CLASSES),
    "histograms, two classes": (HistGradientBoostingClassifier(max_iter=10), GAPS, CLASSES > 0),
    "bagged": (BaggingClassifier(DecisionTreeClassifier(), 20, max_features=3, random_state=0), GAPS, CLASSES),
    "one against the rest": (OneVsRestClassifier(DecisionTreeClassifier(random_state=0)), GRID, CLASSES),
    "voting": (
        VotingClassifier(
            [(str(seed), DecisionTreeClassifier(max_depth=3, random_state=seed)) for seed in range(4)], voting="soft"
        ),
        GAPS,
        CLASSES,
    ),
}
REGRESSORS: dict[str, tuple[Any, Any, Any]] = {
    "tree": (DecisionTreeRegressor(), GAPS, FAR),
    "forest": (RandomForestRegressor(20, random_state=0), GAPS, FAR),
    "forest of two targets": (RandomForestRegressor(20, random_state=0), GAPS, np.column_stack([FAR, CLASSES])),
    "boosted": (GradientBoostingRegressor(n_estimators=10), GRID, FAR),
    "histograms": (HistGradientBoostingRegressor(max_iter=10), GAPS, FAR),
    "histograms, poisson": (HistGradientBoostingRegressor(max_iter=10, loss="poisson"), GAPS, CLASSES + 1.0),
}


def fitted(case: tuple[Any, Any, Any]) -> tuple[Any, Any]:
    """The estimator, and rows of the kind that it takes."""
    estimator, rows, target = case
    return estimator.fit(rows, target), ROWS_WITH_GAPS if np.isnan(rows).any() else ROWS


def answers(estimator: Any, rows: Any, precision: str) -> list[list[Any]]:
    """With one and several threads; together and alone."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = to_onnx(estimator, rows.shape[1], input_name="x", precision=precision).SerializeToString()
    found = []
    for n_threads in THREADS:
        options = ort.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = n_threads, 4
        session = ort.InferenceSession(model, options)
        sent = rows.astype(np.float32 if precision == "FP32" else np.float64)
        alone = [session.run(None, {"x": sent[row : row + 1]}) for row in range(100)]
        found += [session.run(None, {"x": sent}), [np.concatenate(parts) for parts in zip(*alone, strict=True)]]
    return found


@pytest.mark.parametrize("precision", ["FP32", "FP64"])
@pytest.mark.parametrize("case", CLASSIFIERS)
def test_a_label_is_that_of_scikit_learn_alone_together_and_with_any_number_of_threads(case: str, precision: str) -> None:
    """Missing values take the branch of training, and of equal probabilities the same class wins."""
    estimator, rows = fitted(CLASSIFIERS[case])
    labels, probabilities = estimator.predict(rows), estimator.predict_proba(rows)

    for label, scores in answers(estimator, rows, precision):
        assert label.tolist() == labels[: len(label)].tolist()
        np.testing.assert_allclose(scores, probabilities[: len(scores)], atol=1e-6)


def test_the_rows_have_ties() -> None:
    """Otherwise the test above would show nothing about them."""
    estimator, rows = fitted(CLASSIFIERS["forest"])
    best = np.sort(estimator.predict_proba(rows), axis=1)

    assert (best[:, -1] - best[:, -2] < 1e-12).sum() > 10


@pytest.mark.parametrize("case", REGRESSORS)
def test_a_prediction_far_from_zero_is_that_of_scikit_learn(case: str) -> None:
    """Of 1.7e9, float32 keeps no more than 128."""
    estimator, rows = fitted(REGRESSORS[case])
    expected = estimator.predict(rows)

    for (found,) in answers(estimator, rows, "FP64"):
        np.testing.assert_allclose(found.reshape(expected[: len(found)].shape), expected[: len(found)], rtol=1e-15)


def test_probabilities_that_are_all_zero_are_those_of_scikit_learn() -> None:
    """Of a row that every tree rejects: the older versions divide by their sum, and take the last class."""
    estimator, rows = fitted(CLASSIFIERS["one against the rest"])
    rejected = rows[np.nan_to_num(estimator.predict_proba(rows)).sum(axis=1) == 0][:100]

    assert len(rejected) > 0
    for label, scores in answers(estimator, np.resize(rejected, (100, 5)), "FP32"):
        np.testing.assert_array_equal(scores, np.resize(estimator.predict_proba(rejected), scores.shape))
        assert label.tolist() == np.resize(estimator.predict(rejected), label.shape).tolist()


@pytest.mark.parametrize("precision", ["FP32", "FP64"])
def test_a_split_of_missing_and_present_is_converted(precision: str) -> None:
    """Its threshold is infinite."""
    rows = np.array([[np.nan], [1.0], [2.0], [np.nan]] * 10)
    estimator = DecisionTreeClassifier().fit(rows, np.isnan(rows[:, 0]))
    assert np.isinf(estimator.tree_.threshold).any()

    for label, _ in answers(estimator, np.resize(rows, (100, 1)), precision):
        assert label.tolist() == [1, 0, 0, 1] * 25


def test_features_are_compared_as_float32_where_scikit_learn_does() -> None:
    """A float64 feature next to a threshold goes where its float32 goes."""
    rows = np.array([[0.1], [0.3]] * 5)
    estimator = DecisionTreeClassifier().fit(rows, [0, 1] * 5)
    near = float(np.float32(estimator.tree_.threshold[0]))
    hard = np.resize([np.nextafter(near, 1), near, np.nextafter(near, 0), near + 1e-9, near - 1e-9, near + 2e-8], (100, 1))

    for label, _ in answers(estimator, hard, "FP64"):
        assert label.tolist() == estimator.predict(hard).tolist()


def test_a_threshold_is_rounded_down() -> None:
    """So that every float32 number is on the same side of it as of the float64 threshold."""
    thresholds = np.array([0.1, 0.5, -0.1, -1e300, -np.inf, 1e-50, -1e-50, 3e38, np.inf])

    floors = float32_at_most(thresholds).astype(float)

    assert (floors <= thresholds).all()
    above = np.nextafter(floors[:-1].astype(np.float32), np.float32(np.inf)).astype(float)
    assert (above > thresholds[:-1]).all()
