"""What clients send for the columns of a DataFrame: what the transforms use, of whatever type, missing where they accept it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from sklearn.compose import make_column_transformer
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.impute import SimpleImputer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline, make_union
from sklearn.preprocessing import FunctionTransformer, OneHotEncoder, StandardScaler

from splitserve import publish, publish_preprocessor
from splitserve.arrays import from_array, to_array
from splitserve.errors import InvalidInput
from splitserve.publishing.columns import without_unused
from splitserve.repository.bundle import BundleKey
from splitserve.repository.folder import Repository
from splitserve.repository.source import load_bundle
from splitserve.runtimes import predictor, preprocessor
from splitserve.runtimes.release import WholeRelease
from splitserve.runtimes.rows import UnsupportedRows, observe, to_tensors
from tests.publishing.test_publishing import answer

N = 40
RANDOM = np.random.default_rng(0)
TARGET = np.arange(N) % 2
NUMERIC = make_pipeline(SimpleImputer(), StandardScaler())


def published(repository: Path, transforms: Any, frame: pd.DataFrame, estimator: Any = None, **options: Any) -> Any:
    """What publish says, the fitted pipeline, and the whole as services load it."""
    pipeline = make_pipeline(transforms, estimator or LogisticRegression()).fit(frame, TARGET)
    said = publish(pipeline, frame, name="m", repository=repository, **options)
    loaders = (("preprocess", preprocessor.load), ("predict", predictor.load))
    halves = [load_bundle(Repository(repository), BundleKey("m", kind, 1), load) for kind, load in loaders]  # type: ignore
    return said, pipeline, WholeRelease(*halves)


def labels(whole: WholeRelease, frame: pd.DataFrame) -> list[Any]:
    """Of rows as training had them."""
    manifest = whole.preprocessor.manifest
    assert manifest.rows is not None
    found = whole.infer(to_tensors(manifest.rows, manifest.inputs, frame))
    return to_array(found[0]).tolist()


def test_whole_numbers_may_be_missing_where_the_pipeline_accepts_it(tmp_path: Path) -> None:
    """An imputer takes null and 27.5; publish says so. Numbers that are categories stay whole."""
    frame = pd.DataFrame({"age": RANDOM.integers(18, 90, N), "floor": RANDOM.integers(0, 3, N)})
    transforms = make_column_transformer((NUMERIC, ["age"]), (OneHotEncoder(), ["floor"]))

    said, pipeline, whole = published(tmp_path, transforms, frame)

    assert {spec.name: spec.datatype for spec in whole.inputs} == {"age": "FP64", "floor": "INT64"}
    assert '"age", whole numbers in X, may be missing' in str(said)
    asked = pd.DataFrame({"age": [np.nan, 27.5, 30.0], "floor": [1, 2, 0]})
    assert labels(whole, asked) == pipeline.predict(asked).tolist()
    assert labels(whole, frame) == pipeline.predict(frame).tolist()


def test_whole_numbers_may_have_decimals_where_the_pipeline_refuses_gaps(tmp_path: Path) -> None:
    """A linear model without an imputer: a missing value is refused as the pipeline refuses it. Categories stay whole."""
    frame = pd.DataFrame({"age": RANDOM.integers(18, 90, N), "floor": RANDOM.integers(0, 3, N)})
    transforms = make_column_transformer((StandardScaler(), ["age"]), (OneHotEncoder(), ["floor"]))

    said, pipeline, whole = published(tmp_path, transforms, frame)

    assert {spec.name: spec.datatype for spec in whole.inputs} == {"age": "FP64", "floor": "INT64"}
    assert said.notes == ('"age", whole numbers in X, may have decimals: sent as FP64',)
    asked = pd.DataFrame({"age": [27.5, 30.0], "floor": [1, 2]})
    assert labels(whole, asked) == pipeline.predict(asked).tolist()
    with pytest.raises(InvalidInput, match="row 0: the features contain a missing or infinite value"):
        labels(whole, asked.assign(age=[np.nan, 30.0]))


def test_that_empty_text_is_a_missing_value_is_said(tmp_path: Path) -> None:
    """Only of columns in which it is one: where training had it, it is a category."""
    frame = pd.DataFrame({"city": ["Oslo", None] * (N // 2), "job": ["", "cook"] * (N // 2)})
    encoders = make_column_transformer((OneHotEncoder(handle_unknown="ignore"), ["city", "job"]))

    said, pipeline, whole = published(tmp_path, encoders, frame)

    assert said.notes == ('"city": empty text is a missing value, as on the wire they are the same',)
    asked = frame[:2].assign(city=["", ""])
    assert labels(whole, asked) == pipeline.predict(asked.assign(city=None)).tolist()


def test_whole_numbers_of_transforms_alone_stay_whole(tmp_path: Path) -> None:
    """Nothing is known of the model behind them, which may refuse a missing value or not."""
    frame = pd.DataFrame({"age": RANDOM.integers(18, 90, N)})

    bundle = publish_preprocessor(StandardScaler().fit(frame), frame, name="m", repository=tmp_path)

    assert bundle.manifest.inputs[0].datatype == "INT64"


def test_whole_numbers_may_be_missing_for_trees_that_accept_it(tmp_path: Path) -> None:
    """Without transforms the estimator decides."""
    frame = pd.DataFrame({"age": RANDOM.integers(18, 90, N)})

    _, pipeline, whole = published(tmp_path, "passthrough", frame, HistGradientBoostingClassifier(max_iter=3))

    asked = pd.DataFrame({"age": [np.nan, 50.5]})
    assert labels(whole, asked) == pipeline.predict(asked).tolist()


def test_columns_that_nothing_uses_are_not_required(tmp_path: Path) -> None:
    """Whatever they hold; publish says which."""
    frame = pd.DataFrame({"id": [object() for _ in range(N)], "x": RANDOM.normal(size=N), "note": ["a"] * N})

    said, pipeline, whole = published(tmp_path, make_column_transformer((StandardScaler(), ["x"])), frame)

    assert [spec.name for spec in whole.inputs] == ["x"]
    assert 'no transform selects "id", "note": clients need not send it' in str(said)
    assert whole.preprocessor.manifest.ignored == ("id", "note")
    assert labels(whole, frame[["x"]]) == pipeline.predict(frame).tolist()


@pytest.mark.parametrize(
    "transforms",
    [
        make_union(
            make_column_transformer((StandardScaler(), ["x"])),
            make_column_transformer((StandardScaler(), ["y"]), ("drop", ["id"])),
        ),
        make_pipeline(make_pipeline(make_column_transformer((StandardScaler(), ["x", "y"]))), StandardScaler()),
    ],
    ids=["each of a union", "within pipelines"],
)
def test_columns_are_unused_wherever_the_selection_is(transforms: Any) -> None:
    frame = pd.DataFrame({"id": ["a"] * N, "x": RANDOM.normal(size=N), "y": RANDOM.normal(size=N)})

    kept, unused = without_unused(transforms.fit(frame), frame)

    assert (list(kept), unused) == (["x", "y"], ("id",))


@pytest.mark.parametrize(
    "transforms",
    [
        make_column_transformer((StandardScaler(), ["x"]), remainder="passthrough"),
        StandardScaler(),
        make_column_transformer((StandardScaler(), ["x"]), (FunctionTransformer(), ["y"])),
        make_union(make_column_transformer((StandardScaler(), ["x"])), FunctionTransformer()),
    ],
    ids=["remainder", "no selection", "both", "one of a union"],
)
def test_columns_that_something_uses_are_required(transforms: Any) -> None:
    frame = pd.DataFrame(RANDOM.normal(size=(N, 2)), columns=["x", "y"])

    assert without_unused(transforms.fit(frame), frame)[1] == ()


NULLABLE = {
    "Int64": (
        pd.array([1, None, 3, 4] * 10, dtype="Int64"),
        27.5,
        "whole numbers from -9007199254740992 to 9007199254740992 or NaN",
    ),
    "Float64": (pd.array([1.5, None, 3, 4] * 10, dtype="Float64"), None, ""),
    "boolean": (pd.array([True, None, False, True] * 10, dtype="boolean"), 0.5, "whole numbers from 0 to 1 or NaN"),
}


@pytest.mark.parametrize("dtype", NULLABLE)
def test_nullable_numbers_are_sent_with_nan_for_missing(tmp_path: Path, dtype: str) -> None:
    """The transforms get the dtype that they were fitted on; what it cannot hold is the caller's mistake."""
    values, wrong, message = NULLABLE[dtype]
    frame = pd.DataFrame({"x": values})

    _, pipeline, whole = published(tmp_path, SimpleImputer(), frame)

    assert whole.inputs[0].datatype == "FP64"
    assert labels(whole, frame) == pipeline.predict(frame).tolist()
    if wrong is not None:
        with pytest.raises(InvalidInput, match=f'"x": expected {message}, as {dtype} in training'):
            whole.infer((from_array("x", np.array([[wrong]])),))


@pytest.mark.parametrize("step", [FunctionTransformer(), make_column_transformer(("passthrough", ["count", "is_new"]))])
def test_nullable_numbers_may_reach_the_estimator(tmp_path: Path, step: Any) -> None:
    """A missing value is NaN to it, as to the estimators that take such columns."""
    counts = pd.array([1, None, 3, 4] * 10, dtype="Int64")
    rows = pd.DataFrame({"count": counts, "is_new": pd.array([True, False, None, True, False] * 8, dtype="boolean")})
    pipeline = make_pipeline(step.set_output(transform="pandas"), HistGradientBoostingClassifier(max_iter=4, min_samples_leaf=2))
    pipeline.fit(rows, [0, 1, 1, 0] * 10)

    publish(pipeline, rows, name="m", repository=tmp_path)

    assert answer(tmp_path, "m", rows)["label"].tolist() == pipeline.predict(rows).tolist()


def test_pandas_text_is_sent_as_text(tmp_path: Path) -> None:
    frame = pd.DataFrame({"x": pd.array(["a", "c", "b", "a"] * 10, dtype="string")})
    transforms = OneHotEncoder(handle_unknown="ignore")

    _, pipeline, whole = published(tmp_path, transforms, frame)

    assert whole.inputs[0].datatype == "BYTES"
    assert labels(whole, frame) == pipeline.predict(frame).tolist()


def test_columns_beside_booleans_are_found_too(tmp_path: Path) -> None:
    """Together they are features of objects, among them NaN."""
    frame = pd.DataFrame(
        {"id": "a", "age": RANDOM.integers(18, 90, N), "old": RANDOM.random(N) < 0.5, "size": [np.nan, 1.5, 2.5, 3.5] * (N // 4)}
    )
    transforms = make_column_transformer(("passthrough", ["age", "old", "size"]), ("drop", ["id"]))

    said, pipeline, whole = published(tmp_path, transforms, frame, HistGradientBoostingClassifier(max_iter=3))

    assert whole.preprocessor.manifest.ignored == ("id",)
    assert said.notes[1] == '"age", whole numbers in X, may be missing or have decimals: sent as FP64'
    asked = frame.assign(age=[np.nan, 27.5] * (N // 2))
    assert labels(whole, asked) == pipeline.predict(asked).tolist()


class Hours:
    """Functions on a column of times, in a module that a service could have."""

    @staticmethod
    def of(frame: pd.DataFrame) -> np.ndarray:
        column = frame.iloc[:, 0].dt
        return np.column_stack([column.hour, column.day_of_week]).astype(float)


def hours(frame: pd.DataFrame) -> np.ndarray:
    return Hours.of(frame)


@pytest.mark.parametrize("zone", [None, "UTC", "Europe/Oslo"])
def test_times_are_sent_as_iso_8601(tmp_path: Path, zone: str | None) -> None:
    """With and without a zone. Missing ones are the empty string."""
    times = pd.date_range("2026-01-01", periods=N, freq="7h", tz=zone)
    frame = pd.DataFrame({"at": times})
    transforms = make_pipeline(FunctionTransformer(hours), SimpleImputer())
    options = {"trusted_modules": [__name__]}

    pipeline = make_pipeline(transforms, LogisticRegression()).fit(frame, TARGET)
    publish(pipeline, frame, name="m", repository=tmp_path, **options)
    half = load_bundle(
        Repository(tmp_path),
        BundleKey("m", "preprocess", 1),
        lambda bundle: preprocessor.load(bundle, trusted_modules=[__name__]),
    )
    manifest = half.manifest
    expected = pipeline[:-1].transform(frame)

    assert manifest.inputs[0].datatype == "BYTES"
    found = half.transform(to_tensors(manifest.rows, manifest.inputs, frame))
    np.testing.assert_array_equal(to_array(found[0]), expected.astype(np.float32))
    missing = half.transform((from_array("at", np.array([[b""]], object)),))
    assert np.isfinite(to_array(missing[0])).all()
    with pytest.raises(InvalidInput, match='"at": expected dates and times in ISO 8601'):
        half.transform((from_array("at", np.array([[b"yesterday"]], object)),))


def test_a_column_that_occurs_twice_is_refused() -> None:
    """By its name."""
    frame = pd.DataFrame(RANDOM.normal(size=(N, 3)), columns=["x", "y", "x"])

    with pytest.raises(UnsupportedRows, match='unique names; "x" occurs more than once: rename or drop it'):
        observe(frame, "features")


def test_a_table_of_many_columns_needs_settings(tmp_path: Path) -> None:
    """Publish names them."""
    frame = pd.DataFrame(RANDOM.normal(size=(N, 70)), columns=[f"c{number}" for number in range(70)])

    said, _, _ = published(tmp_path, StandardScaler(), frame)

    assert "requests have 70 inputs, one a column: set PROXY_MAX_INPUTS and PREPROCESS_MAX_INPUTS" in str(said)


@pytest.mark.parametrize("golden", ["rows", "synthetic"])
def test_golden_rows_of_these_columns(tmp_path: Path, golden: str) -> None:
    """Generated ones too."""
    frame = pd.DataFrame(
        {
            "age": RANDOM.integers(18, 90, N),
            "count": pd.array([1, None, 3, 4] * 10, dtype="Int64"),
            "flag": pd.array([True, None, False, True] * 10, dtype="boolean"),
        }
    )
    transforms = make_column_transformer((SimpleImputer(), ["age", "count", "flag"]))

    said, pipeline, whole = published(tmp_path, transforms, frame, golden=golden)

    assert said.golden == golden
    assert labels(whole, frame) == pipeline.predict(frame).tolist()
