"""Estimators as ONNX models: each answers as scikit-learn does."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from sklearn.ensemble import GradientBoostingClassifier, HistGradientBoostingClassifier, RandomForestClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.tree import DecisionTreeClassifier

from splitserve.publishing.convert import expected_of, to_onnx

RANDOM = np.random.default_rng(0)
ROWS = RANDOM.normal(size=(60, 4))
CLASSES = np.digitize(ROWS[:, 0] + ROWS[:, 1], [-0.5, 0.5])


def run(estimator: Any, rows: np.ndarray, **options: Any) -> dict[str, np.ndarray]:
    """The answers of an estimator's model at float64."""
    model = to_onnx(estimator, rows.shape[1], input_name="features", precision="FP64", **options)
    session = ort.InferenceSession(model.SerializeToString())
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(None, {"features": rows.astype(np.float64)}), strict=True))


@pytest.mark.parametrize(
    "estimator",
    [
        DecisionTreeClassifier(max_depth=4, random_state=0),
        RandomForestClassifier(20, max_depth=2, random_state=0),
        HistGradientBoostingClassifier(max_iter=5, min_samples_leaf=2),
    ],
    ids=lambda each: type(each).__name__,
)
def test_trees_answer_to_the_last_bit(estimator: Any) -> None:
    """Also for NaN, and where two classes have equal probabilities: leaf values are added in scikit-learn's order."""
    rows = ROWS.round(1)
    rows[::7, 1] = np.nan
    estimator.fit(rows, CLASSES)
    asked = np.where(RANDOM.random((500, 4)) < 0.1, np.nan, RANDOM.normal(size=(500, 4)).round(1))

    found = run(estimator, asked)

    np.testing.assert_array_equal(found["label"], estimator.predict(asked))
    np.testing.assert_allclose(found["probabilities"], estimator.predict_proba(asked), rtol=0, atol=4e-16)


@pytest.mark.parametrize("labels", [["a", "b"], [False, True], [0.0, 1.0], [3, 5]], ids=["text", "boolean", "float", "integer"])
def test_labels_have_the_datatype_of_training(labels: Any) -> None:
    """Classes of every type that the wire has."""
    y = np.array(labels)[(CLASSES > 1).astype(int)]
    estimator = LogisticRegression().fit(ROWS, y)

    found = run(estimator, ROWS)["label"]

    assert found.dtype == (object if y.dtype.kind == "U" else y.dtype)
    assert found.tolist() == estimator.predict(ROWS).tolist()


def test_each_target_of_a_classifier_has_outputs_of_its_name() -> None:
    """Whether they have two classes or three."""
    estimator = RandomForestClassifier(5, random_state=0).fit(ROWS, np.c_[CLASSES, CLASSES > 1])

    found = run(estimator, ROWS, targets=["kind", "is_large"])
    expected = expected_of(estimator, ROWS, ["kind", "is_large"])

    assert list(found) == ["label_kind", "probabilities_kind", "label_is_large", "probabilities_is_large"]
    for name, array in found.items():
        np.testing.assert_allclose(array, expected[name], atol=1e-15)


def test_a_boosted_model_begins_with_its_initial_estimator() -> None:
    """Which may depend on the features."""
    estimator = GradientBoostingClassifier(n_estimators=3, init=LogisticRegression()).fit(ROWS, CLASSES > 0)

    found = run(estimator, ROWS)

    np.testing.assert_allclose(found["probabilities"], estimator.predict_proba(ROWS), atol=1e-6)
