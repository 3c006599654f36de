"""JSON lines: an object a line. Values are read as the REST API reads them: null is a missing value, an absent key an error."""

from __future__ import annotations

import base64
import binascii
import math
from collections.abc import Iterator, Sequence
from typing import Any

import msgspec
import numpy as np
import pyarrow as pa

from splitserve.arrays import DTYPES
from splitserve.errors import InvalidInput
from splitserve.oip.rest import decode_json, pack_values
from splitserve.scoring.errors import ScoringError
from splitserve.scoring.inputs import Failures
from splitserve.scoring.sources.block import Block, Part, Reading, Unreadable
from splitserve.scoring.sources.text import (
    is_gzip,
    is_utf8,
    lines_of,
    naming_damage,
    opened,
    parts_of,
    read_range,
    scan,
    start_of_text,
)
from splitserve.scoring.storage import storage_of
from splitserve.signature import TensorSpec
from splitserve.tensors import DATATYPES

MAX_LINE_BYTES = 64 * 1024**2
"""A longer line is an error of its row."""

_N_SAMPLED = 100
_HEAD_BYTES = 1024**2
_EMPTY = (b"", b"\r")
"""Lines that are no rows, as `scan` counts them."""

_ABSENT: Any = object()

_decoder = msgspec.json.Decoder(dict[str, Any])
_KeyDecoder = msgspec.json.Decoder(dict[str, msgspec.Raw])


def keys_of(path: str, encoding: str, *, every: bool = False) -> list[str]:
    """Keys in the order in which they appear, of the first lines or of every line.

    Raises:
        ScoringError: the first line is no JSON object.
        OSError: it cannot be read.
    """
    found: dict[str, None] = {}
    n_seen = 0
    with naming_damage(path, encoding), opened(path, encoding) as file:
        for lines, _ in lines_of(file, MAX_LINE_BYTES):
            for line in lines:
                if n_seen == 0:
                    line = line[start_of_text(path, line) :]
                if not line.strip():
                    continue
                try:
                    found.update(dict.fromkeys(_KeyDecoder.decode(line)))
                except msgspec.DecodeError:
                    if not found and n_seen == 0 and b"NaN" not in line and b"Infinity" not in line:
                        raise ScoringError(f"{path}: row 1: expected a JSON object in each line, got {_shown(line)}") from None
                n_seen += 1
                if n_seen >= _N_SAMPLED and not every:
                    return list(found)
    return list(found)


def _shown(line: bytes) -> str:
    return line[:64].decode("utf-8", "replace")


def plan(file: int, path: str, encoding: str, shard_bytes: int) -> list[Part]:
    """The parts of a file. One that is packed or of another encoding is one part."""
    if is_gzip(path) or not is_utf8(encoding):
        return [Part(file, 0, -1)]
    with storage_of(path).open(path) as opened_file:
        start = start_of_text(path, opened_file.read(4))
        return parts_of(file, scan(opened_file, start, shard_bytes))


def read(path: str, part: Part, reading: Reading) -> Iterator[Block]:
    """The rows of a part.

    Raises:
        OSError: it cannot be read.
    """
    if part.end >= 0:
        yield _block(read_range(path, part).split(b"\n"), 0, part.first_row, reading)
        return
    first_row = part.first_row
    with naming_damage(path, reading.encoding), opened(path, reading.encoding) as file:
        for lines, too_long in lines_of(file, MAX_LINE_BYTES):
            if first_row == part.first_row and lines:
                lines[0] = lines[0][start_of_text(path, lines[0]) :]
            block = _block(lines, too_long, first_row, reading)
            first_row += len(block.rows) + len(block.unreadable)
            yield block


def _block(lines: Sequence[bytes], too_long: int, first_row: int, reading: Reading) -> Block:
    records: list[dict[str, Any]] = []
    numbers: list[int] = []
    unreadable: list[Unreadable] = []
    row = first_row
    for line in lines:
        if line in _EMPTY:
            continue
        if len(line) > MAX_LINE_BYTES:
            unreadable.append(_too_long(row, len(line)))
        else:
            try:
                records.append(_decoder.decode(line))
                numbers.append(row)
            except (msgspec.DecodeError, UnicodeDecodeError):
                try:
                    records.append(_tolerantly(line))
                    numbers.append(row)
                except InvalidInput as error:
                    unreadable.append(Unreadable(row, line.decode("utf-8", "replace"), error.message))
        row += 1
    if too_long:
        unreadable.append(_too_long(row, too_long))
    failures: Failures = {}
    columns = {
        name: _values(spec, [record.get(name, _ABSENT) for record in records], name, failures)
        for name, spec in reading.spec_by_column.items()
        if name not in reading.partitions
    }
    kept = {
        name: _kept([record.get(name) for record in records], reading.keeps_json)
        for name in reading.kept
        if name not in reading.partitions
    }
    known = {*columns, *kept}
    unknown = frozenset(set().union(*records) - known)
    return Block(np.array(numbers, np.int64), columns, kept, records.__getitem__, failures, tuple(unreadable), unknown)


def _too_long(row: int, length: int) -> Unreadable:
    return Unreadable(row, "", f"the line has {length} bytes, the limit is {MAX_LINE_BYTES}")


def _tolerantly(line: bytes) -> dict[str, Any]:
    """A line with the tokens NaN and Infinity, which Python and other programs write."""
    record = decode_json(line, what="the line")
    if not isinstance(record, dict):
        raise InvalidInput(f"expected a JSON object, got {_shown(line)}")
    return record


def _kept(values: Sequence[Any], keeps_json: bool) -> pa.Array:
    """Text; with ``keeps_json`` the JSON of each value."""
    if keeps_json:
        return pa.array([msgspec.json.encode(value).decode() for value in values], pa.string())
    return pa.array(
        [value if isinstance(value, str) or value is None else msgspec.json.encode(value).decode() for value in values],
        pa.string(),
    )


def _values(spec: TensorSpec, values: list[Any], name: str, failures: Failures) -> pa.Array:
    """The values of a key, one a row; of lists, lists."""
    column = "" if name == spec.name else f' (key "{name}")'
    if _ABSENT in values:
        for place, value in enumerate(values):
            if value is _ABSENT:
                failures.setdefault(place, f'input "{spec.name}": missing{column}')
        values = [None if value is _ABSENT else value for value in values]
    width = math.prod(spec.wire_shape[1:])
    if width > 1 and any(isinstance(value, list) for value in values):
        return _lists(spec, values, column, failures)
    return _scalars(spec, values, range(len(values)), column, failures)


def _lists(spec: TensorSpec, values: Sequence[Any], column: str, failures: Failures) -> pa.Array:
    flat: list[Any] = []
    ends, row_of = [0], []
    for place, value in enumerate(values):
        elements = _flattened(value) if isinstance(value, list) else []
        flat += elements
        row_of += [place] * len(elements)
        ends.append(len(flat))
    return pa.ListArray.from_arrays(pa.array(ends, pa.int32()), _scalars(spec, flat, row_of, column, failures))


def _flattened(value: Any) -> list[Any]:
    return [element for each in value for element in _flattened(each)] if isinstance(value, list) else [value]


def _scalars(spec: TensorSpec, values: list[Any], row_of: Sequence[int], column: str, failures: Failures) -> pa.Array:
    datatype = DATATYPES[spec.datatype]
    kinds = set(map(type, values))
    if datatype.name == "BYTES":
        return _texts(spec, values, kinds, row_of, column, failures)
    if datatype.is_float:
        if kinds <= {float, int, type(None)}:
            try:
                return pa.array(np.array(values, np.float64))  # None becomes NaN
            except (OverflowError, TypeError):
                pass
    elif kinds <= ({bool} if datatype.name == "BOOL" else {int}):
        try:
            return pa.array(values, _type(spec))
        except (pa.ArrowInvalid, OverflowError):
            pass
    dtype = np.dtype("<f8") if datatype.is_float else DTYPES[datatype.name]
    wide = DATATYPES["FP64"] if datatype.is_float else datatype
    made = np.zeros(len(values), dtype)
    for place, value in enumerate(values):
        try:
            made[place] = np.frombuffer(pack_values("", wide, [value]), dtype)[0]
        except InvalidInput:
            said = msgspec.json.encode(value).decode()[:32]
            failures.setdefault(row_of[place], f'input "{spec.name}": {said} is not a {spec.datatype}{column}')
    return pa.array(made)


def _type(spec: TensorSpec) -> pa.DataType:
    return pa.from_numpy_dtype(DTYPES[spec.datatype])


def _texts(
    spec: TensorSpec, values: Sequence[Any], kinds: set[type], row_of: Sequence[int], column: str, failures: Failures
) -> pa.Array:
    if kinds <= {str, type(None)}:
        return pa.array(values, pa.string())
    made = []
    for place, value in enumerate(values):
        try:
            made.append(_text(value))
        except ValueError:
            said = msgspec.json.encode(value).decode()[:32]
            failures.setdefault(
                row_of[place], f'input "{spec.name}": expected text or {{"b64": "base64 text"}}, got {said}{column}'
            )
            made.append(b"")
    return pa.array(made, pa.binary())


def _text(value: Any) -> bytes | None:
    if value is None:
        return None
    if isinstance(value, str):
        return value.encode()
    try:
        return base64.b64decode(value["b64"], validate=True)
    except (KeyError, TypeError, binascii.Error) as error:
        raise ValueError from error
