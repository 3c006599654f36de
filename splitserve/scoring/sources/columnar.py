"""Parquet and Arrow IPC: files with types, read in record batches. Such files are untrusted: what is read is validated."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from splitserve.scoring.errors import ScoringError
from splitserve.scoring.inputs import plain
from splitserve.scoring.rows import CHUNK_ROWS
from splitserve.scoring.sources.block import SHARD_ROWS, Block, Part, Reading
from splitserve.scoring.storage import storage_of

MAX_COLUMNS = 10_000
MAX_BATCH_BYTES = 2 * 1024**3
"""Largest record batch of an Arrow file, unpacked."""

_BUFFER_BYTES = 1024**2


def _parquet(file: Any) -> pq.ParquetFile:
    """Column chunks are read in pieces, so that a large row group is never whole in memory."""
    return pq.ParquetFile(file, page_checksum_verification=True, buffer_size=_BUFFER_BYTES, pre_buffer=False)


def parquet_schema(path: str) -> pa.Schema:
    """Raises:
    ScoringError: it is no Parquet file.
    OSError: it cannot be read.
    """
    with storage_of(path).open(path) as file, _naming(path):
        return _limited(path, _parquet(file).schema_arrow)


def plan_parquet(file: int, path: str, shard_rows: int) -> list[Part]:
    """Row groups, small ones together, large ones in pieces."""
    with storage_of(path).open(path) as opened, _naming(path):
        metadata = _parquet(opened).metadata
        sizes = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
    step = max(shard_rows // CHUNK_ROWS, 1) * CHUNK_ROWS
    return [
        Part(file, run.start, run.end, run.first_row + skip, min(step, run.n_rows - skip), skip)
        for run in _together(sizes, step)
        for skip in range(0, run.n_rows, step)
    ]


class _Run(NamedTuple):
    """Neighbours, from ``start`` up to ``end``, and their rows."""

    start: int
    end: int
    first_row: int
    n_rows: int


def _together(sizes: Sequence[int], most_rows: int) -> Iterator[_Run]:
    """Neighbours that have at most so many rows together; a larger one is alone."""
    first, start = 1, 0
    while start < len(sizes):
        end, n_rows = start + 1, sizes[start]
        while end < len(sizes) and n_rows + sizes[end] <= most_rows:
            n_rows += sizes[end]
            end += 1
        yield _Run(start, end, first, n_rows)
        first += n_rows
        start = end


class ParquetReader:
    """Reads parts of Parquet files. A part that follows the last one in its row groups goes on where that one ended."""

    def __init__(self) -> None:
        self._key: tuple[Any, ...] = ()
        self._position = 0
        self._batches: Iterator[pa.RecordBatch] = iter(())
        self._file: Any = None

    def __call__(self, path: str, part: Part, reading: Reading) -> Iterator[Block]:
        """The rows of a part.

        Raises:
            ScoringError: a page is damaged, or cannot be decoded here.
            OSError: it cannot be read.
        """
        key = (path, part.start, part.end, tuple(reading.columns))
        with self._closing_on_error(), _naming(path, f"row groups {part.start} to {part.end - 1}"):
            if key != self._key or self._position > part.skip:
                self.close()
                self._file = storage_of(path).open(path)
                self._batches = _parquet(self._file).iter_batches(
                    CHUNK_ROWS, row_groups=range(part.start, part.end), columns=reading.columns, use_threads=False
                )
                self._key, self._position = key, 0
            end = part.skip + part.n_rows
            while self._position < end:
                batch = next(self._batches, None)
                if batch is None:
                    raise ScoringError(f"{path}: expected {part.n_rows} rows from row {part.first_row}, got fewer")
                start, self._position = self._position, self._position + len(batch)
                if self._position <= part.skip:
                    continue
                low, high = max(part.skip - start, 0), min(end - start, len(batch))
                yield block(batch.slice(low, high - low), part.first_row + start + low - part.skip, reading)

    @contextmanager
    def _closing_on_error(self) -> Iterator[None]:
        try:
            yield
        except Exception:
            self.close()
            raise

    def close(self) -> None:
        """Close the file that is open."""
        self._key = ()
        self._batches = iter(())
        if self._file is not None:
            self._file.close()
            self._file = None


def block(batch: pa.RecordBatch, first_row: int, reading: Reading) -> Block:
    """A record batch as rows."""
    arrays = {name: plain(batch.column(name)) for name in reading.columns}

    def original(place: int) -> dict[str, Any]:
        return {name: array[place].as_py() for name, array in arrays.items()}

    kept = {name: arrays[name] for name in reading.kept if name in arrays}
    return Block(np.arange(first_row, first_row + len(batch)), arrays, kept, original, {})


def arrow_schema(path: str) -> pa.Schema:
    """Raises:
    ScoringError: it is no Arrow file.
    OSError: it cannot be read.
    """
    with storage_of(path).open(path) as file, _naming(path):
        return _limited(path, _arrow(file).schema)


def _arrow(file: Any) -> Any:
    try:
        return pa.ipc.open_file(file)
    except pa.ArrowInvalid:
        file.seek(0)
        return pa.ipc.open_stream(file)


def plan_arrow(file: int, path: str, shard_rows: int) -> list[Part]:
    """Record batches of a file together up to the size of a shard; a stream is one part."""
    with storage_of(path).open(path) as opened, _naming(path):
        source = _arrow(opened)
        if not isinstance(source, pa.RecordBatchFileReader):
            return [Part(file, 0, -1)]
        sizes = [source.get_batch(number).num_rows for number in range(source.num_record_batches)]
    return [Part(file, *run) for run in _together(sizes, shard_rows) if run.n_rows]


def read_arrow(path: str, part: Part, reading: Reading) -> Iterator[Block]:
    """The rows of a part, each record batch validated.

    Raises:
        ScoringError: a record batch is invalid or too large.
        OSError: it cannot be read.
    """
    first_row = part.first_row
    with storage_of(path).open(path) as file, _naming(path, f"from row {first_row}"):
        source = _arrow(file)
        batches = iter(source) if part.end < 0 else map(source.get_batch, range(part.start, part.end))
        for batch in batches:
            if batch.nbytes > MAX_BATCH_BYTES:
                raise ScoringError(f"{path}: a record batch has {batch.nbytes} bytes, the limit is {MAX_BATCH_BYTES}")
            batch.validate(full=True)
            for start in range(0, len(batch), SHARD_ROWS):
                piece = batch.slice(start, SHARD_ROWS)
                yield block(piece, first_row, reading)
                first_row += len(piece)


def _limited(path: str, schema: pa.Schema) -> pa.Schema:
    if len(schema) > MAX_COLUMNS:
        raise ScoringError(f"{path}: {len(schema)} columns, the limit is {MAX_COLUMNS}")
    if twice := [name for name in dict.fromkeys(schema.names) if schema.names.count(name) > 1]:
        raise ScoringError(f'{path}: column "{twice[0]}" occurs more than once; rename one')
    return schema


class _naming:  # noqa: N801 - a prefix of errors
    """Names the file in errors of Arrow."""

    def __init__(self, path: str, place: str = "") -> None:
        self._where = f"{path}: {place}" if place else path

    def __enter__(self) -> None:
        pass

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        is_io = isinstance(error, OSError) and error.errno is None  # Arrow's own, e.g. of a checksum
        if isinstance(error, pa.ArrowException) or is_io:
            raise ScoringError(f"{self._where}: {str(error).partition(chr(10))[0]}") from error
