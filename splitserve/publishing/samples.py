"""Selects the rows of the training data that become golden samples, and those that a publication is checked on."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

import numpy as np

from splitserve.arrays import Array
from splitserve.runtimes.rows import Rowset, is_missing

N_GOLDEN = 16
"""Rows spread evenly over the data; more are added so that each category and a missing value occurs."""

N_GOLDEN_MAX = 64

N_CHECKED = 1000
"""At most this many rows, spread evenly, are run through the halves and compared with the pipeline."""

_MISSING = object()
"""Stands for a missing value among a column's categories."""

_Values = Any
"""A column: an array of numbers, or a list of anything."""


def spread(n_rows: int, n_wanted: int) -> list[int]:
    """Row numbers spread evenly over the data, the first and the last among them."""
    return sorted({int(index) for index in np.linspace(0, n_rows - 1, min(n_wanted, n_rows)).round()})


def golden_rows(rows: Rowset, learnt: Collection[str] = ()) -> list[int]:
    """Row numbers of the golden samples: spread evenly, then for each column rows with values that are not covered yet.

    These are a missing value and each category: text, booleans, values of pandas' categorical dtype, and numbers that the
    transforms were fitted on as categories. If they exceed `N_GOLDEN_MAX`, missing values come first, and columns with few
    categories before those with many.

    Args:
        rows: the training data.
        learnt: the categories that the transforms were fitted on, as text.
    """
    columns = _columns(rows)
    chosen = dict.fromkeys(spread(len(rows), N_GOLDEN))
    shown = [{_category(values[row], learnt) for row in chosen} for values in columns]
    for number, category, row in _wanted(columns, learnt):
        if len(chosen) == N_GOLDEN_MAX:
            break
        if category not in shown[number]:
            chosen[row] = None
            for categories, values in zip(shown, columns, strict=True):
                categories.add(_category(values[row], learnt))
    return sorted(chosen)


def take(rows: Rowset, indices: list[int]) -> Rowset:
    """These rows, in this order, as the same kind of data."""
    return rows.iloc[indices] if hasattr(rows, "iloc") else rows[indices]


def _wanted(columns: list[_Values], learnt: Collection[str]) -> list[tuple[int, Any, int]]:
    """Categories to cover, most important first: the column's number, the category, the first row that has it."""
    ranked = []
    for number, values in enumerate(columns):
        found = _first_rows(values, learnt)
        ranked += [((category is not _MISSING, len(found), number, row), category) for category, row in found.items()]
    return [(number, category, row) for (_, _, number, row), category in sorted(ranked, key=lambda each: each[0])]


def _first_rows(values: _Values, learnt: Collection[str]) -> dict[Any, int]:
    """The first row of each category of a column, for at most `N_GOLDEN_MAX` categories and the missing value."""
    found: dict[Any, int] = {}
    for row, value in _distinct_numbers(values, learnt) if isinstance(values, np.ndarray) else enumerate(values):
        category = value if isinstance(value, str) else _category(value, learnt)
        if category is not None and category not in found and (len(found) <= N_GOLDEN_MAX or category is _MISSING):
            found[category] = row
    return found


def _distinct_numbers(values: Array, learnt: Collection[str]) -> Iterator[tuple[int, Any]]:
    """The first row of a missing value, and of each number if there are no more of them than ``learnt`` categories."""
    if values.dtype.kind == "f":
        yield from ((int(row), np.nan) for row in np.flatnonzero(np.isnan(values))[:1])
    if learnt:
        numbers, rows = np.unique(values, return_index=True)
        if len(numbers) <= len(learnt) + 1:  # and possibly a missing value
            yield from zip(rows.tolist(), numbers, strict=True)


def _category(value: Any, learnt: Collection[str]) -> Any:
    """The category of a value; None for a number that is not a category."""
    if isinstance(value, str | bytes | bool):
        return value
    if is_missing(value):
        return _MISSING
    return name if learnt and (name := str(value)) in learnt else None


def _columns(rows: Rowset) -> list[_Values]:
    if hasattr(rows, "columns"):
        return [_values(rows.iloc[:, number]) for number in range(rows.shape[1])]
    if rows.dtype.kind not in "OSUfbiu" or rows.ndim > 2:
        return []
    return [_listed(column) for column in (rows.T if rows.ndim == 2 else [rows])]


def _values(column: Any) -> _Values:
    """A column's values; those of a categorical column as text."""
    if str(column.dtype) == "category":
        return [value if is_missing(value) else str(value) for value in column.tolist()]
    return _listed(column.to_numpy()) if isinstance(column.dtype, np.dtype) else column.tolist()


def _listed(values: Any) -> _Values:
    """An array of numbers itself, anything else as a list."""
    return values if values.dtype.kind in "fiu" else values.tolist()
