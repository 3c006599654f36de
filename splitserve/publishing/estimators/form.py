"""What a converter of an estimator is: a class whose properties are the estimator's methods as values in a graph.

A property is computed when something asks for it, so a form need not have all of them. Forms of meta-estimators ask `form_of` for
those of their inner estimators; nothing here depends on what an inner estimator is.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import numpy as np

from splitserve.arrays import Array
from splitserve.publishing.errors import NotConvertible
from splitserve.publishing.graph import Graph, Value, concat

_MAX_REASON = 300


class Form:
    """A fitted estimator over rows.

    Args:
        estimator: fitted.
        x: rows (n_rows, n_features).
    """

    def __init__(self, estimator: Any, x: Value) -> None:
        self.estimator = estimator
        self.x = x

    @property
    def graph(self) -> Graph:
        return self.x.graph

    @property
    def wide(self) -> Value:
        """The rows in float64, in which scikit-learn computes."""
        return self.x.astype(np.float64)

    @cached_property
    def decision_function(self) -> Value:
        """(n_rows, n_scores), also where scikit-learn gives one dimension."""
        raise self._cannot("decision_function")

    @cached_property
    def predict_proba(self) -> Value:
        """(n_rows, n_classes)."""
        raise self._cannot("predict_proba")

    @cached_property
    def class_index(self) -> Value:
        """(n_rows,) of the predicted class among ``classes_``."""
        return self.predict_proba.argmax()

    @cached_property
    def predict(self) -> Value:
        """Of a classifier (n_rows,), of a regressor (n_rows, n_targets)."""
        return labels(self.graph, self.classes, self.class_index)

    @cached_property
    def score_samples(self) -> Value:
        """(n_rows, 1)."""
        raise self._cannot("score_samples")

    @cached_property
    def transform(self) -> Value:
        """(n_rows, n_features_out)."""
        raise self._cannot("transform")

    @cached_property
    def targets(self) -> Sequence[Form]:
        """Of a classifier with several targets, what is predicted for each."""
        return [self]

    @property
    def classes(self) -> Array:
        """(n_classes,) as `predict` gives them."""
        return np.asarray(self.estimator.classes_)

    def _cannot(self, what: str) -> NotConvertible:
        return NotConvertible(f"{type(self.estimator).__name__}.{what} has no ONNX form")


class Target(Form):
    """One target of a classifier with several.

    Args:
        of: the classifier's form.
        classes: (n_classes,) of the target.
        probabilities: (n_rows, n_classes), None if the classifier has none.
        index: (n_rows,) of the predicted class; that of the greatest probability by default.
    """

    def __init__(self, of: Form, classes: Any, probabilities: Value | None, index: Value | None = None) -> None:
        super().__init__(of.estimator, of.x)
        self._classes, self._probabilities, self._index = np.asarray(classes), probabilities, index

    @property
    def classes(self) -> Array:
        return self._classes

    @cached_property
    def predict_proba(self) -> Value:
        if self._probabilities is None:
            raise self._cannot("predict_proba")
        return self._probabilities

    @cached_property
    def class_index(self) -> Value:
        return self.predict_proba.argmax() if self._index is None else self._index


class Regressor(Form):
    """A form whose ``predict`` is numbers."""

    @cached_property
    def predict(self) -> Value:
        raise self._cannot("predict")


class Scored(Form):
    """An outlier detector by its ``score_samples``: what is below ``offset_`` is an outlier."""

    @cached_property
    def decision_function(self) -> Value:
        return self.score_samples - float(self.estimator.offset_)

    @cached_property
    def predict(self) -> Value:
        return inlier(self.decision_function, (self.decision_function < 0.0).logical_not())


class Forwarding(Form):
    """A form that answers what another one does."""

    @cached_property
    def inner(self) -> Form:
        raise NotImplementedError

    @cached_property
    def predict(self) -> Value:
        return self.inner.predict

    @cached_property
    def predict_proba(self) -> Value:
        return self.inner.predict_proba

    @cached_property
    def decision_function(self) -> Value:
        return self.inner.decision_function

    @cached_property
    def class_index(self) -> Value:
        return self.inner.class_index

    @cached_property
    def score_samples(self) -> Value:
        return self.inner.score_samples

    @cached_property
    def transform(self) -> Value:
        return self.inner.transform

    @cached_property
    def targets(self) -> Sequence[Form]:
        return self.inner.targets


_FORMS: dict[str, Callable[[Any, Value], Form]] = {}
_MODULES = (*("trees", "linear", "bayes", "neighbours", "kernels", "ensembles", "networks", "groups", "others", "steps"),)
"""Modules of this package that register forms."""


def converts(*names: str) -> Callable[[type[Form]], type[Form]]:
    """Register a form.

    Args:
        names: of classes, each with the package that it comes from, e.g. "sklearn.LinearRegression". A name that is registered
            already is replaced.
    """

    def register(form: type[Form]) -> type[Form]:
        _FORMS.update(dict.fromkeys(names, form))
        return form

    return register


def form_of(estimator: Any, x: Value) -> Form:
    """The form of a fitted estimator: one of this package, else what skl2onnx makes of it.

    Args:
        estimator: fitted.
        x: rows (n_rows, n_features).

    Raises:
        NotConvertible: there is none, or the estimator's parameters are not supported; says why and what works instead.
    """
    from splitserve.publishing.estimators.by_skl2onnx import ByConverter
    from splitserve.publishing.estimators.refused import reason_for

    name = name_of(estimator)
    if reason := reason_for(estimator):
        raise NotConvertible(f"{type(estimator).__name__}: {reason}")
    for module in _MODULES:
        importlib.import_module(f"splitserve.publishing.estimators.{module}")
    importlib.import_module("splitserve.publishing.boosting")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scikit-learn's, about attributes that will go
        return _FORMS.get(name, ByConverter)(estimator, x)


def not_converted(estimator: Any, reason: str) -> NotConvertible:
    """The error of a conversion that failed in a way that no form foresees; of a long reason, its beginning."""
    return NotConvertible(
        f"{type(estimator).__name__} cannot be converted to ONNX: {' '.join(reason.split())[:_MAX_REASON]}; convert it by other "
        "means and publish the result with publish_predictor"
    )


def unknown(estimator: Any) -> NotConvertible:
    """The error of an estimator of a class that has no form, and that skl2onnx does not know either."""
    kind = type(estimator)
    base = next((each.__name__ for each in kind.__mro__[1:] if _name_of(each) in _FORMS), "")
    derived = f"; fit a {base}, from which it is derived, if it predicts in the same way" if base else ""
    return NotConvertible(
        f"{kind.__name__} of {kind.__module__} has no ONNX form{derived}; convert it by other means and publish the result with "
        "publish_predictor"
    )


def name_of(estimator: Any) -> str:
    """As `converts` takes it."""
    return _name_of(type(estimator))


def _name_of(kind: type) -> str:
    return f"{kind.__module__.partition('.')[0]}.{kind.__qualname__}"


def labels(graph: Graph, classes: Array, index: Value) -> Value:
    """(n_rows,) classes by their index, of the datatype that `label_dtype` gives.

    Raises:
        NotConvertible: they are neither numbers, booleans nor text.
    """
    wanted = label_dtype(classes)
    if wanted.kind == "O":
        return graph.constant(classes.astype(object)).take(index, axis=0)
    return graph.constant(classes.astype(wanted), wanted).take(index, axis=0)


def label_dtype(classes: Array) -> np.dtype[Any]:
    """The datatype of labels on the wire: that of the classes in training, ``object`` for text.

    Raises:
        NotConvertible: they are neither numbers, booleans nor text.
    """
    if classes.dtype.kind in "biuf":
        return classes.dtype
    listed = classes.tolist()
    if classes.dtype.kind == "U" or all(isinstance(each, str) for each in listed):
        return np.dtype(object)
    for kind, dtype in ((bool, np.bool_), (int, np.int64), (float, np.float64)):
        if all(isinstance(each, kind) and not (kind is int and isinstance(each, bool)) for each in listed):
            return np.dtype(dtype)
    raise NotConvertible(
        f"classes of the types {sorted({type(each).__name__ for each in listed})} cannot be sent; fit on y of one type: "
        "text, whole numbers or booleans"
    )


def shares_of(values: Value, of_zeros: float | None = None) -> Value:
    """(n_rows, n_classes) divided by each row's sum; rows of zeros stay zeros, or become ``of_zeros``."""
    total = values.sum()
    is_zero = total.equals(0.0)
    found = values / values.graph.where(is_zero, 1.0, total)
    return found if of_zeros is None else values.graph.where(is_zero, of_zeros, found)


def two_columns(positive: Value) -> Value:
    """(n_rows, 1) probabilities of the second of two classes -> (n_rows, 2)."""
    return concat([1.0 - positive, positive])


def inlier(scores: Value, is_inlier: Value) -> Value:
    """(n_rows,) 1 or -1."""
    return (2.0 * is_inlier.astype(scores.dtype) - 1.0).astype(np.int64).reshape(-1)


def constant_rows(x: Value, row: Any, dtype: Any = np.float64) -> Value:
    """(n_rows, n_values), each of them ``row``."""
    n_rows = x.graph.op("Shape", x, dtype=np.int64, start=0, end=1)
    values = np.asarray(row, dtype)
    shape = x.graph.op("Concat", n_rows, x.graph.constant(np.array([values.size], np.int64)), axis=0)
    return x.graph.op("Expand", x.graph.constant(values.reshape(1, -1), dtype), shape)
