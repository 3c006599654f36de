"""Rows: what a transform was fitted on is what it gets from a request."""

from __future__ import annotations

from datetime import date
from decimal import Decimal
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from splitserve.arrays import from_array, to_array
from splitserve.errors import InvalidInput
from splitserve.repository.manifest import Column, Rows
from splitserve.runtimes.rows import UnsupportedRows, is_missing, observe, to_rows, to_tensors
from splitserve.signature import TensorSpec, check_inputs
from splitserve.tensors import Tensor, decode_bytes, encode_bytes
from tests.budgets import examples
from tests.strategies import names

NAN = float("nan")
TO_TEXT = 'convert X["bad"] to one type, e.g. to text'
TO_NUMBERS = 'fit on X["bad"].astype("float64"), in which a missing value is NaN'


def over_the_wire(data: Any) -> Any:
    """What a transform gets for these rows, if the model was published with them and a client sends them."""
    rows, specs = observe(data, "x")
    tensors = to_tensors(rows, specs, data)
    check_inputs(specs, tensors, widen=False)
    return to_rows(rows, specs, tensors)


def described(values: Any) -> list[str]:
    """Values with their types, so that 1 is not 1.0, and what is missing as what stands for it: nan, None or <NA>."""
    return [f"{type(value).__name__} {value!r}" if not is_missing(value) else repr(value) for value in values]


def assert_same(found: pd.DataFrame, expected: pd.DataFrame) -> None:
    """Columns, dtypes, values and missing values; the index is not sent."""
    assert list(found.columns) == list(expected.columns)
    assert list(found.dtypes) == list(expected.dtypes)
    for name in expected.columns:
        assert described(found[name].tolist()) == described(expected[name].tolist())


TEXT = st.text(min_size=1, max_size=4)

COLUMNS: dict[str, st.SearchStrategy[pd.Series]] = {
    **{
        dtype: st.lists(st.integers(np.iinfo(dtype).min, np.iinfo(dtype).max), max_size=5).map(
            lambda values, dtype=dtype: pd.Series(values, dtype=dtype)
        )
        for dtype in ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")
    },
    **{
        dtype: st.lists(st.floats(width=width), max_size=5).map(lambda values, dtype=dtype: pd.Series(values, dtype=dtype))
        for dtype, width in (("float16", 16), ("float32", 32), ("float64", 64), (">f8", 64))
    },
    "bool": st.lists(st.booleans(), max_size=5).map(lambda values: pd.Series(values, dtype="bool")),
    "str": st.lists(TEXT | st.just(NAN), max_size=5).map(lambda values: pd.Series(values, dtype="str")),
    "string": st.lists(TEXT | st.none(), max_size=5).map(lambda values: pd.Series(values, dtype="string")),
    "object": st.lists(st.text(max_size=4), max_size=5).map(lambda values: pd.Series(values, dtype="object")),
    "object with None": st.lists(TEXT | st.none(), max_size=5).map(lambda values: pd.Series(values, dtype="object")),
    "object with NaN": st.lists(TEXT | st.just(NAN), max_size=5).map(lambda values: pd.Series(values, dtype="object")),
    "category": st.lists(TEXT, min_size=1, max_size=3, unique=True).flatmap(
        lambda categories: st.lists(st.sampled_from([*categories, NAN]), max_size=5).map(
            lambda values: pd.Series(pd.Categorical(values, categories=categories))
        )
    ),
}


@pytest.mark.parametrize("kind", COLUMNS)
@settings(max_examples=examples(30))
@given(data=st.data())
def test_a_column_is_the_same_after_the_wire(kind, data):
    """Values, dtype and missing values, all of which transforms depend on."""
    frame = pd.DataFrame({data.draw(names()): data.draw(COLUMNS[kind])})

    assert_same(over_the_wire(frame), frame)


@settings(max_examples=examples(30))
@given(st.data())
def test_a_frame_is_the_same_after_the_wire(data):
    """Its columns in their order, each with its own dtype."""
    kinds = data.draw(
        st.lists(st.sampled_from(["int64", "float32", "float64", "bool", "str", "category"]), min_size=1, max_size=4)
    )
    columns = [data.draw(COLUMNS[kind]) for kind in kinds]
    n_rows = min(len(column) for column in columns)
    titles = data.draw(st.lists(names(), min_size=len(kinds), max_size=len(kinds), unique=True))
    frame = pd.DataFrame({title: column[:n_rows] for title, column in zip(titles, columns, strict=True)})

    assert_same(over_the_wire(frame), frame)


def test_a_frame_has_this_json_schema():
    """Each column an input of the signature, (batch, 1), with what is needed to build it again."""
    frame = pd.DataFrame(
        {
            "age": [1.5, NAN],
            "year": np.array([2007, 2008], dtype="int32"),
            "island": ["Dream", NAN],
            "sex": pd.Series(["m", None], dtype="object"),
            "size": pd.Categorical(["l", None], categories=["s", "l"]),
            "ok": [True, False],
        }
    )

    rows, specs = observe(frame, "unused")

    assert rows == Rows(
        "frame",
        (
            Column("age", "float64"),
            Column("year", "int32"),
            Column("island", "str", "nan"),
            Column("sex", "object", "none"),
            Column("size", "category", "nan", ("s", "l")),
            Column("ok", "bool"),
        ),
    )
    datatypes = {"age": "FP64", "year": "INT32", "island": "BYTES", "sex": "BYTES", "size": "BYTES", "ok": "BOOL"}
    assert specs == tuple(TensorSpec(name, datatype, ("batch", 1)) for name, datatype in datatypes.items())


def test_a_missing_text_is_empty_on_the_wire():
    """The protocol has no missing values; for floats NaN is one."""
    frame = pd.DataFrame({"island": ["Dream", NAN], "age": [NAN, 1.5]})

    island, age = to_tensors(*observe(frame, "x"), frame)

    assert decode_bytes(island) == [b"Dream", b""]
    assert np.isnan(to_array(age)).ravel().tolist() == [True, False]


@pytest.mark.parametrize("dtype", ["str", "object"])
def test_an_empty_string_that_training_had_is_a_value(dtype):
    """If the training data has "" it means "", even where something is missing too."""
    frame = pd.DataFrame({"island": pd.Series(["Dream", "", NAN], dtype=dtype)})

    rows, _ = observe(frame, "x")

    assert rows.columns[0].missing == ""
    assert over_the_wire(frame)["island"].tolist() == ["Dream", "", ""]


def test_an_empty_string_is_a_value_where_training_had_no_missing_values():
    """Training never saw a missing value: the transform would not know one."""
    frame = pd.DataFrame({"island": ["Dream", "Biscoe"]})
    rows, specs = observe(frame, "x")

    found = to_rows(rows, specs, [Tensor("island", "BYTES", (2, 1), encode_bytes([b"", b"Dream"]))])

    assert found["island"].tolist() == ["", "Dream"]


def test_a_category_that_training_did_not_have_is_kept():
    """The transform decides what to make of it; to it, it is unknown, not missing."""
    frame = pd.DataFrame({"size": pd.Categorical(["s", None], categories=["s", "l"])})
    rows, specs = observe(frame, "x")

    found = to_rows(rows, specs, [Tensor("size", "BYTES", (3, 1), encode_bytes([b"xl", b"", b"s"]))])

    assert described(found["size"]) == ["str 'xl'", "nan", "str 's'"]
    assert list(found["size"].cat.categories) == ["s", "l", "xl"]


def test_categories_stay_ordered():
    """An ordered column without its order would be another dtype."""
    frame = pd.DataFrame({"size": pd.Categorical(["l", "s"], categories=["s", "l"], ordered=True)})

    assert_same(over_the_wire(frame), frame)


def test_narrower_numbers_become_the_training_datas():
    """The caller's float32 or integer is the column's float64 before a transform sees it."""
    frame = pd.DataFrame({"age": [1.5, 2.5], "count": [1, 2]})
    rows, specs = observe(frame, "x")
    tensors = [from_array("count", np.array([[3], [4]], dtype="uint8")), from_array("age", np.array([[5], [6]], dtype="int16"))]
    check_inputs(specs, tensors, widen=True)

    assert_same(to_rows(rows, specs, tensors), pd.DataFrame({"age": [5.0, 6.0], "count": [3, 4]}))


@pytest.mark.parametrize("column", [[1.5, 2.5], ["a", "b"]])
def test_a_column_may_be_sent_without_its_inner_dimension(column):
    """(batch,) is the same column."""
    frame = pd.DataFrame({"x": column})
    rows, specs = observe(frame, "x")
    (tensor,) = to_tensors(rows, specs, frame)
    flat = Tensor(tensor.name, tensor.datatype, (2,), tensor.raw)
    check_inputs(specs, [flat], widen=True)

    assert_same(to_rows(rows, specs, [flat]), frame)


def test_no_rows_become_an_empty_frame():
    """With every column and its dtype."""
    frame = pd.DataFrame({"age": [1.5], "island": ["Dream"], "size": pd.Categorical(["s"])})
    rows, specs = observe(frame, "x")

    assert_same(to_rows(rows, specs, to_tensors(rows, specs, frame[:0])), frame[:0])


@pytest.mark.parametrize(
    ("column", "datatype"),
    [
        (pd.Series([1, None, 2**53], dtype="Int64"), "FP64"),
        (pd.Series([1, None, 255], dtype="UInt8"), "FP64"),
        (pd.Series([True, None, False], dtype="boolean"), "FP64"),
        (pd.Series([1.5, None, 0.1], dtype="Float64"), "FP64"),
        (pd.Series([1.5, None, 0.1], dtype="Float32"), "FP32"),
        (pd.Series(["a", None, "b"], dtype="string"), "BYTES"),
        (pd.Series(pd.to_datetime(["2020-01-01", None, "2026-11-30T12:00:00.000001"], format="ISO8601")), "BYTES"),
        (pd.Series(pd.to_datetime(["2020-01-01", None], utc=True)), "BYTES"),
        (pd.Series(pd.to_datetime(["2020-01-01", None])).dt.tz_localize("Europe/Oslo"), "BYTES"),
    ],
    ids=lambda each: str(getattr(each, "dtype", "")),
)
def test_a_column_of_pandas_own_dtypes_is_the_same_after_the_wire(column, datatype):
    """Missing ones too, with the dtype of training."""
    frame = pd.DataFrame({"x": column})
    rows, specs = observe(frame, "x")

    assert specs[0].datatype == datatype
    assert_same(to_rows(rows, specs, to_tensors(rows, specs, frame)), frame)


@pytest.mark.parametrize(
    "column",
    [
        pd.Series(pd.to_timedelta(["1 days"])),
        pd.Series(pd.period_range("2020", periods=2, freq="D")),
        pd.Series(pd.interval_range(0, 2)),
        pd.Series([1.0, 0.0], dtype="Sparse[float64]"),
        pd.Series([1j]),
        pd.Series(np.array([1.0], dtype="longdouble")),
    ],
    ids=lambda column: str(column.dtype),
)
def test_a_dtype_without_a_datatype_is_refused_by_column(column):
    """With a way out, which works."""
    X = pd.DataFrame({"good": [1.0] * len(column), "bad": column})
    with pytest.raises(UnsupportedRows) as caught:
        observe(X, "x")

    start, _, way_out = str(caught.value).partition("; ")
    assert start == f'column "bad": dtype {column.dtype} cannot be sent'
    if ": X[" in way_out:
        exec(way_out.partition(": ")[2], {"X": X, "pd": pd})
    elif "fit on X[" in way_out:
        X["bad"] = eval(way_out.removeprefix("fit on ").partition(",")[0], {"X": X})
    else:
        assert way_out == "send its real and imaginary parts as two columns"
        return
    observe(X, "x")


@pytest.mark.parametrize(
    ("column", "found", "way_out"),
    [
        (pd.Series([1, "a"], dtype="object"), "int, str", TO_TEXT),
        (pd.Series(["a", 1.5], dtype="object"), "float, str", TO_TEXT),
        (pd.Series([True, None], dtype="object"), "bool", TO_NUMBERS),
        (pd.Series([Decimal("1.5"), 2], dtype="object"), "Decimal, int", TO_NUMBERS),
        (pd.Series([date(2026, 1, 31), None], dtype="object"), "date", 'fit on pd.to_datetime(X["bad"])'),
        (pd.Series([b"a"], dtype="object"), "bytes", TO_TEXT),
        (pd.Series([["a"]], dtype="object"), "list", TO_TEXT),
    ],
)
def test_objects_that_are_not_text_are_refused_by_column(column, found, way_out):
    """The wire has one kind of element; which is meant is not guessed. The error says how to choose."""
    with pytest.raises(UnsupportedRows) as caught:
        observe(pd.DataFrame({"bad": column}), "x")

    assert str(caught.value) == f'column "bad": expected text or numbers, got objects of type {found}; {way_out}'


@pytest.mark.parametrize(
    "column",
    [
        pd.Categorical([3, 1, None, 3], categories=[3, 1, 7]),
        pd.Categorical([-1, 2, 2, -1], ordered=True),
        pd.Categorical([0.1, None, -2.5, 0.1]),
        pd.Categorical(np.array([1, 2, 1, 2], np.int8)),
    ],
    ids=["missing", "ordered", "float", "int8"],
)
def test_categories_that_are_numbers_are_sent_as_numbers(column):
    """Beside others of their kind, too, which are not one block."""
    frame = pd.DataFrame({"one": column, "other": column})

    found = over_the_wire(frame)

    assert [spec.datatype for spec in observe(frame, "x")[1]] == ["FP64", "FP64"]
    pd.testing.assert_frame_equal(found, frame)


def test_an_unseen_number_is_one_more_category():
    """A fraction, where training had none, too."""
    rows, specs = observe(pd.DataFrame({"k": pd.Categorical([1, 2])}), "x")

    found = [
        to_rows(rows, specs, (from_array("k", np.array(asked, float).reshape(-1, 1)),))["k"]
        for asked in ([2, 9], [2, 2.5, np.nan])
    ]

    assert [column.tolist() for column in found] == [[2, 9], [2.0, 2.5, pytest.approx(np.nan, nan_ok=True)]]
    assert [column.cat.categories.tolist() for column in found] == [[1, 2, 9], [1.0, 2.0, 2.5]]


def test_categories_that_are_not_text_are_refused_by_column():
    """With the way to make them text."""
    with pytest.raises(UnsupportedRows) as caught:
        observe(pd.DataFrame({"bad": pd.to_datetime(["2026-01-31", "2026-02-01"]).astype("category")}), "x")

    assert str(caught.value) == (
        'column "bad": expected text as categories, got Timestamp; fit on X["bad"].cat.rename_categories(str) and send text'
    )


@pytest.mark.parametrize(
    "columns",
    [["a", "a"], [0, 1], ["a", 1], [("a", "b"), ("a", "c")], pd.MultiIndex.from_tuples([("a", "b"), ("a", "c")])],
    ids=["twice", "numbers", "mixed", "tuples", "levels"],
)
def test_columns_whose_names_cannot_be_encoded_are_refused(columns):
    """An input has one name, and it is text: a transform fitted on column 0 would not find "0"."""
    frame = pd.DataFrame([[1.5, 2.5]])
    frame.columns = columns

    with pytest.raises(UnsupportedRows):
        observe(frame, "x")


@pytest.mark.parametrize("text", [b"\xff", b"a\xff"])
@pytest.mark.parametrize("data", [pd.DataFrame({"x": ["a"]}), pd.DataFrame({"x": ["a"]}, dtype="category"), np.array(["a"])])
def test_text_that_is_not_utf_8_is_invalid_input(data, text):
    """Named by its input."""
    rows, specs = observe(data, "x")

    with pytest.raises(InvalidInput, match='^input "x": an element is not UTF-8 text$'):
        to_rows(rows, specs, [Tensor("x", "BYTES", (2, 1), encode_bytes([b"a", text]))])


ARRAYS = {
    "float32": np.arange(6, dtype="float32").reshape(2, 3),
    "float64 column": np.array([[1.5], [NAN]]),
    "float64 without columns": np.array([1.5, NAN, 2.5]),
    "int64": np.arange(6).reshape(3, 2),
    "big-endian": np.arange(6, dtype=">i4").reshape(3, 2),
    "bool": np.array([[True, False]]),
    "uint8 images": np.arange(24, dtype="uint8").reshape(2, 3, 4),
    "fortran order": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
    "no rows": np.empty((0, 3)),
}


@pytest.mark.parametrize("kind", ARRAYS)
def test_an_array_is_the_same_after_the_wire(kind):
    """Shape, dtype and elements."""
    array = ARRAYS[kind]

    found = over_the_wire(array)

    assert (found.shape, found.dtype) == (array.shape, array.dtype)
    np.testing.assert_array_equal(found, array)


@pytest.mark.parametrize(
    ("array", "elements"),
    [
        (np.array(["a", "é"]), ["a", "é"]),
        (np.array([["a"], ["é"]]), [["a"], ["é"]]),
        (np.array([["a", "b"], ["é", ""]]), [["a", "b"], ["é", ""]]),
        (np.array(["a", ""], dtype="object"), ["a", ""]),
        (np.array(["a", None], dtype="object"), ["a", None]),
        (np.array([["a"], [NAN]], dtype="object"), [["a"], [NAN]]),
        (np.array([b"a", b""]), [b"a", b""]),
        (np.array([[b"\xff\x00", b""]], dtype="object"), [[b"\xff\x00", b""]]),
        (np.array([[b"\xff"], [b""]], dtype="object"), [[b"\xff"], [b""]]),
    ],
)
def test_an_array_of_text_or_bytes_becomes_an_object_array(array, elements):
    """Of any rank: text as text, bytes as bytes, what is missing as what it was."""
    found = over_the_wire(array)

    assert found.dtype == np.object_
    assert repr(found.tolist()) == repr(elements)


@pytest.mark.parametrize(
    ("array", "rows", "spec"),
    [
        (
            np.zeros((5, 3, 4), dtype="uint8"),
            Rows("array", (Column("image", "uint8"),), "uint8", 3),
            TensorSpec("image", "UINT8", ("batch", 3, 4)),
        ),
        (np.zeros(5), Rows("array", (Column("image", "float64"),), "float64", 1), TensorSpec("image", "FP64", ("batch", 1))),
        (
            np.array([["a", None]]),
            Rows("array", (Column("image", "str", "none"),), "str", 2),
            TensorSpec("image", "BYTES", ("batch", 2)),
        ),
        (
            np.array([b"a"]),
            Rows("array", (Column("image", "bytes"),), "bytes", 1),
            TensorSpec("image", "BYTES", ("batch", 1)),
        ),
    ],
)
def test_an_array_has_this_json_schema(array, rows, spec):
    """One input of the name given; rows of a single value are (batch, 1)."""
    assert observe(array, "image") == (rows, (spec,))


@pytest.mark.parametrize("array", [np.array([[1.5], [2.5]]), np.array([["a"], ["b"]]), np.array([1.5, 2.5])])
def test_an_array_of_one_value_per_row_may_be_sent_without_its_inner_dimension(array):
    """The signature's check takes (batch,); the transform gets the rank that it was fitted on."""
    rows, specs = observe(array, "x")
    (tensor,) = to_tensors(rows, specs, array)
    flat = Tensor(tensor.name, tensor.datatype, (2,), tensor.raw)
    check_inputs(specs, [flat], widen=True)

    assert to_rows(rows, specs, [flat]).tolist() == array.tolist()


def test_a_narrower_array_becomes_the_training_datas():
    """As a column does."""
    rows, specs = observe(np.zeros((1, 2)), "x")

    found = to_rows(rows, specs, [from_array("x", np.array([[1, 2]], dtype="int32"))])

    assert (found.dtype, found.tolist()) == (np.float64, [[1.0, 2.0]])


@pytest.mark.parametrize("dtype", ["complex128", "datetime64[D]", "timedelta64[s]", "longdouble", "i4,f4"])
def test_an_array_without_a_datatype_is_refused(dtype):
    """By the input's name."""
    with pytest.raises(UnsupportedRows, match='^"image": dtype .* cannot be sent$'):
        observe(np.zeros((2, 2), dtype=dtype), "image")


@pytest.mark.parametrize(
    ("elements", "found"), [(["a", 1], "int, str"), ([b"a", "a"], "bytes, str"), ([b"a", None, 1.5], "bytes, float")]
)
def test_an_array_of_mixed_objects_is_refused(elements, found):
    """As a column is."""
    with pytest.raises(UnsupportedRows) as caught:
        observe(np.array([elements], dtype="object"), "image")

    assert str(caught.value) == (
        f'"image": expected text or numbers, got objects of type {found}; convert X to one type, e.g. to text'
    )


@pytest.mark.parametrize("missing", [None, NAN])
def test_an_array_of_bytes_with_a_missing_one_is_refused(missing):
    """Empty bytes are a value: nothing on the wire could stand for it."""
    with pytest.raises(UnsupportedRows):
        observe(np.array([[b"a", missing]], dtype="object"), "image")


@pytest.mark.parametrize(
    ("value", "answer"),
    [
        (None, True),
        (NAN, True),
        (np.float32("nan"), True),
        (pd.NA, True),
        (pd.NaT, True),
        ("", False),
        (0, False),
        ("nan", False),
        (b"", False),
    ],
)
def test_missing_values_are_these(value, answer):
    """None, NaN and pandas' own; never an empty or a false value."""
    assert is_missing(value) is answer
