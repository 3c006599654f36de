"""Columns of a table <-> the inputs of a signature: which column an input is read from, and Arrow arrays as tensors.

Values are converted as the client converts a DataFrame's: numbers of any type to the signature's datatype, where it holds them;
a missing value is NaN in floats and the empty string in text; dates and times are ISO 8601. A value that cannot be converted
fails its row.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from splitserve.arrays import DTYPES, Array, from_array, objects
from splitserve.scoring.errors import ScoringError, WrongUsage
from splitserve.signature import TensorSpec
from splitserve.tensors import Tensor

ALL_OTHERS = "*"
"""In a mapping, all columns that are neither kept nor mapped, in the order of the file."""

Failures = dict[int, str]
"""Why a row fails, by its place in the block."""

Columns = Mapping[str, "pa.DataType | None"]
"""The columns of a file with their types; None where the format has none, as in text."""


class Binding(msgspec.Struct, frozen=True):
    """The columns that an input is read from: one, or one for each element of a row."""

    input: str
    columns: tuple[str, ...]


def bind(
    specs: Sequence[TensorSpec],
    columns: Columns,
    mapping: Mapping[str, str],
    *,
    where: str,
    kept: Collection[str] = (),
) -> tuple[Binding, ...]:
    """Find the columns of each input, by name.

    An input of several elements a row is a column of lists, or columns named ``INPUT_0``, ``INPUT_1``, …

    Args:
        specs: the inputs of the signature.
        columns: of the file.
        mapping: input by column.
        where: the file, for the error.
        kept: names of columns that are copied to the output, which `ALL_OTHERS` leaves out.

    Raises:
        ScoringError: a column is missing or has another type.
        WrongUsage: a mapping names no column or no input.
    """
    names = {spec.name for spec in specs}
    elements = {f"{spec.name}_{place}" for spec in specs for place in range(_width(spec, where))}
    for column, name in mapping.items():
        if column not in columns and column != ALL_OTHERS:
            raise WrongUsage(f'{where}: --map {column}={name}: there is no column "{column}"; it has {_listed(columns)}')
        if name not in names | elements:
            raise WrongUsage(f'--map {column}={name}: the model has no input "{name}", it has {_listed(names)}')
    found: dict[str, str] = {}
    for column in columns:
        name = mapping.get(column, column)
        if name in found:
            raise ScoringError(f'{where}: both "{found[name]}" and "{column}" are the input "{name}"; map one to another name')
        found[name] = column
    others = tuple(column for column in columns if column not in mapping and column not in kept)
    bound, absent = [], []
    for spec in specs:
        width = _width(spec, where)
        parts = [f"{spec.name}_{place}" for place in range(width)]
        if mapping.get(ALL_OTHERS) == spec.name:
            if len(others) != width:
                raise WrongUsage(
                    f'{where}: --map "*={spec.name}": expected {width} columns, one for each element, got {len(others)}: '
                    f"{_listed(others)}; --keep those that are no inputs"
                )
            bound.append(Binding(spec.name, others))
        elif spec.name in found:
            bound.append(Binding(spec.name, (found[spec.name],)))
        elif width > 1 and all(part in found for part in parts):
            bound.append(Binding(spec.name, tuple(found[part] for part in parts)))
        else:
            absent.append(spec.name if width == 1 else f"{spec.name} (lists of {width}, or {parts[0]} to {parts[-1]})")
    if absent:
        raise ScoringError(
            f"{where}: missing {_listed(absent)}; it has {_listed(columns)}; --map COLUMN=INPUT reads an input from a column of "
            "another name"
        )
    by_name = {spec.name: spec for spec in specs}
    for binding in bound:
        for column in binding.columns:
            _check_type(by_name[binding.input], columns[column], f'{where}: column "{column}"', len(binding.columns) > 1)
    return tuple(bound)


def _width(spec: TensorSpec, where: str) -> int:
    """Elements in a row."""
    inner = spec.wire_shape[1:]
    if any(size < 0 for size in inner):
        raise ScoringError(
            f'{where}: input "{spec.name}" has the variable shape {list(spec.wire_shape)}, which has no column form'
        )
    return math.prod(inner)


def _listed(names: Iterable[str]) -> str:
    shown = [f'"{name}"' for name in names]
    return (", ".join(shown[:20]) + (f" and {len(shown) - 20} more" if len(shown) > 20 else "")) or "none"


def _check_type(spec: TensorSpec, found: pa.DataType | None, what: str, is_element: bool) -> None:
    if found is None:
        return
    kind, is_list = _value_type(found), pa.types.is_nested(plain_type(found))
    expected = "text" if spec.datatype == "BYTES" else "numbers"
    if is_list and (is_element or _width(spec, what) == 1):
        raise ScoringError(f"{what}: expected {expected} ({spec.datatype}), got {found}")
    if pa.types.is_null(kind):
        if spec.datatype != "BYTES" and not _is_float(spec):
            raise ScoringError(f"{what}: expected {expected} ({spec.datatype}), which have no missing value; all are missing")
        return
    fits = _is_text(kind) or pa.types.is_temporal(kind) if spec.datatype == "BYTES" else _is_number(kind)
    if not fits:
        raise ScoringError(f"{what}: expected {expected} ({spec.datatype}), got {found}")


def _is_float(spec: TensorSpec) -> bool:
    return spec.datatype in ("FP16", "BF16", "FP32", "FP64")


def _value_type(found: pa.DataType) -> pa.DataType:
    """The type of the elements of lists, at any depth."""
    found = plain_type(found)
    while pa.types.is_list(found) or pa.types.is_large_list(found) or pa.types.is_fixed_size_list(found):
        found = plain_type(found.value_type)
    return found


def _is_text(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_binary(kind) or pa.types.is_fixed_size_binary(kind))


def _is_number(kind: pa.DataType) -> bool:
    return bool(pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind) or pa.types.is_decimal(kind))


def plain_type(found: pa.DataType) -> pa.DataType:
    """The type of a column as it is kept: dictionaries, views, 64 bit offsets and time zones are
    other forms of the same values.
    """
    if pa.types.is_dictionary(found):
        return plain_type(found.value_type)
    if pa.types.is_large_string(found) or found == pa.string_view():
        return pa.string()
    if pa.types.is_large_binary(found) or found == pa.binary_view():
        return pa.binary()
    if pa.types.is_timestamp(found) and found.tz:
        return pa.timestamp(found.unit, "UTC")
    return found


def plain(array: pa.Array) -> pa.Array:
    """An array with `plain_type`.

    Raises:
        ScoringError: the values do not fit into one array.
    """
    if isinstance(array, pa.ChunkedArray):
        array = array.combine_chunks() if array.num_chunks != 1 else array.chunk(0)
    wanted = plain_type(array.type)
    if array.type == wanted:
        return array
    try:
        return array.cast(wanted)
    except pa.ArrowInvalid as error:
        raise ScoringError(f"{array.type}: {error}") from error


class InputValues:
    """The values of one input for the rows of a block: an array (n_rows, …) of numbers or objects, or binary elements."""

    def __init__(self, spec: TensorSpec, values: Array | pa.Array) -> None:
        self._spec = spec
        self._values = values
        self._inner = (1,) if spec.is_column else tuple(spec.wire_shape[1:])

    def tensor(self, rows: Array | slice) -> Tensor:
        """The tensor of some rows."""
        spec, values = self._spec, self._values
        if isinstance(values, np.ndarray):
            part = values[rows]
            return from_array(spec.name, part.reshape(len(part), *self._inner), spec.datatype)
        part = values[rows] if isinstance(rows, slice) else values.take(pa.array(rows))
        return Tensor(spec.name, "BYTES", (len(part), *self._inner), raw_bytes(part))

    @property
    def numbers(self) -> Array | None:
        """The values, if they are floats."""
        values = self._values
        return values if isinstance(values, np.ndarray) and values.dtype.kind == "f" else None

    @property
    def row_bytes(self) -> float:
        """Bytes of a row on average."""
        return float(self._values.nbytes) / max(len(self._values), 1)


def raw_bytes(elements: pa.Array) -> bytes:
    """The raw form of a BYTES tensor with these elements: each preceded by its length, four bytes."""
    lengths = pc.binary_length(elements)
    prefixes = pa.Array.from_buffers(pa.binary(4), len(elements), [None, _values_buffer(lengths)])
    joined = pc.binary_join_element_wise(prefixes.cast(pa.binary()), elements, pa.scalar(b"", pa.binary()))
    _, offsets, data = joined.buffers()
    if data is None:
        return b""
    ends = np.frombuffer(offsets, np.int32, len(joined) + 1, joined.offset * 4)
    return bytes(data[int(ends[0]) : int(ends[-1])].to_pybytes())


def _values_buffer(numbers: pa.Array) -> pa.Buffer:
    """The four bytes of each number, without those before its offset."""
    return numbers.buffers()[1].slice(numbers.offset * 4, len(numbers) * 4)


def values_of(
    specs: Sequence[TensorSpec], bindings: Sequence[Binding], columns: Mapping[str, pa.Array], n_rows: int
) -> tuple[list[InputValues], Failures]:
    """The values of each input in the order of the signature, and the rows of which a value cannot be converted.

    The values of a row that fails are arbitrary.
    """
    failures: Failures = {}
    by_input = {binding.input: binding.columns for binding in bindings}
    values = []
    for spec in specs:
        parts = [columns[name] for name in by_input[spec.name]]
        if len(parts) > 1:
            converted = [_converted(spec, part, name, failures) for part, name in zip(parts, by_input[spec.name], strict=True)]
            made: Array | pa.Array = np.stack([_as_numpy(each) for each in converted], axis=1)
        elif _width(spec, "") == 1 and not pa.types.is_nested(parts[0].type):
            made = _converted(spec, parts[0], by_input[spec.name][0], failures)
        else:
            made = _from_lists(spec, parts[0], by_input[spec.name][0], n_rows, failures)
        values.append(InputValues(spec, made))
    return values, failures


def _as_numpy(values: Array | pa.Array) -> Array:
    return values if isinstance(values, np.ndarray) else objects(values.to_pylist(), (len(values),))


def _converted(spec: TensorSpec, array: pa.Array, name: str, failures: Failures) -> Array | pa.Array:
    """One value a row."""
    array = plain(array)
    if spec.datatype == "BYTES":
        return _text(array)
    return _numbers(spec, array, name, failures)


def _text(array: pa.Array) -> pa.Array:
    kind = array.type
    if pa.types.is_temporal(kind):
        array = _iso_8601(array)
    elif pa.types.is_null(kind):
        array = pa.array([None] * len(array), pa.binary())
    if not pa.types.is_binary(array.type):
        array = array.cast(pa.binary())
    return array.fill_null(b"") if array.null_count else array


def _iso_8601(array: pa.Array) -> pa.Array:
    if pa.types.is_timestamp(array.type) and array.type.tz:
        array = array.cast(pa.timestamp(array.type.unit, "UTC"))
    text = array.cast(pa.string())
    return pc.replace_substring(text, " ", "T", max_replacements=1) if pa.types.is_timestamp(array.type) else text


def _numbers(spec: TensorSpec, array: pa.Array, name: str, failures: Failures) -> Array:
    dtype = np.dtype("<f4") if spec.datatype == "BF16" else DTYPES[spec.datatype]
    n_rows = len(array)
    if pa.types.is_null(array.type):
        array = pa.array([None] * n_rows, pa.float64())
    if pa.types.is_decimal(array.type):  # by text, whose conversion rounds correctly
        array = array.cast(pa.string()).cast(pa.float64())
    if array.null_count:
        if dtype.kind != "f":
            for row in np.flatnonzero(array.is_null().to_numpy(zero_copy_only=False)).tolist():
                failures.setdefault(
                    row, f'input "{spec.name}": the value is missing, expected {spec.datatype}{_said(spec, name)}'
                )
        elif not pa.types.is_floating(array.type):
            array = array.cast(pa.float64(), safe=False)
        array = array.fill_null(float("nan") if dtype.kind == "f" else False if pa.types.is_boolean(array.type) else 0)
    numbers = _as_view(array)
    if numbers.dtype == dtype:
        return numbers
    with np.errstate(all="ignore"):
        converted = numbers.astype(dtype)
    is_kept = ~np.isinf(converted) | ~np.isfinite(numbers) if dtype.kind == "f" else converted == numbers
    if not is_kept.all():
        for row in np.flatnonzero(~is_kept).tolist():
            failures.setdefault(
                row,
                f'input "{spec.name}": the value is {numbers[row]}, which {spec.datatype} cannot represent{_said(spec, name)}',
            )
    return converted


_DTYPES = {
    pa.from_numpy_dtype(dtype): dtype for dtype in map(np.dtype, ("f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8"))
}


def _as_view(array: pa.Array) -> Array:
    """Numbers of which none is missing. pyarrow's own conversion imports pandas first, which takes longer than a shard."""
    dtype = _DTYPES.get(array.type)
    if dtype is None or not len(array):
        return array.to_numpy(zero_copy_only=False)  # type: ignore[no-any-return]
    return np.frombuffer(array.buffers()[1], dtype, len(array), array.offset * dtype.itemsize)


def _said(spec: TensorSpec, name: str) -> str:
    return "" if name == spec.name else f' (column "{name}")'


def _from_lists(spec: TensorSpec, array: pa.Array, name: str, n_rows: int, failures: Failures) -> Array:
    """Rows of several elements, from lists at any depth."""
    width = _width(spec, "")
    lists, counts = plain(array), np.ones(n_rows, np.int64)
    starts = np.arange(n_rows + 1)
    while pa.types.is_nested(lists.type):
        inner = pc.list_value_length(lists).fill_null(0).to_numpy(zero_copy_only=False).astype(np.int64)
        ends = np.concatenate([[0], np.cumsum(inner)])
        starts = ends[starts]
        lists = plain(lists.flatten())
    counts = np.diff(starts)
    if (counts != width).any():
        for row in np.flatnonzero(counts != width).tolist():
            failures.setdefault(row, f'input "{spec.name}": expected {width} values, got {counts[row]}{_said(spec, name)}')
    inner_failures: Failures = {}
    flat = _as_numpy(_converted(spec, lists, name, inner_failures))
    row_of = np.repeat(np.arange(n_rows), counts)
    for place, message in inner_failures.items():
        failures.setdefault(int(row_of[place]), message)
    if (counts == width).all():
        return flat.reshape(n_rows, width)
    made = np.zeros((n_rows, width), flat.dtype) if flat.dtype.kind != "O" else np.full((n_rows, width), b"", np.object_)
    for row in np.flatnonzero(counts == width).tolist():
        made[row] = flat[starts[row] : starts[row] + width]
    return made
