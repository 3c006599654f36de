"""Arrow arrays as tensors: what is converted, and what fails its row."""

from __future__ import annotations

import datetime as dt
from decimal import Decimal
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from splitserve.arrays import to_array
from splitserve.client.encoding import to_columns
from splitserve.errors import InvalidInput
from splitserve.scoring.inputs import bind, raw_bytes, values_of
from splitserve.signature import BATCH, TensorSpec
from splitserve.tensors import encode_bytes

NOON = dt.datetime(2026, 1, 31, 12, 0, 0, 500)
TOKYO = dt.timezone(dt.timedelta(hours=9))


def converted(array: pa.Array, datatype: str) -> tuple[list[Any], dict[int, str]]:
    """The elements of the tensor that a column becomes, and the rows that fail."""
    spec = TensorSpec("x", datatype, (BATCH, 1))
    bindings = bind([spec], {"x": array.type}, {}, where="here")
    (values,), failures = values_of([spec], bindings, {"x": array}, len(array))
    tensor = values.tensor(slice(0, len(array)))
    assert tensor.shape == (len(array), 1)
    return to_array(tensor).ravel().tolist(), failures


@pytest.mark.parametrize(
    ("array", "datatype", "expected"),
    [
        (pa.array([1, None, 3], pa.int32()), "FP64", [1.0, float("nan"), 3.0]),
        (pa.array([True, False]), "FP32", [1.0, 0.0]),
        (pa.array([True, False]), "BOOL", [True, False]),
        (pa.array([1.0, 2.0]), "INT8", [1, 2]),
        (pa.array([Decimal("0.1"), Decimal("12.6614242")], pa.decimal128(38, 12)), "FP64", [0.1, 12.6614242]),
        (pa.array([Decimal("3")]), "INT64", [3]),
        (pa.array([0.1], pa.float64()), "FP32", [float(np.float32(0.1))]),
        (pa.array(["é", None, ""]), "BYTES", ["é".encode(), b"", b""]),
        (pa.array([b"\x00\xff", b""]), "BYTES", [b"\x00\xff", b""]),
        (pa.array([NOON, None], pa.timestamp("us")), "BYTES", [b"2026-01-31T12:00:00.000500", b""]),
        (pa.array([NOON.replace(tzinfo=TOKYO)], pa.timestamp("us", "Asia/Tokyo")), "BYTES", [b"2026-01-31T03:00:00.000500Z"]),
        (pa.array([dt.date(2026, 1, 31)]), "BYTES", [b"2026-01-31"]),
        (pa.nulls(2), "FP64", [float("nan")] * 2),
        (pa.nulls(2), "BYTES", [b"", b""]),
    ],
    ids=str,
)
def test_values_become_elements_of_the_datatype(
    array: pa.Array, datatype: str, expected: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the machine's zone is; also in the middle of a larger array."""
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    padded = pa.concat_arrays([array, array, array]).slice(len(array), len(array))

    for each in (array, padded):
        found, failures = converted(each, datatype)
        np.testing.assert_equal(found, expected)
        assert not failures


@pytest.mark.parametrize(
    ("array", "datatype", "message"),
    [
        (pa.array([0, None]), "INT64", "the value is missing, expected INT64"),
        (pa.array([0.0, 1.5]), "INT64", "the value is 1.5, which INT64 cannot represent"),
        (pa.array([0, 300]), "UINT8", "the value is 300, which UINT8 cannot represent"),
        (pa.array([0.0, 1e300]), "FP32", "the value is 1e+300, which FP32 cannot represent"),
    ],
    ids=str,
)
def test_a_value_that_cannot_be_converted_fails_its_row(array: pa.Array, datatype: str, message: str) -> None:
    """And no other; the client refuses it as well."""
    _, failures = converted(array, datatype)

    assert failures == {1: f'input "x": {message}'}
    with pytest.raises(InvalidInput):
        to_columns({"x": array.to_pylist()}, [TensorSpec("x", datatype, (BATCH, 1))])


@pytest.mark.parametrize("elements", [[], [b""], [b"a", b"", b"\x00" * 300, "é".encode()]], ids=len)
def test_bytes_elements_are_preceded_by_their_lengths(elements: list[bytes]) -> None:
    """As the wire has them."""
    array = pa.array([b"before", *elements, b"after"], pa.binary()).slice(1, len(elements))

    assert raw_bytes(array) == encode_bytes(elements)
