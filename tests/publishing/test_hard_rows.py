"""Hard rows show what rows of the training data do not, and publishing refuses what differs on them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from sklearn.compose import make_column_transformer
from sklearn.ensemble import BaggingClassifier, HistGradientBoostingClassifier, RandomForestClassifier
from sklearn.impute import SimpleImputer
from sklearn.linear_model import LinearRegression, LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder, StandardScaler
from sklearn.tree import DecisionTreeClassifier, DecisionTreeRegressor

from splitserve import PublishError, publish
from splitserve.arrays import from_array, to_array
from splitserve.publishing import from_pipeline
from splitserve.publishing.convert import to_onnx
from splitserve.publishing.estimators import trees
from splitserve.publishing.from_pipeline import DEFAULT_TOLERANCE
from splitserve.publishing.hard_rows import FAR, N_A_KIND, N_MIXED, HardRows, feature_thresholds, splits_of
from splitserve.repository.bundle import BundleKey
from splitserve.repository.folder import Repository
from splitserve.repository.release import ReleaseKey, ReleaseManifest, decode
from splitserve.repository.source import load_bundle
from splitserve.runtimes import preprocessor
from splitserve.versions import Pair
from tests.publishing import pipelines

RANDOM = np.random.default_rng(0)


def blocks(rows: Any, **options: Any) -> dict[str, Any]:
    """The rows of each kind, several blocks of one kind joined."""
    found: dict[str, list[Any]] = {}
    for block in HardRows([rows], ["x"], **options).blocks():
        found.setdefault(block.kind, []).append(block.arrays[0])
    return {kind: np.concatenate(parts) for kind, parts in found.items()}


def test_each_column_is_tried_alone_and_all_are_tried_together() -> None:
    """Missing in each column, in all, and in several."""
    gaps = np.isnan(blocks(RANDOM.normal(size=(50, 4)))["missing"])

    assert (gaps[:4] == np.eye(4, dtype=bool)).all()
    assert gaps[4].all()
    assert gaps.any(axis=1).all()


def test_the_number_of_rows_does_not_grow_with_the_number_of_columns() -> None:
    """From some number on, each row changes several columns; every column is changed in one of them."""
    wide = blocks(RANDOM.normal(size=(50, 2000)))

    gaps = np.isnan(wide["missing"])
    assert len(gaps) == N_A_KIND + 2
    assert gaps[:N_A_KIND].sum(axis=0).tolist() == [1] * 2000
    assert sum(map(len, wide.values())) < 1000


def test_values_are_of_the_datatype() -> None:
    """Whole numbers have no missing value, and go no farther than their datatype."""
    found = blocks(np.arange(100, dtype=np.int8).reshape(50, 2))

    assert "missing" not in found
    assert found[FAR].max() == 127
    assert found[FAR].min() == -128


def test_large_whole_numbers_are_tried_where_float32_and_float64_stop_to_count() -> None:
    """In columns of ids and times, not in those of small numbers."""
    assert "large integers" not in blocks(np.arange(50.0).reshape(-1, 1))
    assert 2**24 + 1 in blocks(1e5 + np.arange(50.0).reshape(-1, 1))["large integers"]
    assert 2**53 + 1 in blocks(2**41 + np.arange(50).reshape(-1, 1))["large integers"]


def test_raw_rows_are_next_to_the_thresholds_of_features() -> None:
    """Two neighbouring float64 numbers, whose features are on different sides."""
    rows = pipelines.tenths(100, 0)
    scaler = StandardScaler().fit(rows)
    tree = DecisionTreeClassifier(random_state=0).fit(scaler.transform(rows), pipelines.two(rows))
    splits = splits_of(tree, 5)

    block = HardRows([rows], ["x"]).thresholds(lambda arrays: scaler.transform(arrays[0]), splits)

    assert block is not None
    low, high = block.arrays[0][::2], block.arrays[0][1::2]
    moved = low != high
    assert (moved.sum(axis=1) == 1).all()
    assert len(low) == len(splits)
    np.testing.assert_array_equal(np.nextafter(low[moved], np.inf), high[moved])
    assert "= " in block.shown[0]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_feature_rows_are_at_thresholds_and_on_both_sides(dtype: Any) -> None:
    """One float32 to each side and, of float64, one float64 to each side."""
    at = 0.1
    block = feature_thresholds(np.zeros((3, 2), dtype), [(1, at)])

    assert block is not None
    values = block.arrays[0][:, 1]
    near = np.float32(at)
    assert {near, np.nextafter(near, np.float32(1)), np.nextafter(near, np.float32(0))} <= set(values.astype(np.float32))
    if dtype is np.float64:
        assert {at, np.nextafter(at, 1), np.nextafter(at, 0)} <= set(values)


def test_thresholds_are_found_wherever_trees_are() -> None:
    """In ensembles, and in ensembles of ensembles."""
    rows = pipelines.grid(100, 0)
    forest = RandomForestClassifier(3, random_state=0).fit(rows, pipelines.two(rows))
    histograms = HistGradientBoostingClassifier(max_iter=3).fit(rows, pipelines.two(rows))

    for estimator in (forest, histograms):
        assert len(splits_of(estimator, 5)) > 3
    assert splits_of(LogisticRegression().fit(rows, pipelines.two(rows)), 5) == []


def test_thresholds_of_a_converted_model_are_of_the_columns_of_its_input() -> None:
    """A bagged tree counts only the columns that it was given; and other libraries' trees are no Python objects."""
    rows = pipelines.tenths(100, 0)
    bagged = BaggingClassifier(DecisionTreeClassifier(max_depth=2), 4, max_features=0.4, random_state=0)
    bagged.fit(rows, pipelines.two(rows))
    wanted = {
        (int(chosen[feature]), float(np.float32(at)))
        for tree, chosen in zip(bagged.estimators_, bagged.estimators_features_, strict=True)
        for feature, at in zip(tree.tree_.feature, tree.tree_.threshold, strict=True)
        if feature >= 0
    }

    model = to_onnx(bagged, 5, input_name="x", precision="FP32").SerializeToString()
    found = splits_of(None, 5, model)

    near = {(feature, float(other)) for feature, at in found for other in (at, np.nextafter(np.float32(at), np.float32(np.inf)))}
    assert wanted <= near


def test_a_release_records_the_rows_that_were_compared(tmp_path: Path) -> None:
    """By kind, at both levels; publish says so."""
    rows = pipelines.gaps(100, 0)
    pipeline = make_pipeline(DecisionTreeClassifier(max_depth=3)).fit(rows, pipelines.two(rows))

    published = publish(pipeline, rows, name="m", repository=tmp_path)

    compared = released(tmp_path).compared
    assert compared.hard_rows == published.hard_rows
    assert compared.worst.keys() == {"label", "probabilities"}
    assert compared.worst["label"] == 0
    assert 0 < compared.worst["probabilities"] == published.worst_difference < DEFAULT_TOLERANCE
    assert {
        "missing",
        "mixed rows",
        "extremes",
        "far out of range",
        "thresholds",
        "thresholds (features)",
    } <= published.hard_rows.keys()
    assert compared.rows == 100 + sum(published.hard_rows.values())
    assert f"{published.hard_rows['missing']} missing" in str(published)


def test_rows_that_the_pipeline_refuses_are_not_compared(tmp_path: Path) -> None:
    """A linear model takes no missing values."""
    rows = pipelines.numbers(100, 0)
    pipeline = make_pipeline(StandardScaler(), LogisticRegression()).fit(rows, pipelines.two(rows))

    published = publish(pipeline, rows, name="m", repository=tmp_path)

    assert "missing" not in published.hard_rows
    assert "infinite" not in published.hard_rows


def released(repository: Path) -> ReleaseManifest:
    """The manifest of the newest release."""
    key = ReleaseKey("m", 1, Pair(1, 1))
    return decode((repository / "m" / "releases" / key.folder_name / "manifest.json").read_bytes(), key)


FAULTS: dict[str, tuple[Any, Any, str]] = {
    "missing values take the other branch": (
        "tree_of",
        lambda original: (
            lambda *args: (lambda tree: trees.Tree(tree.feature, tree.threshold, tree.left, tree.right, ~tree.nan_left))(
                original(*args)
            )
        ),
        r"row \d+ of the kind missing.*: \"features\[\d\]\" = nan",
    ),
    "thresholds are rounded to the nearest": (
        "float32_at_most",
        lambda _: lambda thresholds: np.nextafter(thresholds.astype(np.float32), np.float32(np.inf)),
        r"row \d+ of the kind thresholds: .*features\[\d\]\"? = ",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_conversion_is_refused_with_the_row_that_shows_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    """Rows of X do not: they are whole, and not at thresholds."""
    attribute, wrong, message = FAULTS[fault]
    monkeypatch.setattr(trees, attribute, wrong(getattr(trees, attribute)))
    rows = pipelines.numbers(200, 0).astype(np.float32)
    pipeline = make_pipeline(DecisionTreeClassifier(max_depth=4, random_state=0)).fit(rows, pipelines.two(rows))

    with pytest.raises(PublishError, match=message):
        publish(pipeline, rows, name="m", repository=tmp_path)

    assert not list(tmp_path.rglob("*.json"))


def test_a_row_that_only_the_split_refuses_is_shown_with_the_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Here the manifest says that a tree, which takes missing values, does not."""
    monkeypatch.setattr(from_pipeline, "_refuses", lambda _: "nan")
    rows = pipelines.numbers(100, 0).astype(np.float32)
    pipeline = make_pipeline(DecisionTreeClassifier(max_depth=2)).fit(rows, pipelines.two(rows))

    message = r"that the pipeline answers \(missing: .* = nan\): .*the features contain a missing or infinite value"
    with pytest.raises(PublishError, match=message):
        publish(pipeline, rows, name="m", repository=tmp_path)


FLOAT64: dict[str, tuple[Any, Any, Any]] = {
    "thresholds of float64 features": (HistGradientBoostingClassifier(max_iter=5), pipelines.tenths, pipelines.two),
    "times": (HistGradientBoostingClassifier(max_iter=5), pipelines.epochs, pipelines.two),
    "predictions far from zero": (LinearRegression(), pipelines.numbers, pipelines.far_amount),
    "leaves far from zero": (DecisionTreeRegressor(max_depth=4), pipelines.tenths, pipelines.far_amount),
}


@pytest.mark.parametrize("case", FLOAT64)
def test_what_float32_cannot_tell_apart_is_computed_in_float64(tmp_path: Path, case: str) -> None:
    """Although rows of X may not show it."""
    estimator, make, target = FLOAT64[case]
    rows = make(300, 0)

    publish(make_pipeline(estimator).fit(rows, target(rows)), rows, name="m", repository=tmp_path)

    assert Repository(tmp_path).open(BundleKey("m", "predict", 1)).manifest.inputs[0].datatype == "FP64"


def test_trees_that_compare_in_float32_stay_at_float32(tmp_path: Path) -> None:
    """scikit-learn rounds their features itself."""
    rows = pipelines.tenths(300, 0)

    publish(make_pipeline(DecisionTreeClassifier()).fit(rows, pipelines.two(rows)), rows, name="m", repository=tmp_path)

    assert Repository(tmp_path).open(BundleKey("m", "predict", 1)).manifest.inputs[0].datatype == "FP32"


@pytest.mark.parametrize("missing", [None, np.nan], ids=["None", "NaN"])
@pytest.mark.parametrize("is_frame", [True, False], ids=["frame", "array"])
def test_missing_text_is_what_the_imputer_replaces(tmp_path: Path, missing: Any, is_frame: bool) -> None:
    """Also where the training data has none: NaN and None are not the same to scikit-learn."""
    cities = np.array([["Lima"], ["Oslo"], ["Lima"]] * 10, dtype=object)
    rows = pd.DataFrame(cities, columns=["city"], dtype=object) if is_frame else cities
    imputer = SimpleImputer(missing_values=missing, strategy="most_frequent")
    pipeline = make_pipeline(imputer, OneHotEncoder(handle_unknown="ignore"), LogisticRegression())
    pipeline.fit(rows, [0, 1, 0] * 10)

    publish(pipeline, rows, name="m", repository=tmp_path)
    half = load_bundle(Repository(tmp_path), BundleKey("m", "preprocess", 1), preprocessor.load)
    name = half.inputs[0].name
    empty, lima = (half.transform((from_array(name, np.array([[text]], object)),)) for text in (b"", b"Lima"))

    assert to_array(empty[0]).tolist() == to_array(lima[0]).tolist()


def test_raw_rows_are_compared_where_features_are_sparse(tmp_path: Path) -> None:
    """None of what the pipeline answers is taken for refused."""
    rows = pd.DataFrame({"city": ["Oslo", "Rome", "Lima", "Bern", "Nice"] * 10})
    pipeline = make_pipeline(OneHotEncoder(handle_unknown="ignore"), LogisticRegression()).fit(rows, [0, 1] * 25)

    published = publish(pipeline, rows, name="m", repository=tmp_path)

    assert published.hard_rows["mixed rows"] == N_MIXED
    assert published.hard_rows["unseen text"] == 1


def test_the_transforms_run_as_often_whatever_the_number_of_columns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that the time of a publication is linear in it."""
    n_cells: list[int] = []
    original = StandardScaler.transform

    def counted(scaler: Any, rows: Any, copy: Any = None) -> Any:
        n_cells[-1] += rows.size
        return original(scaler, rows, copy)

    monkeypatch.setattr(StandardScaler, "transform", counted)
    for n_columns in (80, 160):
        rows = pd.DataFrame(RANDOM.normal(size=(100, n_columns)), columns=[f"c{number}" for number in range(n_columns)])
        scaler = make_column_transformer((StandardScaler(), list(rows.columns)))
        n_cells.append(0)
        pipeline = make_pipeline(scaler, LogisticRegression()).fit(rows, pipelines.two(rows.to_numpy()))
        publish(pipeline, rows, name=f"m{n_columns}", repository=tmp_path)

    assert n_cells[1] < 2.2 * n_cells[0]


def test_a_frame_of_columns_of_all_kinds_is_proven(tmp_path: Path) -> None:
    """Unseen and missing text, booleans, whole numbers."""
    case = pipelines.Case((pipelines.columns(), LogisticRegression()), pipelines.frame, pipelines.named)
    pipeline, rows = case.fitted()

    published = publish(pipeline, rows, name="m", repository=tmp_path)

    assert isinstance(rows, pd.DataFrame)
    assert {"missing", "unseen text", "booleans", "zeros", "mixed rows"} <= published.hard_rows.keys()
