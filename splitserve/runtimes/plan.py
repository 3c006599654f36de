"""A plan of fitted transforms: scikit-learn's arithmetic without its overhead per call.

scikit-learn's cost is mostly per call, not per row: estimators repeat the signature's checks; frames are sliced, copied and
stacked. A plan is built once from the fitted transforms: for each step a numpy expression, in scikit-learn's order and dtypes, so
that results are equal bit by bit.

1. `plan_of` supports some classes, not their subclasses, with the parameters whose effect it reproduces. An unsupported part of a
   ColumnTransformer is called itself, with its own columns. Anything else unsupported means no plan.
2. Values that scikit-learn might reject are left to it: a plan raises `OriginalDecides`, and the transforms are called.
3. When a bundle is loaded, the plan is compared with the transforms on the golden samples, and dropped if a bit differs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from sklearn.compose import ColumnTransformer
from sklearn.impute import SimpleImputer
from sklearn.pipeline import Pipeline
from sklearn.preprocessing import FunctionTransformer, MinMaxScaler, OneHotEncoder, OrdinalEncoder, StandardScaler

from splitserve.arrays import Array
from splitserve.repository.manifest import Column, Rows
from splitserve.runtimes import sklearn_pipeline
from splitserve.runtimes.rows import Values, frame, read_columns, series
from splitserve.signature import TensorSpec
from splitserve.tensors import Tensor
from splitserve.transformers import Flatten

_OBJECT = np.dtype(np.object_)
_TEXT_COLUMNS = ("object", "str", "category")
_NUMBERS = frozenset(map(np.dtype, ("f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8")))


class OriginalDecides(Exception):
    """The transforms may reject these values: call them instead of the plan."""


class _NotPlanned(Exception):
    """A transformer, a parameter or a dtype that plans do not support."""


class _Block(NamedTuple):
    """A step's input or output: an array (n_rows, *inner), or for text a list of values for each column."""

    dtype: np.dtype[Any]
    inner: tuple[int, ...]

    @property
    def is_text(self) -> bool:
        return self.dtype.kind == "O"


Layout = _Block | tuple[Column, ...]
"""A block, or the columns of a frame; then a step's input is a list with the values of each."""

Step = Callable[[Any], Any]


class Plan:
    """Request tensors -> features (n_rows, n_features); pure, so safe to call from several threads."""

    def __init__(self, rows: Rows, specs: Sequence[TensorSpec], step: Step) -> None:
        self._rows = rows
        self._specs = specs
        self._step = step

    def __call__(self, tensors: Sequence[Tensor]) -> Array:
        """Args:
            tensors: in the signature's order, checked against it, with a row at least.

        Raises:
            InvalidInput: an element of a text column is not UTF-8, or the bytes are not elements.
            OriginalDecides: call the transforms instead.
        """
        values = read_columns(self._rows, self._specs, tensors)
        features: Array = self._step(values if self._rows.form == "frame" else values[0])
        return features


def plan_of(transformer: Any, rows: Rows, specs: Sequence[TensorSpec]) -> Plan | None:
    """The plan of fitted transforms; None if they are not supported.

    Args:
        transformer: fitted on such rows.
        rows: of the manifest.
        specs: the signature's inputs.
    """
    try:
        step, given = _step(transformer, _layout(rows, specs))
    except _NotPlanned:
        return None
    if not isinstance(given, _Block) or given.is_text:
        return None
    return Plan(rows, specs, step)


def _layout(rows: Rows, specs: Sequence[TensorSpec]) -> Layout:
    if rows.form == "frame":
        return rows.columns
    if rows.n_dims < 2 or rows.element == "bytes":
        raise _NotPlanned
    return _Block(_OBJECT if rows.element == "str" else np.dtype(rows.element), specs[0].wire_shape[1:])


def _step(transformer: Any, layout: Layout) -> tuple[Step, Layout]:
    if not _gives_arrays(transformer):
        raise _NotPlanned
    make = _MAKERS.get(type(transformer))
    if make is None:
        raise _NotPlanned
    return make(transformer, layout)


def _gives_arrays(transformer: Any) -> bool:
    """Whether the output is an array: ``set_output`` was not used to change it."""
    return set(getattr(transformer, "_sklearn_output_config", {}).values()) <= {"default"}


def _pipeline(pipeline: Any, layout: Layout) -> tuple[Step, Layout]:
    steps: list[Step] = []
    for _, transformer in pipeline.steps:
        if transformer is not None and transformer != "passthrough":
            step, layout = _step(transformer, layout)
            steps.append(step)
    return _chain(steps), layout


def _chain(steps: Sequence[Step]) -> Step:
    if len(steps) == 1:
        return steps[0]

    def run(values: Any) -> Any:
        for step in steps:
            values = step(values)
        return values

    return run


def _column_transformer(columns: Any, layout: Layout) -> tuple[Step, Layout]:
    if columns.transformer_weights:
        raise _NotPlanned
    steps: list[Step] = []
    dtypes, width = [], 0
    for name, transformer, selected in columns.transformers_:
        indices = list(columns._transformer_to_input_indices[name])
        if not indices or transformer == "drop":
            continue
        indices = _places(columns, layout, indices)
        step, given = _part(transformer, layout, indices, is_single=isinstance(selected, str | int))
        steps.append(step)
        dtypes.append(given.dtype)
        width += given.inner[0]
    if not steps:
        raise _NotPlanned
    dtype = np.result_type(*dtypes)
    is_sparse = columns.sparse_output_ and dtype.kind == "f"

    def run(values: Any) -> Array:
        parts = [step(values) for step in steps]
        stacked: Array = np.concatenate(parts, axis=1) if len(parts) > 1 else parts[0]
        return stacked + dtype.type(0) if is_sparse else stacked  # a sparse matrix has no negative zero

    return run, _Block(dtype, (width,))


def _places(columns: Any, layout: Layout, indices: list[int]) -> list[int]:
    """Where columns of training are in the layout, which need not have those that nothing selects."""
    if isinstance(layout, _Block):
        return indices
    places = {column.name: place for place, column in enumerate(layout)}
    names = getattr(columns, "feature_names_in_", None)
    if names is None or any(names[index] not in places for index in indices):
        raise _NotPlanned
    return [places[names[index]] for index in indices]


def _part(transformer: Any, layout: Layout, indices: list[int], *, is_single: bool) -> tuple[Step, _Block]:
    """The step for the columns of one transformer in a ColumnTransformer."""
    try:
        if is_single:
            raise _NotPlanned
        select, part = _select(layout, indices)
        if transformer == "passthrough":
            transformer = FunctionTransformer()
        step, given = _step(transformer, part)
        if not isinstance(given, _Block) or given.is_text:
            raise _NotPlanned
        return _chain([select, step]), given
    except _NotPlanned:
        if isinstance(layout, _Block):
            raise
        return _original(transformer, [layout[index] for index in indices], indices, is_single=is_single)


def _original(transformer: Any, columns: Sequence[Column], indices: list[int], *, is_single: bool) -> tuple[Step, _Block]:
    """The transformer itself, called with its own columns of the frame."""
    if transformer == "passthrough" or not _gives_arrays(transformer):
        raise _NotPlanned
    try:
        n_features = len(transformer.get_feature_names_out())
    except Exception:  # transformers without feature names raise various errors
        raise _NotPlanned from None
    dtype = np.dtype("f8")

    def run(values: Sequence[Values]) -> Array:
        own = [values[index] for index in indices]
        given = sklearn_pipeline.transform(transformer, series(columns[0], own[0]) if is_single else frame(columns, own))
        features: Array = given.toarray() if hasattr(given, "toarray") else given
        if type(features) is not np.ndarray or features.dtype != dtype:
            raise OriginalDecides
        return features

    return run, _Block(dtype, (n_features,))


def _select(layout: Layout, indices: list[int]) -> tuple[Step, _Block]:
    """These columns as a block: one array if they are numbers."""
    width = len(indices)
    if isinstance(layout, _Block):
        if layout.is_text:
            return lambda values: [values[index] for index in indices], _Block(_OBJECT, (width,))
        return lambda values: values[:, indices], _Block(layout.dtype, (width,))
    columns = [layout[index] for index in indices]
    if all(column.dtype in _TEXT_COLUMNS for column in columns):
        return lambda values: [values[index] for index in indices], _Block(_OBJECT, (width,))
    dtype = _common_dtype(columns)

    def gather(values: Sequence[Values]) -> Array:
        block = np.empty((len(values[indices[0]]), width), dtype)
        for place, index in enumerate(indices):
            block[:, place] = values[index]
        return block

    return gather, _Block(dtype, (width,))


def _common_dtype(columns: Sequence[Column]) -> np.dtype[Any]:
    """The dtype that scikit-learn would use for these columns of numbers."""
    try:
        dtypes = {np.dtype(column.dtype) for column in columns}
    except TypeError:
        raise _NotPlanned from None
    if not dtypes <= _NUMBERS:
        raise _NotPlanned
    common = np.result_type(*dtypes)
    if len(dtypes) > 1 and common != np.float64 and common.kind != "i":
        raise _NotPlanned
    return common


def _block(layout: Layout, n_features: int) -> tuple[Step, _Block]:
    """The input as a block of ``n_features`` columns."""
    select, block = _select(layout, list(range(len(layout)))) if not isinstance(layout, _Block) else (None, layout)
    if block.inner != (n_features,) or (not block.is_text and block.dtype not in _NUMBERS):
        raise _NotPlanned
    return select or _same, block


def _same(values: Any) -> Any:
    return values


def _floats(layout: Layout, n_features: int) -> tuple[Step, np.dtype[Any]]:
    """The input as floats, as scikit-learn's scalers convert it: float32 stays, all else becomes float64.

    Source: ``check_array`` with a list of dtypes.
    """
    select, block = _block(layout, n_features)
    if block.is_text:
        raise _NotPlanned
    dtype = block.dtype if block.dtype.kind == "f" else np.dtype("f8")
    if block.dtype.kind == "f":
        return select, dtype
    return lambda values: select(values).astype(dtype), dtype


def _is_finite(X: Array) -> bool:
    """Whether all values are finite; False if there are NaN.

    Raises:
        OriginalDecides: a value is infinite, which every caller's transformer rejects.
    """
    if np.isfinite(X).all():
        return True
    if np.isinf(X).any():
        raise OriginalDecides
    return False


def _standard_scaler(scaler: Any, layout: Layout) -> tuple[Step, Layout]:
    read, dtype = _floats(layout, scaler.n_features_in_)
    mean = scaler.mean_.astype(dtype) if scaler.with_mean else None
    scale = scaler.scale_.astype(dtype) if scaler.with_std else None

    def run(values: Any) -> Array:
        X: Array = read(values)
        _is_finite(X)
        if mean is not None:
            X = X - mean
        return X if scale is None else X / scale

    return run, _Block(dtype, (scaler.n_features_in_,))


def _min_max_scaler(scaler: Any, layout: Layout) -> tuple[Step, Layout]:
    read, dtype = _floats(layout, scaler.n_features_in_)
    low, high = (dtype.type(end) for end in scaler.feature_range)

    def run(values: Any) -> Array:
        X: Array = read(values)
        _is_finite(X)
        X = X.copy()
        X *= scaler.scale_  # in place, as there: the dtype stays
        X += scaler.min_
        return np.clip(X, low, high, out=X) if scaler.clip else X

    return run, _Block(dtype, (scaler.n_features_in_,))


def _simple_imputer(imputer: Any, layout: Layout) -> tuple[Step, Layout]:
    is_nan = isinstance(imputer.missing_values, float) and imputer.missing_values != imputer.missing_values
    select, block = _block(layout, imputer.n_features_in_)
    if imputer.strategy in ("mean", "median"):
        select, dtype = _floats(layout, imputer.n_features_in_)
        block = _Block(dtype, block.inner)
    fills = imputer.statistics_
    if imputer.add_indicator or not is_nan or any(fill != fill for fill in fills.tolist()) or callable(imputer.strategy):
        raise _NotPlanned
    if block.is_text:
        return _text_imputer(imputer, select), block
    if block.dtype.kind != "f" or imputer._fit_dtype != block.dtype:
        raise _NotPlanned
    fills = fills.astype(getattr(imputer, "_fill_dtype", fills.dtype)).astype(
        block.dtype
    )  # scikit-learn 1.6 has no such attribute

    def run(values: Any) -> Array:
        X: Array = select(values)
        return X if _is_finite(X) else np.where(np.isnan(X), fills, X)

    return run, block


def _text_imputer(imputer: Any, select: Step) -> Step:
    fills = imputer.statistics_.tolist()
    if imputer._fit_dtype.kind != "O" or not all(isinstance(fill, str) for fill in fills):
        raise _NotPlanned

    def run(values: Any) -> list[list[Any]]:
        columns = zip(fills, select(values), strict=True)
        return [[fill if value is np.nan else value for value in column] for fill, column in columns]

    return run


def _one_hot_encoder(encoder: Any, layout: Layout) -> tuple[Step, Layout]:
    select, drops = _text_for(encoder, layout), encoder.drop_idx_
    is_strict = encoder.handle_unknown == "error"
    if encoder.handle_unknown not in ("error", "ignore") or (drops is not None and not is_strict):
        raise _NotPlanned
    tables, width = [], 0
    for index, categories in enumerate(encoder.categories_):
        dropped = None if drops is None else drops[index]
        words = [word for place, word in enumerate(_words(categories)) if place != dropped]
        table: dict[Any, int] = {} if dropped is None else {_words(categories)[dropped]: -1}
        tables.append(table | {word: width + place for place, word in enumerate(words)})
        width += len(words)
    dtype = np.dtype(encoder.dtype)

    def run(values: Any) -> Array:
        columns = select(values)
        n_rows, ones = len(columns[0]), []
        for table, column in zip(tables, columns, strict=True):
            places = _look_up(table, column) if is_strict else [table.get(value, -1) for value in column]
            ones += [row * width + place for row, place in enumerate(places) if place >= 0]
        encoded = np.zeros(n_rows * width, dtype)
        encoded[ones] = 1
        return encoded.reshape(n_rows, width)

    return run, _Block(dtype, (width,))


def _ordinal_encoder(encoder: Any, layout: Layout) -> tuple[Step, Layout]:
    select = _text_for(encoder, layout)
    is_strict = encoder.handle_unknown == "error"
    dtype = np.dtype(encoder.dtype)
    if dtype.kind != "f":
        raise _NotPlanned
    tables: list[dict[Any, float]] = []
    for categories in encoder.categories_:
        table: dict[Any, float] = {word: float(place) for place, word in enumerate(_words(categories))}
        if np.nan in table:
            table[np.nan] = encoder.encoded_missing_value
        tables.append(table)
    unknown = encoder.unknown_value

    def run(values: Any) -> Array:
        columns = select(values)
        encoded = np.empty((len(columns[0]), len(columns)), dtype)
        for place, (table, column) in enumerate(zip(tables, columns, strict=True)):
            encoded[:, place] = _look_up(table, column) if is_strict else [table.get(value, unknown) for value in column]
        return encoded

    return run, _Block(dtype, (len(tables),))


def _text_for(encoder: Any, layout: Layout) -> Step:
    """The step that selects an encoder's text columns."""
    select, block = _block(layout, encoder.n_features_in_)
    all_text = all(isinstance(word, str) or word is np.nan for categories in encoder.categories_ for word in _words(categories))
    if not block.is_text or encoder._infrequent_enabled or not all_text:
        raise _NotPlanned
    return select


def _words(categories: Array) -> list[Any]:
    """Categories as a list; a missing one is ``np.nan`` itself, the object that rows have."""
    return [np.nan if isinstance(word, float) and word != word else word for word in categories.tolist()]


def _look_up(table: dict[Any, Any], column: list[Any]) -> list[Any]:
    try:
        return [table[value] for value in column]
    except KeyError:
        raise OriginalDecides from None


def _function_transformer(transformer: Any, layout: Layout) -> tuple[Step, Layout]:
    if transformer.func is not None or transformer.validate:
        raise _NotPlanned
    if not isinstance(layout, _Block) and len({column.dtype for column in layout}) > 1:
        raise _NotPlanned
    return _block(layout, layout.inner[0] if isinstance(layout, _Block) else len(layout))


def _flatten(_: Any, layout: Layout) -> tuple[Step, Layout]:
    if not isinstance(layout, _Block) or layout.is_text:
        raise _NotPlanned
    width = int(np.prod(layout.inner))
    return lambda values: values.reshape(-1, width), _Block(layout.dtype, (width,))


_MAKERS: dict[type, Callable[[Any, Layout], tuple[Step, Layout]]] = {
    ColumnTransformer: _column_transformer,
    Flatten: _flatten,
    FunctionTransformer: _function_transformer,
    MinMaxScaler: _min_max_scaler,
    OneHotEncoder: _one_hot_encoder,
    OrdinalEncoder: _ordinal_encoder,
    Pipeline: _pipeline,
    SimpleImputer: _simple_imputer,
    StandardScaler: _standard_scaler,
}
