"""Text with one record a line: its files split at line breaks, and lines read from gzip."""

from __future__ import annotations

import codecs
import gzip
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Any, NamedTuple, cast

import numpy as np

from splitserve.scoring.errors import ScoringError
from splitserve.scoring.sources.block import Part
from splitserve.scoring.storage import storage_of

UTF8_BOM = codecs.BOM_UTF8
_OTHER_BOMS = {codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16", b"\0\0\xfe\xff": "utf-32"}
_GZIP = b"\x1f\x8b"
_SCANNED = 8 * 1024**2
_NEWLINE, _RETURN, _QUOTE = 10, 13, 34


def is_gzip(path: str) -> bool:
    return path.lower().endswith(".gz")


def is_utf8(encoding: str) -> bool:
    return codecs.lookup(encoding).name in ("utf-8", "utf-8-sig", "ascii")


def opened(path: str, encoding: str = "utf-8") -> IO[bytes]:
    """A file's text as UTF-8, unpacked.

    Raises:
        OSError: it cannot be opened.
    """
    file = storage_of(path).open(path)
    if is_gzip(path):
        file = cast("IO[bytes]", _Unpacked(file))
    return file if is_utf8(encoding) else cast("IO[bytes]", _Recoded(file, encoding))


class _Unpacked(gzip.GzipFile):
    """Closes the file below, too."""

    def __init__(self, file: IO[bytes]) -> None:
        super().__init__(fileobj=file, mode="rb")
        self._below = file

    def close(self) -> None:
        super().close()
        self._below.close()


class _Recoded:
    """Reads text of another encoding as UTF-8."""

    def __init__(self, file: IO[bytes], encoding: str) -> None:
        self._file = file
        self._decoder = codecs.getincrementaldecoder(encoding)()
        self.closed = False

    def read(self, size: int = -1) -> bytes:
        while data := self._file.read(size):
            if text := self._decoder.decode(data).encode():
                return text
        return self._decoder.decode(b"", final=True).encode()

    def readable(self) -> bool:
        return True

    def close(self) -> None:
        self.closed = True
        self._file.close()

    def __enter__(self) -> _Recoded:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@contextmanager
def naming_damage(path: str, encoding: str) -> Iterator[None]:
    """Raises:
    ScoringError: what was read is not whole, or not of this encoding.
    """
    try:
        yield
    except (UnicodeError, EOFError, zlib.error) as error:
        raise ScoringError(f"{path}: {error}; is it whole, and --encoding {encoding} right?") from error


def start_of_text(path: str, head: bytes) -> int:
    """Bytes of a byte order mark.

    Raises:
        ScoringError: the mark of another encoding, or of gzip.
    """
    if head.startswith(_GZIP):
        raise ScoringError(f"{path}: packed by gzip; a name that ends in .gz says so")
    for mark, name in _OTHER_BOMS.items():
        if head.startswith(mark):
            raise ScoringError(f"{path}: the text is not UTF-8; --encoding {name} reads it")
    return len(UTF8_BOM) if head.startswith(UTF8_BOM) else 0


class Lines(NamedTuple):
    """Where rows of a file of text may be split."""

    ranges: list[tuple[int, int, int]]
    """Start, end, number of rows."""

    is_regular: bool
    """Whether line breaks outside of quotes are known to end rows."""


def scan(file: IO[bytes], start: int, shard_bytes: int, *, delimiter: bytes = b"") -> Lines:
    """Split a file into ranges of whole rows, and count them; empty lines are no rows.

    With a delimiter, line breaks in quotes end no row: whether a place is in quotes is the parity of the quotes before it. That
    holds where every quote opens or closes a field or is doubled, which is checked; elsewhere the file is not regular.

    Args:
        file: seekable.
        start: of the first row.
        shard_bytes: a range ends with the first row that reaches so many bytes.
        delimiter: of CSV; none: quotes mean nothing.
    """
    file.seek(start)
    allowed = np.zeros(256, np.bool_)
    allowed[[_NEWLINE, _RETURN, _QUOTE, *delimiter]] = True
    ranges: list[tuple[int, int, int]] = []
    position = range_start = line_start = start
    n_rows, in_quotes, previous, closes_last = 0, False, _NEWLINE, False
    while data := file.read(_SCANNED):
        chunk = np.frombuffer(data, np.uint8)
        ends = np.flatnonzero(chunk == _NEWLINE)
        if delimiter:
            alone = data.count(b"\r") - data.count(b"\r\n") - data.endswith(b"\r")
            if alone or (previous == _RETURN and chunk[0] != _NEWLINE):
                return Lines([], is_regular=False)  # a carriage return alone ends a row of CSV, or is in one
            quotes = np.flatnonzero(chunk == _QUOTE) if b'"' in data else np.empty(0, np.int64)
            if closes_last and not allowed[chunk[0]]:
                return Lines([], is_regular=False)
            closes_last = False
            if len(quotes):
                opening, closing = (quotes[int(in_quotes) :: 2], quotes[1 - int(in_quotes) :: 2])
                before = np.where(opening > 0, chunk[opening - 1], previous)
                inner = closing[closing + 1 < len(chunk)]
                if not (allowed[before].all() and allowed[chunk[inner + 1]].all()):
                    return Lines([], is_regular=False)
                closes_last = len(inner) < len(closing)
            if len(quotes) or in_quotes:
                ends = ends[(int(in_quotes) + np.searchsorted(quotes, ends)) % 2 == 0]
            in_quotes = bool((int(in_quotes) + len(quotes)) % 2)
        if len(ends):
            lengths = np.diff(ends + position, prepend=line_start - 1)
            is_row = (lengths > 2) | ((lengths == 2) & (np.where(ends > 0, chunk[ends - 1], previous) != _RETURN))
            counts = np.cumsum(is_row)
            done = 0
            while True:  # the rows of this chunk that complete a range
                place = int(np.searchsorted(ends + position + 1, range_start + shard_bytes))
                if place >= len(ends):
                    break
                end = int(ends[place]) + position + 1
                ranges.append((range_start, end, n_rows + int(counts[place]) - done))
                range_start, n_rows, done = end, 0, int(counts[place])
            n_rows += int(counts[-1]) - done
            line_start = int(ends[-1]) + position + 1
        previous = int(chunk[-1])
        position += len(chunk)
    rest = position - line_start
    if rest > 1 or (rest and previous != _RETURN):  # the last row has no line break
        n_rows += 1
    if position > range_start:
        ranges.append((range_start, position, n_rows))
    return Lines([each for each in ranges if each[2]], is_regular=not in_quotes and not (delimiter and previous == _RETURN))


def parts_of(file: int, lines: Lines) -> list[Part]:
    """The ranges of a file as parts, with the numbers of their rows."""
    parts, first = [], 1
    for start, end, n_rows in lines.ranges:
        parts.append(Part(file, start, end, first, n_rows))
        first += n_rows
    return parts


def read_range(path: str, part: Part) -> bytes:
    """The bytes of a part.

    Raises:
        ScoringError: the file has become shorter.
    """
    with storage_of(path).open(path) as file:
        file.seek(part.start)
        data = file.read(part.end - part.start)
    if len(data) < part.end - part.start:
        raise ScoringError(f"{path}: the file became shorter during the run")
    return data


def lines_of(file: IO[Any], max_bytes: int) -> Iterator[tuple[list[bytes], int]]:
    """Lines of a stream in lists, with the length of a last one that is longer than ``max_bytes`` and left out (0: none)."""
    rest = b""
    while data := file.read(_SCANNED):
        rest += data
        cut = rest.rfind(b"\n") + 1
        if cut:
            yield rest[:cut].split(b"\n")[:-1], 0
            rest = rest[cut:]
        if len(rest) > max_bytes:
            length = len(rest)
            while (data := file.read(_SCANNED)) and b"\n" not in data:
                length += len(data)
            head, _, rest = data.partition(b"\n")
            yield [], length + len(head)
    if rest:
        yield [rest], 0
