"""Fitted transforms -> a plan: for each transformer the operations with its arithmetic, in scikit-learn's order and dtypes.

1. Only classes of scikit-learn and `splitserve.transformers` are planned, not their subclasses, with the parameters whose effect
   operations reproduce. Anything else means that there is no portable plan; the reason names the step.
2. A plan that does not leave this process may keep transformers of a ColumnTransformer that are not planned: they are called
   themselves, with their own columns.
3. Whoever makes a plan compares it with the transforms.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import numpy as np
from sklearn import preprocessing
from sklearn.compose import ColumnTransformer
from sklearn.decomposition import PCA, TruncatedSVD
from sklearn.feature_extraction.text import CountVectorizer, HashingVectorizer, TfidfTransformer, TfidfVectorizer
from sklearn.feature_selection import SelectorMixin
from sklearn.impute import KNNImputer, MissingIndicator, SimpleImputer
from sklearn.pipeline import FeatureUnion, Pipeline

from splitserve.arrays import Array
from splitserve.repository.manifest import Column, Rows
from splitserve.runtimes import sklearn_pipeline
from splitserve.runtimes.plans import encoders, operations, pictures, statistics, words
from splitserve.runtimes.plans.encoders import Numbers, Words
from splitserve.runtimes.plans.files import Plan, PlanStep, bind, request_layout
from splitserve.runtimes.plans.layouts import Layout, Operation, PlanError, RefusedValue, Run, StepArrays, numbers
from splitserve.runtimes.plans.operations import EXACT_UFUNCS, NUMBER_DTYPES, ROUNDED_UFUNCS, TEXT_DTYPES
from splitserve.runtimes.rows import Values, frame, series
from splitserve.signature import TensorSpec
from splitserve.transformers import CategoryCodes, DecodeImage, Flatten, NormaliseImage, ResizeImage

Frame = tuple[Column, ...]
"""Columns of the request, which no step has made a block of yet."""

Source = Frame | int
"""What a transformer is given: columns of the request, or the value of this number."""


class NotPlanned(Exception):
    """A step, a parameter or a dtype that plans do not reproduce; the message names the step."""


class _Reason(Exception):
    """Why a step is not planned, without its name."""


class PlannedSteps:
    """A plan as it is made: its steps, and what runs it here."""

    def __init__(self, plan: Plan, steps: Sequence[PlanStep]) -> None:
        self.plan = plan
        self.steps = steps


def make_plan(transformer: Any, rows: Rows, specs: Sequence[TensorSpec], *, keep_originals: bool = False) -> PlannedSteps:
    """The plan of fitted transforms.

    Args:
        transformer: fitted on such rows.
        rows: of the manifest.
        specs: the signature's inputs.
        keep_originals: for a plan that does not leave this process.

    Raises:
        NotPlanned: a step is not supported.
    """
    planner = _Planner(rows, specs, keep_originals)
    try:
        value = planner.dense(planner.block(planner.step(transformer, planner.root())))
    except _Reason as error:
        raise NotPlanned(str(error)) from None
    layout = planner.layouts[value]
    if layout.kind != "numbers" or value != len(planner.steps):
        raise NotPlanned(f"the transforms give {layout.kind}")
    return PlannedSteps(Plan(rows, specs, planner.runs), planner.steps)


class _Planner:
    def __init__(self, rows: Rows, specs: Sequence[TensorSpec], keep_originals: bool) -> None:
        self.rows = rows
        self.keep_originals = keep_originals
        self.steps: list[PlanStep] = []
        self.runs: list[tuple[Run, tuple[int, ...]]] = []
        self._path: list[str] = []
        self._sparse: set[int] = set()
        try:
            self.layouts = [request_layout(rows, specs)]
        except PlanError as error:
            raise NotPlanned(str(error)) from None

    def root(self) -> Source:
        """The rows of a request."""
        if self.rows.form == "frame":
            return self.rows.columns
        whole = self.add(operations.Whole, 0)
        if self.rows.n_dims == 1:
            return self.add(words.Documents, whole)
        return whole

    def add(self, operation: type[Operation], *of: int, arrays: Mapping[str, Array] | None = None, **fields: Any) -> int:
        """The number of the value of a new step."""
        arrays = {name: np.asarray(array) for name, array in (arrays or {}).items()}
        step = operation(of=of, **fields)
        try:
            run, layout = bind(step, arrays, self.layouts)
        except PlanError as error:
            raise _Reason(str(error)) from None
        self.steps.append((step, arrays))
        self.runs.append((run, of))
        self.layouts.append(layout)
        return len(self.steps)

    def sparse(self, value: int) -> int:
        """Note that scikit-learn has this value as a sparse matrix."""
        self._sparse.add(value)
        return value

    def is_sparse(self, value: Source) -> bool:
        return value in self._sparse

    def dense(self, value: int) -> int:
        """The value as an array."""
        return (
            self.add(operations.PositiveZeros, value)
            if value in self._sparse and self.layouts[value].dtype.kind == "f"
            else value
        )

    def layout(self, value: int) -> Layout:
        return self.layouts[value]

    def step(self, transformer: Any, source: Source, name: str = "") -> Source:
        """The value of a transformer."""
        with self._named(name, transformer):
            make = _maker(transformer)
            if make is None:
                raise _Reason("is not among the transformers that plans reproduce")
            return make(self, transformer, source)

    @contextmanager
    def _named(self, name: str, transformer: Any) -> Iterator[None]:
        """Begin the reason with the names of the steps."""
        if name:
            self._path.append(name)
        try:
            yield
        except _Reason as error:
            if str(error).startswith("step "):
                raise
            where = " / ".join(self._path)
            shown = f'step "{where}" ({type(transformer).__name__})' if where else f"step {type(transformer).__name__}"
            raise _Reason(f"{shown}: {error}") from None
        finally:
            if name:
                self._path.pop()

    def block(self, source: Source) -> int:
        """Columns as one value: a block of text or numbers."""
        if isinstance(source, int):
            return source
        names = tuple(column.name for column in source)
        if all(column.dtype in TEXT_DTYPES for column in source):
            return self.add(operations.Columns, 0, names=names, dtype="text")
        return self.add(operations.Columns, 0, names=names, dtype=_common_dtype(source))

    def floats(self, source: Source, n_features: int, *, allow_nan: bool, sparse: bool = False) -> int:
        """Columns as floats that are checked, as scikit-learn converts them: float32 stays, all else becomes float64."""
        if isinstance(source, tuple) and any(column.dtype == "bool" for column in source):
            if any(column.dtype in TEXT_DTYPES for column in source):
                raise _Reason("its columns are text and booleans")
            value = self.add(operations.Columns, 0, names=tuple(column.name for column in source), dtype="float64")
        else:
            value = self.block(source)
        layout = self.columns_of(value, n_features)
        if layout.kind != "numbers":
            raise _Reason("its columns are text")
        is_sparse = self.is_sparse(value)
        if is_sparse and not sparse:
            raise _Reason("it is given a sparse matrix")
        if layout.dtype.kind != "f":
            value = self.add(operations.Cast, value, dtype="float64")
        value = self.finite(value, allow_nan=allow_nan)
        return self.sparse(value) if is_sparse else value

    def columns_of(self, value: int, n_features: int) -> Layout:
        layout = self.layouts[value]
        if layout.kind not in ("numbers", "text") or layout.inner != (n_features,):
            raise _Reason(f"expected {n_features} columns, got {layout}")
        return layout

    def finite(self, value: int, *, allow_nan: bool, input_name: str = "X ") -> int:
        if self.layouts[value].dtype.kind != "f":
            return value
        is_sparse = self.is_sparse(value)
        value = self.add(operations.Finite, value, allow_nan=allow_nan, input_name=input_name)
        return self.sparse(value) if is_sparse else value

    def by_column(self, operation: type[Operation], value: int, by: Array) -> int:
        by = by if by.dtype.kind == "f" else by.astype(np.float64)
        return self.add(operation, value, arrays={"by": np.ascontiguousarray(by)})

    def original(self, transformer: Any, columns: Frame, *, is_single: bool) -> int:
        """The transformer itself, called with its own columns of the request."""
        if transformer == "passthrough" or not _gives_arrays(transformer):
            raise _Reason("is not called by itself")
        try:
            n_features = len(transformer.get_feature_names_out())
        except Exception:  # transformers without feature names raise various errors
            raise _Reason("does not name its features") from None
        places = [self.rows.columns.index(column) for column in columns]

        def run(values: Sequence[Values]) -> Array:
            own = [values[place] for place in places]
            given = sklearn_pipeline.transform(transformer, series(columns[0], own[0]) if is_single else frame(columns, own))
            features: Array = given.toarray() if hasattr(given, "toarray") else given
            if type(features) is not np.ndarray or features.dtype != np.float64:
                raise RefusedValue("the transformer gives something other than float64")
            return features

        self.steps.append((_Original(of=(0,)), {}))
        self.runs.append((run, (0,)))
        self.layouts.append(numbers(np.float64, n_features))
        return len(self.steps)


class _Original(Operation, frozen=True, tag="original"):
    """A transformer that is called itself; not part of the format."""

    def bind(self, given: list[Layout], arrays: StepArrays) -> tuple[Run, Layout]:
        raise PlanError("it cannot be written")


def _gives_arrays(transformer: Any) -> bool:
    """Whether the output is an array: ``set_output`` was not used to change it."""
    return set(getattr(transformer, "_sklearn_output_config", {}).values()) <= {"default"}


def _common_dtype(columns: Frame) -> str:
    """The dtype that pandas gives these columns of numbers in one block."""
    found = {column.dtype for column in columns}
    if not found <= {"bool", *NUMBER_DTYPES}:
        raise _Reason(f"its columns are {', '.join(sorted(found))}: neither plain numbers nor text alone")
    if len(found) > 1 and "bool" in found:
        raise _Reason("its columns are numbers and booleans")
    common = np.result_type(*map(np.dtype, found))
    if len(found) > 1 and common != np.float64 and common.kind != "i":
        raise _Reason(f"its columns are {', '.join(sorted(found))}")
    return str(common)


def _pipeline(plan: _Planner, pipeline: Any, source: Source) -> Source:
    for name, transformer in pipeline.steps:
        if transformer is not None and not (isinstance(transformer, str) and transformer == "passthrough"):
            source = plan.step(transformer, source, name)
    return source


def _column_transformer(plan: _Planner, columns: Any, source: Source) -> Source:
    parts: list[int] = []
    weights = columns.transformer_weights or {}
    for name, transformer, selected in columns.transformers_:
        indices = list(columns._transformer_to_input_indices[name])
        if not indices or (isinstance(transformer, str) and transformer == "drop"):
            continue
        own = _selected(plan, columns, source, indices)
        is_single = isinstance(selected, str | int)
        mark = len(plan.steps)
        try:
            part = _part(plan, name, transformer, own, is_single=is_single)
        except _Reason:
            if not plan.keep_originals or not isinstance(own, tuple):
                raise
            del plan.steps[mark:], plan.runs[mark:], plan.layouts[mark + 1 :]
            part = plan.original(transformer, own, is_single=is_single)
        parts.append(_weighted(plan, part, weights.get(name)))
    return _beside(plan, parts, is_sparse=bool(columns.sparse_output_))


def _part(plan: _Planner, name: str, transformer: Any, own: Source, *, is_single: bool) -> int:
    if is_single:
        with plan._named(name, transformer):
            own = plan.add(words.Documents, plan.block(own))
    if isinstance(transformer, str):  # passthrough
        transformer = preprocessing.FunctionTransformer()
    value = plan.step(transformer, own, name)
    with plan._named(name, transformer):
        part = plan.block(value)
        if plan.layout(part).kind not in ("numbers", "text") or len(plan.layout(part).inner) != 1:
            raise _Reason("gives something other than columns")
    return part


def _selected(plan: _Planner, columns: Any, source: Source, indices: list[int]) -> Source:
    """The columns of one transformer. The request need not have those that nothing selects."""
    if isinstance(source, int):
        return plan.add(operations.Take, source, arrays={"indices": np.array(indices, np.int64)})
    by_name = {column.name: column for column in source}
    names = getattr(columns, "feature_names_in_", None)
    if names is None or any(names[index] not in by_name for index in indices):
        raise _Reason("its columns have other names than the request's")
    return tuple(by_name[names[index]] for index in indices)


def _weighted(plan: _Planner, value: int, weight: float | None) -> int:
    if weight is None:
        return value
    layout = plan.layout(value)
    if layout.dtype.kind != "f":
        value = plan.add(operations.Cast, value, dtype="float64")
    weighted = plan.by_column(operations.Multiply, value, np.full(layout.width, weight, plan.layout(value).dtype))
    return plan.sparse(weighted) if plan.is_sparse(value) else weighted


def _beside(plan: _Planner, parts: list[int], *, is_sparse: bool) -> int:
    if not parts:
        raise _Reason("selects no columns")
    if not is_sparse:
        parts = [plan.dense(part) for part in parts]
    value = plan.add(operations.Concatenate, *parts) if len(parts) > 1 else parts[0]
    return plan.sparse(value) if is_sparse else value


def _feature_union(plan: _Planner, union: Any, source: Source) -> Source:
    parts = []
    weights = union.transformer_weights or {}
    if isinstance(source, tuple):
        source = plan.block(source) if len({column.dtype for column in source}) == 1 else source
    for name, transformer in union.transformer_list:
        if isinstance(transformer, str) and transformer == "drop":
            continue
        own = preprocessing.FunctionTransformer() if isinstance(transformer, str) else transformer
        parts.append(_weighted(plan, plan.block(plan.step(own, source, name)), weights.get(name)))
    return _beside(plan, parts, is_sparse=any(plan.is_sparse(part) for part in parts))


def _standard_scaler(plan: _Planner, scaler: Any, source: Source) -> Source:
    value = plan.floats(source, scaler.n_features_in_, allow_nan=True, sparse=not scaler.with_mean)
    if plan.is_sparse(value):
        return _scaled_sparse(plan, value, scaler.scale_)
    dtype = plan.layout(value).dtype
    if scaler.with_mean:
        value = plan.by_column(operations.Subtract, value, scaler.mean_.astype(dtype))
    return plan.by_column(operations.Divide, value, scaler.scale_.astype(dtype)) if scaler.with_std else value


def _scaled_sparse(plan: _Planner, value: int, scale: Array | None) -> int:
    """A sparse matrix is multiplied by the inverse."""
    return value if scale is None else plan.sparse(plan.by_column(operations.Multiply, value, 1.0 / scale))


def _min_max_scaler(plan: _Planner, scaler: Any, source: Source) -> Source:
    value = plan.floats(source, scaler.n_features_in_, allow_nan=True)
    value = plan.by_column(operations.Multiply, value, scaler.scale_)
    value = plan.by_column(operations.Add, value, scaler.min_)
    if not scaler.clip:
        return value
    low, high = scaler.feature_range
    return plan.add(operations.Clip, value, low=float(low), high=float(high))


def _max_abs_scaler(plan: _Planner, scaler: Any, source: Source) -> Source:
    value = plan.floats(source, scaler.n_features_in_, allow_nan=True, sparse=True)
    is_sparse = plan.is_sparse(value)
    value = _scaled_sparse(plan, value, scaler.scale_) if is_sparse else plan.by_column(operations.Divide, value, scaler.scale_)
    if getattr(scaler, "clip", False):
        value = plan.add(operations.Clip, value, low=-1.0, high=1.0)
    return plan.sparse(value) if is_sparse else value


def _robust_scaler(plan: _Planner, scaler: Any, source: Source) -> Source:
    value = plan.floats(source, scaler.n_features_in_, allow_nan=True, sparse=not scaler.with_centering)
    if plan.is_sparse(value):
        return _scaled_sparse(plan, value, scaler.scale_ if scaler.with_scaling else None)
    if scaler.with_centering:
        value = plan.by_column(operations.Subtract, value, scaler.center_)
    return plan.by_column(operations.Divide, value, scaler.scale_) if scaler.with_scaling else value


def _normalizer(plan: _Planner, normalizer: Any, source: Source) -> Source:
    value = plan.floats(source, normalizer.n_features_in_, allow_nan=False, sparse=True)
    return _normalised(plan, value, normalizer.norm)


def _normalised(plan: _Planner, value: int, norm: str) -> int:
    is_sparse = plan.is_sparse(value)
    value = plan.add(operations.NormaliseRows, value, norm=norm, one_by_one=is_sparse)
    return plan.sparse(value) if is_sparse else value


def _binarizer(plan: _Planner, binarizer: Any, source: Source) -> Source:
    value = plan.block(source)
    plan.columns_of(value, binarizer.n_features_in_)
    if plan.layout(value).kind != "numbers" or plan.is_sparse(value):
        raise _Reason("it is given text or a sparse matrix")
    value = plan.finite(value, allow_nan=False)
    return plan.add(operations.Threshold, value, above=float(binarizer.threshold))


def _power_transformer(plan: _Planner, power: Any, source: Source) -> Source:
    value = plan.floats(source, power.n_features_in_, allow_nan=True)
    lambdas = {"lambdas": power.lambdas_}
    if power.method == "box-cox":
        value = plan.add(statistics.BoxCox, value, arrays=lambdas)
    else:
        by = "power" if hasattr(power, "_yeo_johnson_transform") else "expm1"
        value = plan.add(statistics.YeoJohnson, value, arrays=lambdas, by=by)
    if not power.standardize:
        return value
    value = plan.finite(value, allow_nan=True)
    scaler = power._scaler
    if scaler.with_mean:
        value = plan.by_column(operations.Subtract, value, scaler.mean_.astype(plan.layout(value).dtype))
    return plan.by_column(operations.Divide, value, scaler.scale_.astype(plan.layout(value).dtype))


def _quantile_transformer(plan: _Planner, quantile: Any, source: Source) -> Source:
    value = plan.floats(source, quantile.n_features_in_, allow_nan=True)
    arrays = {"quantiles": quantile.quantiles_, "references": quantile.references_}
    return plan.add(statistics.Quantiles, value, arrays=arrays, normal=quantile.output_distribution == "normal")


def _bins(plan: _Planner, bins: Any, source: Source) -> Source:
    value = plan.floats(source, bins.n_features_in_, allow_nan=False)
    if bins.dtype is not None and np.dtype(bins.dtype) != plan.layout(value).dtype:
        value = plan.add(operations.Cast, value, dtype=str(np.dtype(bins.dtype)))
    edges = [np.asarray(of_column[1:-1], np.float64) for of_column in bins.bin_edges_]
    value = plan.add(encoders.Bins, value, arrays={"edges": np.concatenate(edges)}, n_edges=tuple(map(len, edges)))
    if bins.encode == "ordinal":
        return value
    encoder, dtype = bins._encoder, str(plan.layout(value).dtype)
    return _one_hot(plan, encoder, value, dtype=dtype, is_sparse=bins.encode == "onehot")


def _polynomials(plan: _Planner, polynomials: Any, source: Source) -> Source:
    value = plan.floats(source, polynomials.n_features_in_, allow_nan=False)
    if polynomials._max_degree < 1:
        raise _Reason("its degree is 0")
    return plan.add(
        operations.Products,
        value,
        degree=int(polynomials._max_degree),
        min_degree=int(polynomials._min_degree),
        distinct=bool(polynomials.interaction_only),
        bias=bool(polynomials.include_bias),
    )


def _function(plan: _Planner, transformer: Any, source: Source) -> Source:
    if isinstance(source, tuple) and transformer.func is None and not transformer.validate:
        return source
    if isinstance(source, tuple) and not transformer.validate and len({column.dtype for column in source}) > 1:
        return _beside(plan, [plan.block(_function(plan, transformer, (column,))) for column in source], is_sparse=False)
    value = plan.block(source)
    if transformer.validate:
        if plan.layout(value).kind != "numbers" or plan.is_sparse(value):
            raise _Reason("it validates text or a sparse matrix")
        value = plan.finite(value, allow_nan=False)
    if transformer.func is None:
        return value
    name = next((name for name in (*EXACT_UFUNCS, *ROUNDED_UFUNCS) if transformer.func is getattr(np, name)), None)
    if name is None or transformer.kw_args:
        raise _Reason("its function is not one of numpy's that plans reproduce, without arguments")
    if plan.is_sparse(value):
        raise _Reason("it is given a sparse matrix")
    return plan.add(operations.Ufunc if name in EXACT_UFUNCS else operations.RoundedUfunc, value, name=name)


def _selector(plan: _Planner, selector: Any, source: Source) -> Source:
    value = plan.block(source)
    mask = selector.get_support()
    if plan.columns_of(value, len(mask)).kind != "numbers":
        raise _Reason("its columns are text")
    from sklearn.utils import get_tags

    is_sparse = plan.is_sparse(value)
    if not get_tags(selector).input_tags.allow_nan:  # those that allow NaN allow infinite numbers, too
        value = plan.finite(value, allow_nan=False)
    value = plan.add(operations.Take, value, arrays={"indices": np.flatnonzero(mask).astype(np.int64)})
    return plan.sparse(value) if is_sparse else value


def _pca(plan: _Planner, pca: Any, source: Source) -> Source:
    value = plan.floats(source, pca.n_features_in_, allow_nan=False)
    components, dtype = pca.components_, plan.layout(value).dtype
    if components.dtype != dtype or pca.mean_.dtype != dtype:
        raise _Reason(f"it was fitted on {components.dtype} and is given {dtype}")
    value = plan.add(operations.MatrixProduct, value, arrays={"rows": components})
    value = plan.by_column(operations.Subtract, value, (pca.mean_.reshape(1, -1) @ components.T)[0])
    if not pca.whiten:
        return value
    scale = np.sqrt(pca.explained_variance_)
    least = np.finfo(scale.dtype).eps
    scale[scale < least] = least
    return plan.by_column(operations.Divide, value, scale)


def _truncated_svd(plan: _Planner, svd: Any, source: Source) -> Source:
    value = plan.block(source)
    if plan.columns_of(value, svd.n_features_in_).kind != "numbers":
        raise _Reason("its columns are text")
    value = plan.finite(value, allow_nan=False)
    if plan.is_sparse(value):
        return plan.add(operations.SparseProduct, value, arrays={"rows": svd.components_})
    if plan.layout(value).dtype != svd.components_.dtype:
        raise _Reason(f"it was fitted on {svd.components_.dtype} and is given {plan.layout(value).dtype}")
    return plan.add(operations.MatrixProduct, value, arrays={"rows": svd.components_})


def _is_nan(value: object) -> bool:
    return isinstance(value, float | np.floating) and bool(value != value)


def _simple_imputer(plan: _Planner, imputer: Any, source: Source) -> Source:
    if imputer.strategy in ("mean", "median"):
        value = plan.floats(source, imputer.n_features_in_, allow_nan=_is_nan(imputer.missing_values))
    else:
        value = plan.block(source)
        if plan.is_sparse(value):
            raise _Reason("it is given a sparse matrix")
    if plan.columns_of(value, imputer.n_features_in_).kind == "text":
        return _text_imputer(plan, imputer, value)
    missing, layout = _missing_number(imputer.missing_values), plan.layout(value)
    if imputer._fit_dtype != layout.dtype or layout.dtype.kind not in "fiu":
        raise _Reason(f"it was fitted on {imputer._fit_dtype} and is given {layout.dtype}")
    value = given = plan.finite(value, allow_nan=missing is None)
    fills = np.asarray(imputer.statistics_)
    if fills.dtype.kind == "O":
        fills = np.array(fills.tolist())
    if fills.dtype.kind not in "fiu":
        raise _Reason("it fills with something other than numbers")
    fills = fills.astype(getattr(imputer, "_fill_dtype", fills.dtype))  # scikit-learn 1.6 has no such attribute
    kept = np.ones(len(fills), bool) if imputer.keep_empty_features or fills.dtype.kind != "f" else ~np.isnan(fills)
    if not kept.all():
        value = plan.add(operations.Take, value, arrays={"indices": np.flatnonzero(kept).astype(np.int64)})
    value = plan.add(operations.Fill, value, arrays={"fills": fills[kept]}, missing=missing)
    return _with_indicator(plan, imputer, value, given, missing)


def _missing_number(marker: object) -> float | None:
    """The marker of missing numbers; None for NaN."""
    if _is_nan(marker):
        return None
    if isinstance(marker, bool) or not isinstance(marker, int | float | np.integer | np.floating):
        raise _Reason(f"missing_values={marker!r}")
    return float(marker)


def _with_indicator(plan: _Planner, imputer: Any, value: int, given: int, missing: float | None, **fields: Any) -> int:
    indicator = imputer.indicator_ if imputer.add_indicator else None
    if indicator is None or not len(indicator.features_):
        return value
    mask = plan.add(
        operations.Missing, given, arrays={"indices": indicator.features_.astype(np.int64)}, missing=missing, **fields
    )
    return plan.add(operations.Concatenate, value, mask)


def _text_imputer(plan: _Planner, imputer: Any, value: int) -> int:
    fills = imputer.statistics_.tolist()
    is_none = imputer.missing_values is None
    if imputer._fit_dtype.kind != "O" or imputer.add_indicator or not (is_none or _is_nan(imputer.missing_values)):
        raise _Reason("of text, without an indicator and of NaN or None, is what plans reproduce")
    if not all(isinstance(fill, str) for fill in fills):
        raise _Reason("it fills with something other than text")
    return plan.add(encoders.FillText, value, fills=tuple(map(str, fills)), none=is_none)


def _missing_indicator(plan: _Planner, indicator: Any, source: Source) -> Source:
    value = plan.block(source)
    layout = plan.columns_of(value, indicator.n_features_in_)
    if plan.is_sparse(value) or indicator.sparse is True or not _gives_arrays(indicator):
        raise _Reason("it takes or gives a sparse matrix")
    fields: dict[str, Any] = {}
    if layout.kind == "text":
        fields["none"] = indicator.missing_values is None
        if indicator.missing_values is not None and not _is_nan(indicator.missing_values):
            raise _Reason(f"missing_values={indicator.missing_values!r}")
    else:
        fields["missing"] = _missing_number(indicator.missing_values)
        value = plan.finite(value, allow_nan=fields["missing"] is None)
    if indicator.features == "all":
        indices = np.arange(layout.width)
    else:
        indices, fields["refuse_new"] = indicator.features_, bool(indicator.error_on_new)
    return plan.add(operations.Missing, value, arrays={"indices": indices.astype(np.int64)}, **fields)


def _knn_imputer(plan: _Planner, imputer: Any, source: Source) -> Source:
    if imputer.metric != "nan_euclidean" or imputer.weights not in ("uniform", "distance") or not _is_nan(imputer.missing_values):
        raise _Reason("its metric or weights are a function, or missing values are not NaN")
    value = given = plan.floats(source, imputer.n_features_in_, allow_nan=True)
    if imputer.keep_empty_features and not imputer._valid_mask.all():
        raise _Reason("it keeps empty columns")
    value = plan.add(
        statistics.NearestRows,
        value,
        arrays={"rows": imputer._fit_X},
        n_neighbours=int(imputer.n_neighbors),
        by_distance=imputer.weights == "distance",
    )
    return _with_indicator(plan, imputer, value, given, None)


def _one_hot_encoder(plan: _Planner, encoder: Any, source: Source) -> Source:
    return _one_hot(plan, encoder, source, dtype=str(np.dtype(encoder.dtype)), is_sparse=bool(encoder.sparse_output))


def _one_hot(plan: _Planner, encoder: Any, source: Source, *, dtype: str, is_sparse: bool) -> Source:
    handling = "infrequent_if_exist" if encoder.handle_unknown == "warn" else encoder.handle_unknown
    dropped = encoder._drop_idx_after_grouping

    def entries(number: int) -> tuple[list[list[float]], list[float] | None, int]:
        """The places of a column's categories, of an unknown one, and the column's width."""
        codes, infrequent = _grouped(encoder, number)
        width = max(codes) + 1
        drop = None if dropped is None else dropped[number]
        unknown = -1 if infrequent is None or handling != "infrequent_if_exist" else infrequent
        place_of = {code: code for code in range(-1, width)}
        if drop is not None:
            place_of = {code: -1 if code == drop else code - (code > drop) for code in range(-1, width)} | {-1: -1}
            width -= 1
        return [[place_of[code]] for code in codes], None if handling == "error" else [place_of[unknown]], width

    value = _by_groups(plan, encoder, source, entries, one_hot=dtype)
    return plan.sparse(value) if is_sparse else value


def _grouped(encoder: Any, number: int) -> tuple[list[int], int | None]:
    """The code of each category, rare ones together, and the code of these."""
    n_categories = len(encoder.categories_[number])
    mappings = getattr(encoder, "_default_to_infrequent_mappings", None) if encoder._infrequent_enabled else None
    if mappings is None or mappings[number] is None:
        return list(range(n_categories)), None
    missing = getattr(encoder, "_missing_indices", {}).get(number)
    codes, mapping = list(range(n_categories)), mappings[number].tolist()
    known = [index for index in range(n_categories) if index != missing] if len(mapping) < n_categories else codes
    grouped = dict(zip(known, mapping, strict=True))
    return [grouped.get(index, index) for index in codes], int(mapping[int(encoder._infrequent_indices[number][0])])


def _ordinal_encoder(plan: _Planner, encoder: Any, source: Source) -> Source:
    def entries(number: int) -> tuple[list[list[float]], list[float] | None, int]:
        codes, _ = _grouped(encoder, number)
        values: list[list[float]] = [[float(code)] for code in codes]
        missing = encoder._missing_indices.get(number)
        if missing is not None:
            values[missing] = [encoder.encoded_missing_value]
        return values, None if encoder.handle_unknown == "error" else [encoder.unknown_value], 1

    return _by_groups(plan, encoder, source, entries, dtype=np.dtype(encoder.dtype))


def _target_encoder(plan: _Planner, encoder: Any, source: Source) -> Source:
    n_each = len(encoder.classes_) if encoder.target_type_ == "multiclass" else 1
    unknown = np.atleast_1d(encoder.target_mean_).tolist()

    def entries(number: int) -> tuple[list[list[float]], list[float] | None, int]:
        columns = encoder.encodings_[number * n_each : (number + 1) * n_each]
        return np.column_stack(columns).tolist(), unknown, n_each

    return _by_groups(plan, encoder, source, entries, dtype=np.dtype("f8"))


Entries = Callable[[int], tuple[list[list[float]], list[float] | None, int]]


def _by_groups(plan: _Planner, encoder: Any, source: Source, entries: Entries, *, one_hot: str = "", dtype: Any = None) -> int:
    """An encoder's value: a step for each run of columns of one kind, side by side."""
    if plan.is_sparse(source):
        raise _Reason("it is given a sparse matrix")
    parts, first = [], 0
    for value in _groups(plan, source):
        layout = plan.layout(value)
        tables: list[Any] = []
        known: list[Array] = []
        values: list[list[float]] = []
        width = 0
        for number in range(first, first + layout.width):
            table, own, categories = _table(encoder.categories_[number], layout, entries(number))
            column_width = entries(number)[2]
            if one_hot:
                own = [[place + width if place >= 0 else -1 for place in places] for places in own]
            tables.append(table)
            known.append(categories)
            values += own
            width += column_width
        arrays = {} if layout.kind == "text" else {"categories": np.concatenate(known)}
        fields: dict[str, Any] = {"tables": tuple(tables), "first": first}
        if one_hot:
            arrays["places"] = np.array(values, np.int64)[:, 0]
            operation: Any = encoders.OneHot if layout.kind == "text" else encoders.OneHotNumbers
            parts.append(plan.add(operation, value, arrays=arrays, width=width, dtype=one_hot, **fields))
        else:
            arrays["values"] = np.array(values, dtype)
            operation = encoders.LookUp if layout.kind == "text" else encoders.LookUpNumbers
            parts.append(plan.add(operation, value, arrays=arrays, **fields))
        first += layout.width
    if first != encoder.n_features_in_:
        raise _Reason(f"expected {encoder.n_features_in_} columns, got {first}")
    return _beside(plan, parts, is_sparse=False)


def _groups(plan: _Planner, source: Source) -> Iterator[int]:
    """Blocks of the columns, each of one kind, checked as encoders do."""
    if isinstance(source, int):
        yield plan.finite(source, allow_nan=True, input_name="") if plan.layout(source).kind == "numbers" else source
        return
    kinds = ["text" if column.dtype in TEXT_DTYPES else column.dtype for column in source]
    start = 0
    for end in range(1, len(source) + 1):
        if end == len(source) or kinds[end] != kinds[start]:
            value = plan.block(source[start:end])
            yield value if kinds[start] == "text" else plan.finite(value, allow_nan=True, input_name="")
            start = end


def _table(
    categories: Array, layout: Layout, entries: tuple[list[list[float]], list[float] | None, int]
) -> tuple[Any, Any, Array]:
    """The table of a column, the values of its codes, and its categories if they are numbers."""
    values, unknown, _ = entries
    listed = categories.tolist()
    others = [] if unknown is None else [unknown]
    nan = next((index for index, word in enumerate(listed) if _is_nan(word)), None)
    if layout.kind == "text":
        none = next((index for index, word in enumerate(listed) if word is None), None)
        chosen = [index for index in range(len(listed)) if index not in (none, nan)]
        if not all(isinstance(listed[index], str) for index in chosen):
            raise _Reason("its categories are not text")
        order = chosen + [index for index in (none, nan) if index is not None]
        words_of = Words(
            words=tuple(str(listed[index]) for index in chosen), none=none is not None, nan=nan is not None, unknown=bool(others)
        )
        return words_of, [*(values[index] for index in order), *others], np.empty(0)
    chosen = [index for index in range(len(listed)) if index != nan]
    known = np.asarray([listed[index] for index in chosen])
    if known.dtype.kind not in "fiub":
        raise _Reason("its categories are not numbers")
    cast = known.astype(layout.dtype)
    if not (cast == known).all():
        raise _Reason(f"its categories are not {layout.dtype}")
    order = [chosen[place] for place in np.argsort(cast, kind="stable").tolist()] + ([] if nan is None else [nan])
    table = Numbers(n_known=len(chosen), nan=nan is not None, unknown=bool(others))
    return table, [*(values[index] for index in order), *others], np.sort(cast)


def _vectorizer(plan: _Planner, vectorizer: Any, source: Source) -> Source:
    value = _counts(plan, vectorizer, source)
    if type(vectorizer) is TfidfVectorizer:
        value = _weighed(plan, vectorizer._tfidf, value)
    return value


def _counts(plan: _Planner, vectorizer: Any, source: Source) -> int:
    if not isinstance(source, int) or plan.layout(source).kind != "documents":
        raise _Reason("it is given something other than one column of text")
    if any(getattr(vectorizer, name) is not None for name in ("preprocessor", "tokenizer")) or callable(vectorizer.analyzer):
        raise _Reason("its preprocessor, tokenizer or analyzer is a function")
    if callable(vectorizer.strip_accents) or vectorizer.input != "content":
        raise _Reason("it strips accents by a function, or reads files")
    if vectorizer.analyzer == "word" and vectorizer.token_pattern not in words.TOKEN_PATTERNS:
        raise _Reason(f"token_pattern={vectorizer.token_pattern!r}")
    stop_words = (vectorizer.get_stop_words() or ()) if vectorizer.analyzer == "word" else ()
    fields = {
        "analyser": vectorizer.analyzer,
        "stop_words": tuple(sorted(map(str, stop_words))),
        "shortest": int(vectorizer.ngram_range[0]),
        "longest": int(vectorizer.ngram_range[1]),
        "lowercase": bool(vectorizer.lowercase),
        "strip_accents": vectorizer.strip_accents or "",
        "dtype": str(np.dtype(vectorizer.dtype)),
        "binary": bool(vectorizer.binary),
    }
    if vectorizer.analyzer == "word":
        fields["token_pattern"] = vectorizer.token_pattern
    if type(vectorizer) is HashingVectorizer:
        fields |= {"n_features": int(vectorizer.n_features), "signed": bool(vectorizer.alternate_sign)}
        value = plan.sparse(plan.add(words.HashWords, source, **fields))
        return value if vectorizer.norm is None else _normalised(plan, value, vectorizer.norm)
    in_order = sorted(vectorizer.vocabulary_, key=vectorizer.vocabulary_.__getitem__)
    if not all(isinstance(term, str) for term in in_order):
        raise _Reason("its vocabulary is not text")
    return plan.sparse(plan.add(words.CountWords, source, vocabulary=tuple(in_order), **fields))


def _tfidf_transformer(plan: _Planner, transformer: Any, source: Source) -> Source:
    return _weighed(plan, transformer, plan.block(source))


def _weighed(plan: _Planner, transformer: Any, value: int) -> int:
    if plan.layout(value).kind != "numbers" or len(plan.layout(value).inner) != 1:
        raise _Reason("it is given something other than counts")
    if plan.layout(value).dtype.kind != "f":
        value = plan.sparse(plan.add(operations.Cast, value, dtype="float64"))
    value = plan.sparse(plan.finite(value, allow_nan=False))
    if transformer.sublinear_tf:
        value = plan.sparse(plan.add(operations.LogarithmOfCounts, value))
    if transformer.use_idf:
        value = plan.sparse(plan.by_column(operations.Multiply, value, np.asarray(transformer.idf_)))
    return value if transformer.norm is None else _normalised(plan, plan.sparse(value), transformer.norm)


def _flatten(plan: _Planner, _: Any, source: Source) -> Source:
    return plan.add(operations.Flatten, plan.block(source))


def _decode_image(plan: _Planner, _: Any, source: Source) -> Source:
    return plan.add(pictures.DecodePictures, plan.block(source))


def _resize_image(plan: _Planner, resize: Any, source: Source) -> Source:
    return plan.add(pictures.ResizePictures, plan.block(source), size=int(resize.size), crop=float(resize.crop))


def _normalise_image(plan: _Planner, normalise: Any, source: Source) -> Source:
    scale = 1 / (255 * np.asarray(normalise.std, dtype=np.float32))
    offset = np.asarray(normalise.mean, dtype=np.float32) / np.asarray(normalise.std, dtype=np.float32)
    arrays = {"scale": np.atleast_1d(scale).astype(np.float32), "offset": np.atleast_1d(offset).astype(np.float32)}
    return plan.add(pictures.NormalisePictures, plan.block(source), arrays=arrays)


def _category_codes(plan: _Planner, codes: Any, source: Source) -> Source:
    if not isinstance(source, tuple) or codes.unseen == "next" or len(source) != len(codes.categories):
        raise _Reason("of columns of a frame, with unseen categories missing or after the others, is what plans reproduce")
    parts = []
    for column, known in zip(source, codes.categories, strict=True):
        if known is None:
            parts.append(plan.add(operations.Columns, 0, names=(column.name,), dtype="float64"))
            continue
        if column.dtype not in TEXT_DTYPES or not all(isinstance(word, str) for word in known):
            raise _Reason("its categories are not text")
        unseen = np.nan if codes.unseen == "missing" else float(len(known))
        values = [*map(float, range(len(known))), np.nan, np.nan, unseen]
        table = Words(words=tuple(known), none=True, nan=True, unknown=True)
        value = plan.block((column,))
        parts.append(plan.add(encoders.LookUp, value, arrays={"values": np.array(values)[:, np.newaxis]}, tables=(table,)))
    return _beside(plan, parts, is_sparse=False)


_MAKERS: dict[type, Callable[[_Planner, Any, Source], Source]] = {
    CategoryCodes: _category_codes,
    ColumnTransformer: _column_transformer,
    CountVectorizer: _vectorizer,
    DecodeImage: _decode_image,
    FeatureUnion: _feature_union,
    Flatten: _flatten,
    HashingVectorizer: _vectorizer,
    KNNImputer: _knn_imputer,
    MissingIndicator: _missing_indicator,
    NormaliseImage: _normalise_image,
    PCA: _pca,
    Pipeline: _pipeline,
    ResizeImage: _resize_image,
    SimpleImputer: _simple_imputer,
    TfidfTransformer: _tfidf_transformer,
    TfidfVectorizer: _vectorizer,
    TruncatedSVD: _truncated_svd,
    preprocessing.Binarizer: _binarizer,
    preprocessing.FunctionTransformer: _function,
    preprocessing.KBinsDiscretizer: _bins,
    preprocessing.MaxAbsScaler: _max_abs_scaler,
    preprocessing.MinMaxScaler: _min_max_scaler,
    preprocessing.Normalizer: _normalizer,
    preprocessing.OneHotEncoder: _one_hot_encoder,
    preprocessing.OrdinalEncoder: _ordinal_encoder,
    preprocessing.PolynomialFeatures: _polynomials,
    preprocessing.PowerTransformer: _power_transformer,
    preprocessing.QuantileTransformer: _quantile_transformer,
    preprocessing.RobustScaler: _robust_scaler,
    preprocessing.StandardScaler: _standard_scaler,
    preprocessing.TargetEncoder: _target_encoder,
}


def _maker(transformer: Any) -> Callable[[_Planner, Any, Source], Source] | None:
    found = _MAKERS.get(type(transformer))
    if found is None and type(transformer) in _selectors():
        return _selector
    return found


@cache
def _selectors() -> frozenset[type]:
    """scikit-learn's own selections of features."""
    from sklearn import feature_selection

    found = (getattr(feature_selection, name) for name in feature_selection.__all__)
    return frozenset(each for each in found if isinstance(each, type) and issubclass(each, SelectorMixin))
