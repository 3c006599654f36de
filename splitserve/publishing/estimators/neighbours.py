"""Estimators by distances to rows of training, or to centres."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np

from splitserve.arrays import Array
from splitserve.publishing.errors import NotConvertible
from splitserve.publishing.estimators.form import Form, Regressor, Scored, Target, converts, labels, shares_of
from splitserve.publishing.graph import Value
from splitserve.runtimes.preprocessor import to_dense

_MAX_COLUMNS = 100
"""Up to this many, differences are added column by column, which needs the least memory."""


def distances(x: Value, points: Array, metric: str = "euclidean", p: float = 2.0) -> Value:
    """(n_rows, n_points) in float64, of the Euclidean metric its squares.

    Raises:
        NotConvertible: another metric than those of `power_of`.
    """
    known = np.asarray(points, np.float64)
    power = power_of(metric, p)
    if known.shape[1] > _MAX_COLUMNS:
        wide = x.astype(np.float64).reshape(-1, 1, known.shape[1]) - known[np.newaxis]
        return wide.abs().max(2, keepdims=False) if power == np.inf else _raised(wide, power).sum(2, keepdims=False)
    total = None
    for column in range(known.shape[1]):
        difference = x.astype(np.float64).take([column]) - known[:, column].reshape(1, -1)
        part = difference.abs() if power == np.inf else _raised(difference, power)
        total = part if total is None else total.maximum(part) if power == np.inf else total + part
    assert total is not None, "there is at least one feature"
    return total


def _raised(difference: Value, power: float) -> Value:
    if power == 2:
        return difference * difference
    return difference.abs() if power == 1 else difference.abs() ** power


def power_of(metric: Any, p: float = 2.0) -> float:
    """The power of a Minkowski metric.

    Raises:
        NotConvertible: another metric.
    """
    names = {"euclidean": 2.0, "l2": 2.0, "manhattan": 1.0, "cityblock": 1.0, "l1": 1.0, "chebyshev": np.inf, "infinity": np.inf}
    if metric == "minkowski":
        return float(p)
    if not isinstance(metric, str) or metric not in names:
        shown = f"the metric {metric}" if isinstance(metric, str) else "a callable metric"
        raise NotConvertible(f"{shown} has no ONNX form; use euclidean, manhattan, chebyshev or minkowski")
    return names[metric]


def rooted(raised: Value, power: float) -> Value:
    """Distances of their powers."""
    if power in (1.0, np.inf):
        return raised
    return raised.sqrt() if power == 2 else raised ** (1.0 / power)


def _weights(model: Any, found: Value, is_neighbour: Value | None = None) -> Value | None:
    """Of neighbours by their distances: the inverse, and where a distance is 0, 1 for those at 0 and 0 for others."""
    if model.weights in (None, "uniform"):
        return None if is_neighbour is None else is_neighbour.astype(np.float64)
    if model.weights != "distance":
        raise NotConvertible(
            f"{type(model).__name__} with callable weights has no ONNX form; use weights='uniform' or 'distance'"
        )
    is_zero = found.equals(0.0)
    at_zero = is_zero.astype(np.float64)
    inverse = 1.0 / found.graph.where(is_zero, 1.0, found)
    weights = found.graph.where(at_zero.max() > 0.0, at_zero, inverse)
    return weights if is_neighbour is None else weights * is_neighbour.astype(np.float64)


class Neighbours(Form):
    """What `kneighbors` finds."""

    @cached_property
    def nearest(self) -> tuple[Value, Value]:
        """Distances and indices (n_rows, n_neighbors)."""
        model = self.estimator
        points, power = to_dense(model._fit_X), power_of(model.effective_metric_, _p(model))
        n_neighbours = getattr(model, "n_neighbors_", model.n_neighbors)
        found, indices = distances(self.x, points, model.effective_metric_, _p(model)).smallest(n_neighbours)
        return rooted(found, power), indices

    @cached_property
    def within(self) -> tuple[Value, Value]:
        """Distances to all rows of training (n_rows, n_train), and which are within the radius."""
        model = self.estimator
        power = power_of(model.effective_metric_, _p(model))
        found = rooted(distances(self.x, to_dense(model._fit_X), model.effective_metric_, _p(model)), power)
        return found, found <= float(model.radius)


def _p(model: Any) -> float:
    return float((model.effective_metric_params_ or {}).get("p", model.p or 2.0))


def _one_hot(codes: Array, n_classes: int) -> Array:
    return np.eye(n_classes)[np.asarray(codes)]


@converts("sklearn.KNeighborsClassifier")
class KNeighborsClassifier(Neighbours):
    @cached_property
    def targets(self) -> Sequence[Form]:
        if not self.estimator.outputs_2d_:
            return [self]
        return [
            Target(self, classes, self._shares(self.estimator._y[:, number], len(classes)))
            for number, classes in enumerate(self.estimator.classes_)
        ]

    @cached_property
    def predict_proba(self) -> Value:
        return self._shares(np.ravel(self.estimator._y), len(self.estimator.classes_))

    def _shares(self, codes: Array, n_classes: int) -> Value:
        found, indices = self.nearest
        votes = self.graph.constant(_one_hot(codes, n_classes), np.float64).take(indices, axis=0)
        if (weights := _weights(self.estimator, found)) is not None:
            votes = votes * weights.reshape(-1, self.estimator.n_neighbors, 1)
        counts = votes.running_sum(1)
        return counts / counts.sum()


@converts("sklearn.KNeighborsRegressor")
class KNeighborsRegressor(Neighbours, Regressor):
    @cached_property
    def predict(self) -> Value:
        found, indices = self.nearest
        known = np.asarray(self.estimator._y, np.float64).reshape(len(self.estimator._y), -1)
        values = self.graph.constant(known, np.float64).take(indices, axis=0)  # (n_rows, n_neighbors, n_targets)
        weights = _weights(self.estimator, found)
        if weights is None:
            return values.mean(1, keepdims=False)
        weighted = (values * weights.reshape(-1, self.estimator.n_neighbors, 1)).sum(1, keepdims=False)
        return weighted / weights.sum()


@converts("sklearn.RadiusNeighborsRegressor")
class RadiusNeighborsRegressor(Neighbours, Regressor):
    """NaN, as in scikit-learn, for a row without neighbours."""

    @cached_property
    def predict(self) -> Value:
        found, is_near = self.within
        weights = _weights_within(self.estimator, found, is_near)
        known = np.asarray(self.estimator._y, np.float64).reshape(len(self.estimator._y), -1)
        return (weights @ known) / weights.sum()


@converts("sklearn.RadiusNeighborsClassifier")
class RadiusNeighborsClassifier(Neighbours):
    @cached_property
    def targets(self) -> Sequence[Form]:
        raise NotConvertible("RadiusNeighborsClassifier with several targets has no ONNX form; use KNeighborsClassifier")

    @cached_property
    def votes(self) -> Value:
        model = self.estimator
        if model.outlier_label_ is None:
            raise NotConvertible(
                "RadiusNeighborsClassifier without outlier_label refuses rows that have no neighbours, which a graph cannot; fit "
                "it with outlier_label='most_frequent' or a label"
            )
        if model.outputs_2d_:
            raise NotConvertible("RadiusNeighborsClassifier with several targets has no ONNX form; use KNeighborsClassifier")
        found, is_near = self.within
        return _weights_within(model, found, is_near) @ _one_hot(np.ravel(model._y), len(model.classes_))

    @cached_property
    def is_alone(self) -> Value:
        return self.within[1].astype(np.float64).sum().equals(0.0)

    @cached_property
    def predict_proba(self) -> Value:
        model, shares = self.estimator, shares_of(self.votes)
        alone = (np.asarray(model.classes_) == model.outlier_label_[0]).astype(np.float64).reshape(1, -1)
        return self.graph.where(self.is_alone, alone, shares)

    @cached_property
    def class_index(self) -> Value:
        return self.predict_proba.argmax()

    @cached_property
    def predict(self) -> Value:
        usual = labels(self.graph, self.classes, self.class_index)
        if self.estimator.outlier_label_[0] in self.classes.tolist():
            return usual
        other = labels(self.graph, np.asarray(self.estimator.outlier_label_[:1]), self.graph.constant(np.zeros(1, np.int64)))
        return self.graph.op("Where", self.is_alone.reshape(-1), other.astype(usual.dtype), usual, dtype=usual.dtype)


def _weights_within(model: Any, found: Value, is_near: Value) -> Value:
    far = found.graph.where(is_near, found, np.inf)
    weights = _weights(model, far, is_near)
    assert weights is not None, "given which are near, there are weights"
    return weights


@converts("sklearn.NearestCentroid")
class NearestCentroid(Form):
    @cached_property
    def decision_function(self) -> Value:
        model = self.estimator
        deviation = np.where(model.within_class_std_dev_ == 0, 1.0, model.within_class_std_dev_)
        power = power_of(model.metric)
        found = distances(self.wide / deviation.reshape(1, -1), model.centroids_ / deviation, model.metric)
        squares = found if power == 2 else rooted(found, power) * rooted(found, power)
        return 2.0 * np.log(model.class_prior_).reshape(1, -1) - squares

    @cached_property
    def predict_proba(self) -> Value:
        return self.decision_function.softmax()

    @cached_property
    def class_index(self) -> Value:
        model = self.estimator
        if np.allclose(getattr(model, "class_prior_", 1 / len(model.classes_)), 1 / len(model.classes_)):
            return distances(self.x, model.centroids_, model.metric).argmin()
        return self.decision_function.argmax()


@converts("sklearn.LabelPropagation", "sklearn.LabelSpreading")
class LabelPropagation(Form):
    @cached_property
    def predict_proba(self) -> Value:
        model = self.estimator
        if model.kernel == "rbf":
            weights = (-float(model.gamma) * distances(self.x, model.X_)).exp()
            found = weights @ model.label_distributions_
        elif model.kernel == "knn":
            _, indices = distances(self.x, model.X_).smallest(model.n_neighbors)
            found = self.graph.constant(model.label_distributions_, np.float64).take(indices, axis=0).running_sum(1)
        else:
            raise NotConvertible(f"{type(model).__name__} with a callable kernel has no ONNX form; use kernel='rbf' or 'knn'")
        return found / found.sum()


@converts("sklearn.LocalOutlierFactor")
class LocalOutlierFactor(Neighbours, Scored):
    @cached_property
    def score_samples(self) -> Value:
        model = self.estimator
        found, indices = self.nearest
        reach = self.graph.constant(model._distances_fit_X_[:, model.n_neighbors_ - 1], np.float64).take(indices, axis=0)
        density = 1.0 / (found.maximum(reach).mean() + 1e-10)
        ratios = self.graph.constant(model._lrd, np.float64).take(indices, axis=0) / density
        return -ratios.mean()


def nearest_centre(x: Value, centres: Array) -> Value:
    """(n_rows,) of the nearest of (n_centres, n_features), the first of equal ones."""
    return distances(x, centres).argmin()


def nearest_mean(x: Value, centres: Array) -> Value:
    """As `nearest_centre`, as scikit-learn's k-means computes it.

    The square of the row is left out of the squared distances. Far from all centres, it would be all that float64 holds.
    """
    known, wide = np.asarray(centres, np.float64), x.astype(np.float64)
    squares = (known**2).sum(axis=1).reshape(1, -1)
    if known.shape[1] > _MAX_COLUMNS:
        return (squares - (wide.reshape(-1, 1, known.shape[1]) * known[np.newaxis]).sum(2, keepdims=False) * 2.0).argmin()
    products = wide.take([0]) * known[:, 0].reshape(1, -1)
    for column in range(1, known.shape[1]):
        products = products + wide.take([column]) * known[:, column].reshape(1, -1)
    return (squares - products * 2.0).argmin()
