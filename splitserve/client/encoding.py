"""Arrays, lists, DataFrames and dicts of columns -> arrays of the datatypes of a signature.

Without a signature the datatypes follow from the values. No conversion changes a value, except for the precision of floats.
Knows no transport; recognises pandas objects without importing pandas.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from datetime import date
from typing import Any, NamedTuple

import numpy as np

from splitserve.arrays import DTYPES, Array, datatype_of, from_array, objects
from splitserve.errors import InvalidInput
from splitserve.signature import TensorSpec
from splitserve.tensors import Tensor

_N_SAMPLED = 1000


class InputColumn(NamedTuple):
    """An input as it is sent. ``array`` has the shape of the tensor."""

    name: str
    datatype: str
    array: Array

    def tensor(self, rows: slice | None = None) -> Tensor:
        """The tensor of some rows, or of all."""
        return from_array(self.name, self.array if rows is None else self.array[rows], self.datatype)

    @property
    def n_bytes(self) -> int:
        """Approximate size of the tensor."""
        if self.datatype != "BYTES":
            return int(self.array.size) * max(DTYPES.get(self.datatype, np.dtype("<u2")).itemsize, 1)
        sample = self.array.ravel()[:_N_SAMPLED].tolist()
        return int(sum(4 + len(element) for element in sample) * self.array.size / max(len(sample), 1))


def is_frame(inputs: Any) -> bool:
    """Whether it is a pandas DataFrame."""
    return hasattr(inputs, "columns") and hasattr(inputs, "iloc")


def to_columns(inputs: Any, specs: Sequence[TensorSpec] | None, ignored: Collection[str] = ()) -> list[InputColumn]:
    """The inputs of a request.

    Args:
        inputs: by input name, arrays or lists of rows; or a DataFrame, each column an input, or all columns the rows of a
            model's only input; or the values of a model's only input.
        specs: the inputs of the model's signature; None: unknown.
        ignored: names of inputs that the model does not look at: they are left out.

    Raises:
        InvalidInput: names the input, what was expected and what was given.
    """
    by_name = {spec.name: spec for spec in specs or ()}
    if ignored:
        inputs = _without(inputs, ignored)
    return [_column(name, values, by_name.get(name)) for name, values in _named(inputs, specs).items()]


def _without(inputs: Any, ignored: Collection[str]) -> Any:
    if is_frame(inputs):
        return inputs.loc[:, [str(name) not in ignored for name in inputs.columns]]
    if isinstance(inputs, Mapping):
        return {name: values for name, values in inputs.items() if str(name) not in ignored}
    return inputs


def _named(inputs: Any, specs: Sequence[TensorSpec] | None) -> dict[str, Any]:
    only = specs[0] if specs and len(specs) == 1 else None
    if is_frame(inputs):
        if not inputs.columns.is_unique:
            raise InvalidInput("the DataFrame has duplicate column names, expected one column for each input")
        if only and only.name not in inputs.columns and len(only.shape) == 2:
            return {only.name: inputs}
        return {str(name): inputs[name] for name in inputs.columns}
    if isinstance(inputs, Mapping):
        return {str(name): values for name, values in inputs.items()}
    if only:
        return {only.name: inputs}
    expected = ", ".join(f'"{spec.name}"' for spec in specs or ()) or "a dict or a DataFrame"
    raise InvalidInput(f"the inputs have no names, expected {expected}")


def _column(name: str, values: Any, spec: TensorSpec | None) -> InputColumn:
    array = _to_array(name, values)
    datatype = spec.datatype if spec else None
    if array.dtype.kind in "OSU":
        array = _of_objects(name, array, datatype)
    if datatype is None:
        found = datatype_of(array.dtype)
        if found is None:
            raise InvalidInput(f'input "{name}": dtype {array.dtype} has no datatype in the Open Inference Protocol')
        return InputColumn(name, found, array)
    array = _as_datatype(name, array, datatype)
    if spec and spec.is_column and array.ndim < 2:
        array = array.reshape(-1, 1)
    return InputColumn(name, datatype, array)


def _to_array(name: str, values: Any) -> Array:
    """An array of the values; text as objects: numpy would convert numbers among text, and cut off trailing zero bytes."""
    try:
        array: Array = np.asarray(values.to_numpy() if hasattr(values, "to_numpy") else values)
        if array.dtype.kind in "US" and not isinstance(values, np.ndarray):
            array = np.asarray(values, dtype=np.object_)
    except ValueError as error:
        raise InvalidInput(f'input "{name}": the rows have different shapes: {error}') from None
    return array


def _of_objects(name: str, array: Array, datatype: str | None) -> Array:
    """Text with "" for missing values, or numbers with NaN for them."""
    elements = array.ravel().tolist()
    missing = [_is_missing(element) for element in elements]
    kinds = {type(element) for element, is_missing in zip(elements, missing, strict=True) if not is_missing}
    if kinds and all(issubclass(kind, date) for kind in kinds):
        texts = ["" if is_missing else element.isoformat() for element, is_missing in zip(elements, missing, strict=True)]
        return objects(texts, array.shape)
    if all(issubclass(kind, str | bytes) for kind in kinds) and (kinds or datatype in (None, "BYTES")):
        filled: Array = np.empty(len(elements), dtype=np.object_)
        filled[:] = ["" if is_missing else element for element, is_missing in zip(elements, missing, strict=True)]
        return filled.reshape(array.shape)
    if not all(issubclass(kind, bool | int | float | np.number | np.bool_) for kind in kinds):
        found = ", ".join(sorted(kind.__name__ for kind in kinds))
        raise InvalidInput(f'input "{name}": expected text or numbers, got {found}')
    if any(missing):
        numbers = [np.nan if is_missing else element for element, is_missing in zip(elements, missing, strict=True)]
        return np.array(numbers, dtype=np.float64).reshape(array.shape)
    numeric: Array = np.array(elements).reshape(array.shape)
    if numeric.dtype.kind == "O":
        raise InvalidInput(f'input "{name}": a number does not fit 64 bits')
    return numeric


def _is_missing(element: Any) -> bool:
    """None, NaN, or pandas' NA or NaT. NaN is what differs from itself."""
    return element is None or type(element).__name__ in ("NAType", "NaTType") or bool(element != element)


def _as_datatype(name: str, array: Array, datatype: str) -> Array:
    """The array converted to the dtype of a datatype.

    Raises:
        InvalidInput: text instead of numbers or the reverse, or a number that the datatype cannot represent.
    """
    if datatype == "BYTES":
        return _as_text(name, array)
    if array.dtype.kind not in "biuf":
        found = "text" if array.dtype.kind in "OSU" else str(array.dtype)
        raise InvalidInput(f'input "{name}": expected numbers ({datatype}), got {found}')
    expected = np.dtype("<f4") if datatype == "BF16" else DTYPES.get(datatype)
    if expected is None:
        raise InvalidInput(f'input "{name}": the signature has the unknown datatype "{datatype}"')
    if array.dtype == expected:
        return array
    with np.errstate(all="ignore"):
        converted = array.astype(expected)
    is_kept = ~np.isinf(converted) | ~np.isfinite(array) if expected.kind == "f" else converted == array
    if not is_kept.all():
        index = int(np.argmin(is_kept.ravel()))
        raise InvalidInput(f'input "{name}": element {index} is {array.ravel()[index]}, which {datatype} cannot represent')
    return converted


def _as_text(name: str, array: Array) -> Array:
    """Text as it is; dates and times as ISO 8601."""
    if array.dtype.kind in "OSU":
        return array
    if array.dtype.kind == "M":
        texts = np.datetime_as_string(array).astype(np.object_)
        return np.where(np.isnat(array), "", texts)
    if array.dtype.kind == "f" and np.isnan(array).all():  # a column of missing values only, which pandas reads as numbers
        return np.full(array.shape, "", dtype=np.object_)
    raise InvalidInput(f'input "{name}": expected text or bytes, got {array.dtype}')
