"""Splits tables into requests, and joins the rows of the responses. Knows no transport."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from splitserve.arrays import Array
from splitserve.client.encoding import InputColumn
from splitserve.errors import PairMismatch
from splitserve.oip.messages import ModelMetadata
from splitserve.signature import TensorSpec

CHUNK_BYTES = 1024 * 1024
"""Approximate size of a request: large enough that rows dominate its cost, small enough to be merged and retried."""


def cut(columns: Sequence[InputColumn], chunk_rows: int) -> list[range]:
    """The rows of each request, in order; at least one request, even without rows.

    Args:
        columns: of the table, all with the same number of rows.
        chunk_rows: rows of a request at most; 0: as many as fit into about `CHUNK_BYTES`.
    """
    n_rows = len(columns[0].array)
    if n_rows < 2:
        return [range(n_rows)]
    if not chunk_rows:
        row_bytes = sum(column.n_bytes for column in columns) / max(n_rows, 1)
        chunk_rows = max(1, int(CHUNK_BYTES / max(row_bytes, 1)))
    return [range(start, min(start + chunk_rows, n_rows)) for start in range(0, max(n_rows, 1), chunk_rows)]


def can_be_cut(columns: Sequence[InputColumn]) -> bool:
    """Whether the inputs are a table: all have the same number of rows."""
    return bool(columns) and all(column.array.ndim for column in columns) and len({len(each.array) for each in columns}) == 1


def has_rows(signature: ModelMetadata | None) -> bool:
    """Whether the rows of a model are independent by its signature: every leading dimension is variable.

    And no input has a single dimension, which may as well be a sequence.
    """
    if signature is None:
        return False
    return all(len(spec.shape) > 1 for spec in signature.inputs) and all(
        _has_variable_rows(spec) for spec in (*signature.inputs, *signature.outputs)
    )


def _has_variable_rows(spec: TensorSpec) -> bool:
    return bool(spec.shape) and (not isinstance(spec.shape[0], int) or spec.shape[0] < 0)


def join(parts: Sequence[dict[str, Array]], chunks: Sequence[range]) -> dict[str, Array]:
    """The outputs of all chunks, joined in order.

    Raises:
        PairMismatch: a response has another number of rows than were sent, or other outputs than the first.
    """
    if len(parts) == 1:
        return parts[0]
    for part, rows in zip(parts, chunks, strict=True):
        if part.keys() != parts[0].keys():
            raise PairMismatch(f"rows {rows.start} to {rows.stop - 1}: the outputs differ from those of the first rows")
        for name, array in part.items():
            if array.ndim == 0 or len(array) != len(rows):
                raise PairMismatch(
                    f'rows {rows.start} to {rows.stop - 1}: output "{name}": expected {len(rows)} rows, '
                    f"got shape {list(array.shape)}"
                )
    try:
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    except ValueError as error:
        raise PairMismatch(f"the outputs of the chunks have different shapes: {error}") from None
