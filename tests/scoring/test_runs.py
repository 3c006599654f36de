"""Runs in this process, with a model that adds two numbers: formats, columns, errors, resuming."""

from __future__ import annotations

import gzip
import json
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyarrow import csv as pacsv

from splitserve.scoring import runs
from splitserve.scoring.errors import ScoringError, TooManyErrors, WrongUsage
from splitserve.scoring.release import Clock, ScoringRelease
from splitserve.scoring.runs import ScoringOptions
from splitserve.scoring.shards import ShardScorer
from splitserve.tensors import Tensor
from tests.scoring.conftest import Scored
from tests.scoring.here import Here
from tests.scoring.releases import COUNT, NUMBER, SUM, Adding, release

N_ROWS = 1000


def table(n_rows: int = N_ROWS) -> pa.Table:
    """Rows with an id; the text "NA" is text, every third number is missing."""
    numbers = [None if row % 3 == 0 else row / 8 for row in range(n_rows)]
    return pa.table(
        {
            "id": pa.array(range(n_rows), pa.int64()),
            "number": pa.array(numbers, pa.float64()),
            "text": pa.array(["NA" if row % 2 else f'é,"{row}"\n' for row in range(n_rows)]),
            "count": pa.array(range(n_rows), pa.int32()),
        }
    )


def write_csv(rows: pa.Table, path: Path) -> None:
    pacsv.write_csv(rows, path)


def write_jsonl(rows: pa.Table, path: Path) -> None:
    path.write_bytes(msgspec.json.Encoder().encode_lines(rows.to_pylist()))


def write_arrow(rows: pa.Table, path: Path) -> None:
    with pa.ipc.new_file(str(path), rows.schema) as writer:
        writer.write_table(rows, max_chunksize=100)


def write_stream(rows: pa.Table, path: Path) -> None:
    with pa.ipc.new_stream(str(path), rows.schema) as writer:
        writer.write_table(rows, max_chunksize=100)


def packed(write: Callable[[pa.Table, Path], None]) -> Callable[[pa.Table, Path], None]:
    def write_packed(rows: pa.Table, path: Path) -> None:
        write(rows, path)
        path.write_bytes(gzip.compress(path.read_bytes()))

    return write_packed


WRITERS: dict[str, Callable[[pa.Table, Path], None]] = {
    "t.parquet": lambda rows, path: pq.write_table(rows, path, row_group_size=170),
    "t.csv": write_csv,
    "t.csv.gz": packed(write_csv),
    "t.jsonl": write_jsonl,
    "t.jsonl.gz": packed(write_jsonl),
    "t.arrow": write_arrow,
    "t.arrows": write_stream,
}


def read_back(path: Path) -> pa.Table:
    """The answers of any format, ids as numbers."""
    if path.suffix == ".parquet":
        return pq.read_table(path)
    if path.suffix == ".arrow":
        return pa.ipc.open_file(path).read_all()
    if path.suffix == ".csv":
        return pacsv.read_csv(path, parse_options=pacsv.ParseOptions(newlines_in_values=True))
    records = [json.loads(line) for line in path.read_text().splitlines()]
    for record in records:
        record["sum"] = float(record["sum"])
    return pa.Table.from_pylist(records)


@pytest.mark.parametrize("output", ["out.parquet", "out.csv", "out.jsonl", "out.arrow"])
@pytest.mark.parametrize("name", WRITERS)
def test_every_format_gives_the_same_answers(tmp_path: Path, scored: Scored, name: str, output: str) -> None:
    """In the order of the input; missing numbers are NaN to the model, the text "NA" is text."""
    rows = table()
    WRITERS[name](rows, tmp_path / name)

    summary = scored(tmp_path / name, tmp_path / output, keep=("id",), shard_rows=8192, shard_bytes=3000)

    found = read_back(tmp_path / output)
    assert (summary.rows, summary.scored, summary.errors) == (N_ROWS, N_ROWS, 0)
    assert [int(value) for value in found["id"].to_pylist()] == list(range(N_ROWS))
    assert found["label"].to_pylist() == rows["text"].to_pylist()
    sums = [float("nan") if value in (None, "NaN") else float(value) for value in found["sum"].to_pylist()]
    expected = [float("nan") if row % 3 == 0 else row / 8 + row for row in range(N_ROWS)]
    np.testing.assert_array_equal(sums, expected)


@pytest.mark.parametrize("shard_bytes", [100, 1000, 10**7])
@pytest.mark.parametrize("name", ["t.csv", "t.jsonl"])
def test_the_answers_do_not_depend_on_the_size_of_shards(tmp_path: Path, scored: Scored, name: str, shard_bytes: int) -> None:
    """Not a byte of them."""
    WRITERS[name](table(), tmp_path / name)

    scored(tmp_path / name, tmp_path / "some.csv", shard_bytes=shard_bytes)
    scored(tmp_path / name, tmp_path / "one.csv", engine=Here(Adding(), reverse=True))

    assert (tmp_path / "some.csv").read_bytes() == (tmp_path / "one.csv").read_bytes()


def test_bad_rows_go_to_the_errors_file(tmp_path: Path, scored: Scored) -> None:
    """With what the input had, the row's number, stage, reason and message; their neighbours are answered."""
    path = tmp_path / "t.csv"
    path.write_text("id,number,text,count\n1,1,a,1\n2,one,b,1\n3,3,c\n4,inf,d,1\n5,5,e,1.5\n6,6,f,\n7,7,g,2.0\n")

    summary = scored(path, tmp_path / "out.csv", keep=("id",), max_errors="90%")

    assert (tmp_path / "out.csv").read_text().splitlines()[1:] == ['"1",2,"a"', '"7",9,"g"']
    errors = [json.loads(line) for line in (tmp_path / "out.errors.jsonl").read_text().splitlines()]
    assert [(each["error_row"], each["error_stage"], each["error_message"]) for each in errors] == [
        (2, "read", 'input "number": "one" is not a FP64'),
        (3, "read", "expected 4 cells as in the header, got 3"),
        (4, "preprocess", "a number is refused"),
        (5, "read", 'input "count": "1.5" is not a INT64'),
        (6, "read", 'input "count": the value is missing, expected INT64'),
    ]
    assert errors[0] == {
        "id": "2",
        "number": "one",
        "text": "b",
        "count": "1",
        "error_file": str(path),
        "error_row": 2,
        "error_stage": "read",
        "error_reason": "INVALID_INPUT",
        "error_message": 'input "number": "one" is not a FP64',
    }
    assert errors[1]["error_text"] == "3,3,c"
    assert (summary.rows, summary.scored, summary.errors) == (7, 2, 5)
    assert summary.reasons == {"read: INVALID_INPUT": 4, "preprocess: INVALID_INPUT": 1}
    assert summary.first_error == f'{path}: row 2: input "number": "one" is not a FP64'


def test_bad_json_lines_go_to_the_errors_file(tmp_path: Path, scored: Scored) -> None:
    """A line that is no object, an absent key, a value of another type; NaN as Python writes it is a number."""
    path = tmp_path / "t.jsonl"
    good = {"number": 1, "text": "a", "count": 1}
    lines: list[Any] = [good, {**good, "number": "x"}, {"number": 1, "text": "a"}, [1], {**good, "count": 2.0, "note": 7}]
    path.write_text("\n".join(map(json.dumps, lines)) + '\n{"number": NaN, "text": null, "count": 1}\n{"number"\n')

    summary = scored(path, tmp_path / "out.jsonl", max_errors="90%")

    answers = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert answers == [{"sum": 2.0, "label": "a"}, {"sum": 3.0, "label": "a"}, {"sum": "NaN", "label": ""}]
    errors = [json.loads(line) for line in (tmp_path / "out.errors.jsonl").read_text().splitlines()]
    assert [each["error_row"] for each in errors] == [2, 3, 4, 7]
    assert errors[0]["error_message"] == 'input "number": "x" is not a FP64'
    assert errors[1]["error_message"] == 'input "count": missing'
    assert summary.unused_columns == ("note",)


def test_a_bad_value_in_the_last_row_of_a_typed_file_fails_that_row(tmp_path: Path, scored: Scored) -> None:
    """Nulls where none may be, and numbers that the datatype cannot hold."""
    counts = pa.array([1] * 98 + [None, 2.5], pa.float64())
    pq.write_table(pa.table({"number": pa.array([0.0] * 100), "text": ["t"] * 100, "count": counts}), tmp_path / "t.parquet")

    summary = scored(tmp_path / "t.parquet", tmp_path / "out.parquet")

    errors = [json.loads(line) for line in (tmp_path / "out.errors.jsonl").read_text().splitlines()]
    assert [(each["error_row"], each["count"]) for each in errors] == [(99, None), (100, 2.5)]
    assert summary.scored == 98


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"number": [1.0], "text": ["a"]}, 'missing "count"'),
        ({"number": ["1"], "text": ["a"], "count": [1]}, 'column "number": expected numbers (FP64), got string'),
        ({"number": [1.0], "text": [1], "count": [1]}, 'column "text": expected text (BYTES), got int64'),
        (
            {"number": [1.0], "text": ["a"], "count": pa.nulls(1)},
            'column "count": expected numbers (INT64), which have no missing',
        ),
        ({"number": [[1.0]], "text": ["a"], "count": [1]}, 'column "number": expected numbers (FP64), got list'),
    ],
    ids=["missing", "text", "number", "null", "list"],
)
def test_columns_are_checked_before_the_first_row(tmp_path: Path, scored: Scored, columns: dict[str, Any], message: str) -> None:
    """In every file: the second one is wrong here. Nothing is written."""
    (tmp_path / "in").mkdir()
    pq.write_table(table(), tmp_path / "in" / "1.parquet")
    pq.write_table(pa.table(columns), tmp_path / "in" / "2.parquet")

    with pytest.raises(ScoringError) as raised:
        scored(tmp_path / "in", tmp_path / "out")

    assert f"{tmp_path}/in/2.parquet: {message}" in str(raised.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        {"keep": ["absent"]},
        {"keep": ["sum"]},
        {"mapping": {"absent": "count"}},
        {"mapping": {"number": "absent"}},
        {"mapping": {"*": "count"}},
    ],
    ids=str,
)
def test_an_option_that_does_not_fit_the_input_ends_with_status_2(
    tmp_path: Path, scored: Scored, arguments: dict[str, Any]
) -> None:
    """So that a scheduler does not try it again."""
    write_csv(table(3).append_column("sum", [["", "", ""]]), tmp_path / "t.csv")

    with pytest.raises(ScoringError) as raised:
        scored(tmp_path / "t.csv", tmp_path / "out.csv", **arguments)

    assert raised.value.exit_status == 2


def test_columns_are_found_by_name_and_by_mapping(tmp_path: Path, scored: Scored) -> None:
    """Their order means nothing."""
    rows = table(10)
    pq.write_table(
        rows.select(["count", "text", "id", "number"]).rename_columns(["n", "text", "id", "number"]), tmp_path / "t.parquet"
    )

    scored(tmp_path / "t.parquet", tmp_path / "out.parquet", mapping={"n": "count"}, keep=("all",))

    found = pq.read_table(tmp_path / "out.parquet")
    assert found.column_names == ["n", "text", "id", "number", "sum", "label"]
    assert found["sum"].to_pylist()[1:3] == [1.125, 2.25]


def test_text_of_every_kind_is_the_same_text(tmp_path: Path, scored: Scored) -> None:
    """Dictionaries, also with other values in each batch, large strings and views."""
    rows = table(500)
    outputs = []
    for name, kind in [
        ("a", pa.string()),
        ("b", pa.large_string()),
        ("c", pa.dictionary(pa.int32(), pa.string())),
        ("d", pa.string_view()),
    ]:
        typed = rows.set_column(2, "text", rows["text"].cast(kind))
        write_arrow(typed, tmp_path / f"{name}.arrow")
        scored(tmp_path / f"{name}.arrow", tmp_path / f"{name}.csv", keep=("text",))
        outputs.append((tmp_path / f"{name}.csv").read_bytes())

    assert len(set(outputs)) == 1


def test_rows_that_are_sent_alone_and_answered_stay_in_their_places(tmp_path: Path, scored: Scored) -> None:
    """A model may take infinite numbers."""
    numbers = [1.0] * 100
    numbers[3] = numbers[50] = float("inf")
    rows = table(100).set_column(1, "number", [numbers])
    pq.write_table(rows, tmp_path / "t.parquet")
    scorer = Adding(lambda found: np.zeros(len(found), bool))

    scored(tmp_path / "t.parquet", tmp_path / "out.parquet", keep=("id",), engine=Here(scorer))

    found = pq.read_table(tmp_path / "out.parquet")
    assert sorted(scorer.calls) == [1, 1, 98]
    assert found["id"].to_pylist() == list(range(100))
    assert found["sum"].to_pylist() == [number + row for row, number in enumerate(numbers)]
    assert found["label"].to_pylist() == rows["text"].to_pylist()


def test_a_column_that_is_empty_in_the_first_file_has_its_type_from_the_signature(tmp_path: Path, scored: Scored) -> None:
    """All null there, text in the second."""
    (tmp_path / "in").mkdir()
    first = table(5).set_column(2, "text", pa.nulls(5)).set_column(1, "number", pa.nulls(5))
    pq.write_table(first, tmp_path / "in" / "1.parquet")
    pq.write_table(table(5), tmp_path / "in" / "2.parquet")

    scored(tmp_path / "in", tmp_path / "out.parquet")

    assert pq.read_table(tmp_path / "out.parquet")["label"].to_pylist() == [""] * 5 + table(5)["text"].to_pylist()


def test_folders_of_the_input_are_folders_of_the_output(tmp_path: Path, scored: Scored, chosen: Callable[..., None]) -> None:
    """Spelt alike; a folder's value is text, or the number that the signature asks for."""
    for folder, n_rows in [("m=04", 3), ("m=__HIVE_DEFAULT_PARTITION__", 2), ("m=1 %2F", 1)]:
        (tmp_path / "in" / folder).mkdir(parents=True)
        pq.write_table(table(n_rows).drop(["text"]), tmp_path / "in" / folder / "x.parquet")
        (tmp_path / "in" / folder / "_SUCCESS").touch()

    summary = scored(tmp_path / "in", tmp_path / "out", mapping={"m": "text"}, to="csv")

    found = {path.parent.name: path.read_text() for path in (tmp_path / "out").glob("m=*/*.csv")}
    assert {folder: text.splitlines()[-1] for folder, text in found.items()} == {
        "m=04": '2.25,"04"',
        "m=__HIVE_DEFAULT_PARTITION__": '1.125,""',
        "m=1 %2F": 'nan,"1 /"',
    }
    assert sorted(summary.skipped_files) == ["m=04/_SUCCESS", "m=1 %2F/_SUCCESS", "m=__HIVE_DEFAULT_PARTITION__/_SUCCESS"]

    pq.write_table(table(1).drop(["text"]).append_column("m", [["z"]]), tmp_path / "in" / "m=04" / "z.parquet")
    with pytest.raises(ScoringError, match=r"m=04/z\.parquet: \"m\" is a column of the file and a folder's name"):
        scored(tmp_path / "in", tmp_path / "other", mapping={"m": "text"})


def test_files_are_read_in_the_order_of_their_bytes_and_names_are_literal(tmp_path: Path, scored: Scored) -> None:
    """part-10 is before part-2; a name with brackets is a name if there is such a file."""
    (tmp_path / "in").mkdir()
    for name in ["part-2.parquet", "part-10.parquet", "a[1].parquet", "b %20.parquet"]:
        pq.write_table(table(1).set_column(2, "text", [[name]]), tmp_path / "in" / name)

    scored(tmp_path / "in", tmp_path / "all.parquet")
    scored(tmp_path / "in" / "a[1].parquet", tmp_path / "one.parquet")
    scored(tmp_path / "in" / "part-*.parquet", tmp_path / "some.parquet")

    labels = [pq.read_table(tmp_path / name)["label"].to_pylist() for name in ("all.parquet", "one.parquet", "some.parquet")]
    assert labels == [
        ["a[1].parquet", "b %20.parquet", "part-10.parquet", "part-2.parquet"],
        ["a[1].parquet"],
        ["part-10.parquet", "part-2.parquet"],
    ]


@pytest.mark.parametrize("name", ["t.csv", "t.jsonl", "t.parquet", "t.arrow"])
def test_an_input_without_rows_gives_an_output_without_rows(tmp_path: Path, scored: Scored, name: str) -> None:
    """With its columns, in every format; so does a file of text of no bytes."""
    WRITERS[name](table(0), tmp_path / name)

    summary = scored(tmp_path / name, tmp_path / "out.parquet")

    assert (summary.rows, summary.exit_status) == (0, 0)
    found = pq.read_table(tmp_path / "out.parquet")
    assert (found.column_names, len(found)) == (["sum", "label"], 0)


def test_an_empty_parquet_file_is_refused_by_name(tmp_path: Path, scored: Scored) -> None:
    """It is damaged: a file without rows has a footer."""
    (tmp_path / "t.parquet").touch()

    with pytest.raises(ScoringError, match=r"t\.parquet: Parquet file size is 0 bytes"):
        scored(tmp_path / "t.parquet", tmp_path / "out.csv")


def test_a_damaged_page_is_refused_with_its_row_group(tmp_path: Path, scored: Scored) -> None:
    """By its checksum; nothing has a final name."""
    path = tmp_path / "t.parquet"
    pq.write_table(table(), path, row_group_size=500, write_page_checksum=True, compression="none", use_dictionary=False)
    column = pq.ParquetFile(path).metadata.row_group(1).column(1)
    data = bytearray(path.read_bytes())
    middle = column.data_page_offset + column.total_compressed_size // 2
    data[middle : middle + 64] = bytes(each ^ 0xFF for each in data[middle : middle + 64])
    path.write_bytes(data)

    with pytest.raises(ScoringError, match=r"t\.parquet: row groups 0 to 1: .*CRC"):
        scored(path, tmp_path / "out.csv")

    assert not (tmp_path / "out.csv").exists()


def test_what_is_written_has_checksums_and_says_who_scored(tmp_path: Path, scored: Scored) -> None:
    """Release and digests in the schema's metadata."""
    pq.write_table(table(), tmp_path / "t.parquet")

    scored(tmp_path / "t.parquet", tmp_path / "out.parquet")

    facts = pq.read_schema(tmp_path / "out.parquet").metadata
    assert facts[b"splitserve.release"] == b"m/releases/0001-1.1"
    assert facts[b"splitserve.release_sha256"] == b"a" * 64
    assert facts[b"splitserve.preprocessor_sha256"] == b"b" * 64
    assert b"splitserve.version" in facts
    data = bytearray((tmp_path / "out.parquet").read_bytes())
    column = pq.ParquetFile(tmp_path / "out.parquet").metadata.row_group(0).column(0)
    data[column.dictionary_page_offset + column.total_compressed_size // 2] ^= 0xFF
    (tmp_path / "damaged.parquet").write_bytes(data)
    with pytest.raises(OSError, match="CRC"):
        pq.ParquetFile(tmp_path / "damaged.parquet", page_checksum_verification=True).read()


def test_rows_are_the_first_or_a_sample(tmp_path: Path, scored: Scored) -> None:
    """A sample depends on the rows' numbers only, not on shards."""
    for name in ["t.parquet", "t.csv", "t.csv.gz", "t.jsonl.gz"]:
        WRITERS[name](table(), tmp_path / name)
        scored(tmp_path / name, tmp_path / "first.parquet", keep=("id",), limit=123, shard_bytes=500, overwrite=True)
        assert [int(row) for row in pq.read_table(tmp_path / "first.parquet")["id"].to_pylist()] == list(range(123))

    write_csv(table(), tmp_path / "t.csv")
    scored(tmp_path / "t.csv", tmp_path / "a.parquet", keep=("id",), sample=0.1, shard_bytes=500)
    scored(tmp_path / "t.csv", tmp_path / "b.parquet", keep=("id",), sample=0.1)

    chosen = [pq.read_table(tmp_path / name)["id"].to_pylist() for name in ("a.parquet", "b.parquet")]
    assert chosen[0] == chosen[1]
    assert 70 < len(chosen[0]) < 130


def test_too_many_bad_rows_stop_a_run_that_goes_on_with_more_allowed(tmp_path: Path, scored: Scored) -> None:
    """Status 3; shards that are done stay done."""
    path = tmp_path / "t.csv"
    path.write_text("number,text,count\n" + "inf,a,1\n" * 20 + "1,a,1\n" * 180)
    engine = Here(Adding())

    with pytest.raises(TooManyErrors, match="more than --max-errors 5% allows") as raised:
        scored(path, tmp_path / "out.csv", max_errors="5%", shard_bytes=300, engine=engine)
    assert raised.value.exit_status == 3
    assert not (tmp_path / "out.csv").exists()
    assert engine.done == [0]

    again = Here(Adding())
    summary = scored(path, tmp_path / "out.csv", max_errors="20", shard_bytes=300, engine=again)

    assert 0 not in again.done
    assert (summary.rows, summary.errors, summary.exit_status) == (200, 20, 0)


def test_a_shard_that_is_nearly_all_bad_is_not_tried_to_its_end(
    tmp_path: Path, scored: Scored, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of its rows would be sent alone."""
    monkeypatch.setattr(runs, "MORE_ERRORS", 10)
    (tmp_path / "t.csv").write_text("number,text,count\n" + "x,a,1\n" * 30_000)

    with pytest.raises(TooManyErrors, match="rows have failed in shard 0, .* The first: .*row 1: input"):
        scored(tmp_path / "t.csv", tmp_path / "out.csv", max_errors="0")


def test_a_run_in_which_every_row_is_bad_ends_with_status_3(tmp_path: Path, scored: Scored) -> None:
    """The output has its columns, and every row is in the errors file."""
    (tmp_path / "t.csv").write_text("number,text,count\n" + "inf,a,1\n" * 5)

    summary = scored(tmp_path / "t.csv", tmp_path / "out.csv", max_errors="100%")

    assert (summary.rows, summary.scored, summary.errors, summary.exit_status) == (5, 0, 5, 3)
    assert (tmp_path / "out.csv").read_text() == "sum,label\n"
    assert len((tmp_path / "out.errors.jsonl").read_text().splitlines()) == 5


class Killed(Exception):
    """In the place of a process that is killed."""


class Dying(Here):
    """Dies after so many shards."""

    def __init__(self, after: int) -> None:
        super().__init__(Adding())
        self._after = after

    def run(self, job: bytes, shards: Any, on_rows: Any) -> Any:
        for number, result in enumerate(super().run(job, shards, on_rows)):
            if number == self._after:
                raise Killed
            yield result


@pytest.mark.parametrize("output", ["out.csv", "out.parquet", "folder"])
def test_a_run_goes_on_where_it_was_and_gives_the_same_bytes(tmp_path: Path, scored: Scored, output: str) -> None:
    """Only shards that are not finished are scored again; temporary files are removed."""
    write_csv(table(), tmp_path / "t.csv")
    scored(tmp_path / "t.csv", tmp_path / "whole" / output, shard_bytes=3000)
    with pytest.raises(Killed):
        scored(tmp_path / "t.csv", tmp_path / output, shard_bytes=3000, engine=Dying(3))
    root = tmp_path / (output if output == "folder" else f"{output}.parts")
    (root / ".splitserve-abc").write_text("half of a file")

    engine = Here(Adding())
    summary = scored(tmp_path / "t.csv", tmp_path / output, shard_bytes=3000, engine=engine)

    assert min(engine.done) == 4
    assert summary.resumed_shards == 4
    assert contents(tmp_path / output) == contents(tmp_path / "whole" / output)
    assert not list(tmp_path.rglob(".splitserve-*"))
    assert list(tmp_path.glob("*.parts")) == []


def contents(path: Path) -> dict[str, bytes]:
    """Files by name, without those that have times in them."""
    if path.is_file():
        return {"": path.read_bytes()}
    return {str(each.relative_to(path)): each.read_bytes() for each in path.rglob("part-*") if each.suffix != ".json"}


def test_a_complete_run_is_not_done_again(tmp_path: Path, scored: Scored) -> None:
    """The same command says the same, and reads nothing."""
    write_csv(table(), tmp_path / "t.csv")
    first = scored(tmp_path / "t.csv", tmp_path / "out.csv")
    engine = Here(Adding())

    again = scored(tmp_path / "t.csv", tmp_path / "out.csv", engine=engine)

    assert engine.done == []
    assert (again.rows, again.resumed_shards) == (first.rows, first.shards)


@pytest.mark.parametrize(
    ("options", "difference"),
    [
        ({"limit": 100}, "--limit (was none, is 100)"),
        ({"sample": 0.5}, "--sample (was 1.0, is 0.5)"),
        ({"keep": ("id",)}, "--keep (was [], is ['id'])"),
        ({"mapping": {"number": "count", "count": "number"}}, "--map"),
    ],
    ids=["limit", "sample", "keep", "map"],
)
def test_another_run_with_the_same_output_is_refused(
    tmp_path: Path, scored: Scored, options: dict[str, Any], difference: str
) -> None:
    """Whether the first one is complete or not; --overwrite starts again."""
    path = tmp_path / "t.csv"
    path.write_text("id,number,text,count\n" + "1,1,1,1\n" * 300)
    scored(path, tmp_path / "complete.csv", shard_bytes=200)
    with pytest.raises(Killed):
        scored(path, tmp_path / "begun.csv", shard_bytes=200, engine=Dying(1))

    for output in ("complete.csv", "begun.csv"):
        with pytest.raises(ScoringError) as raised:
            scored(path, tmp_path / output, shard_bytes=200, **options)
        assert difference in str(raised.value)
        scored(path, tmp_path / output, shard_bytes=200, overwrite=True, **options)

    assert (tmp_path / "complete.csv").read_bytes() == (tmp_path / "begun.csv").read_bytes()


def test_a_changed_release_or_input_is_refused(tmp_path: Path, scored: Scored, chosen: Callable[[ScoringRelease], None]) -> None:
    """With what has changed."""
    path = tmp_path / "t.csv"
    write_csv(table(), path)
    with pytest.raises(Killed):
        scored(path, tmp_path / "out.csv", shard_bytes=3000, engine=Dying(1))

    chosen(msgspec.structs.replace(release(), sha256="d" * 64))
    with pytest.raises(ScoringError, match=r"differs in release_sha256 \(was a+, is d+\); --overwrite replaces it"):
        scored(path, tmp_path / "out.csv", shard_bytes=3000)
    chosen(release())
    path.write_bytes(path.read_bytes().replace(b"NA", b"AN"))
    with pytest.raises(ScoringError, match=r"differs in input .*t\.csv \(was \d+ bytes, \d+, is \d+ bytes, \d+\)"):
        scored(path, tmp_path / "out.csv", shard_bytes=3000)


def test_an_input_that_changes_during_the_run_is_refused(tmp_path: Path, scored: Scored) -> None:
    """Nothing of that shard has a final name."""
    path = tmp_path / "t.csv"
    write_csv(table(), path)

    class Writing(Adding):
        def infer(self, inputs: Any, clock: Any) -> Any:
            path.write_bytes(path.read_bytes().replace(b"NA", b"AN"))
            return super().infer(inputs, clock)

    with pytest.raises(ScoringError, match=r"t\.csv: the file was changed during the run"):
        scored(path, tmp_path / "out.csv", engine=Here(Writing()))

    assert not (tmp_path / "out.csv").exists()
    assert not list(tmp_path.rglob("part-*"))


def test_a_crash_between_a_shard_and_its_record_changes_nothing(
    tmp_path: Path, scored: Scored, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The shard is done again, with the same name and bytes."""
    write_csv(table(), tmp_path / "t.csv")
    scored(tmp_path / "t.csv", tmp_path / "whole.csv", shard_bytes=3000)
    with pytest.raises(Killed):
        scored(tmp_path / "t.csv", tmp_path / "out.csv", shard_bytes=3000, engine=Dying(3))
    records = sorted((tmp_path / "out.csv.parts" / "_splitserve" / "shards").iterdir())
    records[2].unlink()

    engine = Here(Adding())
    scored(tmp_path / "t.csv", tmp_path / "out.csv", shard_bytes=3000, engine=engine)

    assert engine.done[0] == 2
    assert (tmp_path / "out.csv").read_bytes() == (tmp_path / "whole.csv").read_bytes()


def test_two_runs_do_not_write_to_one_output(tmp_path: Path, scored: Scored) -> None:
    """The second is refused while the first runs."""
    write_csv(table(), tmp_path / "t.csv")

    class Nested(Adding):
        def infer(self, inputs: Any, clock: Any) -> Any:
            with pytest.raises(ScoringError, match="another run is writing there"):
                scored(tmp_path / "t.csv", tmp_path / "out.csv")
            return super().infer(inputs, clock)

    scored(tmp_path / "t.csv", tmp_path / "out.csv", engine=Here(Nested()))


@pytest.mark.parametrize(
    ("where", "output"),
    [("in/1.csv", "in/out.csv"), ("in/1.csv", "in/out"), ("in", "in/_out"), ("in/1*.csv", "in/out.csv"), ("in/*.csv", "in/out")],
    ids=str,
)
def test_an_output_that_the_next_run_does_not_read_may_be_beside_the_input(
    tmp_path: Path, scored: Scored, where: str, output: str
) -> None:
    """Of a file, under a hidden name, or where the glob finds nothing: the same command does nothing the second time."""
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "1.csv").write_text("number,text,count\n1,a,1\n")

    first = scored(tmp_path / where, tmp_path / output)
    again = scored(tmp_path / where, tmp_path / output)

    assert (first.scored, again.scored) == (1, 1)


@pytest.mark.parametrize("delimiter", [";", "|", "\t"])
def test_csv_may_have_another_delimiter(tmp_path: Path, scored: Scored, delimiter: str) -> None:
    """Also packed, with commas in the cells and line breaks in quotes, at any shard size."""
    rows = [f'{row}{delimiter}"a,{delimiter}\n{row}"{delimiter}{row}\n' for row in range(50)]
    content = delimiter.join(["number", "text", "count"]) + "\n" + "".join(rows)
    (tmp_path / "t.csv").write_text(content)
    (tmp_path / "t.csv.gz").write_bytes(gzip.compress(content.encode()))

    for name, options in (("t.csv", {"shard_bytes": 64}), ("t.csv.gz", {})):
        scored(tmp_path / name, tmp_path / f"{name}.out.parquet", delimiter=delimiter, **options)
        found = pq.read_table(tmp_path / f"{name}.out.parquet")
        assert found["label"].to_pylist() == [f"a,{delimiter}\n{row}" for row in range(50)]
        assert found["sum"].to_pylist() == [2.0 * row for row in range(50)]


@pytest.mark.parametrize("delimiter", [";;", '"', "\n", "é"])
def test_a_delimiter_is_one_character(tmp_path: Path, scored: Scored, delimiter: str) -> None:
    """Which Arrow takes."""
    (tmp_path / "t.csv").write_text("number,text,count\n1,a,1\n")

    with pytest.raises(WrongUsage, match="--delimiter .*: expected one ASCII character"):
        scored(tmp_path / "t.csv", tmp_path / "out.csv", delimiter=delimiter)


@pytest.mark.parametrize("last", ["", "\r", "\n", "\n\r", "\r\n\r\n"], ids=repr)
@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.gz"])
def test_lines_of_spaces_are_bad_rows_and_empty_ones_are_none(tmp_path: Path, scored: Scored, suffix: str, last: str) -> None:
    """Counted alike when the file is planned and when it is read."""
    good = '{"number": 1, "text": "a", "count": 1}'
    content = f"{good}\n \t\n\r\n\n{good}{last}".encode()
    (tmp_path / f"t.{suffix}").write_bytes(gzip.compress(content) if suffix.endswith("gz") else content)

    summary = scored(tmp_path / f"t.{suffix}", tmp_path / "out.csv", max_errors="1")

    assert (summary.rows, summary.scored, summary.errors) == (3, 2, 1)
    assert json.loads((tmp_path / "out.errors.jsonl").read_text())["error_row"] == 2


@pytest.mark.parametrize("unit", ["s", "ms", "us", "ns"])
@pytest.mark.parametrize("suffix", ["parquet", "arrow", "csv", "jsonl"])
def test_kept_times_with_a_zone_are_in_utc(tmp_path: Path, scored: Scored, unit: str, suffix: str) -> None:
    """In every format and unit, of files with several zones; a bad row's, too. Times without a zone have none."""
    noon = 1_704_110_400
    factor = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}[unit]
    (tmp_path / "in").mkdir()
    for number, zone in enumerate(["Asia/Tokyo", "UTC"]):
        rows = table(2)
        rows = rows.set_column(1, "number", pa.array([1.0, float("inf")])).set_column(2, "text", pa.array(["a", "b"]))
        rows = rows.append_column("at", pa.array([noon * factor] * 2, pa.timestamp(unit, zone)))
        rows = rows.append_column("naive", pa.array([noon * factor] * 2, pa.timestamp(unit)))
        with pa.ipc.new_file(str(tmp_path / "in" / f"{number}.arrow"), rows.schema) as writer:
            writer.write_table(rows)

    scored(tmp_path / "in", tmp_path / f"out.{suffix}", keep=("at", "naive"), max_errors="2")

    if suffix in ("parquet", "arrow"):
        found = (
            pq.read_table(tmp_path / "out.parquet")
            if suffix == "parquet"
            else pa.ipc.open_file(tmp_path / "out.arrow").read_all()
        )
        assert (found.schema.field("at").type.tz, found.schema.field("naive").type.tz) == ("UTC", None)
        assert found["at"].cast(pa.timestamp("s", "UTC")).cast(pa.int64()).to_pylist() == [noon] * 2
    else:
        lines = (tmp_path / f"out.{suffix}").read_text().splitlines()[-2:]
        assert all("12:00:00" in line and "21:00" not in line and "Z" in line for line in lines)
        assert lines[0] == lines[1]
    errors = [json.loads(line) for line in (tmp_path / "out.errors.jsonl").read_text().splitlines()]
    assert [each["at"] for each in errors] == ["2024-01-01T12:00:00Z"] * 2
    assert errors[0]["naive"] == "2024-01-01T12:00:00"


def test_two_attempts_at_a_shard_leave_one_file(tmp_path: Path, chosen: object) -> None:
    """At the same time, as Spark does with a slow task: the second one loses quietly, and the bytes are those of one."""
    (tmp_path / "t.csv").write_text("number,text,count\n1,a,1\ninf,b,2\n")
    options = ScoringOptions(max_errors="1")
    both_score = threading.Barrier(2, timeout=30)

    class Slow(Adding):
        def infer(self, inputs: Sequence[Tensor], clock: Clock) -> Sequence[Tensor]:
            if inputs[0].n_rows == 1 and not self.calls:
                both_score.wait()
            return super().infer(inputs, clock)

    once = runs.plan("m", str(tmp_path / "t.csv"), str(tmp_path / "once"), options)
    ShardScorer(once.job, Adding()).score(once.shards[0])
    twice = runs.plan("m", str(tmp_path / "t.csv"), str(tmp_path / "twice"), options)
    with ThreadPoolExecutor(2) as attempts:
        scorers = [ShardScorer(twice.job, Slow()) for _ in range(2)]
        results = list(attempts.map(lambda scorer: scorer.score(twice.shards[0]), scorers))

    assert [(each.rows, each.errors) for each in results] == [(2, 1)] * 2
    files = {path.relative_to(tmp_path / "twice") for path in (tmp_path / "twice").rglob("*") if path.is_file()}
    assert files == {path.relative_to(tmp_path / "once") for path in (tmp_path / "once").rglob("*") if path.is_file()}
    for path in files:
        if path.parts[0] != "_splitserve":  # a record has seconds
            assert (tmp_path / "twice" / path).read_bytes() == (tmp_path / "once" / path).read_bytes()


@pytest.mark.parametrize("output", ["out.csv", "out"])
def test_a_file_of_errors_is_named_only_if_there_is_one(tmp_path: Path, scored: Scored, output: str) -> None:
    """In the summary of the first run and of the second."""
    good = "number,text,count\n1,a,1\n"
    (tmp_path / "good.csv").write_text(good)
    (tmp_path / "bad.csv").write_text(good + "inf,b,2\n")

    for _ in range(2):
        assert scored(tmp_path / "good.csv", tmp_path / f"good-{output}").errors_file == ""
        named = scored(tmp_path / "bad.csv", tmp_path / f"bad-{output}", max_errors="1").errors_file
        assert Path(named).exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("t.csv", "out.txt"), "out.txt: expected a name with one of .parquet"),
        (("t.csv", "t.csv"), "the output is the input"),
        (("no.csv", "out.csv"), "no.csv: no such file or folder"),
        (("no*.csv", "out.csv"), "no file of that name, and none that matches"),
        (("empty", "out.csv"), "empty: the folder has no file with one of .parquet"),
        (("mixed", "out.csv"), "files of several formats (csv, parquet)"),
        (("notes.txt", "out.csv"), "notes.txt: expected a file with one of .parquet"),
        (("twice.csv", "out.csv"), 'twice.csv: column "a" occurs more than once in the header'),
        (("utf16.csv", "out.csv"), "utf16.csv: the text is not UTF-8; --encoding utf-16 reads it"),
        (("latin.csv", "out.csv"), 'latin.csv: row 2, column "text": not UTF-8; name its --encoding'),
        (("two", "two"), "the output is in the input's folder"),
        (("two", "two/out"), "the output is in the input's folder"),
        (("two", "two/out.csv"), "the output is in the input's folder"),
        (("one", "one/below/out.csv"), "the output is in the input's folder"),
        (("two/*.csv", "two/out.csv"), "the output is in the input's folder"),
        (("two/**/*.csv", "two/below/out.csv"), "the output is in the input's folder"),
        (("packed.csv", "out.csv"), "packed.csv: packed by gzip; a name that ends in .gz says so"),
        (("packed.jsonl", "out.csv"), "packed.jsonl: packed by gzip; a name that ends in .gz says so"),
        (("short.csv.gz", "out.csv"), "short.csv.gz: Compressed file ended before the end-of-stream marker"),
        (("short.jsonl.gz", "out.csv"), "short.jsonl.gz: Compressed file ended before the end-of-stream marker"),
        (("damaged.csv.gz", "out.csv"), "damaged.csv.gz: Error -3 while decompressing data"),
        (("semicolons.csv", "out.csv"), 'semicolons.csv: missing "number", "text", "count"; it has "number;text;count"'),
        (("semicolons.csv", "out.csv"), "its cells seem to be separated by ';', which --delimiter names"),
    ],
    ids=lambda each: each[0] if isinstance(each, tuple) else "",
)
def test_a_wrong_input_or_output_is_named(tmp_path: Path, scored: Scored, arguments: tuple[str, str], message: str) -> None:
    """And nothing is written."""
    good = "number,text,count\n1,a,1\n"
    for folder in ("empty", "mixed", "one", "two"):
        (tmp_path / folder).mkdir()
    files = {
        "t.csv": good,
        "semicolons.csv": good.replace(",", ";"),
        "one/1.csv": good,
        "two/1.csv": good,
        "two/2.csv": good,
        "mixed/1.csv": good,
        "notes.txt": good,
        "twice.csv": "a,b,a\n1,2,3\n",
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    pq.write_table(table(1), tmp_path / "mixed" / "2.parquet")
    (tmp_path / "utf16.csv").write_text(good, encoding="utf-16")
    (tmp_path / "latin.csv").write_text(good + "2,é,2\n", encoding="latin-1")
    whole = gzip.compress(good.encode())
    for name in ("packed.csv", "packed.jsonl"):
        (tmp_path / name).write_bytes(whole)
    for name in ("short.csv.gz", "short.jsonl.gz"):
        (tmp_path / name).write_bytes(whole[:-9])
    (tmp_path / "damaged.csv.gz").write_bytes(whole[:10] + b"\xff" * 20 + whole[30:])

    with pytest.raises(ScoringError) as raised:
        scored(tmp_path / arguments[0], tmp_path / arguments[1])

    assert message in str(raised.value)
    assert not (tmp_path / "out.csv").exists()


@pytest.mark.parametrize(
    ("file", "output"),
    [
        ("link.csv", "t.csv"),
        ("t.csv", "link.csv"),
        ("folder/t.csv", "t.csv"),
        ("out.errors.jsonl", "out.csv"),
        ("done/_errors/1.jsonl", "done"),
    ],
)
def test_no_run_removes_its_input(tmp_path: Path, scored: Scored, file: str, output: str) -> None:
    """By whatever name it is called; what earlier runs left is an input as others are."""
    (tmp_path / "done" / "_errors").mkdir(parents=True)
    write_csv(table(3), tmp_path / "t.csv")
    for name in ("out.errors.jsonl", "done/_errors/1.jsonl"):
        write_jsonl(table(3), tmp_path / name)
    (tmp_path / "link.csv").symlink_to("t.csv")
    (tmp_path / "folder").symlink_to(".")
    before = (tmp_path / file).read_bytes()

    with pytest.raises(ScoringError, match="the output is the input"):
        scored(tmp_path / file, tmp_path / output, overwrite=True)

    assert (tmp_path / file).read_bytes() == before


def test_text_of_another_encoding_is_read_with_its_name(tmp_path: Path, scored: Scored) -> None:
    """As if it were UTF-8."""
    for encoding in ("utf-16", "cp1252"):
        (tmp_path / "t.csv").write_text("number,text,count\n1,né,1\n", encoding=encoding)
        scored(tmp_path / "t.csv", tmp_path / "out.csv", encoding=encoding, overwrite=True)
        assert (tmp_path / "out.csv").read_text() == 'sum,label\n2,"né"\n'


def test_formulas_are_escaped_on_request(tmp_path: Path, scored: Scored) -> None:
    """A cell that begins with = is run by a spreadsheet."""
    (tmp_path / "t.csv").write_text("number,text,count\n1,=1+1,1\n1,+a,1\n1,b,1\n")

    scored(tmp_path / "t.csv", tmp_path / "plain.csv")
    scored(tmp_path / "t.csv", tmp_path / "safe.csv", escape_formulas=True)

    assert (tmp_path / "plain.csv").read_text() == 'sum,label\n2,"=1+1"\n2,"+a"\n2,"b"\n'
    assert (tmp_path / "safe.csv").read_text() == 'sum,label\n2,"\'=1+1"\n2,"\'+a"\n2,"b"\n'


def test_floats_in_text_read_back_equal(tmp_path: Path, scored: Scored) -> None:
    """Bit by bit, of both precisions."""
    rng = np.random.default_rng(0)
    numbers = np.concatenate([rng.normal(size=500) * 10.0 ** rng.integers(-300, 300, 500), [5e-324, 0.1, 1e22, -0.0]])
    pq.write_table(
        pa.table({"number": numbers, "text": ["t"] * len(numbers), "count": pa.array(np.zeros(len(numbers), int))}),
        tmp_path / "t.parquet",
    )

    for name in ("out.parquet", "out.csv", "out.jsonl"):
        scored(tmp_path / "t.parquet", tmp_path / name)
        sums = np.array(read_back(tmp_path / name)["sum"].to_pylist(), float)
        np.testing.assert_array_equal(sums.view(np.uint64), (numbers + 0).view(np.uint64))


def test_binary_columns_have_no_form_in_text(tmp_path: Path, scored: Scored) -> None:
    """Refused before the first row."""
    pq.write_table(table(1).append_column("raw", [[b"\x00"]]), tmp_path / "t.parquet")

    with pytest.raises(WrongUsage, match='column "raw": binary has no form in csv'):
        scored(tmp_path / "t.parquet", tmp_path / "out.csv", keep=("raw",))


def test_a_key_that_appears_late_is_kept(tmp_path: Path, scored: Scored) -> None:
    """By name, or with all; values of JSON stay what they are in JSON, and become text elsewhere."""
    lines = [{"number": 1, "text": "a", "count": 1, "id": row} for row in range(300)]
    lines[-1]["note"] = {"x": [1, "y"]}
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, lines)))

    scored(tmp_path / "t.jsonl", tmp_path / "named.jsonl", keep=("id", "note"))
    scored(tmp_path / "t.jsonl", tmp_path / "all.parquet", keep=("all",))

    last = json.loads((tmp_path / "named.jsonl").read_text().splitlines()[-1])
    assert (last["id"], last["note"]) == (299, {"x": [1, "y"]})
    found = pq.read_table(tmp_path / "all.parquet")
    assert (found["id"][299].as_py(), found["note"][299].as_py(), found["note"][0].as_py()) == ("299", '{"x":[1,"y"]}', None)


def test_inputs_of_several_elements_are_lists_or_columns(tmp_path: Path, scored: Scored, chosen: Callable[..., None]) -> None:
    """Lists at any depth, columns named after their place, or all other columns."""
    wide = msgspec.structs.replace(NUMBER, shape=("batch", 2))
    chosen(release(wide, COUNT, outputs=[msgspec.structs.replace(SUM, shape=("batch", 2))]))

    class Wide(Adding):
        def infer(self, inputs: Any, clock: Any) -> Any:
            number, count = (np.frombuffer(each.raw, np.float64 if each.datatype == "FP64" else np.int64) for each in inputs)
            from splitserve.arrays import from_array

            return [from_array("sum", number.reshape(-1, 2) + count.reshape(-1, 1))]

    forms = {
        "lists": {"number": [[1.0, 2.0], [3.0, 4.0], [5.0]], "count": [1, 1, 1]},
        "deep": {"number": [[[1.0], [2.0]], [[3.0], [4.0]], [[5.0]]], "count": [1, 1, 1]},
        "places": {"number_1": [2.0, 4.0], "count": [1, 1], "number_0": [1.0, 3.0]},
        "others": {"b": [1.0, 3.0], "a": [2.0, 4.0], "count": [1, 1]},
    }
    for form, columns in forms.items():
        pq.write_table(pa.table(columns), tmp_path / f"{form}.parquet")
        mapping = {"*": "number", "count": "count"} if form == "others" else {}
        summary = scored(
            tmp_path / f"{form}.parquet", tmp_path / f"{form}.csv", mapping=mapping, engine=Here(Wide()), max_errors="50%"
        )
        assert (tmp_path / f"{form}.csv").read_text() == "sum_0,sum_1\n2,3\n4,5\n", form
        assert summary.errors == (form in ("lists", "deep"))


def test_a_model_whose_rows_depend_on_each_other_gets_a_file_in_one_call(
    tmp_path: Path, scored: Scored, chosen: Callable[..., None]
) -> None:
    """Not more, and not less."""
    chosen(release(is_row_wise=False))
    (tmp_path / "in").mkdir()
    pq.write_table(table(20_000), tmp_path / "in" / "1.parquet", row_group_size=3000)
    pq.write_table(table(7), tmp_path / "in" / "2.parquet")
    scorer = Adding()

    scored(tmp_path / "in", tmp_path / "out.parquet", engine=Here(scorer), shard_rows=8192)

    assert scorer.calls == [20_000, 7]
