"""Files of text split into ranges of rows."""

from __future__ import annotations

import csv
import gzip
import io
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from splitserve.scoring.errors import ScoringError
from splitserve.scoring.sources import delimited, text
from splitserve.scoring.sources.block import Part, Reading
from splitserve.scoring.sources.delimited import header_of, plan, read

CELLS = st.text(st.sampled_from('ab",\n \r=;é'), max_size=6).map(lambda cell: cell.replace("\r", "\r\n"))
TABLES = st.lists(st.tuples(st.just("x"), CELLS, CELLS), max_size=30)


def written(rows: object, *, ending: str) -> bytes:
    """Rows as CSV."""
    stream = io.StringIO(newline="")
    csv.writer(stream, lineterminator=ending).writerows(rows)  # type: ignore[arg-type]
    return stream.getvalue().encode()


def rows_of(path: Path, parts: list[Part]) -> list[tuple[object, ...]]:
    """The cells of every row, in the order of the parts, and its number."""
    found: list[tuple[object, ...]] = []
    for part in parts:
        for block in read(str(path), part, Reading((), (), ("a", "b", "c"))):
            cells = [block.kept[name].to_pylist() for name in ("a", "b", "c")]
            found += zip(block.rows.tolist(), *cells, strict=True)
    return found


@given(TABLES, st.integers(1, 80), st.sampled_from(["\n", "\r\n"]), st.booleans())
def test_a_csv_file_has_the_same_rows_for_every_split(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[str, ...]], shard_bytes: int, ending: str, has_last: bool
) -> None:
    """Line breaks in quotes end no row, doubled quotes are no end of a field; ranges are small enough to fall into both."""
    data = written([("a", "b", "c"), *rows], ending=ending)
    path = tmp_path_factory.mktemp("csv") / "t.csv"
    path.write_bytes(data if has_last else data.removesuffix(ending.encode()))

    parts = plan(0, str(path), "utf-8", shard_bytes)

    assert rows_of(path, parts) == [(number, *row) for number, row in enumerate(rows, 1)]
    assert sum(part.n_rows for part in parts) == len(rows)


@given(st.lists(st.sampled_from(["a", "", "b,c", "  "]), max_size=40), st.integers(1, 20), st.sampled_from(["\n", "\r\n"]))
def test_lines_are_counted_without_the_empty_ones(lines: list[str], shard_bytes: int, ending: str) -> None:
    """And every byte of a row is in one range."""
    data = "".join(line + ending for line in lines).encode()

    found = text.scan(io.BytesIO(data), 0, shard_bytes)

    pieces = [data[start:end] for start, end, _ in found.ranges]
    assert [len([each for each in piece.splitlines() if each]) for piece in pieces] == [count for _, _, count in found.ranges]
    assert b"".join(pieces).split() == data.split()


@pytest.mark.parametrize("cell", ['5" pipe', '"a"b', "a\rb"], ids=["inch", "after", "return"])
def test_a_file_whose_quotes_do_not_tell_is_not_split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cell: str) -> None:
    """It is one shard, which Arrow's parser reads from the start."""
    path = tmp_path / "t.csv"
    path.write_bytes(b"a,b,c\n" + f"x,{cell},y\n".encode() * 40)

    assert plan(0, str(path), "utf-8", 10) == [Part(0, 0, -1)]
    for size in range(1, 20):  # wherever the pieces end in which it is looked through
        monkeypatch.setattr(text, "_SCANNED", size)
        assert plan(0, str(path), "utf-8", 10) == [Part(0, 0, -1)]


def test_a_chunk_may_end_anywhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Between two quotes, or between a carriage return and its line feed."""
    rows = [("x", 'a""b"', "q\r\nr"), ("x", "", '"'), ("x", "é", ",")] * 4
    path = tmp_path / "t.csv"
    path.write_bytes(written([("a", "b", "c"), *rows], ending="\r\n"))

    for size in range(1, 40):
        monkeypatch.setattr(text, "_SCANNED", size)
        parts = plan(0, str(path), "utf-8", 12)
        assert len(parts) > 1
        assert rows_of(path, parts) == [(number, *row) for number, row in enumerate(rows, 1)], size


def test_lines_of_a_stream_longer_than_the_limit_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their length is told, and the lines after them are whole."""
    monkeypatch.setattr(text, "_SCANNED", 8)
    lines = [b"{}", b"x" * 50, b"after", b"last"]

    found = list(text.lines_of(io.BytesIO(b"\n".join(lines)), 20))

    assert [line for block, _ in found for line in block] == [b"{}", b"after", b"last"]
    assert [length for _, length in found if length] == [50]


def test_a_header_may_be_quoted_and_marked(tmp_path: Path) -> None:
    """A byte order mark is not part of the first name, a line break in quotes is part of a name."""
    path = tmp_path / "t.csv"
    path.write_bytes(b'\xef\xbb\xbf"a\nb",c\n1,2\n')

    assert header_of(str(path), "utf-8") == (["a\nb", "c"], 11)


@pytest.mark.parametrize(
    "data",
    [
        b"a,b,c\r1,2,3\r4,5,6\r",
        b"a,b,c\r1,2,3\n4,5,6\n",
        b"a,b,c\n1,2,3\r\n4,5,6",
        b"\r\n\na,b,c\r\n1,2,3\r\n4,5,6\r\n",
        b"\xef\xbb\xbf\na,b,c\n1,2,3\n4,5,6\n",
    ],
    ids=["returns", "return", "mixed", "empty lines", "mark"],
)
def test_a_header_ends_where_the_rows_begin(tmp_path: Path, data: bytes) -> None:
    """At each line break that also ends a row; empty lines before it are none."""
    path = tmp_path / "t.csv"
    path.write_bytes(data)
    parts = plan(0, str(path), "utf-8", 100)

    assert rows_of(path, parts) == [(1, "1", "2", "3"), (2, "4", "5", "6")]


def test_a_quote_within_a_name_swallows_no_row(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_bytes(b'a,b,c 5"\n1,2,3\n4,"5",6\n')

    assert header_of(str(path), "utf-8") == (["a", "b", 'c 5"'], 9)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b'"a,b,c\n1,2,3\n', "cannot be read as CSV"),
        (b'"' + b"a" * 200_000, "cannot be read as CSV"),
        (b"a," * 600_000, "longer than 1 MiB"),
    ],
    ids=["open quote", "long name", "long"],
)
def test_a_header_without_an_end_is_refused(tmp_path: Path, data: bytes, message: str) -> None:
    """Else the rows would be taken for a part of it."""
    path = tmp_path / "t.csv"
    path.write_bytes(data)

    with pytest.raises(ScoringError, match=message):
        header_of(str(path), "utf-8")


def test_json_strings_of_every_line_are_whole() -> None:
    """Quotes mean nothing there."""
    data = b"".join(json.dumps({"a": 'x"y'}).encode() + b"\n" for _ in range(9))

    assert [count for _, _, count in text.scan(io.BytesIO(data), 0, 40).ranges] == [3, 3, 3]


def test_rows_with_other_numbers_of_cells_are_told_by_their_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the parser is ahead of the rows: a packed file, read in small blocks. Empty lines do not count."""
    monkeypatch.setattr(delimited, "MAX_ROW_BYTES", 64)
    lines = [f"{row},x" if row % 7 == 0 else f"{row},x,y" for row in range(1, 100)]
    data = ("a,b,c\n" + "\n\n".join(lines)).encode()
    (tmp_path / "t.csv").write_bytes(data)
    (tmp_path / "t.csv.gz").write_bytes(gzip.compress(data))

    for name in ("t.csv", "t.csv.gz"):
        path = str(tmp_path / name)
        blocks = [each for part in plan(0, path, "utf-8", 100) for each in read(path, part, Reading((), (), ("a",)))]
        rows = [row for block in blocks for row in block.rows.tolist()]
        assert rows == [int(cell) for block in blocks for cell in block.kept["a"].to_pylist()]
        assert rows == [row for row in range(1, 100) if row % 7]
        assert [(each.row, each.text) for block in blocks for each in block.unreadable] == [
            (row, f"{row},x") for row in range(7, 100, 7)
        ]
