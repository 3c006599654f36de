"""Answers as DataFrames."""

from __future__ import annotations

import numpy as np
import pytest

from splitserve.arrays import objects
from splitserve.client import Answer


def frame_of(names: dict[str, list[str]] | None = None, **outputs: np.ndarray) -> dict[str, list[object]]:
    frame: dict[str, list[object]] = Answer(outputs, model="m", version="1").to_frame(names).to_dict("list")
    return frame


def test_values_are_columns_and_vectors_are_numbered_columns() -> None:
    """(n,) and (n, 1) have the output's name; (n, k) has numbers behind it; more dimensions count row-major."""
    assert frame_of(
        a=np.array([1, 2]), b=np.array([[3], [4]]), c=np.array([[5, 6], [7, 8]]), d=np.arange(8).reshape(2, 2, 2)
    ) == {
        "a": [1, 2],
        "b": [3, 4],
        "c_0": [5, 7],
        "c_1": [6, 8],
        "d_0": [0, 4],
        "d_1": [1, 5],
        "d_2": [2, 6],
        "d_3": [3, 7],
    }


def test_columns_can_be_named() -> None:
    """For example after a classifier's labels."""
    assert frame_of({"p": ["yes", "no"], "a": ["b"]}, p=np.array([[0.25, 0.75]]), a=np.array([1])) == {
        "yes": [0.25],
        "no": [0.75],
        "b": [1],
    }


def test_bytes_become_text_where_they_are_text() -> None:
    """Others stay bytes."""
    assert frame_of(t=objects([b"a", "ä".encode()], (2,)), r=objects([b"\xff", b"a"], (2,))) == {
        "t": ["a", "ä"],
        "r": [b"\xff", b"a"],
    }


def test_no_rows_make_an_empty_frame() -> None:
    """With its columns."""
    assert frame_of(label=np.empty(0), p=np.empty((0, 2))) == {"label": [], "p_0": [], "p_1": []}


@pytest.mark.parametrize(
    ("outputs", "names", "message"),
    [
        ({"a": np.array(1)}, {}, "scalar"),
        ({"a": np.zeros(1), "b": np.zeros(2)}, {}, "different numbers of rows"),
        ({"a": np.zeros((1, 2))}, {"a": ["one"]}, "expected 2 names, got 1"),
        ({"a": np.zeros(1)}, {"b": ["one"]}, "expected some of the outputs"),
    ],
)
def test_outputs_that_do_not_form_a_table_are_refused(
    outputs: dict[str, np.ndarray], names: dict[str, list[str]], message: str
) -> None:
    """The output is named."""
    with pytest.raises(ValueError, match=message):
        frame_of(names, **outputs)
