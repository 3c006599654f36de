"""Operations on columns of numbers: selection, arithmetic and checks."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np

from splitserve.arrays import Array
from splitserve.runtimes.plans.layouts import (
    MAX_WIDTH,
    Layout,
    Operation,
    PlanError,
    Run,
    StepArrays,
    block,
    dtype_of,
    numbers,
    one,
    refuse,
)

EXACT_UFUNCS = ("abs", "absolute", "ceil", "fabs", "floor", "negative", "positive", "rint", "sign", "sqrt", "square", "trunc")
ROUNDED_UFUNCS = (
    "arcsinh",
    "arctan",
    "cbrt",
    "cos",
    "exp",
    "exp2",
    "expm1",
    "log",
    "log10",
    "log1p",
    "log2",
    "sin",
    "tan",
    "tanh",
)


class Columns(Operation, frozen=True, tag="columns"):
    """Columns of the request by ``names``, as ``dtype``: "text", or numbers, each converted to it as numpy does."""

    names: tuple[str, ...]
    dtype: str

    def bind(self, given: list[Layout], arrays: StepArrays) -> tuple[Run, Layout]:
        request = one(given, "request")
        places = {column.name: place for place, column in enumerate(request.columns)}
        if not self.names or any(name not in places for name in self.names):
            missing = [name for name in self.names if name not in places]
            raise PlanError(f"expected names of columns, got {missing[:3]}")
        indices = [places[name] for name in self.names]
        is_text = [request.columns[index].dtype in TEXT_DTYPES for index in indices]
        if self.dtype == "text":
            if not all(is_text):
                raise PlanError("expected columns of text, got numbers")
            return (lambda values: [values[index] for index in indices]), Layout("text", None, (len(indices),))
        dtype, width = dtype_of(self.dtype), len(indices)
        for index in indices:
            if request.columns[index].dtype not in ("bool", *NUMBER_DTYPES):
                raise PlanError(f'column "{request.columns[index].name}" has no plain numbers')
            if not np.can_cast(np.dtype(request.columns[index].dtype), dtype, "safe") and dtype != np.float64:
                raise PlanError(f'column "{request.columns[index].name}" does not fit into {dtype}')

        def gather(values: Any) -> Array:
            found = np.empty((len(values[indices[0]]), width), dtype)
            for place, index in enumerate(indices):
                found[:, place] = values[index]
            return found

        return gather, numbers(dtype, width)


TEXT_DTYPES = ("object", "str", "category")
NUMBER_DTYPES = ("float32", "float64", *(f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)))


class Whole(Operation, frozen=True, tag="array"):
    """The request's only input, which is an array of numbers or text."""

    def bind(self, given: list[Layout], arrays: StepArrays) -> tuple[Run, Layout]:
        request = one(given, "request")
        if len(request.columns) != 1 or not request.inner:
            raise PlanError("expected a request that is an array")
        element = request.columns[0].dtype
        if element == "str":
            return _first, Layout("text", None, (int(np.prod(request.inner)),))
        if element == "bytes":
            if request.inner != (1,):
                raise PlanError("expected one file a row")
            return _first, Layout("files")
        return _first, numbers(dtype_of(element), *request.inner)


def _first(values: Any) -> Any:
    return values[0]


class Take(Operation, frozen=True, tag="take"):
    """The columns ``indices`` of a block of numbers or text, in this order."""

    def bind(self, given: list[Layout], arrays: StepArrays) -> tuple[Run, Layout]:
        layout = one(given, "numbers", "text")
        indices = arrays.places("indices", layout.width, None)
        chosen = indices.tolist()
        if not chosen:
            raise PlanError("expected columns, got none")
        if layout.kind == "text":
            return (lambda columns: [columns[index] for index in chosen]), Layout("text", None, (len(chosen),))
        layout = block(given)
        return (lambda X: X[:, indices]), numbers(layout.dtype, len(chosen))


class Concatenate(Operation, frozen=True, tag="concatenate"):
    """Blocks of numbers side by side, in the dtype that numpy promotes theirs to, or blocks of text."""

    def bind(self, given: list[Layout], arrays: StepArrays) -> tuple[Run, Layout]:
        if given and all(layout.kind == "text" for layout in given):
            return (lambda *parts: [column for part in parts for column in part]), Layout(
                "text", None, (sum(layout.width for layout in given),)
            )
        layouts = [block([layout]) for layout in given]
        if not layouts:
            raise PlanError("expected values, got none")
        dtype = np.result_type(*(layout.dtype for layout in layouts))
        width = sum(layout.width for layout in layouts)

        def run(*parts: Array) -> Array:
            return np.concatenate(parts, axis=1)

        return run, numbers(dtype, width)


class Cast(Operation, frozen=True, tag="cast"):
    """Numbers as ``dtype``."""

    dtype: str

    def bind(self, given: list[Layout], arrays: StepArrays) -> tuple[Run, Layout]:
        layout, dtype = one(given, "numbers"), dtype_of(self.dtype)
        return (lambda X: X.astype(dtype, copy=False)), numbers(dtype, *layout.inner)


class Finite(Operation, frozen=True, tag="finite"):
    """Refuses infinite numbers, and NaN unless ``allow_nan``; the message calls the input ``input_name``."""

    allow_nan: bool
    input_name: str = "X "

    def bind(self, given: list[Layout], arrays: StepArrays) -> tuple[Run, Layout]:
        layout = one(given, "numbers")
        if layout.dtype.kind != "f":
            return _same, layout
        allow_nan, name = self.allow_nan, self.input_name

        def run(X: Array) -> Array:
            if not np.isfinite(X).all():
                if not allow_nan and np.isnan(X).any():
                    refuse(f"Input {name}contains NaN.")
                if np.isinf(X).any():
                    refuse(f"Input {name}contains infinity or a value too large for {X.dtype!r}.")
            return X

        return run, layout


def _same(value: Any) -> Any:
    return value


class _ByColumn(Operation, frozen=True):
    """With one number for each column, the array ``by``; computed in the wider of the two dtypes, and rounded to the block's."""

    def bind(self, given: list[Layout], arrays: StepArrays) -> tuple[Run, Layout]:
        layout = block(given, "f")
        by, compute = arrays.take("by", "f", layout.width), _UFUNCS[type(self)]
        dtype = layout.dtype
        if by.dtype == dtype:
            return (lambda X: compute(X, by)), layout
        return (lambda X: compute(X, by).astype(dtype)), layout


class Add(_ByColumn, frozen=True, tag="add"):
    """The block + ``by``."""


class Subtract(_ByColumn, frozen=True, tag="subtract"):
    """The block - ``by``."""


class Multiply(_ByColumn, frozen=True, tag="multiply"):
    """The block × ``by``."""


class Divide(_ByColumn, frozen=True, tag="divide"):
    """The block ÷ ``by``."""


_UFUNCS: dict[type, np.ufunc] = {Add: np.add, Subtract: np.subtract, Multiply: np.multiply, Divide: np.divide}


class Clip(Operation, frozen=True, tag="clip"):
    """Numbers below ``low`` become it, those above ``high`` that; NaN stays."""

    low: float
    high: float

    def bind(self, given: list[Layout], arrays: StepArrays) -> tuple[Run, Layout]:
        layout = block(given, "f")
        if not self.low <= self.high:
            raise PlanError("expected low <= high")
        low, high = layout.dtype.type(self.low), layout.dtype.type(self.high)
        return (lambda X: np.clip(X, low, high)), layout


class PositiveZeros(Operation, frozen=True, tag="positive_zeros"):
    """-0.0 becomes 0.0, which is what a sparse matrix holds."""

    def bind(self, given: list[Layout], arrays: StepArrays) -> tuple[Run, Layout]:
        layout = block(given)
        if layout.dtype.kind != "f":
            return _same, layout
        zero = layout.dtype.type(0)
        return (lambda X: X + zero), layout


class Threshold(Operation, frozen=True, tag="threshold"):
    """1 where a number is above ``above``, else 0, in the block's dtype; compared as floats."""

    above: float

    def bind(self, given: list[Layout], arrays: StepArrays) -> tuple[Run, Layout]:
        layout = block(given, "fiu")
        dtype = layout.dtype
        floats = dtype if dtype.kind == "f" else np.dtype("f8")
        above = floats.type(self.above)
        return (lambda X: (X.astype(floats, copy=False) > above).astype(dtype)), layout


class Fill(Operation, frozen=True, tag="fill"):
    """The numbers ``fills``, one for each column, in the place of ``missing``, which is NaN if it is null."""

    missing: float | None = None

    def bind(self, given: list[Layout], arrays: StepArrays) -> tuple[Run, Layout]:
        layout = block(given)
        fills = arrays.take("fills", "n", layout.width).astype(layout.dtype)
        is_missing = _mask(layout, self.missing)

        def run(X: Array) -> Array:
            mask = is_missing(X)
            return np.where(mask, fills, X) if mask.any() else X

        return run, layout


def _mask(layout: Layout, missing: float | None) -> Run:
    if missing is None:
        return np.isnan if layout.dtype.kind == "f" else lambda X: np.zeros(X.shape, bool)
    return lambda X: missing == X


class Missing(Operation, frozen=True, tag="missing"):
    """Whether values are missing, for the columns ``indices``: NaN if ``missing`` is null, or that number; of text also None if
    ``none`` rather than NaN. Refuses missing values in other columns if ``refuse_new``.
    """

    missing: float | None = None
    none: bool = False
    refuse_new: bool = False

    def bind(self, given: list[Layout], arrays: StepArrays) -> tuple[Run, Layout]:
        layout = one(given, "numbers", "text")
        indices = arrays.places("indices", layout.width, None)
        if layout.kind == "numbers":
            of_numbers = _mask(block(given), self.missing)
        refuse_new, marker = self.refuse_new, None if self.none else np.nan
        others = np.setdiff1d(np.arange(layout.width), indices)

        def run(value: Any) -> Array:
            if layout.kind == "numbers":
                mask = of_numbers(value)
            else:
                mask = np.array([[each is marker for each in column] for column in value], bool).reshape(layout.width, -1).T
            if refuse_new and mask[:, others].any():
                new = others[mask[:, others].any(axis=0)]
                refuse(f"The features {new} have missing values in transform but have no missing values in fit.")
            found: Array = mask[:, indices]
            return found

        return run, numbers(np.bool_, len(indices))


class Ufunc(Operation, frozen=True, tag="ufunc"):
    """numpy's function of this ``name``, of each number."""

    name: str

    def bind(self, given: list[Layout], arrays: StepArrays) -> tuple[Run, Layout]:
        return _ufunc(self.name, EXACT_UFUNCS, given)


class RoundedUfunc(Operation, frozen=True, tag="rounded_ufunc"):
    """numpy's function of this ``name``, of each number."""

    IS_EXACT = False

    name: str

    def bind(self, given: list[Layout], arrays: StepArrays) -> tuple[Run, Layout]:
        return _ufunc(self.name, ROUNDED_UFUNCS, given)


def _ufunc(name: str, known: tuple[str, ...], given: list[Layout]) -> tuple[Run, Layout]:
    layout = one(given, "numbers")
    if name not in known:
        raise PlanError(f'unknown function "{name[:32]}"')
    ufunc: np.ufunc = getattr(np, name)
    try:
        dtype = ufunc.resolve_dtypes((layout.dtype, None))[-1]
    except TypeError:
        raise PlanError(f'function "{name}" does not take {layout.dtype}') from None
    if dtype.name not in ("bool", *NUMBER_DTYPES):
        raise PlanError(f'function "{name}" gives {dtype}')
    return ufunc, numbers(dtype, *layout.inner)


class Products(Operation, frozen=True, tag="products"):
    """Polynomials up to ``degree``: 1 if ``bias``, the columns, then each product of a term with a column, as scikit-learn orders
    and multiplies them; only of distinct columns if ``distinct``. Terms below ``min_degree`` are left out.
    """

    degree: int
    min_degree: int = 0
    distinct: bool = False
    bias: bool = True

    def bind(self, given: list[Layout], arrays: StepArrays) -> tuple[Run, Layout]:
        layout = block(given, "f")
        n_features = layout.width
        if not 1 <= self.degree <= 64 or not 0 <= self.min_degree <= self.degree:
            raise PlanError("expected a degree from 1 to 64, and min_degree not above it")
        if self.bias and self.min_degree > 1:
            raise PlanError("expected no bias with a min_degree above 1")
        index = list(range(1, n_features + 2))
        column = n_features + 1
        products: list[tuple[int, int, int, int]] = []
        first = 0 if self.bias else 1
        for degree in range(2, self.degree + 1):
            if degree == self.min_degree:
                first = column
            starts, end = [], index[-1]
            for feature in range(min(n_features, len(index) - 1)):
                starts.append(column)
                start = index[feature + 1] if self.distinct else index[feature]
                if end <= start:
                    break
                if column + end - start > MAX_WIDTH:
                    raise PlanError(f"more than {MAX_WIDTH} products")
                products.append((start, end, feature, column))
                column += end - start
            index = [*starts, column]
        width, dtype = column, layout.dtype

        def run(X: Array) -> Array:
            found = np.empty((len(X), width), dtype)
            found[:, 0] = 1
            found[:, 1 : n_features + 1] = X
            for start, end, feature, place in products:
                np.multiply(found[:, start:end], X[:, feature : feature + 1], out=found[:, place : place + end - start])
            return found[:, first:]

        return run, numbers(dtype, width - first)


class MatrixProduct(Operation, frozen=True, tag="matrix_product"):
    """The block times the transposed array ``rows`` (n_out, n_columns), by the BLAS of numpy."""

    IS_EXACT = False

    def bind(self, given: list[Layout], arrays: StepArrays) -> tuple[Run, Layout]:
        layout = block(given, "f")
        rows = arrays.finite("rows", "f", None, layout.width)
        if rows.dtype != layout.dtype:
            raise PlanError(f"expected rows of {layout.dtype}, got {rows.dtype}")
        return (lambda X: X @ rows.T), numbers(layout.dtype, len(rows))


class SparseProduct(Operation, frozen=True, tag="sparse_product"):
    """As ``matrix_product``, but numbers are added one by one in the order of columns, without zeros, as of a sparse matrix."""

    IS_EXACT = False

    def bind(self, given: list[Layout], arrays: StepArrays) -> tuple[Run, Layout]:
        layout = block(given, "fiu")
        rows = arrays.finite("rows", "f", None, layout.width)
        dtype = np.result_type(layout.dtype, rows.dtype)
        columns = np.ascontiguousarray(rows.T.astype(dtype))

        def run(X: Array) -> Array:
            found = np.zeros((len(X), columns.shape[1]), dtype)
            for row, values in enumerate(X):
                places = np.flatnonzero(values)
                np.add.reduce(values[places, np.newaxis] * columns[places], axis=0, out=found[row])
            return found

        return run, numbers(dtype, len(rows))


class NormaliseRows(Operation, frozen=True, tag="normalise_rows"):
    """Rows divided by their norm, "l1", "l2" or "max"; rows of zeros stay. ``one_by_one`` adds in the order of columns, without
    zeros, as of a sparse matrix.
    """

    IS_EXACT = False

    norm: Literal["l1", "l2", "max"]
    one_by_one: bool = False

    def bind(self, given: list[Layout], arrays: StepArrays) -> tuple[Run, Layout]:
        layout = block(given, "f")
        return (_one_by_one if self.one_by_one else _at_once)(self.norm), layout


def _at_once(norm: str) -> Run:
    def run(X: Array) -> Array:
        if norm == "l2":
            norms = np.sqrt(np.einsum("ij,ij->i", X, X))
        else:
            norms = np.abs(X).sum(axis=1) if norm == "l1" else np.abs(X).max(axis=1)
        norms[norms < 10 * np.finfo(norms.dtype).eps] = 1  # as scikit-learn treats constant features
        divided: Array = X / norms[:, np.newaxis]
        return divided

    return run


def _one_by_one(norm: str) -> Run:
    def run(X: Array) -> Array:
        found = X.copy()
        for row in found:
            places = np.flatnonzero(row)
            values = row[places]
            if not len(values):
                continue
            if norm == "max":
                row[places] = values / np.abs(values).max()
                continue
            total = np.cumsum(np.square(values) if norm == "l2" else np.abs(values), dtype=np.float64)[-1]
            if total != 0:
                row[places] = values / (np.sqrt(total) if norm == "l2" else total)
        return found

    return run


class LogarithmOfCounts(Operation, frozen=True, tag="logarithm_of_counts"):
    """1 + log of numbers that are not zero."""

    IS_EXACT = False

    def bind(self, given: list[Layout], arrays: StepArrays) -> tuple[Run, Layout]:
        layout = block(given, "f")

        def run(X: Array) -> Array:
            found = np.log(X, where=X != 0, out=np.zeros_like(X))
            return np.where(X != 0, found + layout.dtype.type(1), found)

        return run, layout


class Flatten(Operation, frozen=True, tag="flatten"):
    """(n_rows, …) -> (n_rows, product of the rest)."""

    def bind(self, given: list[Layout], arrays: StepArrays) -> tuple[Run, Layout]:
        layout = one(given, "numbers")
        width = int(np.prod(layout.inner))
        return (lambda X: X.reshape(len(X), width)), numbers(layout.dtype, width)
