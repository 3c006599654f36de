"""Formats of answers: written batch by batch, and files of shards joined into one. The same rows are always the same bytes."""

from __future__ import annotations

import base64
import csv
import datetime
import io
import math
import shutil
from collections.abc import Iterable, Mapping, Sequence
from typing import IO, Any, Protocol

import msgspec
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pyarrow import csv as pacsv

from splitserve.scoring.errors import WrongUsage
from splitserve.scoring.storage import Storage

FORMATS: Mapping[str, tuple[str, ...]] = {
    "parquet": (".parquet", ".pq"),
    "csv": (".csv",),
    "jsonl": (".jsonl", ".ndjson"),
    "arrow": (".arrow", ".feather", ".ipc"),
}
"""Suffixes by format, the first for the files of shards."""

ROW_GROUP_ROWS = 65_536
JSON_FIELD = b"splitserve.json"
"""Metadata of a field whose text is JSON."""

_FORMULA = r"^[=+\-@\t\r]"


def format_of(path: str) -> str:
    """The format that a file's suffix names; "" if none."""
    return next((name for name, suffixes in FORMATS.items() if path.lower().endswith(suffixes)), "")


class Sink(Protocol):
    """Writes record batches of one schema."""

    def write(self, batch: pa.RecordBatch) -> None: ...

    def close(self) -> None: ...

    def discard(self) -> None:
        """Write nothing more: the file is of no use."""
        ...


def sink_of(file: IO[bytes], schema: pa.Schema, format: str, *, has_header: bool = True, escapes_formulas: bool = False) -> Sink:
    """A sink that writes to an open file."""
    if format == "parquet":
        return _ParquetSink(file, schema)
    if format == "csv":
        return _CsvSink(file, schema, has_header, escapes_formulas)
    return _JsonSink(file) if format == "jsonl" else _ArrowSink(file, schema)


def check_types(schema: pa.Schema, format: str) -> None:
    """Raises:
    WrongUsage: a column has no form in the format.
    """
    if format not in ("csv", "jsonl"):
        return
    for field in schema:
        kind = field.type
        if pa.types.is_binary(kind) or pa.types.is_fixed_size_binary(kind):
            raise WrongUsage(
                f'column "{field.name}": {kind} has no form in {format}; leave it out of --keep, or use --to parquet'
            )
        if format == "csv" and pa.types.is_nested(kind):
            raise WrongUsage(f'column "{field.name}": {kind} has no form in csv; leave it out of --keep, or use --to jsonl')


class _ParquetSink:
    def __init__(self, file: IO[bytes], schema: pa.Schema) -> None:
        self._writer = pq.ParquetWriter(file, schema, compression="zstd", compression_level=1, write_page_checksum=True)
        self._schema = schema
        self._waiting: list[pa.RecordBatch] = []
        self._n_waiting = 0

    def write(self, batch: pa.RecordBatch) -> None:
        self._waiting.append(batch)
        self._n_waiting += len(batch)
        if self._n_waiting >= ROW_GROUP_ROWS:
            self._flush()

    def _flush(self) -> None:
        if self._n_waiting:
            table = pa.Table.from_batches(self._waiting, self._schema)
            self._writer.write_table(table, row_group_size=max(self._n_waiting, 1))
        self._waiting, self._n_waiting = [], 0

    def close(self) -> None:
        self._flush()
        self._writer.close()

    def discard(self) -> None:
        self._writer.is_open = False  # else it writes a footer when it is collected


class _ArrowSink:
    def __init__(self, file: IO[bytes], schema: pa.Schema) -> None:
        self._writer = pa.ipc.new_file(file, schema)

    def write(self, batch: pa.RecordBatch) -> None:
        self._writer.write_batch(batch)

    def close(self) -> None:
        self._writer.close()

    def discard(self) -> None:
        """Nothing is written without `close`."""


class _CsvSink:
    """Numbers in the shortest form that reads back equal; text in quotes only where it needs them."""

    def __init__(self, file: IO[bytes], schema: pa.Schema, has_header: bool, escapes_formulas: bool) -> None:
        self._file = file
        self._escapes_formulas = escapes_formulas
        self._options = pacsv.WriteOptions(include_header=False, quoting_style="needed")
        if has_header:
            file.write(csv_header(schema))

    def write(self, batch: pa.RecordBatch) -> None:
        columns = [self._written(column) for column in batch.columns]
        buffer = pa.BufferOutputStream()
        pacsv.write_csv(pa.RecordBatch.from_arrays(columns, names=batch.schema.names), buffer, self._options)
        self._file.write(buffer.getvalue())

    def _written(self, column: pa.Array) -> pa.Array:
        if pa.types.is_float16(column.type):
            return column.cast(pa.float32())
        if self._escapes_formulas and pa.types.is_string(column.type):
            is_formula = pc.match_substring_regex(column, _FORMULA)
            return pc.if_else(is_formula, pc.binary_join_element_wise("'", column, ""), column)
        return column

    def close(self) -> None:
        """The file is closed by who opened it."""

    discard = close


def csv_header(schema: pa.Schema) -> bytes:
    """The first record of a CSV file."""
    line = io.StringIO(newline="")
    csv.writer(line, lineterminator="\n").writerow(schema.names)
    return line.getvalue().encode()


class _JsonSink:
    """An object a row. NaN and infinities, which JSON does not have, are the texts that the REST API takes for them."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._encoder = msgspec.json.Encoder()

    def write(self, batch: pa.RecordBatch) -> None:
        names = batch.schema.names
        columns = [_json_values(column, field) for column, field in zip(batch.columns, batch.schema, strict=True)]
        records = [dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True)]
        self._file.write(self._encoder.encode_lines(records))

    def close(self) -> None:
        """The file is closed by who opened it."""

    discard = close


def _json_values(column: pa.Array, field: pa.Field) -> list[Any]:
    if field.metadata and JSON_FIELD in field.metadata:
        return [msgspec.Raw(text.encode()) if text is not None else None for text in column.to_pylist()]
    if pa.types.is_float32(column.type) or pa.types.is_float16(column.type):
        # The shortest text that reads back as the same number of 32 bits.
        texts = column.cast(pa.float32()).cast(pa.string()).to_pylist()
        return [None if text is None else json_value(float(text)) for text in texts]
    return [json_value(value) for value in column.to_pylist()]


def json_value(value: Any) -> Any:
    """A value as JSON has it."""
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if value != value else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, datetime.datetime | datetime.timedelta) and type(value).__module__ != "datetime":
        return value.isoformat().replace("+00:00", "Z")  # type: ignore[union-attr] # pandas' own, of nanoseconds
    if isinstance(value, list | tuple):
        return [json_value(each) for each in value]
    if isinstance(value, dict):
        return {key: json_value(each) for key, each in value.items()}
    if isinstance(value, bytes):
        return {"b64": base64.b64encode(value).decode()}
    return value


def join(storage: Storage, paths: Sequence[str], file: IO[bytes], schema: pa.Schema, format: str) -> None:
    """Write the rows of several files, in order, as one file."""
    if format in ("csv", "jsonl"):
        if format == "csv":
            file.write(csv_header(schema))
        _concatenate(storage, paths, file)
        return
    sink = sink_of(file, schema, format)
    for path in paths:
        with storage.open(path) as part:
            for batch in _batches(part, format):
                sink.write(batch if batch.schema.equals(schema) else _as(schema, batch))
    sink.close()


def _as(schema: pa.Schema, batch: pa.RecordBatch) -> pa.RecordBatch:
    """Parquet has no whole seconds: it gives milliseconds back."""
    columns = [column.cast(field.type) for column, field in zip(batch.columns, schema, strict=True)]
    return pa.RecordBatch.from_arrays(columns, schema=schema)


def _concatenate(storage: Storage, paths: Iterable[str], file: IO[bytes]) -> None:
    for path in paths:
        with storage.open(path) as part:
            shutil.copyfileobj(part, file, 1024**2)


def _batches(file: Any, format: str) -> Iterable[pa.RecordBatch]:
    if format == "parquet":
        yield from pq.ParquetFile(file, page_checksum_verification=True).iter_batches(ROW_GROUP_ROWS)
        return
    reader = pa.ipc.open_file(file)
    for number in range(reader.num_record_batches):
        yield reader.get_batch(number)
