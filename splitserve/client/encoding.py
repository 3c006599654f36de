"""Arrays, lists, DataFrames and dicts of columns -> arrays of the datatypes of a signature.

Without a signature the datatypes follow from the values. No conversion changes a value, except for the precision of floats.
Knows no transport; recognises pandas objects without importing pandas, and those of other libraries in `foreign`.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping, Sequence
from datetime import date, time
from decimal import Decimal
from typing import Any, Literal, NamedTuple

import numpy as np

from splitserve.arrays import DTYPES, Array, datatype_of, from_array, objects
from splitserve.client.foreign import foreign_kind, to_known_kind, to_plain
from splitserve.errors import InvalidInput
from splitserve.signature import TensorSpec
from splitserve.tensors import Tensor

_N_SAMPLED = 1000

Extra = Literal["error", "drop"]
"""What happens to columns and keys that the model does not have: an error, or nothing."""


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
    return hasattr(inputs, "iloc") and hasattr(inputs, "columns")  # in this order: `columns` of a lazy frame of polars costs


def is_table(inputs: Any) -> bool:
    """Whether its rows are independent by its kind: a DataFrame of pandas or polars, a Table of Arrow."""
    return is_frame(inputs) or foreign_kind(inputs) in ("polars frame", "arrow table")


def index_of(inputs: Any) -> Any:
    """The index of pandas objects among the inputs; None if there is none."""
    if is_frame(inputs):
        return inputs.index
    if isinstance(inputs, Mapping):
        return next((values.index for values in inputs.values() if _is_series(values)), None)
    return None


def to_columns(
    inputs: Any,
    specs: Sequence[TensorSpec] | None,
    ignored: Collection[str] = (),
    *,
    extra: Extra = "error",
    columns: Sequence[str] = (),
) -> list[InputColumn]:
    """The inputs of a request.

    Args:
        inputs: see `splitserve.client.Client.infer`.
        specs: the inputs of the model's signature; None: unknown.
        ignored: names of inputs that the model does not look at: they are left out.
        extra: "drop" leaves out all that the model does not have.
        columns: names of the columns of a model's only input, as they were when it was published; () if unknown.

    Raises:
        InvalidInput: names the input, what was expected and what was given.
    """
    by_name = {spec.name: spec for spec in specs or ()}
    named = _named(inputs, specs, ignored, extra, columns)
    if extra == "drop" and by_name:
        named = {name: values for name, values in named.items() if name in by_name}
    return [_column(name, values, by_name.get(name)) for name, values in named.items() if name not in ignored]


def _named(
    inputs: Any, specs: Sequence[TensorSpec] | None, ignored: Collection[str], extra: Extra, columns: Sequence[str]
) -> dict[str, Any]:
    only = specs[0] if specs and len(specs) == 1 else None
    inputs = to_known_kind(inputs)
    if is_frame(inputs):
        if not inputs.columns.is_unique:
            raise InvalidInput("the DataFrame has duplicate column names, expected one column for each input")
        if only and only.name not in inputs.columns and len(only.shape) == 2:
            kept = [name for name in inputs.columns if str(name) not in ignored]
            order = _ordered([str(name) for name in kept], only, extra, columns)
            return {only.name: inputs[[kept[place] for place in order]]}
        return {str(name): inputs[name] for name in inputs.columns}
    if _is_series(inputs) and _is_row(inputs.index.tolist(), specs):
        row = {str(name): [value] for name, value in zip(inputs.index.tolist(), inputs.tolist(), strict=True)}
        return _named(row, specs, ignored, extra, columns)
    if isinstance(inputs, Mapping):
        named = {str(name): values for name, values in inputs.items()}
        if only and only.name not in named and len(only.shape) == 2 and len(named) > 1:
            kept_names = [name for name in named if name not in ignored]
            order = _ordered(kept_names, only, extra, columns)
            arrays = [_to_array(kept_names[place], named[kept_names[place]], only.datatype).ravel() for place in order]
            try:
                return {only.name: np.stack(arrays, axis=1)}
            except ValueError:
                raise InvalidInput(f'input "{only.name}": the columns have different numbers of rows') from None
        return named
    if _are_records(inputs):
        names = dict.fromkeys(str(name) for record in inputs for name in record)
        texts = [{str(name): value for name, value in record.items()} for record in inputs]
        return _named({name: [record.get(name) for record in texts] for name in names}, specs, ignored, extra, columns)
    if inputs is None or isinstance(inputs, set | frozenset):
        raise InvalidInput(f"the inputs: expected a DataFrame, a dict, rows or an array, got {type(inputs).__name__}")
    if only:
        return {only.name: inputs}
    if specs and (rows := _rows_of(inputs, len(specs))) is not None and all(spec.is_column for spec in specs):
        return {spec.name: [row[place] for row in rows] for place, spec in enumerate(specs)}
    expected = ", ".join(f'"{spec.name}"' for spec in specs or ()) or "a dict or a DataFrame"
    kind = type(inputs).__name__
    raise InvalidInput(f"the inputs have no names, expected {expected}, or rows of as many values; got {kind}")


def _is_series(inputs: Any) -> bool:
    return hasattr(inputs, "iloc") and hasattr(inputs, "index") and not hasattr(inputs, "columns")


def _is_row(labels: Sequence[Any], specs: Sequence[TensorSpec] | None) -> bool:
    """Whether a Series with these labels is one row of a frame, not a column."""
    if not labels or not all(isinstance(label, str) for label in labels):
        return False
    return (
        specs is None
        or len(specs) > 1
        or any(spec.name in labels or len(spec.shape) == 2 for spec in specs if not spec.is_column)
    )


def _are_records(inputs: Any) -> bool:
    return isinstance(inputs, list | tuple) and bool(inputs) and all(isinstance(record, Mapping) for record in inputs)


def _rows_of(inputs: Any, n_columns: int) -> Sequence[Sequence[Any]] | None:
    """Rows of that many values, in the order of the signature; None if it is something else."""
    if isinstance(inputs, np.ndarray):
        inputs = inputs.tolist()
    if not isinstance(inputs, list | tuple) or not inputs:
        return None
    rows = inputs if all(isinstance(row, list | tuple | np.ndarray) for row in inputs) else [inputs]
    return rows if all(len(row) == n_columns for row in rows) else None


def _ordered(names: Sequence[str], spec: TensorSpec, extra: Extra, columns: Sequence[str]) -> list[int]:
    """Where each column of a model's only input is among these.

    Raises:
        InvalidInput: columns are missing, or there are others.
    """
    if not columns:
        if names and not all(name.isdecimal() for name in names):
            shown = ", ".join(names[:5]) + (", …" if len(names) > 5 else "")
            warnings.warn(
                f'input "{spec.name}" takes columns by position, and the model has no record of their names: they are sent in '
                f"the order {shown}; pass .to_numpy() if that is the order of the training data",
                stacklevel=2,
            )
        return list(range(len(names)))
    places = {name: place for place, name in enumerate(names)}
    if missing := [name for name in columns if name not in places]:
        raise InvalidInput(f'input "{spec.name}": expected the columns {_listed(columns)}, missing {_listed(missing)}')
    known = set(columns)
    if extra != "drop" and (others := [name for name in names if name not in known]):
        raise InvalidInput(f'input "{spec.name}": expected the columns {_listed(columns)}, got also {_listed(others)}')
    return [places[name] for name in columns]


def _listed(names: Sequence[str]) -> str:
    return ", ".join(f'"{name}"' for name in names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def _column(name: str, values: Any, spec: TensorSpec | None) -> InputColumn:
    datatype = spec.datatype if spec else None
    array = _to_array(name, values, datatype)
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
    elif spec and _is_bare_row(array, spec):
        array = array[np.newaxis]
    return InputColumn(name, datatype, array)


def _is_bare_row(array: Array, spec: TensorSpec) -> bool:
    """Whether it is one row, or one image, without the dimension of rows."""
    if len(spec.shape) < 2 or array.ndim != len(spec.shape) - 1:
        return False
    expected = spec.wire_shape
    return expected[0] < 0 and all(size in (have, -1) for have, size in zip(array.shape, expected[1:], strict=True))


def _to_array(name: str, values: Any, datatype: str | None) -> Array:
    """An array of the values; text as objects: numpy would convert numbers among text, and cut off trailing zero bytes."""
    values = to_plain(values, is_text=datatype == "BYTES")
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
    if kinds and all(issubclass(kind, date | time) for kind in kinds):
        texts = ["" if is_missing else element.isoformat() for element, is_missing in zip(elements, missing, strict=True)]
        return objects(texts, array.shape)
    if all(issubclass(kind, str | bytes) for kind in kinds) and (kinds or datatype in (None, "BYTES")):
        filled: Array = np.empty(len(elements), dtype=np.object_)
        filled[:] = ["" if is_missing else element for element, is_missing in zip(elements, missing, strict=True)]
        return filled.reshape(array.shape)
    if Decimal in kinds:
        elements = [_number(element) if isinstance(element, Decimal) else element for element in elements]
        kinds = (kinds - {Decimal}) | {float}
    if not all(issubclass(kind, bool | int | float | np.number | np.bool_) for kind in kinds):
        found = ", ".join(sorted(kind.__name__ for kind in kinds))
        raise InvalidInput(
            f'input "{name}": expected text or numbers, got {found}{_first_unfit(array, is_text=datatype == "BYTES")}'
        )
    if any(missing):
        numbers = [np.nan if is_missing else element for element, is_missing in zip(elements, missing, strict=True)]
        return np.array(numbers, dtype=np.float64).reshape(array.shape)
    numeric: Array = np.array(elements).reshape(array.shape)
    if numeric.dtype.kind == "O":
        raise InvalidInput(f'input "{name}": a number does not fit 64 bits')
    return numeric


def _number(element: Decimal) -> int | float:
    """A whole number exactly, another one as the nearest float."""
    return int(element) if element.is_finite() and element == element.to_integral_value() else float(element)


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
        found = f"text{_first_unfit(array, is_text=False)}" if array.dtype.kind in "OSU" else str(array.dtype)
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
        width = array[0].size if array.ndim > 1 and len(array) else 1
        where = f"element {index}" if width == 1 else f"row {index // width}, element {index % width}"
        raise InvalidInput(f'input "{name}": {where} is {array.ravel()[index]}, which {datatype} cannot represent')
    return converted


def _first_unfit(array: Array, *, is_text: bool) -> str:
    """The first element of another kind, with its row; of text among numbers, the first that does not read as a number."""
    elements = array.ravel().tolist()
    kinds = str | bytes if is_text else bool | int | float | Decimal | np.number | np.bool_
    unfit = [
        place
        for place, element in enumerate(elements)
        if not (isinstance(element, kinds) or _is_missing(element) or (isinstance(element, str | bytes) and not element))
    ]
    if not unfit:
        return ""
    place = unfit[0] if is_text else next((place for place in unfit if not _reads_as_number(elements[place])), unfit[0])
    width = array[0].size if array.ndim > 1 else 1
    where = f"row {place}" if width == 1 else f"row {place // width}, element {place % width}"
    shown = repr(elements[place])
    return f"; {where} is {shown if len(shown) <= 40 else shown[:40] + '…'}"


def _reads_as_number(element: Any) -> bool:
    try:
        float(element)
    except (TypeError, ValueError):
        return False
    return True


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
