"""A shard: rows that are scored in one go and written to a file of their own. `score_shard` is all that an engine schedules.

A shard's files are named by its number and its key, the digest of everything that its rows depend on. It is finished when its
record exists, which is written last: after a crash anywhere, a shard is either finished or done again, with the same bytes.
"""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from typing import IO, Any

import msgspec
import numpy as np
import pyarrow as pa

from splitserve.arrays import Array
from splitserve.scoring.answers import AnswerColumns
from splitserve.scoring.errors import ScoringError, TooManyErrors
from splitserve.scoring.inputs import Binding, values_of
from splitserve.scoring.release import LoadedRelease, Scorer, ScoringRelease
from splitserve.scoring.rows import CHUNK_ROWS, Answered, Refused, RowScorer
from splitserve.scoring.sinks import FORMATS, Sink, json_value, sink_of
from splitserve.scoring.sources.block import Block, Part, Reading
from splitserve.scoring.sources.reading import Reader
from splitserve.scoring.storage import Identity, storage_of

ERRORS_FOLDER, RECORDS_FOLDER, RUN_FILE = "_errors", "_splitserve/shards", "_splitserve/run.json"
ERRORS_SUFFIX = ".jsonl"

READ = "read"
"""The stage of a row that is refused before the model sees it."""

OnRows = Callable[[int, int], None]
"""Called with how many more rows are done, and how many of them have failed."""


class InputFile(msgspec.Struct, frozen=True):
    """A file of the input. ``below``: its folder in the input, spelt as there; ``partitions``: values that such folders name."""

    path: str
    identity: Identity
    below: str = ""
    partitions: dict[str, str | None] = {}
    bindings: tuple[Binding, ...] = ()


class Selected(msgspec.Struct, frozen=True):
    """Rows that are scored: a share of them, by their numbers; all if it is 1."""

    share: float = 1.0

    def of(self, path: str, rows: Array) -> Array | None:
        """Which of these rows of a file are selected; None for all."""
        if self.share >= 1:
            return None
        seed = np.uint64(int.from_bytes(hashlib.sha256(path.encode()).digest()[:8], "little"))
        with np.errstate(over="ignore"):  # splitmix64
            mixed = rows.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) + seed
            mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            mixed ^= mixed >> np.uint64(31)
        chosen: Array = mixed.astype(np.float64) < self.share * 2.0**64
        return chosen


class Shard(msgspec.Struct, frozen=True):
    """Parts of the input in the order of its rows. ``below`` is the folder of its files in the output."""

    number: int
    key: str
    parts: tuple[Part, ...]
    below: str = ""

    @property
    def n_rows(self) -> int:
        """-1 if only reading tells."""
        return -1 if any(part.n_rows < 0 for part in self.parts) else sum(part.n_rows for part in self.parts)

    @property
    def name(self) -> str:
        """Of its files, without their suffix."""
        return f"part-{self.number:05d}-{self.key[:12]}"


class ScoringJob(msgspec.Struct, frozen=True):
    """What all shards of a run have in common: everything that a worker on any machine needs besides the shard.

    ``root`` is the folder of the shards' files; in it ``is_joined`` files of CSV have no header. ``url`` is a running system that
    answers instead of the release in the worker.
    """

    release: ScoringRelease
    files: tuple[InputFile, ...]
    input: str
    input_format: str
    root: str
    output_format: str
    kept: tuple[str, ...] = ()
    kept_schema: bytes = b""
    selected: Selected = Selected()
    encoding: str = "utf-8"
    delimiter: str = ""
    is_joined: bool = False
    escapes_formulas: bool = False
    url: str = ""
    version: str = ""
    most_errors: int = -1
    """A shard with more ends the run; -1 for any number."""

    @property
    def schema(self) -> pa.Schema:
        """Of the output: the kept columns, then the answer."""
        kept = pa.ipc.read_schema(pa.BufferReader(self.kept_schema)) if self.kept_schema else pa.schema([])
        facts = {f"splitserve.{key}": value for key, value in self.release.facts.items()} | {"splitserve.version": self.version}
        return pa.schema([*kept, *AnswerColumns(self.release).schema], metadata=facts)

    def data_path(self, shard: Shard) -> str:
        return _joined(self.root, shard.below, shard.name + FORMATS[self.output_format][0])

    def errors_path(self, shard: Shard) -> str:
        return _joined(self.root, ERRORS_FOLDER, shard.below, shard.name + ERRORS_SUFFIX)

    def record_path(self, shard: Shard) -> str:
        return _joined(self.root, RECORDS_FOLDER, shard.name + ".json")


def _joined(*parts: str) -> str:
    return "/".join(part for part in parts if part)


class ShardResult(msgspec.Struct, frozen=True):
    """How a shard ended; its record on disk.

    ``rows`` is how many were read and selected, ``seconds`` the time of each stage; ``reasons`` counts errors.
    """

    number: int
    key: str
    rows: int
    scored: int
    errors: int
    reasons: dict[str, int] = {}
    first_error: str = ""
    seconds: dict[str, float] = {}
    unknown_columns: tuple[str, ...] = ()


class _Clock:
    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def add(self, stage: str, seconds: float) -> None:
        self.seconds[stage] = self.seconds.get(stage, 0.0) + seconds


class ShardScorer:
    """Scores shards of one run in this process: the release is loaded and proven once.

    Args:
        job: of the run.
        scorer: answers rows; by default the release, loaded here.

    Raises:
        ScoringError: the release cannot be loaded.
    """

    def __init__(self, job: ScoringJob, scorer: Scorer | None = None) -> None:
        self._job = job
        self._scorer = scorer or scorer_of(job)
        self._answers = AnswerColumns(job.release)
        self._schema = job.schema
        self._reader = Reader()
        self._storage = storage_of(job.root)

    def score(self, shard: Shard, on_rows: OnRows | None = None) -> ShardResult:
        """Read, score and write a shard.

        Raises:
            ScoringError: a file cannot be read or written, has changed, or the release cannot answer.
        """
        job = self._job
        try:
            return self._score(shard, on_rows or _ignore)
        except OSError as error:
            where = f"{error.filename}: " if error.filename else ""
            paths = ", ".join(job.files[number].path for number in _files_of(shard)[:3])
            raise ScoringError(f"{where}{error.strerror or error} (shard {shard.number}, of {paths})") from error

    def _score(self, shard: Shard, on_rows: OnRows) -> ShardResult:
        job, clock = self._job, _Clock()
        rows = RowScorer(self._scorer, clock, is_row_wise=job.release.is_row_wise)
        tally = _Tally()
        self._check_files(shard)
        with ExitStack() as files:
            data = files.enter_context(self._storage.writing(job.data_path(shard)))
            errors = _OnDemand(lambda: files.enter_context(self._storage.writing(job.errors_path(shard))))
            sink = sink_of(
                data, self._schema, job.output_format, has_header=not job.is_joined, escapes_formulas=job.escapes_formulas
            )
            files.push(_discarding(sink))
            blocks = self._blocks(shard) if job.release.is_row_wise else _whole(self._blocks(shard))
            for file, block in _timed(blocks, READ, clock):
                selected = _select(job, file, block)
                batch, refused = self._answer(selected, rows, clock, file)
                began = time.perf_counter()
                if batch is not None:
                    sink.write(batch)
                tally.add(errors, self._path_of(file), selected, refused, batch)
                if 0 <= job.most_errors < tally.errors:
                    what = f"{tally.errors} rows have failed in shard {shard.number}, more than --max-errors allows"
                    raise TooManyErrors(f"{what}. The first: {tally.first_error}")
                clock.add("write", time.perf_counter() - began)
                on_rows(len(selected.rows) + len(selected.unreadable), len(refused) + len(selected.unreadable))
            sink.close()
            self._check_files(shard)
            if 0 <= shard.n_rows != tally.rows and job.selected.share >= 1:
                raise ScoringError(
                    f"shard {shard.number}: expected {shard.n_rows} rows, got {tally.rows}: {_changed(job, shard)}"
                )
        result = tally.result(shard, clock.seconds)
        with self._storage.writing(job.record_path(shard)) as record:
            record.write(msgspec.json.encode(result))
        return result

    def close(self) -> None:
        """Close the input."""
        self._reader.close()

    def try_first(self, shard: Shard) -> tuple[int, int]:
        """Score the first block of a shard and write nothing: its rows, and how many of them have failed.

        Raises:
            ScoringError: as `score`.
        """
        clock = _Clock()
        rows = RowScorer(self._scorer, clock, is_row_wise=self._job.release.is_row_wise)
        for file, block in self._blocks(shard):
            selected = _select(self._job, file, _first_rows(block, 2 * CHUNK_ROWS))
            _, refused = self._answer(selected, rows, clock, file)
            return len(selected.rows) + len(selected.unreadable), len(refused) + len(selected.unreadable)
        return 0, 0

    def _blocks(self, shard: Shard) -> Iterator[tuple[InputFile, Block]]:
        job = self._job
        for part in shard.parts:
            file = job.files[part.file]
            reading = Reading(
                job.release.inputs,
                file.bindings,
                job.kept,
                file.partitions,
                job.encoding,
                job.delimiter,
                keeps_json=job.output_format == "jsonl",
            )
            n_left = part.n_rows
            for block in self._reader.read(job, part, reading):
                if part.n_rows >= 0:
                    block = _first(block, part.first_row + part.n_rows)
                    n_left -= len(block.rows) + len(block.unreadable)
                yield file, block
                if part.n_rows >= 0 and n_left <= 0:
                    break

    def _answer(
        self, block: Block, rows: RowScorer, clock: _Clock, file: InputFile
    ) -> tuple[pa.RecordBatch | None, dict[int, Refused]]:
        n_rows = len(block.rows)
        if not n_rows:
            return None, {}
        began = time.perf_counter()
        columns = block.columns | _partition_columns(self._job, file, block)
        values, failures = values_of(self._job.release.inputs, file.bindings, columns, n_rows)
        refused = {place: Refused(READ, "INVALID_INPUT", why) for place, why in {**failures, **block.failures}.items()}
        is_good = np.ones(n_rows, np.bool_)
        is_good[list(refused)] = False
        clock.add("convert", time.perf_counter() - began)
        if not self._job.release.is_row_wise and refused:  # the answers of the others would not be those of the whole
            why = Refused(READ, "INVALID_INPUT", "another row of the file is refused, and answers depend on all rows of the call")
            return None, {place: refused.get(place, why) for place in range(n_rows)}
        answered, more = rows.score(values, np.flatnonzero(is_good))
        refused |= more
        began = time.perf_counter()
        batch = self._batch(block, answered, file)
        clock.add("write", time.perf_counter() - began)
        return batch, refused

    def _batch(self, block: Block, answered: list[Answered], file: InputFile) -> pa.RecordBatch | None:
        """The rows of the output: kept columns and answers, in the order of the input."""
        if not answered:
            return None
        parts = [self._answers.arrays(each.outputs) for each in answered]
        columns = [pa.concat_arrays(arrays) if len(arrays) > 1 else arrays[0] for arrays in zip(*parts, strict=True)]
        places = np.concatenate([each.rows for each in answered])
        if (np.diff(places) < 0).any():
            order = np.argsort(places, kind="stable")
            places, columns = places[order], [column.take(pa.array(order)) for column in columns]
        kept = [_kept(block, file, self._schema.field(name)) for name in self._job.kept]
        if len(places) < len(block.rows):
            kept = [column.take(pa.array(places)) for column in kept]
        return pa.RecordBatch.from_arrays([*kept, *columns], schema=self._schema)

    def _path_of(self, file: InputFile) -> Callable[[int], str]:
        """The file of a row. A picture is one, and they are numbered as rows are."""
        if self._job.input_format == "images":
            return lambda row: self._job.files[row - 1].path
        return lambda _: file.path

    def _check_files(self, shard: Shard) -> None:
        """Raises:
        ScoringError: a file is not what it was when the run was planned.
        """
        if self._job.input_format == "images":
            return  # each is read whole, once
        storage = storage_of(self._job.input)
        for number in _files_of(shard):
            file = self._job.files[number]
            found = storage.identity(file.path)
            if found != file.identity:
                raise ScoringError(f"{file.path}: the file was changed during the run: it was {file.identity}, now {found}")


def _ignore(n_rows: int, n_errors: int) -> None:
    """Report nothing."""


def scorer_of(job: ScoringJob) -> Scorer:
    """What answers the rows of a run in this process.

    Raises:
        ScoringError: the release cannot be loaded, or does not serve at the URL.
    """
    if job.url:
        from splitserve.scoring.remote import RemoteScorer  # here: it needs the client

        return RemoteScorer(job.url, job.release)
    return LoadedRelease(job.release)


class _Scorers(threading.local):
    """The scorer of each thread: an engine may run two shards of a process at a time."""

    def __init__(self) -> None:
        self.by_job: dict[bytes, ShardScorer] = {}


_scorers = _Scorers()


def score_shard(job: bytes, shard: Shard) -> ShardResult:
    """Score a shard in this thread, whose release stays loaded for the next one. What engines schedule.

    Args:
        job: a `ScoringJob` as JSON, which any transport can carry.
        shard: of its plan.

    Raises:
        ScoringError: as `ShardScorer.score`.
    """
    scorers = _scorers.by_job
    if job not in scorers:
        for other in scorers.values():
            other.close()
        scorers.clear()
        scorers[job] = ShardScorer(decode_job(job))
    return scorers[job].score(shard)


def encode_job(job: ScoringJob) -> bytes:
    """As JSON."""
    return msgspec.json.encode(job)


def decode_job(data: bytes) -> ScoringJob:
    """The inverse of `encode_job`."""
    return msgspec.json.decode(data, type=ScoringJob)


def shard_key(facts: Mapping[str, Any]) -> str:
    """The digest of everything that the rows of a shard depend on."""
    return hashlib.sha256(msgspec.json.encode(facts, order="sorted")).hexdigest()


def _files_of(shard: Shard) -> list[int]:
    return list(dict.fromkeys(part.file for part in shard.parts))


def _changed(job: ScoringJob, shard: Shard) -> str:
    paths = ", ".join(job.files[number].path for number in _files_of(shard)[:3])
    return f"{paths} was changed during the run, or ends rows in another way than line feeds"


def _timed(blocks: Iterable[Any], stage: str, clock: _Clock) -> Iterator[Any]:
    blocks = iter(blocks)
    while True:
        began = time.perf_counter()
        block = next(blocks, None)
        clock.add(stage, time.perf_counter() - began)
        if block is None:
            return
        yield block


def _whole(blocks: Iterable[tuple[InputFile, Block]]) -> Iterator[tuple[InputFile, Block]]:
    """All rows of a file as one block."""
    found = list(blocks)
    if not found:
        return
    starts = np.cumsum([0, *(len(block.rows) for _, block in found)]).tolist()
    last = found[-1][1]

    def original(place: int) -> dict[str, Any]:
        number = int(np.searchsorted(starts, place, side="right")) - 1
        return found[number][1].original(place - starts[number])

    yield (
        found[0][0],
        Block(
            np.concatenate([block.rows for _, block in found]),
            {name: pa.concat_arrays([block.columns[name] for _, block in found]) for name in last.columns},
            {name: pa.concat_arrays([block.kept[name] for _, block in found]) for name in last.kept},
            original,
            {
                start + place: why
                for start, (_, block) in zip(starts, found, strict=False)
                for place, why in block.failures.items()
            },
            tuple(each for _, block in found for each in block.unreadable),
            frozenset().union(*(block.unknown_columns for _, block in found)),
        ),
    )


def _first_rows(block: Block, n_rows: int) -> Block:
    return _first(block, int(block.rows[n_rows])) if len(block.rows) > n_rows else block


def _first(block: Block, end: int) -> Block:
    """The rows of a block with numbers below ``end``."""
    if (not len(block.rows) or block.rows[-1] < end) and all(each.row < end for each in block.unreadable):
        return block
    return _where(block, block.rows < end, tuple(each for each in block.unreadable if each.row < end))


def _select(job: ScoringJob, file: InputFile, block: Block) -> Block:
    chosen = job.selected.of(file.path, block.rows)
    if chosen is None:
        return block
    unreadable = block.unreadable
    if unreadable:
        is_chosen = job.selected.of(file.path, np.array([each.row for each in unreadable]))
        unreadable = tuple(each for each, keeps in zip(unreadable, is_chosen, strict=True) if keeps)  # type: ignore[arg-type]
    return _where(block, chosen, unreadable)


def _where(block: Block, chosen: Array, unreadable: tuple[Any, ...]) -> Block:
    places = np.flatnonzero(chosen)
    taken = pa.array(places)
    new_place = {int(old): new for new, old in enumerate(places)}
    original = block.original
    return block._replace(
        rows=block.rows[places],
        columns={name: array.take(taken) for name, array in block.columns.items()},
        kept={name: array.take(taken) for name, array in block.kept.items()},
        original=lambda place: original(int(places[place])),
        failures={new_place[old]: why for old, why in block.failures.items() if old in new_place},
        unreadable=unreadable,
    )


def _partition_columns(job: ScoringJob, file: InputFile, block: Block) -> dict[str, pa.Array]:
    """Inputs that the names of folders give: text, or the numbers that the signature asks for."""
    from splitserve.scoring.sources.delimited import cells

    specs = {spec.name: spec for spec in job.release.inputs}
    found: dict[str, pa.Array] = {}
    for binding in file.bindings:
        for column in binding.columns:
            if column in file.partitions:
                text = pa.array([file.partitions[column]] * len(block.rows), pa.string())
                found[column] = cells(specs[binding.input], text, column, block.failures)
    return found


def _kept(block: Block, file: InputFile, field: pa.Field) -> pa.Array:
    if field.name in file.partitions:
        return pa.array([file.partitions[field.name]] * len(block.rows), pa.string())
    column = block.kept[field.name]
    if column.type != field.type:
        raise ScoringError(f'{file.path}: column "{field.name}": expected {field.type} as in the first file, got {column.type}')
    return column


def _discarding(sink: Sink) -> Callable[..., bool]:
    """At the end of a ``with`` block that an exception leaves, discards the sink."""

    def leave(kind: type[BaseException] | None, *_: object) -> bool:
        if kind is not None:
            sink.discard()
        return False

    return leave


class _OnDemand:
    """A file that exists only if something is written."""

    def __init__(self, open_file: Callable[[], IO[bytes]]) -> None:
        self._open = open_file
        self._file: IO[bytes] | None = None

    def write(self, data: bytes) -> None:
        if self._file is None:
            self._file = self._open()
        self._file.write(data)


class _Tally:
    """Counts the rows of a shard and writes its errors."""

    def __init__(self) -> None:
        self.rows = self.scored = self.errors = 0
        self.reasons: dict[str, int] = {}
        self.first_error = ""
        self.unknown: set[str] = set()

    def add(
        self,
        errors: _OnDemand,
        path_of: Callable[[int], str],
        block: Block,
        refused: Mapping[int, Refused],
        batch: pa.RecordBatch | None,
    ) -> None:
        self.rows += len(block.rows) + len(block.unreadable)
        self.scored += 0 if batch is None else len(batch)
        self.unknown |= block.unknown_columns
        if not refused and not block.unreadable:
            return
        found = [(int(block.rows[place]), why, block.original(place)) for place, why in refused.items()]
        found += [
            (each.row, Refused(READ, "INVALID_INPUT", each.message), {"error_text": each.text}) for each in block.unreadable
        ]
        for row, why, values in sorted(found, key=lambda each: each[0]):
            facts = {
                "error_file": path_of(row),
                "error_row": row,
                "error_stage": why.stage,
                "error_reason": why.reason,
                "error_message": why.message,
            }
            errors.write(msgspec.json.encode({**{name: json_value(value) for name, value in values.items()}, **facts}) + b"\n")
            reason = f"{why.stage}: {why.reason}"
            self.reasons[reason] = self.reasons.get(reason, 0) + 1
            self.first_error = self.first_error or f"{path_of(row)}: row {row}: {why.message}"
        self.errors += len(found)

    def result(self, shard: Shard, seconds: Mapping[str, float]) -> ShardResult:
        """Raises:
        ScoringError: rows are neither answered nor errors, which is a defect.
        """
        if self.rows != self.scored + self.errors:
            raise ScoringError(f"shard {shard.number}: {self.rows} rows, but {self.scored} answers and {self.errors} errors")
        rounded = {stage: round(each, 6) for stage, each in seconds.items()}
        unknown = tuple(sorted(self.unknown))
        return ShardResult(
            shard.number, shard.key, self.rows, self.scored, self.errors, self.reasons, self.first_error, rounded, unknown
        )
