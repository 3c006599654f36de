"""Transforms inside of estimators: of pipelines in a vote or a stack, and of targets. Others are left to skl2onnx."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any

import numpy as np
from sklearn.utils import _safe_indexing

from splitserve.arrays import Array
from splitserve.publishing.errors import NotConvertible
from splitserve.publishing.estimators.form import Form, Forwarding, converts, form_of
from splitserve.publishing.estimators.kernels import erf
from splitserve.publishing.estimators.others import interpolated
from splitserve.publishing.graph import Value, concat

_FUNCTIONS: dict[Any, Callable[[Value], Value]] = {
    None: lambda x: x,
    np.exp: lambda x: x.exp(),
    np.expm1: lambda x: x.exp() - 1.0,
    np.exp2: lambda x: (x * float(np.log(2.0))).exp(),
    np.log: lambda x: x.log(),
    np.log1p: lambda x: (x + 1.0).log(),
    np.log2: lambda x: x.log() / float(np.log(2.0)),
    np.log10: lambda x: x.log() / float(np.log(10.0)),
    np.sqrt: lambda x: x.sqrt(),
    np.square: lambda x: x * x,
    np.cbrt: lambda x: x.graph.op("Sign", x) * (x.abs() ** (1.0 / 3.0)),
    np.abs: lambda x: x.abs(),
    np.negative: lambda x: -x,
    np.reciprocal: lambda x: 1.0 / x,
    np.tanh: lambda x: x.tanh(),
    np.sinh: lambda x: (x.exp() - (-x).exp()) / 2.0,
    np.arcsinh: lambda x: x.graph.op("Sign", x) * (x.abs() + (x * x + 1.0).sqrt()).log(),
}


def function_of(function: Any, argument: str) -> Callable[[Value], Value]:
    """What a function of numpy is in a graph; ``argument`` is where it was given.

    Raises:
        NotConvertible: another function.
    """
    try:
        return _FUNCTIONS[function]
    except (KeyError, TypeError):
        name = getattr(function, "__name__", type(function).__name__)
        known = ", ".join(sorted(f"np.{each.__name__}" for each in _FUNCTIONS if each is not None))
        raise NotConvertible(
            f"{argument}={name} has no ONNX form; give one of numpy's functions itself, not a lambda or function that calls it: "
            f"{known}"
        ) from None


def inverse_of(transformer: Any, x: Value) -> Value:
    """``inverse_transform`` of a fitted transformer of targets, (n_rows, n_targets).

    Raises:
        NotConvertible: it has no ONNX form.
    """
    name = type(transformer).__name__
    if name == "FunctionTransformer":
        return function_of(transformer.inverse_func, "inverse_func")(x)
    if name == "Pipeline":
        for _, step in reversed(transformer.steps):
            x = x if step in (None, "passthrough") else inverse_of(step, x)
        return x
    if name == "StandardScaler":
        x = x if transformer.scale_ is None or not transformer.with_std else x * _row(transformer.scale_)
        return x + _row(transformer.mean_) if transformer.with_mean else x
    if name == "MinMaxScaler":
        return (x - _row(transformer.min_)) / _row(transformer.scale_)
    if name == "MaxAbsScaler":
        return x * _row(transformer.scale_)
    if name == "RobustScaler":
        x = x * _row(transformer.scale_) if transformer.with_scaling else x
        return x + _row(transformer.center_) if transformer.with_centering else x
    if name == "PowerTransformer":
        x = inverse_of(transformer._scaler, x) if transformer.standardize else x
        undo = _undo_box_cox if transformer.method == "box-cox" else _undo_yeo_johnson
        return concat([undo(x.take([column]), float(power)) for column, power in enumerate(transformer.lambdas_)])
    if name == "QuantileTransformer":
        columns = []
        for column, quantiles in enumerate(transformer.quantiles_.T):
            share = x.take([column])
            if transformer.output_distribution == "normal":
                share = 0.5 * (1.0 + erf(share / float(np.sqrt(2.0))))
            inside = share.maximum(0.0).minimum(1.0)
            columns.append(interpolated(inside, transformer.references_, np.asarray(quantiles)))
        return concat(columns)
    raise NotConvertible(
        f"TransformedTargetRegressor with transformer={name} has no ONNX form; use func=np.log1p and "
        "inverse_func=np.expm1, StandardScaler, PowerTransformer or QuantileTransformer"
    )


def _undo_box_cox(x: Value, power: float) -> Value:
    return x.exp() if power == 0 else (x * power + 1.0) ** (1.0 / power)


def _undo_yeo_johnson(x: Value, power: float) -> Value:
    above, below = x.maximum(0.0), x.minimum(0.0)
    high = above.exp() - 1.0 if abs(power) < np.spacing(1.0) else (above * power + 1.0) ** (1.0 / power) - 1.0
    if abs(power - 2) > np.spacing(1.0):
        low = 1.0 - (-(2.0 - power) * below + 1.0) ** (1.0 / (2.0 - power))
    else:
        low = 1.0 - (-below).exp()
    return x.graph.where(x >= 0.0, high, low)


def _row(values: Any) -> Array:
    return np.asarray(values, np.float64).reshape(1, -1)


@converts("sklearn.Pipeline")
class Pipeline(Forwarding):
    @cached_property
    def inner(self) -> Form:
        x = self.x
        for _, step in self.estimator.steps[:-1]:
            x = x if step in (None, "passthrough") else form_of(step, x).transform
        return form_of(self.estimator.steps[-1][1], x)

    @cached_property
    def transform(self) -> Value:
        if self.estimator.steps[-1][1] in (None, "passthrough"):
            return form_of(self.estimator[:-1], self.x).transform
        return self.inner.transform


@converts("sklearn.ColumnTransformer")
class ColumnTransformer(Form):
    @cached_property
    def transform(self) -> Value:
        parts = []
        everything = np.arange(self.estimator.n_features_in_)
        for _, step, chosen in self.estimator.transformers_:
            if isinstance(step, str) and step == "drop":
                continue
            try:
                used = np.ravel(_safe_indexing(everything, chosen))
            except (ValueError, IndexError, KeyError) as error:
                raise NotConvertible(
                    "a ColumnTransformer inside of an estimator selects columns by number; make the one that selects them by "
                    "name a step before the estimator"
                ) from error
            if not used.size:
                continue
            x = self.x.take(used)
            parts.append(x if isinstance(step, str) else form_of(step, x).transform)
        return concat(parts)


@converts("sklearn.FeatureUnion")
class FeatureUnion(Form):
    @cached_property
    def transform(self) -> Value:
        parts = []
        weights = self.estimator.transformer_weights or {}
        for name, step in self.estimator.transformer_list:
            if isinstance(step, str) and step == "drop":
                continue
            part = self.x if isinstance(step, str) else form_of(step, self.x).transform
            parts.append(part * float(weights[name]) if name in weights else part)
        return concat(parts)


@converts("sklearn.StandardScaler", "sklearn.MinMaxScaler", "sklearn.MaxAbsScaler", "sklearn.RobustScaler")
class Scaler(Form):
    @cached_property
    def transform(self) -> Value:
        return self._scaled().as_sparse(self.x.is_sparse)  # those that take a sparse matrix give one

    def _scaled(self) -> Value:
        model, name, x = self.estimator, type(self.estimator).__name__, self.wide
        if name == "MinMaxScaler":
            x = x * _row(model.scale_) + _row(model.min_)
            return x.maximum(float(model.feature_range[0])).minimum(float(model.feature_range[1])) if model.clip else x
        if name == "MaxAbsScaler":
            return x / _row(model.scale_)
        if name == "RobustScaler":
            x = x - _row(model.center_) if model.with_centering else x
            return x / _row(model.scale_) if model.with_scaling else x
        x = x - _row(model.mean_) if model.with_mean else x
        return x / _row(model.scale_) if model.with_std else x


@converts("sklearn.PCA", "sklearn.IncrementalPCA")
class PCA(Form):
    @cached_property
    def transform(self) -> Value:
        model = self.estimator
        found = (self.wide - _row(model.mean_)) @ model.components_.T
        return found / _row(np.sqrt(model.explained_variance_)) if model.whiten else found


@converts("sklearn.TruncatedSVD")
class TruncatedSVD(Form):
    @cached_property
    def transform(self) -> Value:
        found: Value = self.wide @ self.estimator.components_.T
        return found


@converts(
    *(f"sklearn.Select{name}" for name in ("Fdr", "Fpr", "FromModel", "Fwe", "KBest", "Percentile")),
    *(f"sklearn.{name}" for name in ("GenericUnivariateSelect", "VarianceThreshold", "SequentialFeatureSelector")),
)
class FeatureSelection(Form):
    @cached_property
    def transform(self) -> Value:
        return self.x.take(self.estimator.get_support(indices=True))


@converts("sklearn.PolynomialFeatures")
class PolynomialFeatures(Form):
    @cached_property
    def transform(self) -> Value:
        columns = []
        for powers in self.estimator.powers_:
            column = None
            for place, power in enumerate(powers):
                for _ in range(power):
                    factor = self.wide.take([place])
                    column = factor if column is None else column * factor
            columns.append(self.wide.take([0]) * 0.0 + 1.0 if column is None else column)
        return concat(columns)


@converts("sklearn.SimpleImputer")
class SimpleImputer(Form):
    @cached_property
    def transform(self) -> Value:
        model = self.estimator
        is_nan = isinstance(model.missing_values, float) and np.isnan(model.missing_values)
        fills = np.asarray(model.statistics_, np.float64)
        if model.add_indicator or not is_nan or np.isnan(fills).any():
            raise NotConvertible(
                "this SimpleImputer has no ONNX form inside of an estimator; make it a step before the estimator"
            )
        return self.graph.where(self.wide.is_nan(), _row(fills), self.wide)


@converts("sklearn.FunctionTransformer")
class FunctionTransformer(Form):
    @cached_property
    def transform(self) -> Value:
        return function_of(self.estimator.func, "func")(self.wide)


@converts("sklearn.PowerTransformer")
class PowerTransformer(Form):
    @cached_property
    def transform(self) -> Value:
        model = self.estimator
        do = _box_cox if model.method == "box-cox" else _yeo_johnson
        found = concat([do(self.wide.take([column]), float(power)) for column, power in enumerate(model.lambdas_)])
        return form_of(model._scaler, found).transform if model.standardize else found


def _box_cox(x: Value, power: float) -> Value:
    return x.log() if power == 0 else (x**power - 1.0) / power


def _yeo_johnson(x: Value, power: float) -> Value:
    above, below = x.maximum(0.0), x.minimum(0.0)
    high = (above + 1.0).log() if abs(power) < np.spacing(1.0) else ((above + 1.0) ** power - 1.0) / power
    low = -((1.0 - below) ** (2.0 - power) - 1.0) / (2.0 - power) if abs(power - 2) > np.spacing(1.0) else -(1.0 - below).log()
    return x.graph.where(x >= 0.0, high, low)
