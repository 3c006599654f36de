"""Python, numpy and pandas values -> tensors of the signature."""

from __future__ import annotations

from datetime import date
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from splitserve.arrays import DTYPES, to_array
from splitserve.client.encoding import to_columns
from splitserve.errors import InvalidInput
from splitserve.signature import TensorSpec
from tests.strategies import FLOATS, INTEGERS

NAN = float("nan")


def spec(datatype: str, name: str = "x", *inner: int) -> TensorSpec:
    return TensorSpec(name, datatype, ("batch", *(inner or (1,))))


def sent(values: Any, datatype: str | None) -> list[Any]:
    """The elements of the tensor that an input becomes."""
    [column] = to_columns({"x": values}, [spec(datatype)] if datatype else None)
    return to_array(column.tensor()).ravel().tolist()


CONVERTED: dict[str, tuple[Any, str | None, list[Any]]] = {
    "ints to floats": ([1, 2], "FP32", [1, 2]),
    "floats that are whole to ints": ([1.0, 2.0], "INT64", [1, 2]),
    "doubles to singles": (np.array([0.1]), "FP32", [float(np.float32(0.1))]),
    "infinities stay": (np.array([np.inf]), "FP32", [np.inf]),
    "zero and one to booleans": ([0, 1], "BOOL", [False, True]),
    "booleans to numbers": ([True, False], "INT8", [1, 0]),
    "bfloat16": ([1.5], "BF16", [1.5]),
    "text": (["a", None, ""], "BYTES", [b"a", b"", b""]),
    "bytes with zeros": ([b"a\x00", b"b"], "BYTES", [b"a\x00", b"b"]),
    "a missing number": ([1, None], "FP64", [1, NAN]),
    "objects of numbers": (np.array([1, 2], object), "INT32", [1, 2]),
    "all text missing": ([None, NAN], "BYTES", [b"", b""]),
    "all numbers missing": ([None, None], "FP32", [NAN, NAN]),
    "NaN where text belongs": (np.array([NAN]), "BYTES", [b""]),
    "one value": (3, "FP64", [3]),
    "category": (pd.Series(["a", None, "a"], dtype="category"), "BYTES", [b"a", b"", b"a"]),
    "string": (pd.Series(["a", None], dtype="string"), "BYTES", [b"a", b""]),
    "nullable integers": (pd.Series([1, None], dtype="Int64"), "FP64", [1, NAN]),
    "nullable integers without a gap": (pd.Series([1, 2], dtype="Int64"), "INT64", [1, 2]),
    "nullable booleans": (pd.Series([True, False], dtype="boolean"), "BOOL", [True, False]),
    "times": (
        pd.Series(pd.to_datetime(["2026-11-30T12:00:00", None])).astype("datetime64[s]"),
        "BYTES",
        [b"2026-11-30T12:00:00", b""],
    ),
    "times with a zone": (
        pd.Series(pd.to_datetime(["2026-11-30T12:00:00+01:00", None], utc=True)),
        "BYTES",
        [b"2026-11-30T11:00:00+00:00", b""],
    ),
    "dates": ([date(2026, 11, 30), None], "BYTES", [b"2026-11-30", b""]),
    "categories that are numbers": (pd.Series([1, 2], dtype="category"), "INT64", [1, 2]),
    "guessed integers": ([1, 2], None, [1, 2]),
    "guessed text": (["a", None], None, [b"a", b""]),
    "guessed numbers with a gap": ([1.5, None], None, [1.5, NAN]),
    "large integers stay exact": ([2**53 + 1], "INT64", [2**53 + 1]),
    "the largest integer": ([2**64 - 1], "UINT64", [2**64 - 1]),
}


@pytest.mark.parametrize("case", CONVERTED)
def test_values_are_converted_to_the_datatypes_of_the_signature(case: str) -> None:
    """Where that keeps them; a missing value is NaN, or the empty text."""
    values, datatype, expected = CONVERTED[case]

    np.testing.assert_equal(sent(values, datatype), expected)


REFUSED: dict[str, tuple[Any, str | None, str]] = {
    "a fraction": ([1, 2.5], "INT64", 'input "x": element 1 is 2.5, which INT64 cannot represent'),
    "a missing integer": ([1, None], "INT64", "element 1 is nan, which INT64 cannot represent"),
    "out of range": ([300], "UINT8", "element 0 is 300, which UINT8 cannot represent"),
    "negative": ([-1], "UINT64", "element 0 is -1, which UINT64 cannot represent"),
    "too large for a single": ([1e300], "FP32", "which FP32 cannot represent"),
    "two as a boolean": ([2], "BOOL", "element 0 is 2, which BOOL cannot represent"),
    "text for numbers": (["1"], "FP32", 'input "x": expected numbers (FP32), got text'),
    "one text among numbers": (
        [1.5, None, "unknown", 2],
        "FP32",
        "expected text or numbers, got float, int, str; row 2 is 'unknown'",
    ),
    "one text among numbers that are text": (
        ["1.5", "", "unknown"],
        "FP32",
        "expected numbers (FP32), got text; row 2 is 'unknown'",
    ),
    "text in a table": ([[1, 2], [3, "x"]], "FP32", "row 1, element 1 is 'x'"),
    "a number among text": (["a", None, 5], "BYTES", "expected text or numbers, got int, str; row 2 is 5"),
    "numbers for text": ([1], "BYTES", 'input "x": expected text or bytes, got int64'),
    "a date": (np.array(["2020-01-01"], "datetime64[D]"), "FP64", "expected numbers (FP64), got datetime64"),
    "a guessed date": (np.array(["2020-01-01"], "datetime64[D]"), None, "no datatype in the Open Inference Protocol"),
    "text and numbers": (["a", 1], None, "expected text or numbers, got int, str"),
    "a dict": ([{"a": 1}], None, "expected text or numbers, got dict"),
    "ragged": ([[1], [1, 2]], None, "the rows have different shapes"),
    "beyond 64 bits": ([2**70], None, "does not fit 64 bits"),
    "an unknown datatype": ([1], "FP8", 'unknown datatype "FP8"'),
}


@pytest.mark.parametrize("case", REFUSED)
def test_values_that_a_conversion_would_change_are_refused(case: str) -> None:
    """The input is named, with the expected and the given value."""
    values, datatype, message = REFUSED[case]

    with pytest.raises(InvalidInput) as raised:
        sent(values, datatype)

    assert message in raised.value.message


@given(st.lists(st.one_of(st.integers(-(2**63), 2**64 - 1), st.floats(), st.booleans()), max_size=5), st.data())
def test_encoding_changes_no_value(values: list[Any], data: st.DataObject) -> None:
    """Whatever the numbers and the datatype: they arrive, rounded if it is a float's, or are refused."""
    datatype = data.draw(st.sampled_from([*INTEGERS, *FLOATS, "BOOL"]))
    try:
        arrived = sent(values, datatype)
    except InvalidInput:
        return

    array = np.asarray(values)
    if datatype in FLOATS:
        with np.errstate(all="ignore"):
            expected = array.astype(np.float64).astype(DTYPES.get(datatype, np.dtype("<f4"))).tolist()
        assert len(arrived) == len(values)
        if datatype != "BF16":
            np.testing.assert_allclose(arrived, expected, rtol=1e-2)
    else:
        assert arrived == array.tolist()


def test_a_column_has_the_shape_of_the_signature() -> None:
    """One value a row is (n, 1) where that is declared."""
    [declared] = to_columns({"x": [1, 2]}, [spec("FP32")])
    [guessed] = to_columns({"x": [1, 2]}, None)

    assert (declared.tensor().shape, guessed.tensor().shape) == ((2, 1), (2,))


def test_a_frame_of_other_columns_is_the_row_of_an_only_input() -> None:
    """A model of one input (batch, n) takes the columns together."""
    frame = pd.DataFrame({"a": [1, 2], "b": [0.5, 0.25]})

    with pytest.warns(UserWarning, match="columns by position"):
        [column] = to_columns(frame, [spec("FP32", "features", 2)])

    assert (column.name, column.array.tolist()) == ("features", [[1, 0.5], [2, 0.25]])


def test_inputs_without_names_are_refused_where_there_are_several() -> None:
    """They are named in the message."""
    with pytest.raises(InvalidInput, match='have no names, expected "x", "y"'):
        to_columns([[1]], [spec("FP32"), spec("FP32", "y")])
    with pytest.raises(InvalidInput, match="a dict or a DataFrame"):
        to_columns([[1]], None)


def test_two_columns_of_one_name_are_refused() -> None:
    """An input is given once."""
    with pytest.raises(InvalidInput, match="duplicate column names"):
        to_columns(pd.DataFrame([[1, 2]], columns=["a", "a"]), None)
