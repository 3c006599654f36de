"""polars and pyarrow: their frames in, their frames out; and plain records."""

from __future__ import annotations

import base64
import json
from datetime import date
from typing import Any

import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pytest

from splitserve.arrays import objects, to_array
from splitserve.client import Answer
from splitserve.client.encoding import index_of, is_table, to_columns
from splitserve.signature import TensorSpec

NAN = float("nan")
SPECS = [
    TensorSpec("age", "FP64", ("batch", 1)),
    TensorSpec("sex", "BYTES", ("batch", 1)),
    TensorSpec("n", "INT64", ("batch", 1)),
    TensorSpec("is", "BOOL", ("batch", 1)),
    TensorSpec("day", "BYTES", ("batch", 1)),
]
COLUMNS: dict[str, list[Any]] = {
    "age": [1.5, None],
    "sex": ["m", None],
    "n": [2**53 + 1, 7],
    "is": [True, False],
    "day": [date(2026, 12, 1), None],
}
EXPECTED = {
    "age": [[1.5], [NAN]],
    "sex": [[b"m"], [b""]],
    "n": [[2**53 + 1], [7]],
    "is": [[True], [False]],
    "day": [[b"2026-12-01"], [b""]],
}


def sent(inputs: Any, specs: list[TensorSpec] = SPECS) -> dict[str, Any]:
    return {each.name: to_array(each.tensor()).tolist() for each in to_columns(inputs, specs)}


FRAMES: dict[str, Any] = {
    "polars": pl.DataFrame(COLUMNS),
    "polars, lazy": pl.DataFrame(COLUMNS).lazy(),
    "polars, with categories": pl.DataFrame(COLUMNS).with_columns(pl.col("sex").cast(pl.Categorical)),
    "series of polars": {name: pl.Series(values) for name, values in COLUMNS.items()},
    "pyarrow table": pa.table(COLUMNS),
    "pyarrow table in pieces": pa.concat_tables([pa.table(COLUMNS).slice(0, 1), pa.table(COLUMNS).slice(1)]),
    "pyarrow batch": pa.RecordBatch.from_pydict(COLUMNS),
    "pyarrow, with a dictionary": pa.table({**COLUMNS, "sex": pa.array(COLUMNS["sex"]).dictionary_encode()}),
    "arrays of pyarrow": {name: pa.array(values) for name, values in COLUMNS.items()},
    "pandas on pyarrow": pa.table(COLUMNS).to_pandas(types_mapper=pd.ArrowDtype),
}


@pytest.mark.parametrize("name", FRAMES)
def test_frames_are_sent_by_column(name: str) -> None:
    """Missing values are missing, and no number is rounded."""
    np.testing.assert_equal(sent(FRAMES[name]), EXPECTED)


@pytest.mark.parametrize("name", ["polars", "polars, lazy", "pyarrow table", "pyarrow batch"])
def test_frames_are_tables(name: str) -> None:
    """Long ones are sent in several requests. Only pandas' have an index."""
    assert is_table(FRAMES[name])
    assert index_of(FRAMES[name]) is None


@pytest.mark.parametrize("frame", [pl.DataFrame({"b": [2.0], "a": [1.0]}), pa.table({"b": [2.0], "a": [1.0]})])
def test_their_columns_are_matched_by_name_for_an_only_input(frame: Any) -> None:
    """As those of pandas."""
    [column] = to_columns(frame, [TensorSpec("features", "FP32", ("batch", 2))], columns=("a", "b"))

    assert column.array.tolist() == [[1, 2]]


ANSWER = Answer(
    {
        "label": objects(["Adelie", "Gentoo"], (2,)),
        "probabilities": np.array([[0.25, 0.75], [np.nan, np.inf]], np.float32),
        "raw": objects([b"\xff", b"a"], (2, 1)),
        "n": np.array([[1, 2], [3, 4]]),
    },
    model="m",
    version="1.1",
    labels={"probabilities": ["no", "yes"]},
)
NAMES = ["label", "probabilities_no", "probabilities_yes", "raw", "n_0", "n_1"]


def test_answers_become_frames_of_each_library() -> None:
    """With the same columns: those of probabilities are named after the classes."""
    frame, polars, table = ANSWER.to_frame(), ANSWER.to_polars(), ANSWER.to_arrow()

    assert list(frame) == polars.columns == table.column_names == NAMES
    assert polars["label"].to_list() == table["label"].to_pylist() == ["Adelie", "Gentoo"]
    assert polars["n_1"].to_list() == table["n_1"].to_pylist() == [2, 4]
    assert polars["raw"].to_list() == table["raw"].to_pylist() == [b"\xff", b"a"]
    assert (polars["probabilities_no"].dtype, table["probabilities_no"].type) == (pl.Float32, pa.float32())
    assert ANSWER.to_polars(names={"n": ["x", "y"]}).columns[-2:] == ["x", "y"]


def test_answers_become_records_that_json_can_hold() -> None:
    """Numbers that it cannot are None, bytes that are no text are base64."""
    records = ANSWER.to_records()

    assert json.loads(json.dumps(records, allow_nan=False)) == records
    assert [list(record) for record in records] == [NAMES, NAMES]
    assert [record["probabilities_no"] for record in records] == [0.25, None]
    assert base64.b64decode(records[0]["raw"]) == b"\xff"
    assert Answer({"y": np.zeros((0, 2))}, model="m", version="1").to_records() == []
