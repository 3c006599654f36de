"""Estimators of a few operators that belong to no family."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import numpy as np
from sklearn.ensemble._iforest import _average_path_length

from splitserve.arrays import Array
from splitserve.publishing.errors import NotConvertible
from splitserve.publishing.estimators.form import Form, Regressor, Scored, Target, constant_rows, converts, inlier
from splitserve.publishing.estimators.trees import tree_of, tree_sums
from splitserve.publishing.graph import Value, concat


@converts("sklearn.DummyClassifier")
class DummyClassifier(Form):
    """The strategies that do not draw at random: those that do are refused."""

    @cached_property
    def targets(self) -> Sequence[Form]:
        model = self.estimator
        if model.n_outputs_ == 1:
            return [self]
        priors = zip(model.classes_, model.class_prior_, range(model.n_outputs_), strict=True)
        return [Target(self, classes, self._row(classes, prior, number)) for classes, prior, number in priors]

    @cached_property
    def predict_proba(self) -> Value:
        return self._row(self.estimator.classes_, self.estimator.class_prior_, 0)

    @cached_property
    def class_index(self) -> Value:
        return self.predict_proba.argmax()

    def _row(self, classes: Sequence[object], prior: Sequence[float], target: int) -> Value:
        shares = np.asarray(prior, np.float64)
        if self.estimator.strategy == "most_frequent":
            shares = np.eye(len(shares))[np.argmax(shares)]
        elif self.estimator.strategy == "constant":
            shares = (np.asarray(classes) == np.ravel(self.estimator.constant)[target]).astype(np.float64)
        return constant_rows(self.x, shares)


@converts("sklearn.DummyRegressor")
class DummyRegressor(Regressor):
    @cached_property
    def predict(self) -> Value:
        return constant_rows(self.x, np.ravel(self.estimator.constant_))


@converts("sklearn.QuadraticDiscriminantAnalysis")
class QuadraticDiscriminantAnalysis(Form):
    @cached_property
    def decisions(self) -> Value:
        """(n_rows, n_classes)."""
        model, columns = self.estimator, []
        for rotation, scaling, mean, prior in zip(model.rotations_, model.scalings_, model.means_, model.priors_, strict=True):
            turned = (self.wide - mean.reshape(1, -1)) @ (rotation * scaling**-0.5)
            columns.append(-0.5 * ((turned * turned).sum() + float(np.log(scaling).sum())) + float(np.log(prior)))
        return concat(columns)

    @cached_property
    def decision_function(self) -> Value:
        if len(self.estimator.classes_) > 2:
            return self.decisions
        return self.decisions.take([1]) - self.decisions.take([0])

    @cached_property
    def predict_proba(self) -> Value:
        return self.decisions.softmax()

    @cached_property
    def class_index(self) -> Value:
        return self.decisions.argmax()


def interpolated(x: Value, places: Array, values: Array) -> Value:
    """(n_rows, 1) on the line through (places, values), which are sorted; NaN beyond the first and the last.

    Source: scipy.interpolate.interp1d, linear.
    """
    if len(places) == 1:
        return 0.0 * x + float(values[0])
    graph = x.graph
    above = (graph.constant(places[:-1], np.float64).reshape(1, -1) < x).astype(np.int64).sum()  # places left of x
    index = above.maximum(np.int64(1)).minimum(np.int64(len(places) - 1)).reshape(-1)
    low, high = (graph.constant(places, np.float64).take(each, axis=0).reshape(-1, 1) for each in (index - np.int64(1), index))
    start, end = (graph.constant(values, np.float64).take(each, axis=0).reshape(-1, 1) for each in (index - np.int64(1), index))
    found = (end - start) / (high - low) * (x - low) + start
    is_inside = (x >= float(places[0])).logical_and(x <= float(places[-1]))
    return graph.where(is_inside, found, np.nan)


@converts("sklearn.IsotonicRegression")
class IsotonicRegression(Regressor):
    @cached_property
    def predict(self) -> Value:
        model = self.estimator
        if model.out_of_bounds == "raise":
            raise NotConvertible(
                "IsotonicRegression with out_of_bounds='raise' refuses rows, which a graph cannot; fit it with 'clip' or 'nan'"
            )
        x = self.wide.reshape(-1, 1)
        if model.out_of_bounds == "clip":
            x = x.maximum(float(model.X_min_)).minimum(float(model.X_max_))
        places, values = np.asarray(model.X_thresholds_, np.float64), np.asarray(model.y_thresholds_, np.float64)
        return interpolated(x, places, values)


@converts("sklearn.IsolationForest")
class IsolationForest(Scored):
    @cached_property
    def score_samples(self) -> Value:
        model = self.estimator
        trees = []
        for number, (tree, features) in enumerate(zip(model.estimators_, model.estimators_features_, strict=True)):
            depth = model._decision_path_lengths[number] + model._average_path_length_per_tree[number] - 1.0
            trees.append((tree_of(tree.tree_, features), np.asarray(depth, np.float64)))
        depths = tree_sums(self.x.astype(np.float32), [trees], np.zeros(1))
        scale = len(trees) * float(_average_path_length([model._max_samples])[0])
        scores = depths / scale if scale else depths * 0.0 + 1.0
        return -(self.graph.constant(2.0, np.float64) ** -scores)


@converts("sklearn.EllipticEnvelope")
class EllipticEnvelope(Form):
    @cached_property
    def decision_function(self) -> Value:
        model = self.estimator
        centred = self.wide - model.location_.reshape(1, -1)
        return -((centred @ model.get_precision()) * centred).sum() - float(model.offset_)

    @cached_property
    def predict(self) -> Value:
        return inlier(self.decision_function, self.decision_function >= 0.0)


@converts("sklearn.SGDOneClassSVM")
class SGDOneClassSVM(Form):
    @cached_property
    def decision_function(self) -> Value:
        return self.wide @ np.atleast_2d(self.estimator.coef_).T - np.ravel(self.estimator.offset_).reshape(1, -1)

    @cached_property
    def predict(self) -> Value:
        return inlier(self.decision_function, self.decision_function >= 0.0)
