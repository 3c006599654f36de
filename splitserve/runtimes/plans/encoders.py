"""Operations on categories: text or numbers, looked up in tables."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Any

import msgspec
import numpy as np

from splitserve.arrays import Array
from splitserve.runtimes.plans.layouts import Layout, Operation, PlanError, Run, StepArrays, block, dtype_of, numbers, one, refuse

Codes = Callable[[Any], list[Any]]
"""A value -> for each of its columns the codes of its elements; refuses unknown categories."""


class Words(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The categories of a column of text: ``words`` have the codes 0, 1, 2 …; then come, one code each and if so marked, the
    missing value ``none``, the missing value ``nan``, and all ``unknown`` ones, which are refused if not so marked.
    """

    words: tuple[str, ...]
    none: bool = False
    nan: bool = False
    unknown: bool = False

    @property
    def n_codes(self) -> int:
        return len(self.words) + self.none + self.nan + self.unknown

    def table(self) -> dict[Any, int]:
        """Raises:
        PlanError: a word occurs twice, or there is no code.
        """
        known = [*self.words, *([None] if self.none else []), *([np.nan] if self.nan else [])]
        table: dict[Any, int] = {word: code for code, word in enumerate(known)}
        if len(table) != len(known) or not self.n_codes:
            raise PlanError("expected categories, each once")
        return table


class Numbers(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The categories of a column of numbers: ``n_known`` of the array ``categories``, ascending, have the codes 0, 1, 2 …; then
    NaN if ``nan``, and all ``unknown`` ones, as of `Words`.
    """

    n_known: int
    nan: bool = False
    unknown: bool = False

    @property
    def n_codes(self) -> int:
        return self.n_known + self.nan + self.unknown


def _codes_of_text(tables: Sequence[Words], layout: Layout, first: int) -> Codes:
    if layout.width != len(tables):
        raise PlanError(f"expected {len(tables)} columns, got {layout.width}")
    columns = [(words.table(), words.n_codes - 1 if words.unknown else None) for words in tables]

    def codes(value: Any) -> list[Any]:
        found: list[Any] = []
        for number, ((table, other), column) in enumerate(zip(columns, value, strict=True)):
            if other is not None:
                found.append([table.get(each, other) for each in column])
                continue
            try:
                found.append([table[each] for each in column])
            except KeyError:
                _refuse_unknown([each for each in dict.fromkeys(column) if each not in table], first + number)
        return found

    return codes


def _codes_of_numbers(tables: Sequence[Numbers], layout: Layout, categories: Array, first: int) -> Codes:
    n_known = [table.n_known for table in tables]
    if layout.width != len(tables) or min(n_known) < 0 or sum(n_known) != len(categories):
        raise PlanError(f"expected {len(tables)} columns of {sum(n_known)} categories, got {layout.width} and {len(categories)}")
    if min(table.n_codes for table in tables) < 1:
        raise PlanError("expected categories, each once")
    ends = np.cumsum([0, *n_known]).tolist()
    columns = [categories[start:end] for start, end in pairwise(ends)]
    if any(not np.isfinite(known).all() or (known[1:] <= known[:-1]).any() for known in columns):
        raise PlanError("expected ascending categories")

    def codes(X: Array) -> list[Any]:
        found: list[Any] = []
        for number, (table, known) in enumerate(zip(tables, columns, strict=True)):
            column = X[:, number]
            places = np.searchsorted(known, column)
            places[places == len(known)] = 0
            is_known = known[places] == column if len(known) else np.zeros(len(column), bool)
            if table.nan:
                is_nan = column != column
                places[is_nan], is_known = table.n_known, is_known | is_nan
            if not is_known.all():
                if not table.unknown:
                    _refuse_unknown(list(np.unique(column[~is_known])), first + number)
                places[~is_known] = table.n_codes - 1
            found.append(places)
        return found

    return codes


def _refuse_unknown(values: Sequence[Any], number: int) -> None:
    texts = [value for value in values if isinstance(value, str)]
    ordered = (
        texts + [value for value in values if value is None] + [v for v in values if v is not None and not isinstance(v, str)]
    )
    refuse(f"Found unknown categories {ordered} in column {number} during transform")


def _starts(tables: Sequence[Words | Numbers]) -> Iterator[tuple[int, int]]:
    return pairwise(np.cumsum([0, *(table.n_codes for table in tables)]).tolist())


def _encode(tables: Sequence[Words | Numbers], codes: Codes, places: Array, width: int, dtype: Any) -> Run:
    by_column: list[Any] = [places[start:end] for start, end in _starts(tables)]
    as_lists = [column.tolist() for column in by_column]

    def run(value: Any) -> Array:
        found = codes(value)
        n_rows, ones = len(found[0]), []
        for place_of, column in zip(as_lists, found, strict=True):
            column = column if isinstance(column, list) else column.tolist()
            ones += [row * width + place_of[code] for row, code in enumerate(column) if place_of[code] >= 0]
        encoded = np.zeros(n_rows * width, dtype)
        encoded[ones] = 1
        return encoded.reshape(n_rows, width)

    return run


def _look_up(tables: Sequence[Words | Numbers], codes: Codes, values: Array) -> Run:
    by_column = [values[start:end] for start, end in _starts(tables)]
    n_each = values.shape[1]

    def run(value: Any) -> Array:
        found = codes(value)
        looked_up = np.empty((len(found[0]), len(by_column) * n_each), values.dtype)
        for number, (of_column, column) in enumerate(zip(by_column, found, strict=True)):
            looked_up[:, number * n_each : (number + 1) * n_each] = of_column[column]
        return looked_up

    return run


class OneHot(Operation, frozen=True, tag="one_hot"):
    """Columns of text -> ``width`` columns of ``dtype``: 1 in the column that the array ``places`` has for the category's code
    (the codes of all tables in a row), none if that is -1. ``first`` is the number of the first column, for messages.
    """

    tables: tuple[Words, ...]
    width: int
    dtype: str = "float64"
    first: int = 0

    def bind(self, given: list[Layout], arrays: StepArrays) -> tuple[Run, Layout]:
        codes = _codes_of_text(self.tables, one(given, "text"), self.first)
        return _one_hot(self, codes, arrays)


class OneHotNumbers(Operation, frozen=True, tag="one_hot_numbers"):
    """As ``one_hot``, of columns of numbers."""

    tables: tuple[Numbers, ...]
    width: int
    dtype: str = "float64"
    first: int = 0

    def bind(self, given: list[Layout], arrays: StepArrays) -> tuple[Run, Layout]:
        return _one_hot(self, _number_codes(self, given, arrays), arrays)


class LookUp(Operation, frozen=True, tag="look_up"):
    """Columns of text -> the numbers that the array ``values`` (n_codes, n_each) has for the category's code."""

    tables: tuple[Words, ...]
    first: int = 0

    def bind(self, given: list[Layout], arrays: StepArrays) -> tuple[Run, Layout]:
        codes = _codes_of_text(self.tables, one(given, "text"), self.first)
        return _looked_up(self, codes, arrays)


class LookUpNumbers(Operation, frozen=True, tag="look_up_numbers"):
    """As ``look_up``, of columns of numbers."""

    tables: tuple[Numbers, ...]
    first: int = 0

    def bind(self, given: list[Layout], arrays: StepArrays) -> tuple[Run, Layout]:
        return _looked_up(self, _number_codes(self, given, arrays), arrays)


def _number_codes(step: OneHotNumbers | LookUpNumbers, given: list[Layout], arrays: StepArrays) -> Codes:
    layout = block(given)
    categories = arrays.take("categories", "n", None)
    if categories.dtype != layout.dtype or not step.tables:
        raise PlanError(f"expected categories of {layout.dtype}, got {categories.dtype}")
    return _codes_of_numbers(step.tables, layout, categories, step.first)


def _one_hot(step: OneHot | OneHotNumbers, codes: Codes, arrays: StepArrays) -> tuple[Run, Layout]:
    dtype, layout = dtype_of(step.dtype), numbers(step.dtype, step.width)
    places = arrays.places("places", step.width, sum(table.n_codes for table in step.tables), least=-1)
    return _encode(step.tables, codes, places, step.width, dtype), layout


def _looked_up(step: LookUp | LookUpNumbers, codes: Codes, arrays: StepArrays) -> tuple[Run, Layout]:
    values = arrays.take("values", "n", sum(table.n_codes for table in step.tables), None)
    return _look_up(step.tables, codes, values), numbers(values.dtype, len(step.tables) * values.shape[1])


class FillText(Operation, frozen=True, tag="fill_text"):
    """The words ``fills``, one for each column, in the place of NaN, or of None if ``none``."""

    fills: tuple[str, ...]
    none: bool = False

    def bind(self, given: list[Layout], arrays: StepArrays) -> tuple[Run, Layout]:
        layout = one(given, "text")
        if len(self.fills) != layout.width:
            raise PlanError(f"expected {layout.width} words, got {len(self.fills)}")
        fills, marker = self.fills, None if self.none else np.nan

        def run(value: Any) -> list[list[Any]]:
            columns = zip(fills, value, strict=True)
            return [[fill if each is marker else each for each in column] for fill, column in columns]

        return run, layout


class Bins(Operation, frozen=True, tag="bins"):
    """Numbers -> in how many of their column's ``edges`` (``n_edges`` of each column, ascending) they are at or above."""

    n_edges: tuple[int, ...]

    def bind(self, given: list[Layout], arrays: StepArrays) -> tuple[Run, Layout]:
        layout = block(given, "f")
        if len(self.n_edges) != layout.width or min(self.n_edges) < 0:
            raise PlanError(f"expected edges of {layout.width} columns, got {len(self.n_edges)}")
        edges = arrays.take("edges", "f", sum(self.n_edges))
        columns = [edges[start:end] for start, end in pairwise(np.cumsum([0, *self.n_edges]).tolist())]
        if any(not (column[1:] >= column[:-1]).all() for column in columns):
            raise PlanError("expected ascending edges")

        def run(X: Array) -> Array:
            found = np.empty_like(X)
            for number, column in enumerate(columns):
                found[:, number] = np.searchsorted(column, X[:, number], side="right")
            return found

        return run, layout
