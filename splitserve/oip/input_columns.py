"""The names of the columns of a model's only input, as its training data had them.

Such an input is an array, whose columns have no names on the wire. The model's metadata lists them, so that clients can put a
frame's columns in that order, whatever order they are in.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from splitserve.oip.messages import ModelMetadata

INPUT_COLUMNS = "input_columns"
"""The property of a model's metadata with their names, a JSON list."""


def encode_columns(names: Sequence[str]) -> str:
    """The property; "" if they are unknown."""
    return msgspec.json.encode(names).decode() if names else ""


def input_columns(metadata: ModelMetadata) -> tuple[str, ...]:
    """The names in the property."""
    text = metadata.properties.get(INPUT_COLUMNS)
    try:
        return msgspec.json.decode(text, type=tuple[str, ...]) if text else ()
    except msgspec.DecodeError:  # another maker's property of that name
        return ()
