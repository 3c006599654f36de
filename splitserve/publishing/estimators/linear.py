"""Linear models: a product with the coefficients, then what each makes of it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import numpy as np

from splitserve.arrays import Array
from splitserve.publishing.estimators.form import Form, Regressor, Target, converts, shares_of, two_columns
from splitserve.publishing.graph import Value, concat


def product(x: Value, coefficients: Array, intercept: Array | float) -> Value:
    """(n_rows, n_outputs) of coefficients (n_outputs, n_features) or (n_features,)."""
    rows = np.atleast_2d(np.asarray(coefficients, np.float64))
    offset = np.broadcast_to(np.asarray(intercept, np.float64), (len(rows),)).reshape(1, -1)
    found: Value = x @ rows.T + offset
    return found


@converts(
    *(
        f"sklearn.{name}"
        for name in (
            *(
                "ARDRegression",
                "BayesianRidge",
                "ElasticNet",
                "ElasticNetCV",
                "HuberRegressor",
                "Lars",
                "LarsCV",
                "Lasso",
                "LassoCV",
            ),
            *("LassoLars", "LassoLarsCV", "LassoLarsIC", "LinearRegression", "LinearSVR", "MultiTaskElasticNet"),
            *("MultiTaskElasticNetCV", "MultiTaskLasso", "MultiTaskLassoCV", "OrthogonalMatchingPursuit"),
            *(
                "OrthogonalMatchingPursuitCV",
                "PassiveAggressiveRegressor",
                "QuantileRegressor",
                "Ridge",
                "RidgeCV",
                "SGDRegressor",
            ),
            "TheilSenRegressor",
        )
    )
)
class LinearRegressor(Regressor):
    @cached_property
    def predict(self) -> Value:
        return product(self.x, self.estimator.coef_, self.estimator.intercept_)


@converts("sklearn.PoissonRegressor", "sklearn.GammaRegressor", "sklearn.TweedieRegressor")
class GeneralizedLinear(Regressor):
    @cached_property
    def predict(self) -> Value:
        linear = product(self.x, self.estimator.coef_, self.estimator.intercept_)
        has_log_link = type(self.estimator._base_loss.link).__name__ == "LogLink"
        return linear.exp() if has_log_link else linear


@converts("sklearn.PLSRegression", "sklearn.PLSCanonical", "sklearn.CCA")
class PartialLeastSquares(Regressor):
    @cached_property
    def predict(self) -> Value:
        model = self.estimator
        return product(self.x - model._x_mean.reshape(1, -1), model.coef_, model.intercept_)

    @cached_property
    def transform(self) -> Value:
        model = self.estimator
        found: Value = ((self.x - model._x_mean.reshape(1, -1)) / model._x_std.reshape(1, -1)) @ model.x_rotations_
        return found


class LinearClassifier(Form):
    """A classifier by ``coef_`` (1 or n_classes, n_features): two classes by the sign, several by the greatest."""

    @cached_property
    def decision_function(self) -> Value:
        return product(self.x, self.estimator.coef_, self.estimator.intercept_)

    @property
    def is_binary(self) -> bool:
        return len(np.atleast_2d(self.estimator.coef_)) == 1

    @cached_property
    def class_index(self) -> Value:
        if self.is_binary:
            return (self.decision_function.take(0) > 0.0).astype(np.int64)
        return self.decision_function.argmax()

    def one_against_rest(self) -> Value:
        """(n_rows, n_classes) of the scores' sigmoids, divided by their sum. Source: ``_predict_proba_lr``."""
        shares = self.decision_function.sigmoid()
        return two_columns(shares) if self.is_binary else shares / shares.sum()


converts(
    *(f"sklearn.{name}" for name in ("LinearSVC", "PassiveAggressiveClassifier", "Perceptron")),
)(LinearClassifier)


@converts("sklearn.RidgeClassifier", "sklearn.RidgeClassifierCV")
class RidgeClassifier(LinearClassifier):
    """With several targets, each is a class or not."""

    @cached_property
    def targets(self) -> Sequence[Form]:
        if not self.estimator._label_binarizer.y_type_.startswith("multilabel"):
            return [self]
        scores = self.decision_function
        return [
            Target(self, np.array([0, 1]), None, (scores.take(number) > 0.0).astype(np.int64))
            for number in range(len(self.estimator.coef_))
        ]


@converts("sklearn.LogisticRegression", "sklearn.LogisticRegressionCV")
class LogisticRegression(LinearClassifier):
    @cached_property
    def predict_proba(self) -> Value:
        model = self.estimator
        is_one_against_rest = getattr(model, "multi_class", "auto") == "ovr" or model.solver == "liblinear"
        if is_one_against_rest:
            return self.one_against_rest()
        if not self.is_binary:
            return self.decision_function.softmax()
        if getattr(model, "multi_class", "auto") == "multinomial":
            return concat([-self.decision_function, self.decision_function]).softmax()
        return two_columns(self.decision_function.sigmoid())


@converts("sklearn.SGDClassifier")
class SGDClassifier(LinearClassifier):
    @cached_property
    def predict_proba(self) -> Value:
        if self.estimator.loss == "log_loss":
            return self.one_against_rest()
        scores = (self.decision_function.maximum(-1.0).minimum(1.0) + 1.0) / 2.0  # modified_huber
        if self.is_binary:
            return two_columns(scores)
        return shares_of(scores, 1.0 / len(self.estimator.classes_))


@converts("sklearn.LinearDiscriminantAnalysis")
class LinearDiscriminantAnalysis(LinearClassifier):
    @cached_property
    def predict_proba(self) -> Value:
        return two_columns(self.decision_function.sigmoid()) if self.is_binary else self.decision_function.softmax()

    @cached_property
    def transform(self) -> Value:
        model = self.estimator
        centred = self.x - model.xbar_.reshape(1, -1) if model.solver == "svd" else self.x
        found: Value = centred @ model.scalings_
        return found.take(np.arange(model._max_components))
