"""Wire tensors <-> the rows that transforms are fitted on: a DataFrame with the training columns, or an array.

`observe` describes the training data; `to_rows` builds such rows from a request; `to_tensors` is its inverse. pandas is imported
only for DataFrames.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from datetime import date
from numbers import Number
from typing import Any, Literal

import numpy as np

from splitserve.arrays import Array, datatype_of, from_array, objects, to_array
from splitserve.errors import InvalidInput
from splitserve.repository.manifest import Column, Rows
from splitserve.signature import BATCH, TensorSpec
from splitserve.tensors import Tensor, decode_bytes

Rowset = Any
"""A DataFrame, or an array whose leading dimension is the rows."""

Values = Array | list[Any]
"""One column of a request: an array of numbers, or a list of text in which missing values are NaN or None as in training."""

Missing = Literal["", "nan", "none"]

_TEXT_DTYPES = ("object", "str", "string", "category")
_NULLABLE = {
    **{f"{sign}Int{bits}": "FP64" for sign in ("", "U") for bits in (8, 16, 32, 64)},
    "Float32": "FP32",
    "Float64": "FP64",
    "boolean": "FP64",
}
"""The datatype of pandas' nullable dtypes, whose missing value is NaN on the wire. Booleans are 0 and 1."""

_NUMBERED = "category["
"""Begins the name of a categorical dtype whose categories are numbers, e.g. ``category[int64]``. They are sent as FP64."""

_DATETIME = "datetime64"
_MISSING = {"nan": np.nan, "none": None}


class UnsupportedRows(ValueError):
    """The training data cannot be sent over the wire; the message names the column and the way out."""


def observe(rows: Rowset, input_name: str) -> tuple[Rows, tuple[TensorSpec, ...]]:
    """The kind of these rows, and the signature of a request with such rows.

    Args:
        rows: the training data, or a part of it with every kind of value: a DataFrame, or an array (n_rows, …).
        input_name: name of the input if the data is one array.

    Raises:
        UnsupportedRows: a column or the array has a type without a wire datatype.
    """
    if hasattr(rows, "columns"):
        if not rows.columns.is_unique:
            twice = ", ".join(f'"{name}"' for name in dict.fromkeys(rows.columns[rows.columns.duplicated()]))
            raise UnsupportedRows(
                f"columns become inputs, which have unique names; {twice} occurs more than once: rename or drop it"
            )
        if not all(isinstance(name, str) for name in rows.columns):
            raise UnsupportedRows(
                "the columns of a DataFrame become inputs: expected unique text as names; rename them, or publish with "
                "X.to_numpy()"
            )
        columns = tuple(_observe_column(name, rows[name]) for name in rows.columns)
        specs = tuple(TensorSpec(column.name, _datatype(column.dtype), (BATCH, 1)) for column in columns)
        return Rows("frame", columns), specs
    element = _observe_elements(rows, f'"{input_name}"')
    inner = tuple(rows.shape[1:]) or (1,)
    spec = TensorSpec(input_name, _datatype(element), (BATCH, *inner))
    missing: Missing = _missing_value(rows.ravel().tolist()) if element == "str" else ""
    return Rows("array", (Column(input_name, element, missing),), element, rows.ndim), (spec,)


def _observe_column(name: str, series: Any) -> Column:
    dtype = str(series.dtype)
    if dtype.startswith(_DATETIME):
        return Column(name, dtype, "nan")
    if dtype not in _TEXT_DTYPES:
        if not _datatype(dtype):
            raise UnsupportedRows(f'column "{name}": dtype {dtype} cannot be sent; {_conversion(name, dtype)}')
        return Column(name, dtype)
    if dtype == "category" and _are_numbers(series.cat.categories):
        numbers = tuple(map(str, series.cat.categories.tolist()))
        return Column(name, f"{_NUMBERED}{series.cat.categories.dtype}]", "", numbers, bool(series.cat.ordered))
    values = series.tolist()
    _check_text(f'column "{name}"', [value for value in values if not is_missing(value)], f'X["{name}"]', dtype)
    categories = tuple(str(value) for value in series.cat.categories) if dtype == "category" else ()
    return Column(name, dtype, _missing_value(values), categories, dtype == "category" and bool(series.cat.ordered))


def _are_numbers(categories: Any) -> bool:
    """Whether float64 holds all of these categories."""
    dtype = categories.dtype
    return isinstance(dtype, np.dtype) and dtype.kind in "iuf" and bool((abs(categories.to_numpy(np.float64)) <= 2**53).all())


def _conversion(name: str, dtype: str) -> str:
    """How to make numbers or text of a column, in training and in what clients send."""
    if dtype.startswith("timedelta64"):
        return f'send seconds and fit on them: X["{name}"] = X["{name}"] / pd.Timedelta(seconds=1)'
    if dtype.startswith(("period", "interval")):
        return f'send text and fit on it: X["{name}"] = X["{name}"].astype(str)'
    if dtype.startswith("complex"):
        return "send its real and imaginary parts as two columns"
    return f'fit on X["{name}"].astype("float64"), in which a missing value is NaN'


def _observe_elements(array: Array, name: str) -> str:
    if array.dtype.kind not in "OSU":
        if datatype_of(array.dtype) is None:
            raise UnsupportedRows(f"{name}: dtype {array.dtype} cannot be sent")
        return str(array.dtype)
    present = [value for value in array.ravel().tolist() if not is_missing(value)]
    if present and all(isinstance(value, bytes) for value in present):
        if len(present) < array.size:
            raise UnsupportedRows(f'{name}: an element is missing, and no bytes could stand for it; replace it, e.g. with b""')
        return "bytes"
    _check_text(name, present, "X")
    return "str"


def _check_text(name: str, values: Sequence[object], data: str, dtype: str = "object") -> None:
    """Raises:
    UnsupportedRows: a value is no text; ``data`` is what the user calls them.
    """
    kinds = {type(value) for value in values}
    if all(issubclass(kind, str) for kind in kinds):
        return
    found = ", ".join(sorted(kind.__name__ for kind in kinds))
    if dtype == "category":
        raise UnsupportedRows(
            f"{name}: expected text as categories, got {found}; fit on {data}.cat.rename_categories(str) and send text"
        )
    if all(issubclass(kind, Number | np.bool_) for kind in kinds):
        way_out = f'fit on {data}.astype("float64"), in which a missing value is NaN'
    elif all(issubclass(kind, date) for kind in kinds):
        way_out = f"fit on pd.to_datetime({data})"
    else:
        way_out = f"convert {data} to one type, e.g. to text"
    raise UnsupportedRows(f"{name}: expected text or numbers, got objects of type {found}; {way_out}")


def is_missing(value: object) -> bool:
    """Whether a value is None, NaN, or pandas' NA or NaT."""
    return (
        value is None
        or type(value).__name__ in ("NAType", "NaTType")
        or (isinstance(value, float | np.floating) and bool(value != value))
    )


def _missing_value(values: Sequence[object]) -> Missing:
    """The value that "" on the wire becomes: the missing value of the data, unless "" is a value of the data."""
    if any(isinstance(value, str) and not value for value in values):
        return ""
    missing = [value for value in values if is_missing(value)]
    return ("none" if missing[0] is None else "nan") if missing else ""


def _plain_datatype(dtype: str) -> str | None:
    try:
        return datatype_of(np.dtype(dtype))
    except TypeError:
        return None


def _datatype(dtype: str) -> str:
    """The datatype of a column of this dtype; "" if it cannot be sent."""
    if dtype in (*_TEXT_DTYPES, "bytes") or dtype.startswith(_DATETIME):
        return "BYTES"
    if dtype.startswith(_NUMBERED):
        return "FP64"
    return _NULLABLE.get(dtype) or _plain_datatype(dtype) or ""


def to_rows(rows: Rows, specs: Sequence[TensorSpec], inputs: Sequence[Tensor]) -> Rowset:
    """The rows that the transforms expect, from tensors that were checked against the signature.

    Numbers are widened to the training data's dtype; an empty string becomes the column's missing value, if it has one.

    Raises:
        InvalidInput: an element of a text column is not UTF-8.
    """
    by_name = {tensor.name: tensor for tensor in inputs}
    if rows.form == "array":
        array = _elements(rows.columns[0], by_name[specs[0].name])
        return array.reshape(-1) if rows.n_dims == 1 else array.reshape(len(array), *specs[0].wire_shape[1:])
    return frame(rows.columns, read_columns(rows, specs, [by_name[column.name] for column in rows.columns]))


def read_columns(rows: Rows, specs: Sequence[TensorSpec], tensors: Sequence[Tensor]) -> list[Values]:
    """The values of each column; of an array of numbers one block, widened. Numbers of a frame's columns are not widened.

    Args:
        rows: a frame, or an array of numbers, of text, or of bytes.
        specs: the signature's inputs.
        tensors: in their order.

    Raises:
        InvalidInput: an element of a text column is not UTF-8, or the bytes are not elements.
    """
    if rows.form == "frame":
        return [_values(column, tensor) for column, tensor in zip(rows.columns, tensors, strict=True)]
    column, tensor, spec = rows.columns[0], tensors[0], specs[0]
    if column.dtype == "bytes":
        return [to_array(tensor).ravel().tolist()]
    if column.dtype == "str":
        elements, width = _text(column, tensor), math.prod(spec.wire_shape[1:])
        return [[elements[place::width] for place in range(width)]]
    return [to_array(tensor).reshape(-1, *spec.wire_shape[1:]).astype(column.dtype, copy=False)]


def frame(columns: Sequence[Column], values: Sequence[Values]) -> Any:
    """The DataFrame that the transforms were fitted on, with these values."""
    import pandas as pd

    dtypes, arrays = {column.dtype for column in columns}, [each for each in values if isinstance(each, np.ndarray)]
    is_plain = columns[0].dtype not in _NULLABLE and not columns[0].dtype.startswith(_NUMBERED)
    if len(dtypes) == 1 and len(arrays) == len(columns) > 1 and is_plain:  # one block, not many
        block = np.stack([each.astype(columns[0].dtype, copy=False) for each in arrays], axis=1)
        return pd.DataFrame(block, columns=[column.name for column in columns], copy=False)
    data = {column.name: _pandas_values(column, each) for column, each in zip(columns, values, strict=True)}
    return pd.DataFrame(data, copy=False)


def series(column: Column, values: Values) -> Any:
    """One column of that frame."""
    return frame([column], [values])[column.name]


def _elements(column: Column, tensor: Tensor) -> Array:
    if column.dtype == "bytes":
        return to_array(tensor)
    if tensor.datatype != "BYTES":
        return to_array(tensor).astype(column.dtype, copy=False)
    return objects(_text(column, tensor), tensor.shape)


def _values(column: Column, tensor: Tensor) -> Values:
    return _text(column, tensor) if tensor.datatype == "BYTES" else to_array(tensor).reshape(-1)


def _text(column: Column, tensor: Tensor) -> list[Any]:
    elements = decode_bytes(tensor)
    if len(elements) != math.prod(tensor.shape):
        raise InvalidInput(f'input "{tensor.name}": shape {list(tensor.shape)} is not that of {len(elements)} BYTES elements')
    missing = _MISSING.get(column.missing, "")
    try:
        return [element.decode() if element else missing for element in elements]
    except UnicodeDecodeError:
        raise InvalidInput(f'input "{column.name}": an element is not UTF-8 text') from None


def _pandas_values(column: Column, values: Values) -> Any:
    import pandas as pd

    if column.dtype in _NULLABLE:
        return _nullable(column, np.asarray(values))
    if column.dtype.startswith(_NUMBERED):
        return _numbered(column, np.asarray(values, np.float64))
    if column.dtype.startswith(_DATETIME):
        return _datetimes(column, values)
    if isinstance(values, np.ndarray):
        return values.astype(column.dtype, copy=False)
    if column.dtype == "category":
        unseen = {value for value in values if isinstance(value, str)}.difference(column.categories)
        return pd.Categorical(values, categories=[*column.categories, *sorted(unseen)], ordered=column.ordered)
    if column.dtype in ("str", "string"):
        return pd.array(values, dtype=column.dtype)
    return pd.Series(values, dtype="object")  # a bare array of text would become pandas' own text dtype


def _nullable(column: Column, values: Array) -> Any:
    """A column of a nullable dtype, from floats in which NaN is missing."""
    import pandas as pd

    if not column.dtype.startswith("Float"):
        low, high = (0, 1) if column.dtype == "boolean" else _bounds(column.dtype)
        present = values[~np.isnan(values)]
        if not ((present == np.rint(present)) & (present >= low) & (present <= high)).all():
            raise InvalidInput(
                f'input "{column.name}": expected whole numbers from {low} to {high} or NaN, as {column.dtype} in training'
            )
    return pd.array(values, dtype=column.dtype)


def _numbered(column: Column, values: Array) -> Any:
    """A column of categories that are numbers, from floats in which NaN is missing; unseen ones are added."""
    import pandas as pd

    dtype = np.dtype(column.dtype.removeprefix(_NUMBERED).removesuffix("]"))
    known = np.array(column.categories).astype(dtype)
    unseen = np.setdiff1d(values[~np.isnan(values)], known)
    if dtype.kind != "f" and all(_is_of(value, dtype) for value in unseen):
        unseen = unseen.astype(dtype)
    return pd.Categorical(values, categories=np.concatenate([known, unseen]), ordered=column.ordered)


def _is_of(value: float, dtype: np.dtype[Any]) -> bool:
    limits = np.iinfo(dtype)
    return float(value).is_integer() and float(limits.min) <= value < float(limits.max)


def _bounds(dtype: str) -> tuple[int, int]:
    """The range of an integer dtype, as far as float64 counts by 1."""
    limits = np.iinfo(dtype.lower())
    return max(int(limits.min), -(2**53)), min(int(limits.max), 2**53)


def _datetimes(column: Column, values: Values) -> Any:
    """A column of ISO 8601 text; a zone is that of training, UTC where the text names none."""
    import pandas as pd

    has_zone = "," in column.dtype
    try:
        parsed = pd.to_datetime(pd.Series(values, dtype=object), format="ISO8601", utc=has_zone)
        return parsed.astype(column.dtype)
    except (ValueError, TypeError, OverflowError):
        raise InvalidInput(
            f'input "{column.name}": expected dates and times in ISO 8601, e.g. 2026-01-31T12:00:00{"+00:00" if has_zone else ""}'
        ) from None


def to_tensors(rows: Rows, specs: Sequence[TensorSpec], data: Rowset) -> tuple[Tensor, ...]:
    """The tensors that a client would send for these rows."""
    if rows.form == "array":
        spec = specs[0]
        array = np.asarray(data)
        return (_to_tensor(rows.columns[0], spec, array.reshape(array.shape[0], *spec.wire_shape[1:])),)
    return tuple(
        _to_tensor(column, spec, _sent(column, data[column.name]).reshape(-1, 1))
        for column, spec in zip(rows.columns, specs, strict=True)
    )


def _sent(column: Column, series: Any) -> Array:
    """A column's values as they are sent: (n_rows,)."""
    if column.dtype in _NULLABLE:
        values: Array = series.astype(column.dtype).to_numpy(dtype=np.float64, na_value=np.nan)
        return values.astype(np.float32) if column.dtype == "Float32" else values
    if column.dtype.startswith(_NUMBERED):
        numbers: Array = series.astype(np.float64).to_numpy()
        return numbers
    if column.dtype.startswith(_DATETIME):
        return objects([value if is_missing(value) else value.isoformat() for value in series.tolist()], (len(series),))
    return np.asarray(series, dtype=np.object_ if column.dtype in _TEXT_DTYPES else column.dtype)


def _to_tensor(column: Column, spec: TensorSpec, array: Array) -> Tensor:
    if spec.datatype == "BYTES" and column.dtype != "bytes":
        array = objects(["" if is_missing(value) else value for value in array.ravel().tolist()], array.shape)
    return from_array(spec.name, array, spec.datatype)
