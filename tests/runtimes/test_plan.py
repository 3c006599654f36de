"""Plans: the same bits and the same refusals as the transforms that they stand for."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from sklearn.compose import ColumnTransformer, make_column_selector, make_column_transformer
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.impute import SimpleImputer
from sklearn.pipeline import FeatureUnion, make_pipeline
from sklearn.preprocessing import (
    FunctionTransformer,
    KBinsDiscretizer,
    MinMaxScaler,
    OneHotEncoder,
    OrdinalEncoder,
    RobustScaler,
    StandardScaler,
)

from splitserve.arrays import to_array
from splitserve.errors import InvalidInput
from splitserve.publishing import preprocessor_half as half_module
from splitserve.publishing.halves import PreprocessorHalf, PublishOptions
from splitserve.publishing.preprocessor_half import FeatureForm, preprocessor_half
from splitserve.repository.golden import Golden
from splitserve.repository.manifest import Compiled
from splitserve.runtimes.plan import plan_of
from splitserve.runtimes.preprocessor import Preprocessor
from splitserve.runtimes.rows import to_tensors
from splitserve.tensors import Tensor
from splitserve.transformers import Flatten
from tests.budgets import examples

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

ARRAY = np.random.default_rng(0).normal(size=(12, 4))
GAPPY = np.where(np.random.default_rng(1).random((12, 4)) < 0.2, np.nan, ARRAY)


def on_columns(*parts: Any, **options: Any) -> ColumnTransformer:
    return ColumnTransformer([(f"part {index}", *part) for index, part in enumerate(parts)], **options)


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
    "parts that are not known": (
        on_columns(
            (RobustScaler(), ["year"]),
            (TfidfVectorizer(), "note"),
            (make_pipeline(SimpleImputer(strategy="median"), KBinsDiscretizer(2, encode="ordinal")), ["length"]),
            (OneHotEncoder(handle_unknown="ignore"), ["island"]),
        ),
        FRAME,
    ),
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
    "an array of text": (OneHotEncoder(handle_unknown="ignore"), FRAME[["island", "island"]].to_numpy(dtype=object)),
}

UNPLANNED: dict[str, tuple[Any, Any]] = {
    "another class": (RobustScaler(), ARRAY),
    "a function": (FunctionTransformer(np.log1p), np.abs(ARRAY)),
    "a union": (FeatureUnion([("a", StandardScaler()), ("b", MinMaxScaler())]), ARRAY),
    "an indicator": (SimpleImputer(add_indicator=True), GAPPY),
    "another marker": (SimpleImputer(missing_values=-1), ARRAY),
    "a subclass": (OtherScaler(), ARRAY),
    "a frame as result": (StandardScaler().set_output(transform="pandas"), ARRAY),
    "weights": (on_columns((StandardScaler(), NUMBERS), transformer_weights={"part 0": 2.0}), FRAME),
    "half precision": (StandardScaler(), ARRAY.astype("float16")),
    "rare categories": (OneHotEncoder(max_categories=2, handle_unknown="infrequent_if_exist"), FRAME[["island"]]),
    "categories that are numbers": (OneHotEncoder(), FRAME[["year"]]),
}


def published(transformer: Any, rows: Any) -> PreprocessorHalf:
    """The transforms as `publish` would write them, but at full precision and without a compiled form, whose proof takes long."""
    with warnings.catch_warnings(), pytest.MonkeyPatch.context() as patch:
        warnings.simplefilter("ignore")
        patch.setattr(half_module, "compile_transforms", lambda *_: (b"", Compiled(reason="a plan is what is wanted")))
        features = FeatureForm(precision="FP64", all_as_floats=False)
        options = PublishOptions(name="model", input_name="x", trusted_modules=[__name__])
        return preprocessor_half(transformer.fit(rows), rows, features, options)


def planned(half: PreprocessorHalf) -> Preprocessor:
    """The same, with its plan where there is one."""
    found = Preprocessor(half.manifest, half.runtime.transformer)
    found.adopt_plan(half.golden)
    return found


@cache
def half_of(name: str) -> PreprocessorHalf:
    """Of one of `PLANNED`, published once."""
    return published(*PLANNED[name])


def outcome(call: Callable[[], tuple[Tensor, ...]]) -> Any:
    """The tensors, or what was refused."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # numbers that overflow, on purpose
        try:
            return call()
        except InvalidInput as error:
            return error.message


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
        if dtype.kind in "fiu":
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
    half = published(SimpleImputer(), GAPPY)
    del half.runtime.transformer._fill_dtype
    assert plan_of(half.runtime.transformer, half.manifest.rows, half.manifest.inputs) is not None


@pytest.mark.parametrize("name", PLANNED)
def test_known_transforms_have_a_plan(name):
    """It agrees with them on the golden samples."""
    assert planned(half_of(name)).runtime == "plan"


@pytest.mark.parametrize("name", PLANNED)
@settings(max_examples=examples(25), suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_a_plan_equals_scikit_learn_bit_for_bit_and_refuses_the_same(name, data):
    """For any input: NaN, infinities, extremes, unseen categories, empty text, missing values."""
    half, like = half_of(name), PLANNED[name][1]
    rows = data.draw(frames(like) if isinstance(like, pd.DataFrame) else arrays(like))
    inputs = to_tensors(half.rows, half.manifest.inputs, rows)

    assert outcome(lambda: planned(half).transform(inputs)) == outcome(lambda: half.runtime.transform(inputs))


@pytest.mark.parametrize("name", UNPLANNED)
def test_unknown_transforms_have_no_plan(name):
    """A parameter, a class or a dtype whose effect a plan does not repeat: the transforms are called as they are."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        half = published(*UNPLANNED[name])

        assert planned(half).runtime == "sklearn"


def test_a_plan_that_differs_is_dropped():
    """If golden samples differ by a single bit, there is no plan."""
    half = published(StandardScaler(), ARRAY)
    other = StandardScaler().fit(ARRAY)
    other.transform = lambda X: np.nextafter(StandardScaler.transform(other, X), np.inf)
    found = Preprocessor(half.manifest, other)

    found.adopt_plan(half.golden)

    assert found.runtime == "sklearn"


def test_inputs_may_be_in_any_order_and_narrower():
    """A plan takes what the signature takes."""
    half = half_of("the demo's columns")
    inputs = {tensor.name: tensor for tensor in half.golden.inputs}
    year = inputs["year"]
    inputs["year"] = Tensor("year", "INT16", year.shape[:1], to_array(year).astype("<i2").tobytes())

    found = planned(half).transform(tuple(reversed(inputs.values())))

    assert found == half.golden.outputs


@pytest.mark.parametrize("raw", [b"\x04\x00\x00\x00aut", b"\x04\x00\x00", b"", b"\x02\x00\x00\x00\xff\xfe"])
def test_bytes_that_are_not_utf_8_are_refused_by_name(raw):
    """They are decoded only once, and refused with the input's name."""
    half = half_of("the demo's columns")
    one = Golden(to_tensors(half.rows, half.manifest.inputs, FRAME[:1]), ())
    inputs = [Tensor("sex", "BYTES", (1, 1), raw) if tensor.name == "sex" else tensor for tensor in one.inputs]

    with pytest.raises(InvalidInput, match='input "sex"'):
        planned(half).transform(inputs)
