"""Estimators of a few operators that belong to no family."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import numpy as np

from splitserve.publishing.estimators.form import Form, Regressor, Target, constant_rows, converts
from splitserve.publishing.graph import Value


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
