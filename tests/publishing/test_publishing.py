"""Publishing: the split answers as the original did, or nothing is written."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pandas as pd
import pytest
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.compose import TransformedTargetRegressor, make_column_transformer
from sklearn.datasets import load_diabetes, load_iris
from sklearn.decomposition import PCA
from sklearn.ensemble import GradientBoostingRegressor, HistGradientBoostingClassifier, RandomForestClassifier
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.impute import SimpleImputer
from sklearn.linear_model import LinearRegression, LogisticRegression, Ridge
from sklearn.model_selection import GridSearchCV
from sklearn.naive_bayes import GaussianNB, MultinomialNB
from sklearn.neural_network import MLPClassifier
from sklearn.pipeline import Pipeline, make_pipeline, make_union
from sklearn.preprocessing import FunctionTransformer, OneHotEncoder, OrdinalEncoder, SplineTransformer, StandardScaler
from sklearn.svm import LinearSVC
from sklearn.tree import DecisionTreeClassifier

from splitserve import PublishError, publish, publish_predictor, publish_preprocessor
from splitserve.arrays import to_array
from splitserve.errors import InvalidInput
from splitserve.publishing import from_pipeline
from splitserve.publishing.agreement import compare
from splitserve.publishing.halves import PublishOptions
from splitserve.publishing.preprocessor_half import FeatureForm, preprocessor_half
from splitserve.publishing.samples import N_GOLDEN, N_GOLDEN_MAX, golden_rows
from splitserve.repository.bundle import BundleKey
from splitserve.repository.folder import Repository
from splitserve.repository.golden import decode
from splitserve.repository.manifest import BOUNDS, BundleError
from splitserve.repository.source import load_bundle
from splitserve.runtimes import predictor, preprocessor
from splitserve.runtimes.rows import to_tensors
from tests.system.models import softmax_model

IRIS, SPECIES = load_iris(return_X_y=True)
NAMES = np.array(["setosa", "versicolor", "virginica"])[SPECIES]
TEXTS = ["good film", "bad film"]
MISSING_TEXT = pd.DataFrame({"nick": pd.array(["a", None, "a", "b"], dtype="string")})
DIABETES, PROGRESS = load_diabetes(return_X_y=True)
MIXED = pd.DataFrame(
    {
        "length": [1.0, 2.0, np.nan, 4.0, 5.0, 6.0] * 5,
        "colour": ["red", "blue", "red", np.nan, "green", "blue"] * 5,
        "kind": ["a", "b"] * 15,
        "count": np.arange(30),
        "is_new": [True, False, True] * 10,
    }
)


def mixed_transforms(**encoder: Any) -> Any:
    return make_column_transformer(
        (make_pipeline(SimpleImputer(), StandardScaler()), ["length", "count"]),
        (make_pipeline(SimpleImputer(strategy="most_frequent"), OneHotEncoder(**encoder)), ["colour"]),
        (OneHotEncoder(**encoder), ["kind"]),
        ("passthrough", ["is_new"]),
    )


def load(repository: Path, name: str, pair: str = "1.1") -> tuple[Any, Any]:
    """Both halves, as the services load them."""
    first, second = map(int, pair.split("."))
    found = Repository(repository)
    return (
        load_bundle(found, BundleKey(name, "preprocess", first), preprocessor.load),
        load_bundle(found, BundleKey(name, "predict", second), predictor.load),
    )


def answer(repository: Path, name: str, rows: Any) -> dict[str, np.ndarray]:
    """What the published halves answer to these rows."""
    half, other = load(repository, name)
    manifest = Repository(repository).open(BundleKey(name, "preprocess", 1)).manifest
    outputs = other.infer(half.transform(to_tensors(manifest.rows, manifest.inputs, rows)))
    return {tensor.name: to_array(tensor) for tensor in outputs}


PIPELINES = {
    "logistic regression": (make_pipeline(StandardScaler(), LogisticRegression()), IRIS, NAMES),
    "random forest": (make_pipeline(PCA(3), RandomForestClassifier(10, random_state=0)), IRIS, SPECIES),
    "boosted trees": (make_pipeline(StandardScaler(), HistGradientBoostingClassifier(max_iter=10)), IRIS, SPECIES),
    "network": (make_pipeline(StandardScaler(), MLPClassifier((8,), max_iter=2000, random_state=0)), IRIS, NAMES),
    "two classes, booleans": (make_pipeline(StandardScaler(), LogisticRegression()), IRIS, SPECIES == 1),
    "without probabilities": (make_pipeline(StandardScaler(), LinearSVC(random_state=0)), IRIS, NAMES),
    "no transforms": (make_pipeline(LogisticRegression(max_iter=1000)), IRIS, SPECIES),
    "mixed columns": (
        make_pipeline(mixed_transforms(handle_unknown="ignore"), LogisticRegression()),
        MIXED,
        np.array(["yes", "no", "no"] * 10),
    ),
    "ordinal columns": (
        make_pipeline(OrdinalEncoder(), LogisticRegression()),
        MIXED[["kind", "is_new"]],
        SPECIES[:30] * 0 + [0, 1] * 15,
    ),
    "text": (make_pipeline(CountVectorizer(), MultinomialNB()), ["good film", "bad film", "very bad", "very good"], [1, 0, 0, 1]),
}


@pytest.mark.parametrize("case", PIPELINES)
def test_a_classifier_answers_as_before(tmp_path: Path, case: str) -> None:
    """Labels are the same and probabilities within the tolerance; what scikit-learn does not give is not given."""
    pipeline, rows, target = PIPELINES[case]
    pipeline.fit(rows, target)

    published = publish(pipeline, rows, name="m", repository=tmp_path)
    found = answer(tmp_path, "m", rows)

    labels = [each.decode() if isinstance(each, bytes) else str(each) for each in found["label"].tolist()]
    expected = pipeline.predict(rows)
    assert labels == [str(each) for each in expected.tolist()]
    assert ("probabilities" in found) is hasattr(pipeline, "predict_proba")
    if "probabilities" in found:
        np.testing.assert_allclose(found["probabilities"], pipeline.predict_proba(rows), atol=1e-5)
    assert (published.pair, published.worst_difference < 1e-5) == ("1.1", True)


@pytest.mark.parametrize("estimator", [LinearRegression(), GradientBoostingRegressor(random_state=0)])
def test_a_regressor_answers_as_before(tmp_path: Path, estimator: Any) -> None:
    """One output, ``prediction``, close to the original relative to the largest value."""
    pipeline = make_pipeline(StandardScaler(), estimator).fit(DIABETES, PROGRESS)

    publish(pipeline, DIABETES, name="m", repository=tmp_path)
    found = answer(tmp_path, "m", DIABETES)

    assert list(found) == ["prediction"]
    np.testing.assert_allclose(found["prediction"].ravel(), pipeline.predict(DIABETES), rtol=1e-4)


def test_numbers_beyond_float32_are_published_as_float64(tmp_path: Path) -> None:
    """Features that differ in the ninth digit need the wider form, which the bundle then has."""
    rows = 1e8 + np.arange(40.0).reshape(-1, 1)
    estimator = LinearRegression().fit(rows, np.arange(40.0))
    pipeline = make_pipeline(FunctionTransformer().fit(rows), estimator)

    publish(pipeline, rows, name="m", repository=tmp_path)
    half, other = load(tmp_path, "m")

    assert half.outputs[0].datatype == other.inputs[0].datatype == "FP64"


def test_versions_count_up_and_never_change(tmp_path: Path) -> None:
    """Each half has its own numbers; a number that is taken is refused and nothing is left half-written."""
    pipeline = make_pipeline(StandardScaler(), LogisticRegression()).fit(IRIS, SPECIES)
    publish(pipeline, IRIS, name="m", repository=tmp_path)
    publish_preprocessor(pipeline[:-1], IRIS, name="m", repository=tmp_path)

    second = publish(pipeline, IRIS, name="m", repository=tmp_path)
    with pytest.raises(PublishError, match="m/preprocess/3: already published"):
        publish(pipeline, IRIS, name="m", repository=tmp_path, version=3)

    assert second.pair == "3.2"
    assert Repository(tmp_path).versions("m", "predict") == [1, 2]


def test_if_the_second_half_cannot_be_written_the_first_is_removed(tmp_path: Path) -> None:
    """Both or none."""
    pipeline = make_pipeline(StandardScaler(), LogisticRegression()).fit(IRIS, SPECIES)
    publish_predictor(softmax_model(4, 3), IRIS[:1].astype(np.float32), name="m", repository=tmp_path, version=5)

    with pytest.raises(PublishError, match="m/predict/5: already published"):
        publish(pipeline, IRIS, name="m", repository=tmp_path, version=5)

    assert Repository(tmp_path).versions("m", "preprocess") == []


class Unknown(ClassifierMixin, BaseEstimator):
    """An estimator that skl2onnx has never heard of."""

    def fit(self, X: Any, y: Any) -> Unknown:
        self.classes_ = np.unique(y)
        return self

    def predict(self, X: Any) -> Any:
        return np.zeros(len(X), int)


class Ragged(Unknown):
    """An estimator whose rows have one probability or two."""

    def predict_proba(self, X: Any) -> Any:
        return [[1.0] * (1 + row % 2) for row in range(len(X))]


FITTED = make_pipeline(StandardScaler(), LogisticRegression()).fit(IRIS, SPECIES)
COLOURS = pd.DataFrame({"colour": ["red", "blue"] * 10})
MISTAKES: dict[str, tuple[Any, Any, dict[str, Any], str]] = {
    "not a pipeline": (
        LogisticRegression(),
        IRIS,
        {},
        r"got LogisticRegression; publish make_pipeline\(",
    ),
    "a search of pipelines": (
        GridSearchCV(make_pipeline(GaussianNB()), {"gaussiannb__priors": [None]}, cv=2).fit(IRIS, SPECIES),
        IRIS,
        {},
        "expected a scikit-learn Pipeline, got GridSearchCV; publish its best_estimator_$",
    ),
    "a search of estimators": (
        GridSearchCV(GaussianNB(), {"priors": [None]}, cv=2).fit(IRIS, SPECIES),
        IRIS,
        {},
        r"got GridSearchCV; publish its make_pipeline\(search.best_estimator_\), a GaussianNB",
    ),
    "a search without a best": (
        GridSearchCV(GaussianNB(), {"priors": [None]}, cv=2, refit=False).fit(IRIS, SPECIES),
        IRIS,
        {},
        "fit it with refit=True",
    ),
    "text within a search of pipelines": (
        make_pipeline(GridSearchCV(make_pipeline(OneHotEncoder(), LinearRegression()), {}, cv=2)).fit(COLOURS, range(20)),
        COLOURS,
        {},
        r"GridSearchCV gets columns that are not numbers \(colour: .*\).*; publish the best_estimator_ of the GridSearchCV",
    ),
    "text within a transformed target": (
        make_pipeline(TransformedTargetRegressor(make_pipeline(OneHotEncoder(), LinearRegression()))).fit(COLOURS, range(20)),
        COLOURS,
        {},
        r"move the transforms in front of it, make_pipeline\(transforms, TransformedTargetRegressor\(model\)\), and fit again",
    ),
    "a transformer": (StandardScaler(), IRIS, {}, "publish_preprocessor takes transforms"),
    "neither": (object(), IRIS, {}, "got object; publish_preprocessor and publish_predictor take the halves"),
    "a lambda": (
        make_pipeline(FunctionTransformer(lambda x: x), GaussianNB()).fit(IRIS, SPECIES),
        IRIS,
        {"trusted_modules": ["tests"]},
        "a lambda, or a function inside of another, has no name to load it by; take a function of numpy",
    ),
    "a lambda as a pickle": (
        make_pipeline(FunctionTransformer(lambda x: x), GaussianNB()).fit(IRIS, SPECIES),
        IRIS,
        {"allow_pickle": True},
        "A lambda, or a function inside of another, has no name to load it by",
    ),
    "ragged answers": (
        make_pipeline(StandardScaler(), Ragged()).fit(IRIS, SPECIES),
        IRIS,
        {},
        "Ragged.predict_proba gives rows of different lengths, which no tensor can hold",
    ),
    "not fitted": (make_pipeline(StandardScaler(), LogisticRegression()), IRIS, {}, "Pipeline is not fitted; call fit first"),
    "no estimator": (make_pipeline(StandardScaler()).fit(IRIS), IRIS, {}, "the last step, StandardScaler, has no predict"),
    "unsupported estimator": (
        make_pipeline(StandardScaler(), Unknown()).fit(IRIS, SPECIES),
        IRIS,
        {},
        "Unknown of .* has no ONNX form; convert it by other means and publish the result with publish_predictor",
    ),
    "fewer columns": (FITTED, IRIS[:, :3], {}, "X has 3 features, but .* is expecting 4 features"),
    "text for numbers": (FITTED, np.full((3, 4), "a"), {}, "X does not fit"),
    "texts as a table": (
        make_pipeline(CountVectorizer(), MultinomialNB()).fit(TEXTS, [0, 1]),
        pd.DataFrame({"text": TEXTS}),
        {},
        r'1 values of label for 2 rows; CountVectorizer takes a list or column of texts, not a table: publish with X\["text"\]',
    ),
    "texts as an array of two dimensions": (
        make_pipeline(make_union(CountVectorizer()), MultinomialNB()).fit(TEXTS, [0, 1]),
        np.array([TEXTS], object).T,
        {},
        r"CountVectorizer takes .*: publish with X\[:, 0\]",
    ),
    "a lambda over the target": (
        make_pipeline(
            StandardScaler(), TransformedTargetRegressor(Ridge(), func=np.log1p, inverse_func=lambda y: np.expm1(y))
        ).fit(IRIS, SPECIES),
        IRIS,
        {},
        "inverse_func=<lambda> has no ONNX form; give one of numpy's functions itself.* np.expm1",
    ),
    "an imputer of pandas.NA": (
        make_pipeline(
            SimpleImputer(strategy="most_frequent", missing_values=pd.NA), OneHotEncoder(), DecisionTreeClassifier()
        ).fit(MISSING_TEXT, [0, 1, 0, 1]),
        MISSING_TEXT,
        {},
        "the transforms hold pandas.NA, which skops cannot load again; fit them on columns of dtype object",
    ),
    "no rows": (FITTED, IRIS[:0], {}, "X has no rows"),
    "a ragged list": (FITTED, [[1, 2], [3]], {}, "X is not an array"),
    "a name that is a path": (FITTED, IRIS, {"name": "../m"}, 'name "../m": expected letters'),
    "a function of one's own": (
        make_pipeline(FunctionTransformer(np.sort), StandardScaler(), LogisticRegression()).fit(IRIS, SPECIES),
        IRIS,
        {},
        "holds types that are not allowed",
    ),
    "a tolerance that cannot be met": (FITTED, IRIS, {"tolerance": 0.0}, "probabilities of row .* more than 0e"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_errors_are_named_and_nothing_is_written(tmp_path: Path, case: str) -> None:
    """The message says what is wrong; the repository is as it was."""
    pipeline, rows, options, message = MISTAKES[case]

    with warnings.catch_warnings(), pytest.raises(PublishError, match=message):
        warnings.simplefilter("ignore")  # scikit-learn's, about the mistake that is made here
        publish(pipeline, rows, **{"name": "m", "repository": tmp_path / "models", **options})

    assert not list((tmp_path / "models").rglob("*"))


def test_what_fails_at_float64_does_not_hide_why_float32_did(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both complaints are shown, each with its precision."""
    make = from_pipeline.predictor_half

    def failing(model: bytes, *arguments: Any, **options: Any) -> Any:
        if onnx.load_from_string(model).graph.input[0].type.tensor_type.elem_type == onnx.TensorProto.DOUBLE:
            raise PublishError("no float64 here")
        return make(model, *arguments, **options)

    monkeypatch.setattr(from_pipeline, "predictor_half", failing)

    with pytest.raises(PublishError, match="at FP32, probabilities of row .*; at FP64, no float64 here"):
        publish(FITTED, IRIS, name="m", repository=tmp_path, tolerance=0.0)


def test_an_unwritable_repository_is_named(tmp_path: Path) -> None:
    """A file where the folder should be."""
    (tmp_path / "models").write_text("")

    with pytest.raises(PublishError, match="m: cannot be written"):
        publish(FITTED, IRIS, name="m", repository=tmp_path / "models")


def test_golden_samples_contain_every_category_and_a_missing_value() -> None:
    """Also where they are rare; a bound keeps the file small."""
    frame = pd.DataFrame({"word": ["common"] * 500, "size": np.ones(500)})
    frame.loc[321, "word"] = "rare"
    frame.loc[322, "word"] = None
    frame.loc[323, "size"] = np.nan

    chosen = golden_rows(frame)
    crowded = golden_rows(pd.DataFrame({"word": [str(index) for index in range(500)]}))

    assert {321, 322, 323} <= set(chosen)
    assert len(chosen) == N_GOLDEN + 3
    assert len(crowded) == N_GOLDEN_MAX


def test_a_rare_category_is_in_the_golden_samples() -> None:
    """All of the data is looked through."""
    late = 100_001
    words = np.full(late + 300, "common", dtype=object)
    words[late] = "late"

    assert late in golden_rows(pd.DataFrame({"word": words}))


def test_a_category_that_is_contained_already_adds_no_sample() -> None:
    """However many columns there are: what is rare in the last one is shown all the same."""
    rows = np.arange(500)
    frame = pd.DataFrame({f"word {index}": np.where(rows < 8 * index + 4, "a", "b") for index in range(60)})
    frame.loc[321, "word 59"] = "rare"

    chosen = golden_rows(frame)

    assert 321 in chosen
    assert all(set(frame.iloc[chosen][name]) == set(frame[name]) for name in frame)


def test_without_room_for_all_free_text_gets_fewer_samples() -> None:
    """A missing value and the few categories of another column are shown before the many of this one."""
    frame = pd.DataFrame({"text": [f"text {index}" for index in range(500)], "kind": "a", "size": 1.0})
    frame.loc[321, "kind"] = "b"
    frame.loc[322, "size"] = np.nan

    assert {321, 322} <= set(golden_rows(frame))


@pytest.mark.parametrize("make", [pd.DataFrame, lambda columns: np.array(list(columns.values())).T], ids=["frame", "array"])
def test_numbers_are_categories_if_the_transforms_have_learnt_them(make: Any) -> None:
    """Of an encoder: the rare ones are tried too, of a frame and of an array."""
    rows = make({"floor": [1] * 321 + [2] + [1] * 178, "size": range(500)})
    encoder = make_column_transformer((OneHotEncoder(), [0]), (StandardScaler(), [1])).fit(rows)

    features = FeatureForm(name="y", precision="FP32", all_as_floats=True)
    half = preprocessor_half(encoder, rows, features, PublishOptions(name="m", input_name="x"))

    floors = np.concatenate([to_array(tensor).reshape(tensor.shape[0], -1)[:, :1] for tensor in half.golden.inputs[:1]])
    assert set(floors.ravel().tolist()) == {1, 2}
    assert len(floors) == N_GOLDEN + 1


@pytest.mark.parametrize(
    ("values", "rare"),
    [
        (pd.Categorical([1] * 321 + [2] + [1] * 178), 321),
        ([False] * 321 + [True] + [False] * 178, 321),
        ([b"a"] * 321 + [b"b"] + [b"a"] * 178, 321),
    ],
    ids=["categorical", "boolean", "bytes"],
)
def test_categories_need_not_be_text(values: Any, rare: int) -> None:
    """Truth values, bytes, and pandas' own categories, whatever they are."""
    assert rare in golden_rows(pd.DataFrame({"column": values}))


def test_the_number_of_samples_is_as_documented() -> None:
    """docs/publishing.md states the default: 16 rows spread evenly, 64 at most."""
    text = " ".join((Path(__file__).parents[2] / "docs" / "publishing.md").read_text().split())

    assert len(golden_rows(np.zeros((1000, 2)))) == N_GOLDEN
    assert f"{N_GOLDEN} spread evenly" in text
    assert f"{N_GOLDEN_MAX} at most" in text


def test_tolerances_are_recorded_for_what_is_not_exact(tmp_path: Path) -> None:
    """Of each floating-point output, the bound of its datatype; labels and integers are compared exactly."""
    published = publish(FITTED, IRIS, name="m", repository=tmp_path)
    repository = Repository(tmp_path)

    halves = {kind: repository.open(BundleKey("m", kind, 1)).manifest for kind in ("preprocess", "predict")}  # type: ignore[arg-type]

    assert published.pair == "1.1"
    assert halves["preprocess"].tolerances.keys() == {"features"}
    assert halves["predict"].tolerances.keys() == {"probabilities"}
    assert {spec.name for spec in halves["predict"].outputs} == {"label", "probabilities"}
    for manifest in halves.values():
        for tolerance in manifest.tolerances.values():
            assert tolerance.rtol == 0
            assert 0 < tolerance.atol <= BOUNDS["FP32"] * 10


def test_of_many_sample_inputs_some_become_golden_samples(tmp_path: Path) -> None:
    """Spread evenly, the first and the last among them; all of them must fit."""
    sample = np.arange(3000, dtype=np.float32).reshape(1000, 3)
    bundle = publish_predictor(softmax_model(3), sample, name="m", repository=tmp_path)

    golden = decode(bundle.read("golden.npz"), bundle.manifest.inputs, bundle.manifest.outputs)
    kept = to_array(golden.inputs[0])

    assert len(kept) == N_GOLDEN_MAX
    assert kept[0, 0] == 0
    assert kept[-1, -1] == 2999
    with pytest.raises(PublishError, match="the sample inputs have no rows"):
        publish_predictor(softmax_model(3), sample[:0], name="m", repository=tmp_path)


def test_rows_that_the_estimator_would_refuse_are_refused_by_the_preprocessor(tmp_path: Path) -> None:
    """scikit-learn refuses NaN for this estimator, so the split does, and names the row."""
    publish(FITTED, IRIS, name="strict", repository=tmp_path)
    trees = make_pipeline(StandardScaler(), HistGradientBoostingClassifier(max_iter=5)).fit(IRIS, SPECIES)
    publish(trees, IRIS, name="lenient", repository=tmp_path)
    rows = IRIS[:3].copy()
    rows[2, 1] = np.nan

    with pytest.raises(InvalidInput, match="row 2: the features contain a missing or infinite value"):
        answer(tmp_path, "strict", rows)
    with pytest.raises(
        InvalidInput, match=r"row 0: a feature is .*e\+300, beyond the range of FP32, with which the model computes"
    ):
        answer(tmp_path, "strict", rows[:1] * 1e300)
    found = answer(tmp_path, "lenient", rows)

    np.testing.assert_allclose(found["probabilities"], trees.predict_proba(rows), atol=1e-5)


class SamplingPipeline(Pipeline):
    """As imbalanced-learn's: steps that draw other rows to train on are left out of predictions."""

    def _iter(self, *arguments: Any, **options: Any) -> Any:
        return (each for each in super()._iter(*arguments, **options) if not hasattr(each[2], "fit_resample"))


class Sampler(BaseEstimator):
    def fit_resample(self, X: Any, y: Any) -> Any:
        return X, y


def test_steps_of_training_alone_are_not_published(tmp_path: Path) -> None:
    """Services need no module of theirs."""
    scaler = StandardScaler().fit(IRIS)
    model = LogisticRegression().fit(scaler.transform(IRIS), NAMES)
    pipeline = SamplingPipeline([("scaler", scaler), ("sampler", Sampler()), ("model", model)])

    publish(pipeline, IRIS, name="m", repository=tmp_path)

    found = [each.decode() for each in answer(tmp_path, "m", IRIS)["label"].tolist()]
    assert found == pipeline.predict(IRIS).tolist()


def with_both(kind: str) -> Any:
    """A column with missing and empty text."""
    frame = pd.DataFrame({"city": pd.Series(["Oslo", "", None, "Lima"] * 10, dtype="object" if kind == "array" else kind)})
    return frame.to_numpy() if kind == "array" else frame


@pytest.mark.parametrize("kind", ["object", "category", "array"])
def test_missing_and_empty_text_that_the_transforms_tell_apart_are_refused(tmp_path: Path, kind: str) -> None:
    """They are one on the wire. What the transforms take for the same is published."""
    rows, target = with_both(kind), [0, 0, 1, 1] * 10
    told_apart = make_pipeline(OneHotEncoder(), LogisticRegression()).fit(rows, target)

    with pytest.raises(PublishError, match="has both missing and empty text, .*fit again with one of them, e.g. after X"):
        publish(told_apart, rows, name="m", repository=tmp_path)

    if kind == "object":
        one = make_pipeline(SimpleImputer(strategy="constant", fill_value="", missing_values=None), OneHotEncoder())
        publish(make_pipeline(one, LogisticRegression()).fit(rows, target), rows, name="m", repository=tmp_path)


def test_an_empty_string_is_a_missing_value_if_the_transforms_accept_one(tmp_path: Path) -> None:
    """Observed in the data, or tried out; where "" was a value in training it stays one."""
    frame = pd.DataFrame(
        {"gaps": ["a", None, "b"] * 4, "full": ["a", "b", "c"] * 4, "blank": ["a", "", "b"] * 4, "text": ["one two"] * 12}
    )
    transforms = make_column_transformer(
        (OneHotEncoder(handle_unknown="ignore"), ["gaps", "full", "blank"]), (CountVectorizer(), "text")
    ).fit(frame)

    bundle = publish_preprocessor(transforms, frame, name="m", repository=tmp_path)

    columns = {column.name: column.missing for column in bundle.manifest.rows.columns}
    assert {name: bool(missing) for name, missing in columns.items()} == {
        "gaps": True,
        "full": True,
        "blank": False,
        "text": False,
    }


def test_a_value_that_the_transforms_refuse_is_invalid_input(tmp_path: Path) -> None:
    """scikit-learn's own words, on one line."""
    bundle = publish_preprocessor(mixed_transforms().fit(MIXED), MIXED, name="m", repository=tmp_path)
    half = preprocessor.load(bundle)
    strange = MIXED[:1].assign(kind="zebra")

    with pytest.raises(InvalidInput, match="the transforms refuse a row: Found unknown categories"):
        half.transform(to_tensors(bundle.manifest.rows, bundle.manifest.inputs, strange))


def test_a_predictor_is_taken_as_path_bytes_or_model(tmp_path: Path) -> None:
    """All three publish the same file."""
    data = softmax_model(3)
    (tmp_path / "model.onnx").write_bytes(data)
    sample = np.zeros((2, 3), np.float32)

    bundles = [
        publish_predictor(model, sample, name="m", repository=tmp_path / "models", labels=["no", "yes"])
        for model in (tmp_path / "model.onnx", data, onnx.load_from_string(data))
    ]

    assert [bundle.key.version for bundle in bundles] == [1, 2, 3]
    assert bundles[0].manifest.labels == ("no", "yes")
    assert bundles[0].manifest.environment["ONNX IR"] == "8"
    assert {bundle.read("model.onnx") for bundle in bundles[:2]} == {data}


@pytest.mark.parametrize(
    ("model", "sample", "message"),
    [
        (b"no model", np.zeros((2, 3), np.float32), "ONNX Runtime .* cannot load it"),
        ("missing.onnx", np.zeros((2, 3), np.float32), "missing.onnx: No such file"),
        (softmax_model(3), np.zeros((2, 4), np.float32), "the sample inputs do not fit the model"),
        (softmax_model(3), {"wrong": np.zeros((2, 3), np.float32)}, 'unknown input "wrong"'),
    ],
)
def test_a_predictor_that_cannot_run_is_refused(tmp_path: Path, model: Any, sample: Any, message: str) -> None:
    """Named, and nothing is written."""
    with pytest.raises(PublishError, match=message):
        publish_predictor(model, sample, name="m", repository=tmp_path)

    assert not list(tmp_path.rglob("manifest.json"))


def test_a_predictor_without_a_free_batch_is_refused(tmp_path: Path) -> None:
    """Rows are the leading dimension, and there may be any number of them."""
    model = onnx.load_from_string(softmax_model(3))
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = 1

    with pytest.raises(PublishError, match="the leading dimension must be a free batch"):
        publish_predictor(model, np.zeros((1, 3), np.float32), name="m", repository=tmp_path)


def test_a_version_whose_answers_differ_from_publishing_is_refused(tmp_path: Path) -> None:
    """Golden samples are replayed at load; the worst difference is shown with sample, tensor, index, expected and got."""
    sample = np.random.default_rng(1).normal(size=(4, 3)).astype(np.float32)
    published = publish_predictor(softmax_model(3), sample, name="m", repository=tmp_path)
    other = onnx.load_from_string(softmax_model(3))
    weights = onnx.numpy_helper.to_array(other.graph.initializer[0])[:, ::-1]
    other.graph.initializer[0].CopyFrom(onnx.numpy_helper.from_array(weights.copy(), "weights"))
    changed = publish_predictor(other, sample, name="other", repository=tmp_path)

    data = changed.read("model.onnx")
    digest, old = changed.manifest.files["model.onnx"], published.manifest.files["model.onnx"]
    (published.folder / "model.onnx").write_bytes(data)
    manifest = published.folder / "manifest.json"
    manifest.write_text(
        manifest.read_text().replace(old.sha256, digest.sha256).replace(f'"size": {old.size}', f'"size": {digest.size}')
    )

    with pytest.raises(BundleError, match=r'm/predict/1: output "scores" of golden sample \d at \[\d, \d\]: expected .*, got'):
        load_bundle(Repository(tmp_path), published.key, predictor.load)


def test_another_minor_version_of_scikit_learn_is_refused_unless_allowed(tmp_path: Path) -> None:
    """Both versions and the ways out are named; allowed, the golden samples decide."""
    bundle = publish_preprocessor(SplineTransformer().fit(IRIS), IRIS, name="m", repository=tmp_path)
    manifest = bundle.folder / "manifest.json"
    here = bundle.manifest.environment["scikit-learn"]
    manifest.write_text(manifest.read_text().replace(f'"scikit-learn": "{here}"', '"scikit-learn": "0.24.2"'))
    repository = Repository(tmp_path)

    with pytest.raises(BundleError, match="published with scikit-learn 0.24.2, this service runs .*ALLOW_ENVIRONMENT_MISMATCH"):
        load_bundle(repository, bundle.key, preprocessor.load)
    loaded = load_bundle(repository, bundle.key, lambda each: preprocessor.load(each, allow_environment_mismatch=True))

    assert loaded.inputs[0].name == "features"


@pytest.mark.parametrize(
    ("found", "worst", "complaint"),
    [
        ({"label": np.array([0, 1]), "probabilities": np.array([[0.9, 0.1], [0.2, 0.8]])}, 0.0, ""),
        ({"label": np.array([0, 1]), "probabilities": np.array([[0.90001, 0.1], [0.2, 0.8]])}, 1e-5, ""),
        ({"label": np.array([0, 1]), "probabilities": np.array([[0.9, 0.1], [0.25, 0.75]])}, 0.05, "probabilities of row 1"),
        ({"label": np.array([0, 1]), "probabilities": np.array([[0.9, 0.1], [np.nan, 0.8]])}, np.inf, "probabilities of row 1"),
        (
            {"label": np.array([1, 1]), "probabilities": np.array([[0.9, 0.1], [0.2, 0.8]])},
            0.0,
            'label of row 0: .* "0", the split "1"',
        ),
    ],
)
def test_agreement_is_of_probabilities_and_labels(found: dict[str, np.ndarray], worst: float, complaint: str) -> None:
    """The row that is farthest off is named; a NaN is never close to anything."""
    import re

    expected = {"label": np.array([0, 1]), "probabilities": np.array([[0.9, 0.1], [0.2, 0.8]])}

    found_worst, found_complaint = compare(found, expected, 1e-4)

    np.testing.assert_allclose(found_worst["probabilities"], worst, atol=1e-9)
    assert found_worst.get("label") == (None if "probabilities" in complaint else float("label" in complaint))
    assert re.search(complaint, found_complaint) if complaint else not found_complaint


@pytest.mark.parametrize(
    ("gap", "precision", "is_allowed"),
    [(1e-12, "FP64", True), (1e-12, "FP32", False), (0.0, "FP64", False), (1e-6, "FP64", False)],
)
def test_a_label_differs_only_where_the_order_of_a_float64_sum_may_decide_it(
    gap: float, precision: str, is_allowed: bool
) -> None:
    """At float32 there is no exception, since the model can be computed at float64, and none for equal probabilities."""
    expected = {"label": np.array([0]), "probabilities": np.array([[0.5 + gap / 2, 0.5 - gap / 2]])}
    found = {"label": np.array([1]), "probabilities": expected["probabilities"]}

    worst, complaint = compare(found, expected, 1e-4, precision=precision)

    assert (complaint == "") is is_allowed
    assert worst == {"label": 1.0, "probabilities": 0.0}


def test_a_label_of_the_only_class_is_compared() -> None:
    """One class has no second probability that could be close."""
    expected = {"label": np.array([0]), "probabilities": np.array([[1.0]])}

    assert "label of row 0" in compare({"label": np.array([1]), "probabilities": np.array([[1.0]])}, expected, 1e-4)[1]


def test_predictions_are_measured_by_their_spread() -> None:
    """An error of 64 is large where the targets are between 1.7e9 and 1.7e9 + 100, however far from 0 they are."""
    want = 1.7e9 + np.arange(100.0)

    assert "prediction of row" in compare({"prediction": want + 64}, {"prediction": want}, 1e-4)[1]
    assert compare({"prediction": want + 1e-3}, {"prediction": want}, 1e-4)[1] == ""
