"""What applications have at hand, as inputs: never silently another answer."""

from __future__ import annotations

import io
from datetime import datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import scipy.sparse
from PIL import Image

from splitserve import Client
from splitserve.arrays import to_array
from splitserve.client.encoding import to_columns
from splitserve.errors import InvalidInput
from splitserve.signature import TensorSpec

NAN = float("nan")
AGE, SEX = TensorSpec("age", "FP64", ("batch", 1)), TensorSpec("sex", "BYTES", ("batch", 1))
TABLE = [AGE, SEX]
FEATURES = [TensorSpec("features", "FP32", ("batch", 3))]
PICTURE = [TensorSpec("image", "UINT8", ("batch", 2, 2))]
FILE = [TensorSpec("image", "BYTES", ("batch", 1))]


def sent(inputs: Any, specs: list[TensorSpec], **options: Any) -> dict[str, Any]:
    """The tensors that inputs become, by name."""
    return {each.name: to_array(each.tensor()).tolist() for each in to_columns(inputs, specs, **options)}


ROWS = {"age": [[1.0], [NAN]], "sex": [[b"m"], [b""]]}

TABLES: dict[str, Any] = {
    "a dict of columns": {"age": [1, None], "sex": ["m", None]},
    "a frame": pd.DataFrame({"age": [1, None], "sex": ["m", None]}),
    "a list of dicts": [{"age": 1, "sex": "m"}, {"age": None, "sex": None}],
    "dicts without what is missing": [{"age": 1, "sex": "m"}, {}],
    "a list of lists": [[1, "m"], [None, None]],
    "decimals": {"age": [Decimal("1"), None], "sex": ["m", None]},
    "masked arrays": {
        "age": np.ma.array([1.0, 7.0], mask=[False, True]),
        "sex": np.ma.array(["m", "f"], mask=[False, True], dtype=object),
    },
    "masked elements": {"age": [1.0, np.ma.masked], "sex": ["m", np.ma.masked]},
}


@pytest.mark.parametrize("name", TABLES)
def test_tables_are_sent_by_column(name: str) -> None:
    """Missing values are missing, however they are marked."""
    np.testing.assert_equal(sent(TABLES[name], TABLE), ROWS)


@pytest.mark.parametrize("row", [{"age": 1, "sex": "m"}, pd.Series({"age": 1, "sex": "m"}), [1, "m"], (1, "m")])
def test_one_row_needs_no_list_around_it(row: Any) -> None:
    """A dict of values, a row of a frame, or its values in the order of the signature."""
    assert sent(row, TABLE) == {"age": [[1.0]], "sex": [[b"m"]]}


def test_a_masked_integer_is_not_its_filling() -> None:
    """An integer input cannot be missing: it is refused rather than sent as what the mask hides."""
    with pytest.raises(InvalidInput, match="element 1 is nan"):
        sent({"n": np.ma.array([1, 7], mask=[False, True])}, [TensorSpec("n", "INT64", ("batch", 1))])
    assert sent({"n": np.ma.array([1, 7])}, [TensorSpec("n", "INT64", ("batch", 1))]) == {"n": [[1], [7]]}


ARRAYS: dict[str, Any] = {
    "an array": np.array([[1, 2, 3]]),
    "a bare row": [1, 2, 3],
    "a bare array": np.array([1.0, 2.0, 3.0]),
    "a series": pd.Series([1, 2, 3]),
    "a sparse matrix": scipy.sparse.csr_matrix([[1, 2, 3]]),
    "a sparse array": scipy.sparse.coo_array([[1, 2, 3]]),
    "decimals": [[Decimal(1), Decimal(2), Decimal(3)]],
    "a masked array without a mask": np.ma.array([[1, 2, 3]]),
}


@pytest.mark.parametrize("name", ARRAYS)
def test_rows_without_names_are_the_only_input(name: str) -> None:
    """With or without the dimension of rows."""
    assert sent(ARRAYS[name], FEATURES) == {"features": [[1, 2, 3]]}


def test_decimals_and_times_keep_their_values() -> None:
    """Whole decimals exactly, also beyond a float; times as ISO 8601."""
    integers = [TensorSpec("n", "INT64", ("batch", 1))]
    texts = [TensorSpec("t", "BYTES", ("batch", 1))]

    assert sent({"n": [Decimal(2**53 + 1)]}, integers) == {"n": [[2**53 + 1]]}
    assert sent({"t": [datetime(2026, 12, 1, 12)]}, texts) == {"t": [[b"2026-12-01T12:00:00"]]}
    with pytest.raises(InvalidInput, match="INT64 cannot represent"):
        sent({"n": [Decimal("0.5")]}, integers)


COLUMNS = ("a", "b", "c")
SHUFFLED = pd.DataFrame({"c": [3.0], "a": [1.0], "b": [2.0]})


@pytest.mark.parametrize("rows", [SHUFFLED, SHUFFLED.to_dict("list"), SHUFFLED.to_dict("records"), SHUFFLED.iloc[0]])
def test_columns_of_an_only_input_are_matched_by_name(rows: Any) -> None:
    """The model knows the names that its training data had."""
    assert sent(rows, FEATURES, columns=COLUMNS) == {"features": [[1, 2, 3]]}


def test_columns_that_do_not_match_are_refused() -> None:
    """Missing ones always, others unless they are to be dropped."""
    with pytest.raises(InvalidInput, match='expected the columns "a", "b", "c", missing "a"'):
        sent(SHUFFLED.rename(columns={"a": "z"}), FEATURES, columns=COLUMNS)
    with pytest.raises(InvalidInput, match='got also "id"'):
        sent(SHUFFLED.assign(id=7), FEATURES, columns=COLUMNS)
    assert sent(SHUFFLED.assign(id=7), FEATURES, columns=COLUMNS, extra="drop") == {"features": [[1, 2, 3]]}


def test_columns_whose_order_is_unknown_are_warned_of() -> None:
    """They go by position: the caller has to know. Frames with numbered columns, and arrays, have no names to go by."""
    with pytest.warns(UserWarning, match="in the order c, a, b"):
        assert sent(SHUFFLED, FEATURES) == {"features": [[3, 1, 2]]}
    assert sent(pd.DataFrame([[3, 1, 2]]), FEATURES) == {"features": [[3, 1, 2]]}


def test_columns_that_the_model_does_not_have_are_dropped_on_request() -> None:
    """By default they are sent, and the server refuses them."""
    rows = {"age": [1], "sex": ["m"], "id": [object()]}

    assert sent(rows, TABLE, extra="drop") == {"age": [[1.0]], "sex": [[b"m"]]}
    with pytest.raises(InvalidInput, match='input "id"'):
        sent(rows, TABLE)


PIXELS = np.array([[0, 50], [100, 255]], np.uint8)


def png() -> bytes:
    file = io.BytesIO()
    Image.fromarray(PIXELS).save(file, "PNG")
    return file.getvalue()


@pytest.mark.parametrize(
    "form", [PIXELS, PIXELS[np.newaxis], Image.fromarray(PIXELS), [Image.fromarray(PIXELS)], {"image": PIXELS}]
)
def test_images_as_pixels(form: Any) -> None:
    """One, or a list of them."""
    assert sent(form, PICTURE) == {"image": [PIXELS.tolist()]}


def test_images_as_files(tmp_path: Path) -> None:
    """Bytes as they are; a path is read; pixels are encoded without a loss."""
    path = tmp_path / "image.png"
    path.write_bytes(png())

    for form in (png(), bytearray(png()), memoryview(png()), path, [path], [bytearray(png())]):
        assert sent(form, FILE) == {"image": [[png()]]}
    [[encoded]] = sent(Image.fromarray(PIXELS), FILE)["image"]
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(encoded))), PIXELS)


def test_an_element_is_named_by_its_row() -> None:
    """Of the whole input."""
    with pytest.raises(InvalidInput, match="row 1, element 2 is 300"):
        sent([[1, 2, 3], [4, 5, 300]], [TensorSpec("x", "UINT8", ("batch", 3))])


@pytest.mark.parametrize("model", ["", None, 7])
@pytest.mark.parametrize("url", ["http://127.0.0.1:1", "127.0.0.1:1"])
def test_what_is_no_name_of_a_model_is_refused_before_anything_is_sent(url: str, model: Any) -> None:
    """The same over both protocols."""
    with Client(url) as client, pytest.raises(ValueError, match="model: expected the name of a model"):
        client.infer(model, [[1.0]])
