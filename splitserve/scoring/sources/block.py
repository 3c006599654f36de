"""Rows as every format gives them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import msgspec
import pyarrow as pa

from splitserve.arrays import Array
from splitserve.scoring.inputs import Binding, Failures
from splitserve.signature import TensorSpec

SHARD_ROWS = 131_072
"""Most rows in a shard of a format that knows its rows; a multiple of `splitserve.scoring.rows.CHUNK_ROWS`."""

SHARD_BYTES = 8 * 1024**2
"""Bytes in a shard of text, up to the end of a row, and of a run of small files."""


class Part(msgspec.Struct, frozen=True):
    """Rows of one file that belong to a shard.

    What ``start`` and ``end`` count depends on the format: bytes of text, row groups of Parquet, record batches of Arrow, files
    in the list of pictures. ``skip`` rows after the start are not part of it. ``first_row`` is the number of its first, from 1.
    ``n_rows`` is -1 where only reading tells.
    """

    file: int
    start: int
    end: int
    first_row: int = 1
    n_rows: int = -1
    skip: int = 0


class Reading(msgspec.Struct, frozen=True):
    """What to read of a file: the columns of each input, and those that are copied to the output."""

    specs: tuple[TensorSpec, ...]
    bindings: tuple[Binding, ...]
    kept: tuple[str, ...] = ()
    partitions: Mapping[str, str | None] = {}
    encoding: str = "utf-8"
    delimiter: str = ""
    keeps_json: bool = False
    """Whether kept values of JSON lines stay JSON, for an output of JSON lines; otherwise they become text."""

    @property
    def spec_by_column(self) -> dict[str, TensorSpec]:
        """The input that each column is read for."""
        by_name = {spec.name: spec for spec in self.specs}
        return {column: by_name[binding.input] for binding in self.bindings for column in binding.columns}

    @property
    def columns(self) -> list[str]:
        """Names of the columns of the file that are needed, each once."""
        names = dict.fromkeys([*self.spec_by_column, *self.kept])
        return [name for name in names if name not in self.partitions]


class Unreadable(NamedTuple):
    """A row that has no columns: its number, its text, and why."""

    row: int
    text: str
    message: str


class Block(NamedTuple):
    """Some rows of a file. ``rows`` are their numbers, from 1; ``original`` gives a row's values as the file has them."""

    rows: Array
    columns: dict[str, pa.Array]
    kept: dict[str, pa.Array]
    original: Callable[[int], dict[str, Any]]
    failures: Failures
    unreadable: tuple[Unreadable, ...] = ()
    unknown_columns: frozenset[str] = frozenset()


ReadBlocks = Callable[[str, Part, Reading], Iterator[Block]]


def file_name(path: str) -> str:
    """The last part of a path or URL."""
    return path.rstrip("/").rpartition("/")[2] or os.fspath(path)
