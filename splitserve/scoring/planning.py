"""From a path to shards: the files of an input, their columns checked against the signature, divided into parts.

Everything that can be checked before the first row is scored is checked here, and named by file.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote

import msgspec
import pyarrow as pa

from splitserve.scoring.answers import AnswerColumns
from splitserve.scoring.errors import ScoringError, WrongUsage
from splitserve.scoring.inputs import Columns, bind, plain_type
from splitserve.scoring.release import ScoringRelease
from splitserve.scoring.shards import InputFile
from splitserve.scoring.sinks import JSON_FIELD
from splitserve.scoring.sources import columnar, delimited, images, json_lines
from splitserve.scoring.sources.block import SHARD_BYTES, SHARD_ROWS, Part, file_name
from splitserve.scoring.storage import Storage, absolute, storage_of

ALL = "all"
"""In ``keep``: every column."""

SUFFIXES: Mapping[str, tuple[str, ...]] = {
    "parquet": (".parquet", ".pq", ".parq"),
    "csv": (".csv", ".tsv", ".csv.gz", ".tsv.gz"),
    "jsonl": (".jsonl", ".ndjson", ".jsonl.gz", ".ndjson.gz"),
    "arrow": (".arrow", ".feather", ".ipc", ".arrows"),
    "images": images.SUFFIXES,
}

_NULL_PARTITION = "__HIVE_DEFAULT_PARTITION__"


def format_of(path: str) -> str:
    """The format that a file's name says; "" if none."""
    name = file_name(path).lower()
    return next((format for format, suffixes in SUFFIXES.items() if name.endswith(suffixes)), "")


class Listing(NamedTuple):
    """The files of an input, by the bytes of their paths, and those that were left out.

    ``where`` names them; ``is_one``: it is the name of a file.
    """

    where: str
    is_one: bool
    root: str
    format: str
    files: list[InputFile]
    skipped: list[str]


def list_files(where: str) -> Listing:
    """The files that a path, a folder or a glob names, in the order of their rows.

    A name that exists is meant literally, whatever characters it has. In a folder, names that begin with "." or "_" are left out,
    as are files of no known format.

    Raises:
        ScoringError: there is nothing, or files of several formats.
    """
    where = absolute(where)
    storage = storage_of(where)
    try:
        paths, root, skipped = _found(storage, where)
        formats = {format_of(path) for path in paths}
        if len(formats) > 1:
            examples = ", ".join(next(path for path in paths if format_of(path) == format) for format in sorted(formats))
            raise ScoringError(
                f"{where}: files of several formats ({', '.join(sorted(formats))}), e.g. {examples}; name one kind"
            )
        files = [InputFile(path, storage.identity(path), *_partition(path, root)) for path in paths]
    except FileNotFoundError as error:
        raise ScoringError(f"{error.filename or where}: no such file or folder") from error
    except OSError as error:
        raise ScoringError(f"{error.filename or where}: {error.strerror or error}") from error
    return Listing(where, [where] == paths, root, formats.pop(), files, skipped)


def _found(storage: Storage, where: str) -> tuple[list[str], str, list[str]]:
    if storage.is_folder(where):
        found = storage.files(where)
        paths = [path for path in found if format_of(path) and not _is_hidden(path.removeprefix(where))]
        if not paths:
            raise ScoringError(f"{where}: the folder has no file with one of {_known()}")
        return paths, where.rstrip("/"), sorted(set(found) - set(paths))
    if storage.exists(where):
        if not format_of(where):
            raise ScoringError(f"{where}: expected a file with one of {_known()}")
        return [where], where.rpartition("/")[0], []
    if any(character in where for character in "*?["):
        found = storage.glob(where)
        root = where[: min(where.index(character) for character in "*?[" if character in where)].rpartition("/")[0]
        paths = [path for path in found if format_of(path)]
        if paths:
            return paths, root, sorted(set(found) - set(paths))
        raise ScoringError(f"{where}: no file of that name, and none that matches with one of {_known()}")
    raise ScoringError(f"{where}: no such file or folder")


def _known() -> str:
    return ", ".join(suffix for suffixes in SUFFIXES.values() for suffix in suffixes)


def would_list(listing: Listing, path: str) -> bool:
    """Whether a file of this path would be found where the files of a listing were."""
    if listing.is_one or not format_of(path):
        return False
    if any(character in listing.where for character in "*?[") and not storage_of(listing.where).is_folder(listing.where):
        return _matches(path, listing.where)
    return path.startswith(f"{listing.root}/") and not _is_hidden(path.removeprefix(listing.root))


def _matches(path: str, pattern: str) -> bool:
    """Whether a glob finds a path; ``**`` stands for any folders."""
    if "**" in pattern:
        return fnmatchcase(path, pattern.replace("**/", "*"))
    parts, wanted = path.split("/"), pattern.split("/")
    return len(parts) == len(wanted) and all(map(fnmatchcase, parts, wanted))


def _is_hidden(below: str) -> bool:
    return any(part.startswith((".", "_")) for part in below.split("/"))


def _partition(path: str, root: str) -> tuple[str, dict[str, str | None]]:
    """A file's folder below the root, and the values of folders like ``m=04``."""
    below = path.removeprefix(root).strip("/").rpartition("/")[0]
    values: dict[str, str | None] = {}
    for part in below.split("/"):
        name, separator, value = part.partition("=")
        if separator and name:
            values[unquote(name)] = None if value == _NULL_PARTITION else unquote(value)
    return below, values


class Table(NamedTuple):
    """Files whose columns are known to fit, and what of them is kept."""

    files: list[InputFile]
    kept: tuple[str, ...]
    kept_schema: pa.Schema
    unused: list[str]


class ColumnOptions(NamedTuple):
    """Which columns are read as which input, and which are kept; ``keeps_partitions``: those that folders name, too."""

    mapping: Mapping[str, str]
    keep: Sequence[str]
    encoding: str
    delimiter: str
    output_format: str
    keeps_partitions: bool


def check_columns(listing: Listing, release: ScoringRelease, options: ColumnOptions) -> Table:
    """Check the columns of every file, and fix the types of those that are kept.

    Raises:
        ScoringError: names the file and the column.
    """
    files: list[InputFile] = []
    kept: dict[str, pa.Field] = {}
    names: tuple[str, ...] | None = None
    unused: dict[str, None] = {}
    for file in listing.files:
        columns = _columns_of(file, listing.format, release, options)
        if columns is None:  # an empty file of text: no rows, no columns
            continue
        if clash := file.partitions.keys() & columns.keys():
            raise ScoringError(f'{file.path}: "{clash.pop()}" is a column of the file and a folder\'s name; rename one')
        everything: Columns = {**columns, **dict.fromkeys(file.partitions)}
        wanted = _kept_names(everything, columns, file, options)
        if names is None:
            names = wanted
        elif set(names) != set(wanted):
            other = ", ".join(sorted(set(names) ^ set(wanted)))
            raise ScoringError(
                f"{file.path}: mixed schemas: not the columns of the first file, differing in {other}; --keep by name"
            )
        for name in wanted:
            field = _kept_field(name, everything[name], listing.format, options)
            if kept.setdefault(name, field).type != field.type:
                raise ScoringError(
                    f'{file.path}: mixed schemas: column "{name}": expected {kept[name].type} as in the first file, '
                    f"got {field.type}"
                )
        try:
            bindings = bind(release.inputs, everything, options.mapping, where=file.path, kept=wanted)
        except ScoringError as error:
            if listing.format == "csv" and (delimiter := delimited.other_delimiter(list(columns))):
                raise type(error)(f"{error}; its cells seem to be separated by {delimiter!r}, which --delimiter names") from error
            raise
        used = {column for binding in bindings for column in binding.columns}
        unused.update(dict.fromkeys(name for name in columns if name not in used | set(wanted) | set(release.ignored)))
        files.append(msgspec.structs.replace(file, bindings=bindings))
    names = names or ()
    answers = AnswerColumns(release).schema.names
    if in_both := [name for name in names if name in answers]:
        raise WrongUsage(f'"{in_both[0]}" is a column of the input and of the answer; leave it out of --keep')
    return Table(files, names, pa.schema([kept[name] for name in names]), list(unused))


def _columns_of(file: InputFile, format: str, release: ScoringRelease, options: ColumnOptions) -> Columns | None:
    try:
        if format == "parquet":
            return _typed(columnar.parquet_schema(file.path))
        if format == "arrow":
            return _typed(columnar.arrow_schema(file.path))
        if format == "csv":
            names, _ = delimited.header_of(file.path, options.encoding, options.delimiter)
            return dict.fromkeys(names) if names else None
        if format == "jsonl":
            keys = json_lines.keys_of(file.path, options.encoding, every=ALL in options.keep)
            # A key may be absent from the first lines; one that is absent from a line is an error of that line.
            return dict.fromkeys([*keys, *(name for name in options.keep if name != ALL)]) if keys else None
    except OSError as error:
        raise ScoringError(f"{file.path}: {error.strerror or error}") from error
    if len(release.inputs) != 1 or release.inputs[0].datatype != "BYTES":
        raise ScoringError(f"{file.path}: a picture is the only input of its model; {release.name} has others")
    return {release.inputs[0].name: pa.binary(), images.FILE: pa.string()}


def _typed(schema: pa.Schema) -> Columns:
    return dict(zip(schema.names, schema.types, strict=True))


def _kept_names(everything: Columns, columns: Columns, file: InputFile, options: ColumnOptions) -> tuple[str, ...]:
    of_folders = [name for name in file.partitions if options.keeps_partitions]
    if ALL in options.keep:
        return (*of_folders, *columns)
    for name in options.keep:
        if name not in everything:
            raise WrongUsage(f'{file.path}: --keep {name}: there is no column "{name}"; it has {", ".join(everything)}')
    return tuple(name for name in options.keep if name in columns or name in of_folders)


def _kept_field(name: str, found: pa.DataType | None, format: str, options: ColumnOptions) -> pa.Field:
    if found is not None:
        return pa.field(name, plain_type(found))
    is_json = format == "jsonl" and options.output_format == "jsonl"
    return pa.field(name, pa.string(), metadata={JSON_FIELD: b"1"} if is_json else None)


class ShardSizes(NamedTuple):
    """How large a shard is: rows, where the format knows them, else bytes."""

    rows: int = SHARD_ROWS
    bytes: int = SHARD_BYTES


def divide(table: Table, format: str, options: ColumnOptions, *, is_row_wise: bool, sizes: ShardSizes) -> list[list[Part]]:
    """The parts of each shard, in the order of the rows.

    Small files of one folder share a shard. Where answers depend on the other rows of the call, a file is a shard.

    Raises:
        ScoringError: a file cannot be read.
    """
    if format == "images":
        return [[part] for part in images.plan([file.path for file in table.files])]
    plan: dict[str, Callable[[int, str], list[Part]]] = {
        "parquet": lambda number, path: columnar.plan_parquet(number, path, sizes.rows),
        "arrow": lambda number, path: columnar.plan_arrow(number, path, sizes.rows),
        "csv": lambda number, path: delimited.plan(number, path, options.encoding, sizes.bytes, options.delimiter),
        "jsonl": lambda number, path: json_lines.plan(number, path, options.encoding, sizes.bytes),
    }
    shards: list[list[Part]] = []
    filled, below = 0.0, None
    for number, file in enumerate(table.files):
        try:
            parts = plan[format](number, file.path)
        except OSError as error:
            raise ScoringError(f"{file.path}: {error.strerror or error}") from error
        if not is_row_wise:
            shards.append(parts)
            continue
        for part in parts:
            share = _share(part, file, format, sizes)
            if shards and filled + share <= 1 and below == file.below and shards[-1][-1].file != number:
                shards[-1].append(part)
                filled += share
            else:
                shards.append([part])
                filled, below = share, file.below
    return [parts for parts in shards if parts]


def _share(part: Part, file: InputFile, format: str, sizes: ShardSizes) -> float:
    """How much of a shard a part is."""
    if format in ("parquet", "arrow") and part.n_rows >= 0:
        return part.n_rows / sizes.rows
    return (file.identity.size if part.end < 0 else part.end - part.start) / sizes.bytes


def limited(shards: list[list[Part]], limit: int, count: Callable[[Part], int]) -> list[list[Part]]:
    """The first rows only.

    Args:
        shards: parts of each.
        limit: how many rows.
        count: rows of a part whose number is not known.
    """
    if limit < 0:
        raise WrongUsage(f"--limit: expected 0 or more rows, got {limit}")
    left, kept = limit, []
    for parts in shards:
        some = []
        for part in parts:
            if left <= 0:
                break
            n_rows = min(part.n_rows if part.n_rows >= 0 else count(part), left)
            left -= n_rows
            some.append(msgspec.structs.replace(part, n_rows=n_rows))
        if some:
            kept.append(some)
    return kept


def parse_mapping(texts: Sequence[str]) -> dict[str, str]:
    """``column=input`` as a dict.

    Raises:
        WrongUsage: not of this form, or a column is mapped twice.
    """
    mapping: dict[str, str] = {}
    for text in texts:
        column, separator, name = text.rpartition("=")
        if not separator or not column or not name:
            raise WrongUsage(f"--map {text}: expected COLUMN=INPUT")
        if column in mapping:
            raise WrongUsage(f'--map {text}: column "{column}" is mapped twice')
        mapping[column] = name
    return mapping


def writable(folder: str) -> str:
    """Why a folder of this machine cannot be written to; "" if it can."""
    path = Path(folder)
    while not path.exists():
        path = path.parent
    return "" if os.access(path, os.W_OK) else f"{path}: cannot be written: permission denied"
