"""How many rows go into one request, and the answers' rows back into one whole. Knows no transport."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from splitserve.arrays import Array
from splitserve.client.encoding import InputColumn
from splitserve.errors import PairMismatch
from splitserve.oip.messages import ModelMetadata
from splitserve.signature import TensorSpec

CHUNK_BYTES = 1024 * 1024
"""About how much goes into one request: enough that its cost is the rows', little enough to be merged, retried and waited for."""


def cut(columns: Sequence[InputColumn], chunk_rows: int) -> list[range]:
    """The rows of each request, in order; at least one request, be there rows or not.

    Args:
        columns: of the table, with as many rows each.
        chunk_rows: how many at most; 0: as many as about `CHUNK_BYTES` hold.
    """
    n_rows = len(columns[0].array)
    if not chunk_rows:
        row_bytes = sum(column.n_bytes for column in columns) / max(n_rows, 1)
        chunk_rows = max(1, int(CHUNK_BYTES / max(row_bytes, 1)))
    return [range(start, min(start + chunk_rows, n_rows)) for start in range(0, max(n_rows, 1), chunk_rows)]


def can_be_cut(columns: Sequence[InputColumn]) -> bool:
    """Whether the inputs are a table: as many rows in each."""
    return bool(columns) and all(column.array.ndim for column in columns) and len({len(each.array) for each in columns}) == 1


def has_rows(signature: ModelMetadata | None) -> bool:
    """Whether a signature says that the model answers row by row: every leading dimension is free.

    And it is not the only one of an input: that may as well be a sequence.
    """
    if signature is None:
        return False
    return all(len(spec.shape) > 1 for spec in signature.inputs) and all(
        _is_free(spec) for spec in (*signature.inputs, *signature.outputs)
    )


def _is_free(spec: TensorSpec) -> bool:
    return bool(spec.shape) and spec.wire_shape[0] == -1


def join(parts: Sequence[dict[str, Array]], chunks: Sequence[range]) -> dict[str, Array]:
    """The outputs of all chunks, in their order.

    Raises:
        PairMismatch: an answer has another number of rows than were sent, or other outputs than the first.
    """
    if len(parts) == 1:
        return parts[0]
    for part, rows in zip(parts, chunks, strict=True):
        if part.keys() != parts[0].keys():
            raise PairMismatch(f"rows {rows.start} to {rows.stop - 1}: the outputs are not those of the first rows")
        for name, array in part.items():
            if array.ndim == 0 or len(array) != len(rows):
                raise PairMismatch(
                    f'rows {rows.start} to {rows.stop - 1}: output "{name}" has shape {list(array.shape)} for {len(rows)} rows'
                )
    try:
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    except ValueError as error:
        raise PairMismatch(f"the outputs of the chunks are not of one shape: {error}") from None
