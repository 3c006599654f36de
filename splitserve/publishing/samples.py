"""Which rows of the training data are kept as golden samples, and which a publication is checked on."""

from __future__ import annotations

from typing import Any

import numpy as np

from splitserve.runtimes.rows import Rowset, is_missing

N_GOLDEN = 16
"""Rows spread evenly over the data, before those that are added so that each category and a missing value occurs."""

N_GOLDEN_MAX = 64
N_SEARCHED = 20_000
"""Categories and missing values are looked for in the first rows only, so many of them."""

N_CHECKED = 1000
"""At most so many rows, spread evenly, are run through the split and compared with the original pipeline."""


def spread(n_rows: int, n_wanted: int) -> list[int]:
    """Row numbers spread evenly over the data, the first and the last among them."""
    return sorted({int(index) for index in np.linspace(0, n_rows - 1, min(n_wanted, n_rows)).round()})


def golden_rows(rows: Rowset) -> list[int]:
    """Row numbers of the golden samples: spread evenly, then the first row of each category and missing value by column.

    Categories are texts, truth values, and whatever a column of pandas' categorical dtype holds.
    """
    n_rows = len(rows)
    chosen = dict.fromkeys(spread(n_rows, N_GOLDEN))
    for values in _columns(rows):
        first_rows: dict[Any, int] = {}
        for index, value in enumerate(values[:N_SEARCHED]):
            first_rows.setdefault("missing" if is_missing(value) else value if _is_category(value) else "present", index)
        for index in first_rows.values():
            if len(chosen) < N_GOLDEN_MAX:
                chosen.setdefault(index)
    return sorted(chosen)


def take(rows: Rowset, indices: list[int]) -> Rowset:
    """These rows, in this order, as the same kind of data."""
    return rows.iloc[indices] if hasattr(rows, "iloc") else rows[indices]


def _columns(rows: Rowset) -> list[list[Any]]:
    if hasattr(rows, "columns"):
        return [_values(rows[name]) for name in rows.columns]
    if rows.dtype.kind not in "OSUfb" or rows.ndim > 2:
        return []
    return [column.tolist() for column in (rows.T if rows.ndim == 2 else [rows])]


def _values(column: Any) -> list[Any]:
    """A column's values; those of a categorical one as text, whatever they are."""
    values: list[Any] = column.tolist()
    if str(column.dtype) == "category":
        return [value if is_missing(value) else str(value) for value in values]
    return values


def _is_category(value: Any) -> bool:
    return isinstance(value, str | bytes | bool)
