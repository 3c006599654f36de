"""Estimators as ONNX models: each answers as scikit-learn does."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from sklearn.base import is_classifier
from sklearn.cluster import DBSCAN, BisectingKMeans, KMeans, MiniBatchKMeans
from sklearn.dummy import DummyClassifier
from sklearn.ensemble import GradientBoostingClassifier, HistGradientBoostingClassifier, RandomForestClassifier
from sklearn.linear_model import LinearRegression, LogisticRegression
from sklearn.neighbors import KNeighborsClassifier, LocalOutlierFactor, NearestCentroid, RadiusNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC
from sklearn.tree import DecisionTreeClassifier

from splitserve import PublishError, publish, publish_preprocessor
from splitserve.arrays import to_array
from splitserve.publishing.convert import expected_of, outputs_of, to_onnx
from splitserve.publishing.errors import NotConvertible
from splitserve.publishing.estimators.refused import AS_TRANSFORM, REFUSED
from splitserve.repository.bundle import BundleKey
from splitserve.repository.folder import Repository
from splitserve.repository.source import load_bundle
from splitserve.runtimes import predictor, preprocessor
from splitserve.runtimes.release import WholeRelease
from splitserve.runtimes.rows import to_tensors
from tests.publishing import estimator_cases as cases

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
    expected = expected_of(estimator, ROWS, outputs_of(estimator, ["kind", "is_large"]))

    assert list(found) == ["label_kind", "probabilities_kind", "label_is_large", "probabilities_is_large"]
    for name, array in found.items():
        np.testing.assert_allclose(array, expected[name], atol=1e-15)


def test_a_boosted_model_begins_with_its_initial_estimator() -> None:
    """Which may depend on the features."""
    estimator = GradientBoostingClassifier(n_estimators=3, init=LogisticRegression()).fit(ROWS, CLASSES > 0)

    found = run(estimator, ROWS)

    np.testing.assert_allclose(found["probabilities"], estimator.predict_proba(ROWS), atol=1e-6)


@pytest.mark.parametrize("kind", [KMeans, MiniBatchKMeans, BisectingKMeans])
@pytest.mark.parametrize("n_columns", [4, 120])
def test_rows_far_away_have_the_nearest_mean(kind: Any, n_columns: int) -> None:
    """Where the distances to all means are the same number."""
    estimator = kind(3, n_init=1, random_state=0)
    rows = np.random.default_rng(1).normal(size=(150, n_columns))
    estimator.fit(rows)
    far = rows * np.logspace(0, 30, len(rows)).reshape(-1, 1)

    found = run(estimator, far)["label"]

    assert found.tolist() == estimator.predict(far).tolist()
    assert len(set(found[-50:].tolist())) > 1


def whole(repository: Path) -> WholeRelease:
    """The published pair, its halves loaded as the services load them."""
    found = Repository(repository)
    halves = (
        load_bundle(found, BundleKey("m", "preprocess", 1), preprocessor.load),
        load_bundle(found, BundleKey("m", "predict", 1), predictor.load),
    )
    return WholeRelease(*halves)


def served(release: WholeRelease, rows: np.ndarray) -> dict[str, np.ndarray]:
    manifest = release.preprocessor.manifest
    assert manifest.rows is not None
    return {tensor.name: to_array(tensor) for tensor in release.infer(to_tensors(manifest.rows, manifest.inputs, rows))}


def assert_same(found: dict[str, np.ndarray], expected: Any, atol: float) -> None:
    """Labels are equal, numbers within the tolerance, relative to the largest where that is beyond 1."""
    assert set(found) == set(expected)
    for name, array in found.items():
        want = np.asarray(expected[name]).reshape(array.shape)
        if name.startswith("label"):
            texts = [each.decode() if isinstance(each, bytes) else each for each in array.ravel().tolist()]
            assert texts == want.ravel().tolist()
        else:
            largest = float(np.nan_to_num(np.abs(want)).max())
            np.testing.assert_allclose(array, want, rtol=0, atol=atol * max(1.0, largest))


@pytest.mark.parametrize("name", cases.with_predict())
def test_every_estimator_that_predicts_is_published_and_served(tmp_path: Path, name: str) -> None:
    """The whole answers as the pipeline does to rows that it was not fitted on."""
    estimator, x = cases.fitted(name)
    pipeline = make_pipeline(estimator)

    publish(pipeline, x, name="m", repository=tmp_path)
    asked = cases.rows(name, 200, seed=1)

    assert_same(served(whole(tmp_path), asked), expected_of(pipeline, asked, outputs_of(pipeline)), atol=1e-4)


@pytest.mark.long
@pytest.mark.parametrize("name", cases.with_predict())
def test_every_estimator_answers_to_many_rows(name: str) -> None:
    """At float64, on 10,000 rows, some of them far from those of training."""
    estimator, _ = cases.fitted(name, n_rows=300)
    asked = cases.rows(name, 10_000, seed=1)
    if name not in cases.COUNTS:
        asked[::10] *= 10

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of rows far from all others, whose answer is NaN
        expected = expected_of(estimator, asked, outputs_of(estimator))

    assert_same(run(estimator, asked), expected, atol=1e-9)


@pytest.mark.parametrize("name", cases.VARIANTS)
def test_what_an_estimator_is_made_of_may_be_anything(name: str) -> None:
    """Votes, stacks, bags and targets, with text for classes, two classes, several targets."""
    estimator, kind = cases.VARIANTS[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        estimator.fit(ROWS, cases.TARGETS[kind](ROWS))
        asked = cases.rows(name, 200, seed=1)
        expected = expected_of(estimator, asked, outputs_of(estimator))

    assert_same(run(estimator, asked), expected, atol=1e-9)


@pytest.mark.parametrize("name", [name for name in cases.with_transform() if name not in (*REFUSED, *AS_TRANSFORM)])
def test_every_transformer_is_published_and_served(tmp_path: Path, name: str) -> None:
    """The preprocessor gives what the transformer gives, one row at a time too."""
    transformer, x = cases.fitted_transformer(name)

    bundle = publish_preprocessor(transformer, x, name="m", repository=tmp_path, precision="FP64")
    half = load_bundle(Repository(tmp_path), bundle.key, preprocessor.load)

    assert bundle.manifest.rows is not None
    for rows in (x, x[:1]):
        found = to_array(half.transform(to_tensors(bundle.manifest.rows, bundle.manifest.inputs, np.asarray(rows)))[0])
        given = transformer.transform(rows)
        want = given.toarray() if hasattr(given, "toarray") else np.asarray(given)
        np.testing.assert_allclose(found, want.reshape(found.shape), atol=1e-9)


@pytest.mark.parametrize("name", sorted(AS_TRANSFORM))
def test_a_transformer_that_skops_cannot_store_is_refused(tmp_path: Path, name: str) -> None:
    """It can be the last step, and be published as a pickle."""
    transformer, x = cases.fitted_transformer(name)

    with pytest.raises(PublishError, match="allow_pickle=True"):
        publish_preprocessor(transformer, x, name="m", repository=tmp_path)


def test_every_class_is_published_in_a_test_or_refused() -> None:
    """No class of scikit-learn that predicts or transforms is missing, and none is refused that does not exist."""
    tested = {*cases.with_predict(), *cases.with_transform()}

    assert {name for name in REFUSED if name in cases.with_predict()} == set()
    assert set(REFUSED) <= {name for name, _ in cases.all_estimators()}
    assert not {name for name, kind in cases.all_estimators() if hasattr(kind, "predict")} - tested


class Own(NearestCentroid):
    """A class of a user's."""


@pytest.mark.parametrize(
    ("estimator", "message"),
    [
        (DBSCAN(), "has no predict: it labels the rows that it was fitted on and no others; KMeans"),
        (DummyClassifier(strategy="uniform"), "answers at random; strategy='prior'"),
        (LocalOutlierFactor(), "fit it with novelty=True"),
        (RadiusNeighborsClassifier(50.0), "fit it with outlier_label"),
        (KNeighborsClassifier(weights=lambda distances: distances + 1), "use weights='uniform' or 'distance'"),
        (KNeighborsClassifier(metric="cosine", algorithm="brute"), "the metric cosine has no ONNX form; use euclidean"),
        (SVC(kernel=lambda left, right: left @ right.T), "a callable kernel has no ONNX form; use one of linear"),
        (
            Own(),
            "^Own of .*test_estimators has no ONNX form; fit a NearestCentroid, from which it is derived, if it predicts in the",
        ),
    ],
    ids=lambda each: type(each).__name__ if not isinstance(each, str) else "",
)
def test_a_refusal_says_why_and_what_works(tmp_path: Path, estimator: Any, message: str) -> None:
    """Nothing is written."""
    x = np.abs(ROWS).round()
    pipeline = make_pipeline(StandardScaler(with_mean=False, with_std=False), estimator).fit(x, CLASSES)

    with warnings.catch_warnings(), pytest.raises(PublishError, match=message):
        warnings.simplefilter("ignore")
        publish(pipeline, x, name="m", repository=tmp_path)

    assert not list(tmp_path.rglob("manifest.json"))


def test_classes_of_several_types_are_refused() -> None:
    """They have no datatype on the wire."""
    estimator = LogisticRegression()
    estimator.fit(ROWS, CLASSES)
    estimator.classes_ = np.array(["a", 1, None], dtype=object)

    assert is_classifier(estimator)
    with pytest.raises(NotConvertible, match="fit on y of one type"):
        run(estimator, ROWS)


@pytest.mark.parametrize(
    ("estimator", "y", "targets", "labels", "output_labels"),
    [
        (LogisticRegression(), np.array(["a", "b", "c"])[CLASSES], (), ("a", "b", "c"), {}),
        (
            RandomForestClassifier(3),
            np.c_[CLASSES, CLASSES > 1],
            ("kind", "is_large"),
            (),
            {"probabilities_kind": ("0", "1", "2"), "probabilities_is_large": ("0", "1")},
        ),
        (LinearRegression(), ROWS[:, :2], ("price", "weight"), (), {"prediction": ("price", "weight")}),
        (LinearRegression(), ROWS[:, 0], (), (), {}),
    ],
    ids=["one target", "several", "numbers", "one number"],
)
def test_halves_and_release_say_what_columns_are(
    tmp_path: Path, estimator: Any, y: Any, targets: Any, labels: Any, output_labels: Any
) -> None:
    """The classes of probabilities, the targets of predictions."""
    publish(make_pipeline(estimator).fit(ROWS, y), ROWS, name="m", repository=tmp_path, targets=targets)

    halves = [Repository(tmp_path).open(BundleKey("m", kind, 1)).manifest for kind in ("preprocess", "predict")]
    record = json.loads(next(tmp_path.glob("m/releases/*/manifest.json")).read_text())

    for manifest in halves:
        assert (manifest.labels, manifest.output_labels) == (labels, output_labels)
    assert tuple(record.get("labels", ())) == labels
    assert {name: tuple(names) for name, names in record.get("output_labels", {}).items()} == output_labels


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (["price"], "targets: expected 2 names, got 1"),
        (["price", "price"], "targets: expected names that differ, got 'price', 'price'"),
    ],
)
def test_each_target_needs_a_name_of_its_own(tmp_path: Path, targets: list[str], message: str) -> None:
    """If any is named."""
    pipeline = make_pipeline(LinearRegression()).fit(ROWS, ROWS[:, :2])

    with pytest.raises(PublishError, match=message):
        publish(pipeline, ROWS, name="m", repository=tmp_path, targets=targets)
