"""Values of other libraries -> Python's and numpy's: polars, pyarrow, scipy.sparse, PIL, masked arrays, paths.

They are recognised by the name of their module, so that none of these libraries is imported.
"""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any, Literal

import numpy as np

Kind = Literal["polars frame", "polars series", "arrow table", "arrow array", "sparse", "image", ""]


def foreign_kind(value: Any) -> Kind:
    """What it is, if it is of another library."""
    kind = type(value)
    library = kind.__module__.partition(".")[0]
    if library == "polars":
        return "polars series" if kind.__name__ == "Series" else "polars frame"
    if library == "pyarrow":
        return "arrow table" if hasattr(value, "column_names") or hasattr(value, "schema") else "arrow array"
    if library == "scipy" and hasattr(value, "toarray"):
        return "sparse"
    if library == "PIL" and hasattr(value, "save"):
        return "image"
    return ""


def to_known_kind(inputs: Any) -> Any:
    """Frames and tables as a dict of columns, sparse matrices as arrays; anything else as it is."""
    match foreign_kind(inputs):
        case "polars frame":
            frame = inputs.collect() if hasattr(inputs, "collect") else inputs
            return {name: frame[name] for name in frame.columns}
        case "arrow table":
            return {name: inputs.column(place) for place, name in enumerate(inputs.schema.names)}
        case "sparse":
            return inputs.toarray()
    return inputs


def to_plain(values: Any, *, is_text: bool) -> Any:
    """The values of an input as numpy and pandas have them, missing ones as None or NaN.

    Args:
        values: of one input.
        is_text: whether the model takes bytes: then images and files are sent as bytes, not as pixels.
    """
    if isinstance(values, np.ma.MaskedArray):
        return _unmasked(values)
    match foreign_kind(values):
        case "polars series":
            return values.to_numpy() if values.dtype.is_numeric() else values.to_list()
        case "arrow array":
            return _from_arrow(values)
        case "sparse":
            return values.toarray()
    if isinstance(values, bytearray | memoryview | os.PathLike) or foreign_kind(values) == "image":
        plain = _element(values, is_text)
        return [plain] if isinstance(plain, bytes) else plain
    if isinstance(values, list | tuple) and any(_has_to_be_converted(kind) for kind in {type(value) for value in values}):
        return [_element(value, is_text) for value in values]
    return values


def _unmasked(array: Any) -> Any:
    """An array with None where it is masked."""
    if not np.ma.is_masked(array):
        return np.asarray(array.data)
    plain = np.array(array.data, dtype=np.object_)
    plain[np.ma.getmaskarray(array)] = None
    return plain


def _from_arrow(values: Any) -> Any:
    kind = str(values.type)
    is_number = kind.startswith(("int", "uint", "float", "double", "halffloat"))
    return (
        values.to_numpy(zero_copy_only=False)
        if is_number and hasattr(values, "type") and _is_array(values)
        else values.to_pylist()
    )


def _is_array(values: Any) -> bool:
    """Whether it is an Array of Arrow: a ChunkedArray has another signature."""
    return not hasattr(values, "chunks")


def _has_to_be_converted(kind: type) -> bool:
    return (
        issubclass(kind, bytearray | memoryview | os.PathLike | np.ma.MaskedArray) or kind.__module__.partition(".")[0] == "PIL"
    )


def _element(value: Any, is_text: bool) -> Any:
    if isinstance(value, np.ma.MaskedArray):
        return None if value is np.ma.masked else _unmasked(value).tolist()
    if isinstance(value, bytearray | memoryview):
        return bytes(value)
    if isinstance(value, os.PathLike):
        return Path(value).read_bytes() if is_text else os.fspath(value)
    if foreign_kind(value) == "image":
        return _encoded(value) if is_text else np.asarray(value)
    return value


def _encoded(image: Any) -> bytes:
    """The bytes of the file that it was read from, if they are known, else as PNG, which changes no pixel."""
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()
