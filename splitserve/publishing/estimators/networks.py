"""Multi-layer perceptrons."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import numpy as np

from splitserve.publishing.estimators.form import Form, Regressor, Target, converts, two_columns
from splitserve.publishing.graph import Value

_ACTIVATIONS = {
    "identity": lambda x: x,
    "logistic": lambda x: x.sigmoid(),
    "tanh": lambda x: x.tanh(),
    "relu": lambda x: x.maximum(0.0),
    "softmax": lambda x: x.softmax(),
    "exp": lambda x: x.exp(),
}


class MultiLayerPerceptron(Form):
    @cached_property
    def outputs(self) -> Value:
        """(n_rows, n_outputs) of the last layer."""
        model, value = self.estimator, self.x
        last = len(model.coefs_) - 1
        for number, (weights, bias) in enumerate(zip(model.coefs_, model.intercepts_, strict=True)):
            value = value @ weights + bias.reshape(1, -1)
            value = _ACTIVATIONS[model.out_activation_ if number == last else model.activation](value)
        return value


@converts("sklearn.MLPRegressor")
class MultiLayerPerceptronRegressor(MultiLayerPerceptron, Regressor):
    @cached_property
    def predict(self) -> Value:
        return self.outputs


@converts("sklearn.MLPClassifier")
class MultiLayerPerceptronClassifier(MultiLayerPerceptron):
    @cached_property
    def targets(self) -> Sequence[Form]:
        if self.estimator._label_binarizer.y_type_ != "multilabel-indicator":
            return [self]
        return [
            Target(
                self,
                np.array([0, 1]),
                two_columns(self.outputs.take([number])),
                (self.outputs.take(number) > 0.5).astype(np.int64),
            )
            for number in range(self.estimator.n_outputs_)
        ]

    @cached_property
    def predict_proba(self) -> Value:
        return two_columns(self.outputs) if self.estimator.n_outputs_ == 1 else self.outputs

    @cached_property
    def class_index(self) -> Value:
        if self.estimator.n_outputs_ == 1:
            return (self.outputs.take(0) > 0.5).astype(np.int64)
        return self.outputs.argmax()
