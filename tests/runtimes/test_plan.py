"""Plans: the same bits and the same refusals as the transforms that they stand for."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import msgspec
import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image
from sklearn.compose import ColumnTransformer, make_column_selector, make_column_transformer
from sklearn.decomposition import PCA, FastICA, TruncatedSVD
from sklearn.feature_extraction.text import CountVectorizer, HashingVectorizer, TfidfTransformer, TfidfVectorizer
from sklearn.feature_selection import SelectKBest, VarianceThreshold
from sklearn.impute import KNNImputer, MissingIndicator, SimpleImputer
from sklearn.pipeline import FeatureUnion, make_pipeline
from sklearn.preprocessing import (
    Binarizer,
    FunctionTransformer,
    KBinsDiscretizer,
    MaxAbsScaler,
    MinMaxScaler,
    Normalizer,
    OneHotEncoder,
    OrdinalEncoder,
    PolynomialFeatures,
    PowerTransformer,
    QuantileTransformer,
    RobustScaler,
    SplineTransformer,
    StandardScaler,
    TargetEncoder,
)

from splitserve.arrays import to_array
from splitserve.errors import InvalidInput
from splitserve.publishing import preprocessor_half as half_module
from splitserve.publishing.halves import PreprocessorHalf, PublishOptions
from splitserve.publishing.portable import N_ULPS
from splitserve.publishing.preprocessor_half import FeatureForm, preprocessor_half
from splitserve.repository.golden import Golden
from splitserve.repository.manifest import Compiled
from splitserve.runtimes.plans import operations
from splitserve.runtimes.plans.files import OPERATIONS
from splitserve.runtimes.plans.planner import make_plan
from splitserve.runtimes.preprocessor import Preprocessor
from splitserve.runtimes.rows import to_tensors
from splitserve.tensors import Tensor
from splitserve.transformers import DecodeImage, Flatten, NormaliseImage, ResizeImage
from tests.budgets import examples

pytestmark = [pytest.mark.heavy, pytest.mark.xdist_group("plans")]  # what is compared is made once for all tests

FRAME = pd.DataFrame(
    {
        "length": [39.1, 46.5, np.nan, 50.0, 38.2, 41.0],
        "mass": np.array([3.75, 5.2, 4.1, 6.0, 3.9, 4.4], dtype="float32"),
        "year": [2007, 2008, 2009, 2007, 2008, 2009],
        "island": ["Torgersen", "Biscoe", "Dream", "Biscoe", "Dream", "Dream"],
        "sex": ["male", "female", None, "male", "female", "male"],
        "colour": pd.Categorical(["red", "blue", "red", None, "blue", "red"]),
        "note": ["", "a bird", "a small bird", "it flew", "", "gone"],
    }
)
NUMBERS = ["length", "mass", "year"]
WORDS = ["island", "sex", "colour"]
ADULTS = FRAME.assign(is_adult=[True, False, True, True, False, True])
KINDS = [0, 1, 2, 0, 1, 2]

ARRAY = np.random.default_rng(0).normal(size=(12, 4))
NOTES = np.array(["A small bird, a bird!", "it flew", "Über den Café-Dächern", "", "bird bird flew away", "x  y"], dtype=object)
GAPPY = np.where(np.random.default_rng(1).random((12, 4)) < 0.2, np.nan, ARRAY)
ONE_GAP = np.where(np.arange(48).reshape(12, 4) == 5, np.nan, ARRAY)
EMPTY_COLUMN = np.column_stack([GAPPY, np.full(12, np.nan)])


def on_columns(*parts: Any, **options: Any) -> ColumnTransformer:
    return ColumnTransformer([(f"part {index}", *part) for index, part in enumerate(parts)], **options)


def doubled(X: Any) -> Any:
    """A function that plans do not know."""
    return X * 2


class OtherScaler(StandardScaler):
    """A transformer that plans do not know."""


PLANNED: dict[str, tuple[Any, Any]] = {
    "the demo's columns": (
        make_column_transformer(
            (make_pipeline(SimpleImputer(), StandardScaler()), make_column_selector(dtype_include="number")),
            (
                make_pipeline(SimpleImputer(strategy="most_frequent"), OneHotEncoder(handle_unknown="ignore")),
                make_column_selector(dtype_exclude="number"),
            ),
        ),
        FRAME,
    ),
    "strict one-hot, dense": (on_columns((OneHotEncoder(sparse_output=False), WORDS)), FRAME),
    "one-hot without the first": (on_columns((OneHotEncoder(drop="first"), WORDS), remainder="drop"), FRAME),
    "one-hot without one of two": (on_columns((OneHotEncoder(drop="if_binary", dtype=np.float32), WORDS)), FRAME),
    "ordinal": (
        on_columns(
            (OrdinalEncoder(handle_unknown="use_encoded_value", unknown_value=-1, encoded_missing_value=-2), WORDS),
            ("passthrough", ["length"]),
        ),
        FRAME,
    ),
    "strict ordinal": (on_columns((OrdinalEncoder(), WORDS), ("passthrough", ["year"])), FRAME),
    "constant text": (
        on_columns(
            (make_pipeline(SimpleImputer(strategy="constant", fill_value="?"), OneHotEncoder(handle_unknown="ignore")), WORDS)
        ),
        FRAME,
    ),
    "the rest goes through": (
        on_columns((OneHotEncoder(handle_unknown="ignore"), WORDS), ("drop", ["note"]), remainder="passthrough"),
        FRAME,
    ),
    "single precision": (on_columns((MinMaxScaler(clip=True), ["mass"]), (StandardScaler(), ["mass"])), FRAME),
    "one scaler after another": (make_pipeline(on_columns((StandardScaler(), NUMBERS)), MinMaxScaler()), FRAME),
    "a frame of numbers": (make_pipeline(SimpleImputer(), StandardScaler()), FRAME[NUMBERS]),
    "standard scaler": (StandardScaler(), ARRAY),
    "scale only": (StandardScaler(with_mean=False), ARRAY),
    "mean only": (StandardScaler(with_std=False), ARRAY),
    "standard scaler, single": (StandardScaler(), ARRAY.astype("float32")),
    "standard scaler, integers": (StandardScaler(), (ARRAY * 100).astype("int64")),
    "min-max scaler": (MinMaxScaler((-1, 2)), GAPPY),
    "min-max scaler, single": (MinMaxScaler(), GAPPY.astype("float32")),
    "imputer and scaler": (make_pipeline(SimpleImputer(), StandardScaler()), GAPPY),
    "imputer, single": (make_pipeline(SimpleImputer(strategy="median"), "passthrough"), GAPPY.astype("float32")),
    "imputer of the most frequent": (SimpleImputer(strategy="most_frequent"), GAPPY),
    "columns of an array": (on_columns((StandardScaler(), [0, 2]), (MinMaxScaler(), slice(1, 2))), GAPPY),
    "pictures": (make_pipeline(Flatten(), MinMaxScaler()), np.arange(72, dtype="uint8").reshape(6, 3, 4)),
    "robust scaler": (RobustScaler(), GAPPY),
    "robust scaler, single": (RobustScaler(with_centering=False), GAPPY.astype("float32")),
    "largest magnitude": (MaxAbsScaler(), GAPPY.astype("float32")),
    "rows of length one": (make_pipeline(SimpleImputer(), Normalizer()), GAPPY),
    "rows of sum one": (Normalizer("l1"), ARRAY),
    "rows of maximum one": (Normalizer("max"), ARRAY.astype("float32")),
    "powers": (PowerTransformer(), GAPPY),
    "powers, single": (PowerTransformer(standardize=False), ARRAY.astype("float32")),
    "powers of Box and Cox": (PowerTransformer("box-cox"), np.abs(GAPPY) + 0.5),
    "quantiles": (QuantileTransformer(n_quantiles=7), GAPPY),
    "quantiles, normal": (QuantileTransformer(n_quantiles=7, output_distribution="normal"), GAPPY),
    "quantiles, normal, single": (QuantileTransformer(n_quantiles=7, output_distribution="normal"), GAPPY.astype("float32")),
    "bins, ordinal": (KBinsDiscretizer(3, encode="ordinal", quantile_method="linear"), ARRAY),
    "bins": (KBinsDiscretizer(3, strategy="uniform"), ARRAY),
    "bins, dense": (KBinsDiscretizer(4, strategy="kmeans", encode="onehot-dense"), ARRAY.astype("float32")),
    "polynomials": (PolynomialFeatures(3), ARRAY),
    "products of columns": (PolynomialFeatures((2, 3), interaction_only=True, include_bias=False), ARRAY),
    "above a threshold": (Binarizer(threshold=0.25), ARRAY),
    "above a threshold, integers": (Binarizer(threshold=40), (ARRAY * 100).astype("int64")),
    "targets, two classes": (on_columns((TargetEncoder(random_state=0), WORDS)), pd.concat([FRAME] * 4)),
    "indicator beside": (SimpleImputer(add_indicator=True), GAPPY),
    "indicator": (make_pipeline(MissingIndicator(error_on_new=False), MaxAbsScaler()), GAPPY),
    "strict indicator": (FeatureUnion([("gaps", MissingIndicator()), ("values", SimpleImputer())]), ONE_GAP),
    "indicator of all": (MissingIndicator(features="all"), GAPPY),
    "another marker": (SimpleImputer(missing_values=-1, strategy="constant", fill_value=7), ARRAY.round()),
    "imputer of an empty column": (SimpleImputer(keep_empty_features=False), EMPTY_COLUMN),
    "imputer that keeps an empty column": (SimpleImputer(keep_empty_features=True), EMPTY_COLUMN),
    "imputer of None": (
        on_columns((make_pipeline(SimpleImputer(missing_values=None, strategy="most_frequent"), OrdinalEncoder()), ["sex"])),
        pd.DataFrame({"sex": pd.Series(["male", "female", None, "male"], dtype=object)}),
    ),
    "neighbours": (KNNImputer(n_neighbors=2), GAPPY),
    "near neighbours": (
        make_pipeline(KNNImputer(n_neighbors=3, weights="distance", add_indicator=True), StandardScaler()),
        GAPPY,
    ),
    "rare categories": (
        on_columns(
            (OneHotEncoder(max_categories=2, handle_unknown="infrequent_if_exist"), WORDS),
            (OneHotEncoder(min_frequency=2, drop="first", sparse_output=False), ["island"]),
            (OneHotEncoder(max_categories=2, handle_unknown="ignore", drop="if_binary"), ["sex"]),
            (OrdinalEncoder(max_categories=2, handle_unknown="use_encoded_value", unknown_value=-5), ["colour"]),
        ),
        FRAME,
    ),
    "unknown as rare, with a warning": (on_columns((OneHotEncoder(min_frequency=2, handle_unknown="warn"), WORDS)), FRAME),
    "categories that are numbers": (on_columns((OneHotEncoder(), ["year"]), (OrdinalEncoder(), ["length"])), FRAME),
    "categories of all kinds": (on_columns((OneHotEncoder(handle_unknown="ignore"), ["year", "island", "length", "sex"])), FRAME),
    "a column of booleans": (on_columns((StandardScaler(), ["length"]), ("passthrough", ["is_adult"])), ADULTS),
    "booleans and numbers scaled": (on_columns((MinMaxScaler(), ["length", "is_adult"])), ADULTS),
    "numbers of several kinds": (on_columns(("passthrough", ["length", "year"]), (OrdinalEncoder(), ["island"])), FRAME),
    "the best": (make_pipeline(StandardScaler(), SelectKBest(k=2)), ARRAY),
    "those that vary": (VarianceThreshold(), GAPPY),
    "components": (make_pipeline(StandardScaler(), PCA(2)), ARRAY),
    "components, whitened": (PCA(3, whiten=True), ARRAY.astype("float32")),
    "decomposition": (TruncatedSVD(2, random_state=0), ARRAY),
    "a square root": (FunctionTransformer(np.sqrt), np.abs(ARRAY)),
    "a logarithm": (make_pipeline(FunctionTransformer(np.log1p, validate=True), StandardScaler()), np.abs(ARRAY)),
    "a logarithm of columns": (
        on_columns((FunctionTransformer(np.log1p), ["length", "mass"]), (OneHotEncoder(), ["sex"])),
        FRAME,
    ),
    "a union": (
        FeatureUnion(
            [("a", StandardScaler()), ("b", make_pipeline(SimpleImputer(), PCA(2))), ("c", "passthrough"), ("d", "drop")],
            transformer_weights={"a": 0.3},
        ),
        GAPPY,
    ),
    "weights": (on_columns((StandardScaler(), NUMBERS), transformer_weights={"part 0": 2.0}), FRAME),
    "columns of columns": (
        on_columns(
            (on_columns((StandardScaler(), ["length"]), ("passthrough", ["mass"])), ["length", "mass"]),
            (make_pipeline(on_columns((SimpleImputer(strategy="most_frequent"), WORDS)), OneHotEncoder()), WORDS),
        ),
        FRAME,
    ),
    "sparse, scaled": (
        make_pipeline(
            on_columns((OneHotEncoder(handle_unknown="ignore"), WORDS)), StandardScaler(with_mean=False), MaxAbsScaler()
        ),
        FRAME,
    ),
    "a frame as result": (StandardScaler().set_output(transform="pandas"), ARRAY),
    "frames between steps": (
        make_pipeline(
            on_columns((SimpleImputer(), NUMBERS), (OrdinalEncoder(), ["island"])).set_output(transform="pandas"),
            StandardScaler(),
        ),
        FRAME,
    ),
    "words": (on_columns((CountVectorizer(), "note"), (SimpleImputer(), ["length"])), FRAME),
    "weighted words": (TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True), NOTES),
    "weighted words, single": (TfidfVectorizer(stop_words="english", norm="l1", dtype=np.float32), NOTES),
    "words or not": (CountVectorizer(binary=True, strip_accents="unicode", token_pattern=r"(?u)\b\w+\b"), NOTES),
    "characters": (TfidfVectorizer(analyzer="char", ngram_range=(2, 3), strip_accents="ascii", lowercase=False), NOTES),
    "characters of words": (CountVectorizer(analyzer="char_wb", ngram_range=(1, 4)), NOTES),
    "counts, then weights": (make_pipeline(CountVectorizer(), TfidfTransformer(use_idf=False)), NOTES),
    "hashed words": (HashingVectorizer(n_features=32), NOTES),
    "hashed words, counted": (HashingVectorizer(n_features=32, norm=None, alternate_sign=False, binary=True), NOTES),
    "components of words": (make_pipeline(TfidfVectorizer(), TruncatedSVD(2, random_state=0)), NOTES),
    "an array of text": (OneHotEncoder(handle_unknown="ignore"), FRAME[["island", "island"]].to_numpy(dtype=object)),
}

MIXED: dict[str, tuple[Any, Any]] = {
    "parts that plans do not know": (
        on_columns(
            (SplineTransformer(), ["year"]),
            (TfidfVectorizer(token_pattern="[a-z]+"), "note"),
            (make_pipeline(SimpleImputer(strategy="median"), KBinsDiscretizer(2, encode="ordinal")), ["length"]),
            (OneHotEncoder(handle_unknown="ignore"), ["island"]),
        ),
        FRAME,
    ),
}
"""Not portable, and yet with a plan where they are loaded."""

UNPLANNED: dict[str, tuple[Any, Any, str]] = {
    "another class": (SplineTransformer(), ARRAY, "step SplineTransformer: is not among the transformers"),
    "another class in a pipeline": (
        make_pipeline(StandardScaler(), FastICA(2, random_state=0)),
        ARRAY,
        'step "fastica" (FastICA): is not among the transformers',
    ),
    "a function of one's own": (FunctionTransformer(doubled), ARRAY, "step FunctionTransformer: its function"),
    "a subclass": (OtherScaler(), ARRAY, "step OtherScaler: is not among"),
    "half precision": (StandardScaler(), ARRAY.astype("float16"), 'unknown dtype "float16"'),
    "a pattern of one's own": (CountVectorizer(token_pattern="[a-z]+"), NOTES, "step CountVectorizer: token_pattern="),
    "dates": (
        on_columns((OneHotEncoder(), ["day"])),
        pd.DataFrame({"day": pd.to_datetime(["2026-01-01", "2026-02-01"] * 3)}),
        'step "part 0" (OneHotEncoder): its columns are datetime64',
    ),
    "numbers or nothing": (
        on_columns((StandardScaler(), ["count"])),
        pd.DataFrame({"count": pd.array([1, 2, None, 4], dtype="Int64")}),
        'step "part 0" (StandardScaler): its columns are Int64',
    ),
}
"""With the beginning of the reason in the manifest."""


class Published(NamedTuple):
    """Transforms, and what `publish` makes of them."""

    transformer: Any
    half: PreprocessorHalf

    @property
    def original(self) -> Preprocessor:
        """scikit-learn itself."""
        return Preprocessor(self.half.manifest, self.transformer)


def published(transformer: Any, rows: Any) -> Published:
    """The transforms as `publish` would write them, but at full precision and without a compiled form, whose proof takes long."""
    with warnings.catch_warnings(), pytest.MonkeyPatch.context() as patch:
        warnings.simplefilter("ignore")
        patch.setattr(half_module, "compile_transforms", lambda *_: (b"", Compiled(reason="a plan is what is wanted")))
        features = FeatureForm(precision="FP64", all_as_floats=False)
        options = PublishOptions(name="model", input_name="x", trusted_modules=[__name__], row_wise=False)
        target = (KINDS * len(rows))[: len(rows)]
        fitted = transformer.fit(rows, [kind > 1 for kind in target] if "TargetEncoder" in str(transformer) else target)
        return Published(fitted, preprocessor_half(fitted, rows, features, options))


@cache
def case(name: str) -> Published:
    """One of `PLANNED`, published once."""
    return published(*PLANNED[name])


def outcome(call: Callable[[], tuple[Tensor, ...]]) -> Any:
    """The tensors, or what was refused."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # numbers that overflow, on purpose
        try:
            return call()
        except InvalidInput as error:
            return _ordered(error.message)


def _ordered(message: str) -> str:
    """Unknown categories in order: scikit-learn has them in that of a set."""
    return re.sub(r"(?<=categories \[).*(?=\])", lambda found: ", ".join(sorted(found[0].split(", "))), message)


def numbers(dtype: np.dtype[Any]) -> st.SearchStrategy[Any]:
    anything = hnp.from_dtype(dtype)
    if dtype.kind != "f":
        return anything
    most = np.finfo(dtype).max
    return anything | st.sampled_from([0.0, -0.0, np.nan, np.inf, -np.inf, most, -most, np.finfo(dtype).tiny, 39.1]).map(
        dtype.type
    )


@st.composite
def frames(draw: st.DrawFn, like: pd.DataFrame) -> pd.DataFrame:
    """Rows with the columns of this frame: numbers of every kind, categories seen and unseen, gaps."""
    n_rows = draw(st.integers(1, 4))
    columns = {}
    for name in like.columns:
        dtype = like[name].dtype
        if dtype.kind in "fiub":
            values = draw(st.lists(numbers(dtype), min_size=n_rows, max_size=n_rows))
            columns[name] = np.array(values, dtype=dtype)
        else:
            words = [*like[name].dropna().unique(), "", "never seen", "é\x00", None]
            columns[name] = pd.Series(draw(st.lists(st.sampled_from(words), min_size=n_rows, max_size=n_rows)), dtype="object")
    return pd.DataFrame(columns)


@st.composite
def arrays(draw: st.DrawFn, like: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    shape = (draw(st.integers(1, 4)), *like.shape[1:])
    if like.dtype.kind == "O":
        elements = st.sampled_from([*like.ravel().tolist(), "", "never seen"])
        return draw(hnp.arrays(object, shape, elements=elements))
    return draw(hnp.arrays(like.dtype, shape, elements=numbers(like.dtype)))


def test_an_imputer_of_scikit_learn_1_6_has_a_plan() -> None:
    """It does not record the datatype of its fill values."""
    _, half = published(SimpleImputer(), GAPPY)
    transformer = SimpleImputer().fit(GAPPY)
    del transformer._fill_dtype
    assert make_plan(transformer, half.manifest.rows, half.manifest.inputs).steps


@pytest.mark.parametrize("name", PLANNED)
def test_known_transforms_are_portable(name):
    """Publishing writes their plan, and says so."""
    half = case(name).half

    assert (half.manifest.portable, half.manifest.not_portable, half.runtime.runtime) == (True, "", "plan")
    assert {"plan.json", "plan.npz"} <= half.files.keys()


@pytest.mark.parametrize("name", PLANNED)
@settings(max_examples=examples(25), suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_a_plan_equals_scikit_learn_and_refuses_the_same(name, data):
    """For any input: NaN, infinities, extremes, unseen categories, empty text, missing values. Bit for bit, if each operation is
    exact; the message too.
    """
    published_case, like = case(name), PLANNED[name][1]
    half = published_case.half
    rows = data.draw(frames(like) if isinstance(like, pd.DataFrame) else arrays(like))
    inputs = to_tensors(half.rows, half.manifest.inputs, rows)

    found, expected = outcome(lambda: half.runtime.transform(inputs)), outcome(lambda: published_case.original.transform(inputs))

    if isinstance(found, str) or isinstance(expected, str) or b"rounded" not in classes(half):
        assert found == expected
    else:
        assert_close(found, expected)


def classes(half: PreprocessorHalf) -> set[bytes]:
    plan = msgspec.json.decode(half.files["plan.json"])
    return {b"exact" if OPERATIONS[step["operation"]].IS_EXACT else b"rounded" for step in plan["steps"]}


def assert_close(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    """Within the units in the last place that the format allows."""
    have, want = to_array(found[0]), to_array(expected[0])
    with np.errstate(all="ignore"):
        close = np.abs(have - want) <= N_ULPS * np.spacing(np.maximum(np.abs(have), np.abs(want)))
    assert ((have == want) | close | (np.isnan(have) & np.isnan(want))).all(), (have, want)


@pytest.mark.parametrize("name", MIXED)
@settings(max_examples=examples(25), suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_unknown_parts_of_columns_are_called_by_the_plan_of_a_process(name, data):
    """The bundle is not portable; where it is loaded, what is known runs by numpy, and the rest is called itself."""
    transformer, half = mixed(name)
    rows = data.draw(frames(MIXED[name][1]))
    inputs = to_tensors(half.rows, half.manifest.inputs, rows)
    planned, original = adopted(half, transformer), Preprocessor(half.manifest, transformer)

    assert half.manifest.portable is False
    assert planned.runtime == "plan"
    assert outcome(lambda: planned.transform(inputs)) == outcome(lambda: original.transform(inputs))


@cache
def mixed(name: str) -> Published:
    return published(*MIXED[name])


def adopted(half: PreprocessorHalf, transformer: Any) -> Preprocessor:
    """As it is loaded where there is no portable plan."""
    found = Preprocessor(half.manifest, transformer)
    found.adopt_plan(half.golden)
    return found


@pytest.mark.parametrize("name", UNPLANNED)
def test_unknown_transforms_are_not_portable(name):
    """A class, a parameter or a dtype whose effect a plan does not repeat: the manifest names the step."""
    transformer, rows, reason = UNPLANNED[name]

    manifest = published(transformer, rows).half.manifest

    assert manifest.portable is False
    assert manifest.not_portable.startswith(reason)


def file_of(image: Any, form: str) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, form)
    return buffer.getvalue()


def test_pictures_are_decoded_resized_and_normalised_by_the_plan():
    """As by the transformers, and what is no picture is refused with their message."""
    random = np.random.default_rng(0)
    pictures = [random.integers(0, 256, (20 + size, 30, 3)).astype(np.uint8) for size in range(4)]
    files = np.array([[file_of(picture, form)] for picture, form in zip(pictures, ["PNG", "JPEG"] * 2, strict=True)], object)
    transformer = make_pipeline(DecodeImage(), ResizeImage(8), NormaliseImage((0.4, 0.5, 0.6), (0.2, 0.25, 0.3)))
    published_case = published(transformer, files)
    half = published_case.half

    assert half.manifest.portable, half.manifest.not_portable
    assert half.runtime.transform(half.golden.inputs) == published_case.original.transform(half.golden.inputs)
    assert {"pillow", "libjpeg"} == msgspec.json.decode(half.files["plan.json"])["requires"].keys()
    with pytest.raises(InvalidInput, match="the transforms refuse a row: image 0 is not a JPEG or PNG file"):
        half.runtime.transform(to_tensors(half.rows, half.manifest.inputs, np.array([[b"no picture"]], object)))


def test_a_plan_that_differs_is_not_written(monkeypatch):
    """If a row differs by a single bit, the bundle is not portable, and says where."""
    scale = operations.Divide
    monkeypatch.setitem(operations._UFUNCS, scale, lambda X, by: np.nextafter(X / by, np.inf))

    manifest = published(StandardScaler(), ARRAY).half.manifest

    assert manifest.portable is False
    assert manifest.not_portable.startswith("the plan differs from the transforms on golden rows: feature [0] has another value")


def test_a_plan_of_a_process_that_differs_is_dropped():
    """If golden samples differ by a single bit, there is no plan."""
    half = published(StandardScaler(), ARRAY).half
    other = StandardScaler().fit(ARRAY)
    other.transform = lambda X: np.nextafter(StandardScaler.transform(other, X), np.inf)

    assert adopted(half, other).runtime == "sklearn"


def test_inputs_may_be_in_any_order_and_narrower():
    """A plan takes what the signature takes."""
    half = case("the demo's columns").half
    inputs = {tensor.name: tensor for tensor in half.golden.inputs}
    year = inputs["year"]
    inputs["year"] = Tensor("year", "INT16", year.shape[:1], to_array(year).astype("<i2").tobytes())

    found = half.runtime.transform(tuple(reversed(inputs.values())))

    assert found == half.golden.outputs


@pytest.mark.parametrize("raw", [b"\x04\x00\x00\x00aut", b"\x04\x00\x00", b"", b"\x02\x00\x00\x00\xff\xfe"])
def test_bytes_that_are_not_utf_8_are_refused_by_name(raw):
    """They are decoded only once, and refused with the input's name."""
    half = case("the demo's columns").half
    one = Golden(to_tensors(half.rows, half.manifest.inputs, FRAME[:1]), ())
    inputs = [Tensor("sex", "BYTES", (1, 1), raw) if tensor.name == "sex" else tensor for tensor in one.inputs]

    with pytest.raises(InvalidInput, match='input "sex"'):
        half.runtime.transform(inputs)
