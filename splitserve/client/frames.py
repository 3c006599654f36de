"""Arrays -> a pandas DataFrame. The only module of the client that imports pandas."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from splitserve.arrays import Array


def to_frame(outputs: Mapping[str, Array], names: Mapping[str, Sequence[str]], index: Any) -> Any:
    """As `splitserve.client.Answer.to_frame`."""
    if unknown := names.keys() - outputs.keys():
        raise ValueError(f"names: expected some of the outputs {list(outputs)}, got {sorted(unknown)}")
    columns: dict[str, Any] = {}
    for output, array in outputs.items():
        columns |= _columns(output, array, names.get(output))
    if len({len(values) for values in columns.values()}) > 1:
        raise ValueError(f"the outputs have different numbers of rows: {[len(array) for array in outputs.values()]}")
    frame = pd.DataFrame(columns)
    if index is not None and len(index) == len(frame):
        frame.index = index
    return frame


def _columns(output: str, array: Array, names: Sequence[str] | None) -> dict[str, Any]:
    if array.ndim == 0:
        raise ValueError(f'output "{output}" is a scalar and has no rows')
    values = _as_text(array) if array.dtype.kind == "O" else array
    if array.ndim == 1 or array.shape[1:] == (1,):
        names = names or (output,)
    n_columns = int(np.prod(array.shape[1:]))
    names = names or [f"{output}_{position}" for position in range(n_columns)]
    if len(names) != n_columns:
        raise ValueError(f'output "{output}": expected {n_columns} names, got {len(names)}')
    table = values.reshape(len(array), n_columns)
    return {name: table[:, position] for position, name in enumerate(names)}


def _as_text(array: Array) -> Array:
    try:
        return np.array([element.decode() for element in array.ravel()], dtype=np.object_).reshape(array.shape)
    except UnicodeDecodeError:
        return array
