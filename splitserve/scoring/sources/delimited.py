"""CSV: every cell is read as text, and the signature says what it is; nothing is guessed from the values.

A number's cell that is empty, NA or NaN is a missing value, as for ``splitserve infer``; in a column of text it is text.
"""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import csv as pacsv

from splitserve.scoring.errors import ScoringError
from splitserve.scoring.inputs import Failures
from splitserve.scoring.sources.block import Block, Part, Reading, Unreadable
from splitserve.scoring.sources.text import is_gzip, is_utf8, naming_damage, opened, parts_of, read_range, scan, start_of_text
from splitserve.scoring.storage import storage_of
from splitserve.signature import TensorSpec
from splitserve.tensors import DATATYPES

MAX_ROW_BYTES = 16 * 1024**2
"""Longest row, where the file cannot be split beforehand."""

_HEAD_BYTES = 1024**2
_LINE = re.compile(rb"[^\r\n]*(?:\r\n|\r|\n)|[^\r\n]+")  # Arrow ends a row at each of these, too
_MISSING = ("", "NA", "NaN", "nan")
_NUMBER = r"^\s*[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?\s*$"


DELIMITERS = (",", ";", "\t", "|")


def delimiter_of(path: str, chosen: str = "") -> str:
    """What separates cells: what was chosen, else a tab in ``.tsv`` and a comma elsewhere."""
    name = path.lower().removesuffix(".gz")
    return chosen or ("\t" if name.endswith(".tsv") else ",")


def other_delimiter(names: Sequence[str]) -> str:
    """What seems to separate the cells of a header that was read as one name; "" if nothing does."""
    found = [each for each in DELIMITERS if len(names) == 1 and each in names[0]]
    return max(found, key=names[0].count) if found else ""


def header_of(path: str, encoding: str, delimiter: str = "") -> tuple[list[str], int]:
    """Names of the columns, and the byte after the header, which is the first line that is not empty; no names if there is none.

    Raises:
        ScoringError: it is not text of this encoding, its quotes do not match, or two columns have one name.
        OSError: it cannot be read.
    """
    with naming_damage(path, encoding), opened(path, encoding) as file:
        head = b""
        while len(head) < _HEAD_BYTES and (data := file.read(_HEAD_BYTES)):
            head += data
    start = end = start_of_text(path, head)
    if not head[start:].strip():
        return [], len(head)

    def lines() -> Iterator[str]:
        nonlocal end
        for line in _LINE.finditer(head, start):
            end = line.end()
            yield line[0].decode()

    try:  # one parser says what the names are and where they end
        names = next(
            (record for record in csv.reader(lines(), delimiter=delimiter_of(path, delimiter), strict=True) if record), []
        )
    except UnicodeDecodeError as error:
        raise ScoringError(f"{path}: the header is not UTF-8 ({error.reason}); name its --encoding") from None
    except csv.Error as error:
        raise ScoringError(f"{path}: the header cannot be read as CSV: {error}; is a quote not closed?") from None
    if end >= _HEAD_BYTES:
        raise ScoringError(f"{path}: the header is longer than {_HEAD_BYTES >> 20} MiB")
    if twice := [name for name in dict.fromkeys(names) if names.count(name) > 1]:
        raise ScoringError(f'{path}: column "{twice[0]}" occurs more than once in the header; rename one')
    return names, end


def plan(file: int, path: str, encoding: str, shard_bytes: int, delimiter: str = "") -> list[Part]:
    """The parts of a file. One that is packed, of another encoding, or whose quotes do not tell where rows end, is one part."""
    names, start = header_of(path, encoding, delimiter)
    if not names:
        return []
    if is_gzip(path) or not is_utf8(encoding):
        return [Part(file, 0, -1)]
    with storage_of(path).open(path) as opened_file:
        lines = scan(opened_file, start, shard_bytes, delimiter=delimiter_of(path, delimiter).encode())
    return parts_of(file, lines) if lines.is_regular else [Part(file, 0, -1)]


def read(path: str, part: Part, reading: Reading) -> Iterator[Block]:
    """The rows of a part.

    Raises:
        ScoringError: the text is not UTF-8, or a row is too long.
        OSError: it cannot be read.
    """
    names, header_end = header_of(path, reading.encoding, reading.delimiter)
    broken: list[pacsv.InvalidRow] = []

    def note(row: Any) -> str:
        broken.append(row._replace(number=part.first_row + row.number - 1))  # Arrow counts from where it began to read
        return "skip"

    delimiter = delimiter_of(path, reading.delimiter)
    parsing = pacsv.ParseOptions(delimiter=delimiter, newlines_in_values=True, invalid_row_handler=note)
    converting = pacsv.ConvertOptions(
        include_columns=reading.columns,
        column_types=dict.fromkeys(reading.columns, pa.binary()),
        strings_can_be_null=False,
        null_values=[],
    )
    try:
        if part.end >= 0:
            data = read_range(path, part)
            options = pacsv.ReadOptions(column_names=names, use_threads=False, block_size=len(data) + 1)
            table = pacsv.read_csv(pa.BufferReader(data), options, parsing, converting)
            yield _block(path, table, broken, part.first_row, reading, is_last=True)
            return
        options = pacsv.ReadOptions(column_names=names, use_threads=False, block_size=MAX_ROW_BYTES)
        with naming_damage(path, reading.encoding), opened(path, reading.encoding) as file:
            first_row = part.first_row
            stream = _after_header(file, skip=header_end)
            with pacsv.open_csv(pa.PythonFile(stream, "r"), options, parsing, converting) as batches:
                for batch in batches:
                    block = _block(path, pa.Table.from_batches([batch]), broken, first_row, reading)
                    first_row += len(block.rows) + len(block.unreadable)
                    yield block
            if broken:
                yield _block(path, batches.schema.empty_table(), broken, first_row, reading, is_last=True)
    except pa.ArrowInvalid as error:
        raise ScoringError(f"{path}: {_place(part)}: {error}") from error


def _place(part: Part) -> str:
    return f"from row {part.first_row}"


class _after_header(io.RawIOBase):  # noqa: N801 - a view of a file
    """The text after the first record."""

    def __init__(self, file: Any, *, skip: int) -> None:
        super().__init__()
        self._file = file
        self._rest = b""
        while skip > 0 and (data := file.read(min(skip, _HEAD_BYTES))):
            self._rest = data[skip:]
            skip -= len(data)

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        if self._rest:
            data, self._rest = (self._rest, b"") if size < 0 else (self._rest[:size], self._rest[size:])
            return data
        found: bytes = self._file.read(size)
        return found


def _block(
    path: str, table: pa.Table, broken: list[pacsv.InvalidRow], first_row: int, reading: Reading, *, is_last: bool = False
) -> Block:
    """The rows of a table. Takes what is broken among them out of ``broken``, which the parser fills ahead of the table."""
    n_rows = len(table)
    numbers = [row.number for row in broken]
    rows = np.setdiff1d(np.arange(first_row, first_row + n_rows + len(broken)), numbers)[:n_rows]
    n_passed = len(broken) if is_last else sum(number < rows[-1] for number in numbers) if n_rows else 0
    passed, broken[:] = broken[:n_passed], broken[n_passed:]
    unreadable = tuple(
        Unreadable(row.number, row.text, f"expected {row.expected_columns} cells as in the header, got {row.actual_columns}")
        for row in passed
    )
    texts = {name: _utf8(path, name, table[name], rows) for name in table.column_names}
    failures: Failures = {}
    columns = {name: cells(spec, texts[name], name, failures) for name, spec in reading.spec_by_column.items() if name in texts}
    kept = {name: texts[name] for name in reading.kept if name in texts}

    def original(place: int) -> dict[str, Any]:
        return {name: text[place].as_py() for name, text in texts.items()}

    return Block(rows, columns, kept, original, failures, unreadable)


def _utf8(path: str, name: str, column: pa.ChunkedArray, rows: Any) -> pa.Array:
    array = column.combine_chunks() if column.num_chunks != 1 else column.chunk(0)
    try:
        return array.cast(pa.string())
    except pa.ArrowInvalid:
        for place, cell in enumerate(array):
            try:
                cell.as_py().decode()
            except UnicodeDecodeError:
                raise ScoringError(f'{path}: row {rows[place]}, column "{name}": not UTF-8; name its --encoding') from None
        raise


def cells(spec: TensorSpec, text: pa.Array, name: str, failures: Failures) -> pa.Array:
    """The values of text cells of an input."""
    datatype = DATATYPES[spec.datatype]
    if datatype.name == "BYTES":
        return text
    wanted = pa.bool_() if datatype.name == "BOOL" else pa.float64() if datatype.is_float else _INTEGERS[datatype.name]
    missing = pc.is_in(text, pa.array(_MISSING))
    if pc.any(missing).as_py():
        text = pc.if_else(missing, pa.scalar(None, pa.string()), text)
    try:
        return text.cast(wanted)
    except pa.ArrowInvalid:
        return _one_by_one(spec, text, name, wanted, failures)


_INTEGERS = {name: getattr(pa, name.lower())() for name, datatype in DATATYPES.items() if datatype.is_integer}


def _one_by_one(spec: TensorSpec, text: pa.Array, name: str, wanted: pa.DataType, failures: Failures) -> pa.Array:
    """Cells of which one at least is not written as Arrow expects it: those that are, at once; the others by Python."""
    if pa.types.is_floating(wanted):
        is_plain = pc.match_substring_regex(text, _NUMBER).fill_null(True)
        plain = pc.if_else(is_plain, pc.replace_substring_regex(text, r"^\s*\+?|\s+$", ""), pa.scalar(None, pa.string()))
        values = plain.cast(pa.float64()).to_numpy(zero_copy_only=False).copy()
        places = np.flatnonzero(~is_plain.to_numpy(zero_copy_only=False)).tolist()
    else:
        values, places = np.full(len(text), None, np.object_), list(range(len(text)))
    column = "" if name == spec.name else f' (column "{name}")'
    for place in places:
        cell = text[place].as_py()
        try:
            values[place] = None if cell is None else _number(cell, wanted)
        except (ValueError, OverflowError):
            failures.setdefault(place, f'input "{spec.name}": "{cell[:32]}" is not a {spec.datatype}{column}')
            values[place] = math.nan if pa.types.is_floating(wanted) else 0
    if pa.types.is_floating(wanted):
        return pa.array(values)
    return pa.array(values.tolist(), wanted)


def _number(cell: str, wanted: pa.DataType) -> Any:
    cell = cell.strip()
    if cell in _MISSING:
        return math.nan if pa.types.is_floating(wanted) else None
    if pa.types.is_boolean(wanted):
        if cell.lower() not in _BOOLEANS:
            raise ValueError(cell)
        return _BOOLEANS[cell.lower()]
    number = float(cell) if pa.types.is_floating(wanted) or not cell.lstrip("+-").isdecimal() else int(cell)
    if pa.types.is_floating(wanted):
        return number
    if not float(number).is_integer() or (isinstance(number, float) and abs(number) >= 2**53):
        raise ValueError(cell)
    return pa.scalar(int(number), wanted).as_py()  # raises where it does not fit


_BOOLEANS = {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}
