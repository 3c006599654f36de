"""What this package has no form of, as skl2onnx converts it."""

from __future__ import annotations

import warnings
from functools import cached_property

import numpy as np
from skl2onnx import convert_sklearn
from skl2onnx.common.data_types import DoubleTensorType, FloatTensorType
from skl2onnx.common.exceptions import MissingConverter, MissingShapeCalculator
from sklearn.base import is_classifier

from splitserve.publishing.errors import NotConvertible
from splitserve.publishing.estimators.form import Form, not_converted, unknown
from splitserve.publishing.graph import OLDER_OPSETS, Value


class ByConverter(Form):
    """skl2onnx's outputs: ``label`` and ``probabilities``, or one."""

    @cached_property
    def outputs(self) -> dict[str, Value]:
        estimator, graph = self.estimator, self.graph
        kind = DoubleTensorType if self.x.dtype == np.float64 else FloatTensorType
        n_features = getattr(estimator, "n_features_in_", None)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                model = convert_sklearn(
                    estimator,
                    initial_types=[("X", kind([None, n_features]))],
                    options={id(estimator): {"zipmap": False}} if is_classifier(estimator) else None,
                    target_opset=OLDER_OPSETS,
                )
            for entry in model.opset_import:  # skl2onnx states the oldest that it needs, and writes for its target
                entry.version = OLDER_OPSETS.get(entry.domain, entry.version)
            return graph.inline(model, {"X": self.x})
        except (MissingConverter, MissingShapeCalculator) as error:
            raise unknown(estimator) from error
        except Exception as error:  # skl2onnx's converters may raise anything
            raise not_converted(estimator, str(error).strip() or type(error).__name__) from error

    @cached_property
    def predict_proba(self) -> Value:
        if "probabilities" not in self.outputs or not hasattr(self.estimator, "predict_proba"):
            raise self._cannot("predict_proba")
        return self.outputs["probabilities"]

    @cached_property
    def class_index(self) -> Value:
        raise self._cannot("class_index")

    @cached_property
    def predict(self) -> Value:
        if "label" in self.outputs:
            return self.outputs["label"].reshape(-1)
        return self._only().reshape(-1, 1) if is_classifier(self.estimator) else self._only()

    @cached_property
    def transform(self) -> Value:
        return self._only()

    def _only(self) -> Value:
        if len(self.outputs) != 1:
            raise NotConvertible(
                f"{type(self.estimator).__name__}: skl2onnx gives outputs {', '.join(self.outputs)}, expected one or a label"
            )
        return next(iter(self.outputs.values()))
