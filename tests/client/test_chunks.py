"""Tables cut into requests, and answers joined."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from splitserve.client.chunks import CHUNK_BYTES, cut, has_rows, join
from splitserve.client.encoding import InputColumn, to_columns
from splitserve.errors import PairMismatch
from splitserve.signature import TensorSpec
from splitserve.testing import signature


@given(st.integers(0, 50), st.integers(1, 60))
def test_every_row_is_in_one_chunk_in_order(n_rows: int, chunk_rows: int) -> None:
    """None twice, none missing, none in a chunk of more rows than said; no rows are one request."""
    chunks = cut(to_columns({"x": np.zeros((n_rows, 2))}, None), chunk_rows)

    assert [row for chunk in chunks for row in chunk] == list(range(n_rows))
    assert all(len(chunk) <= chunk_rows for chunk in chunks)
    assert len(chunks) == max(1, -(-n_rows // chunk_rows))


@given(st.lists(st.text(max_size=5), min_size=1, max_size=30), st.integers(1, 8))
def test_chunks_joined_are_the_original(texts: list[str], chunk_rows: int) -> None:
    """Of whatever shape and datatype."""
    columns = to_columns({"t": texts, "x": np.arange(len(texts) * 6).reshape(-1, 3, 2)}, None)
    chunks = cut(columns, chunk_rows)

    parts = [{column.name: column.array[chunk.start : chunk.stop] for column in columns} for chunk in chunks]
    joined = join(parts, chunks)

    for column in columns:
        np.testing.assert_array_equal(joined[column.name], column.array)


@given(st.integers(1, 4_000), st.integers(1, 2_000))
def test_chunks_are_cut_by_their_bytes(row_floats: int, n_rows: int) -> None:
    """As many rows as a mebibyte holds, at least one."""
    array = np.broadcast_to(np.float32(0), (n_rows, row_floats))

    sizes = [len(chunk) * row_floats * 4 for chunk in cut([InputColumn("x", "FP32", array)], 0)]

    assert all(size <= CHUNK_BYTES for size in sizes)
    assert all(size > CHUNK_BYTES - row_floats * 4 for size in sizes[:-1])


def test_long_text_makes_short_chunks() -> None:
    """The length of text is estimated from the first rows."""
    columns = to_columns({"t": ["x" * 10_000] * 500}, None)

    assert len(cut(columns, 0)) == 5


@pytest.mark.parametrize(
    ("shape", "is_by_row"), [(("batch", 2), True), ((-1, 2), True), (("batch",), False), ((4, 2), False), ((), False)]
)
def test_a_signature_says_whether_a_model_answers_by_row(shape: tuple[int | str, ...], is_by_row: bool) -> None:
    """A free leading dimension, beside others."""
    assert has_rows(signature("m", [TensorSpec("x", "FP32", shape)])) is is_by_row


def test_outputs_that_differ_between_chunks_are_a_mismatch() -> None:
    """Other names, or other inner shapes, do not make one whole."""
    chunks = [range(1), range(1, 2)]

    with pytest.raises(PairMismatch, match="rows 1 to 1: the outputs differ from those"):
        join([{"a": np.zeros(1)}, {"b": np.zeros(1)}], chunks)
    with pytest.raises(PairMismatch, match="have different shapes"):
        join([{"a": np.zeros((1, 2))}, {"a": np.zeros((1, 3))}], chunks)
