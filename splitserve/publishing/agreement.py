"""Compares the answers of two halves with those of the pipeline that they were split from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from splitserve.arrays import Array, to_array
from splitserve.publishing.convert import LABEL, PREDICTION, PROBABILITIES
from splitserve.publishing.errors import PublishError
from splitserve.publishing.halves import PredictorHalf, PreprocessorHalf
from splitserve.runtimes.rows import Rowset, to_tensors


def expected_answer(pipeline: Any, rows: Rowset) -> dict[str, Array]:
    """The pipeline's answer, under the output names of the converted model.

    Raises:
        PublishError: the rows do not fit the pipeline.
    """
    try:
        predicted = np.asarray(pipeline.predict(rows))
        if hasattr(pipeline, "predict_proba"):
            return {LABEL: predicted, PROBABILITIES: np.asarray(pipeline.predict_proba(rows))}
    except Exception as error:  # a step may raise anything
        raise PublishError(f"X does not fit the pipeline: {error}") from error
    return {LABEL: predicted, PREDICTION: predicted}


def split_answer(preprocessor: PreprocessorHalf, predictor: PredictorHalf, rows: Rowset) -> dict[str, Array]:
    """The answer of the two halves, as a service loads them, to these rows."""
    inputs = to_tensors(preprocessor.rows, preprocessor.manifest.inputs, rows)
    outputs = predictor.runtime.infer(preprocessor.runtime.transform(inputs))
    return {tensor.name: to_array(tensor) for tensor in outputs}


def compare(found: Mapping[str, Array], expected: Mapping[str, Array], tolerance: float) -> tuple[float, str]:
    """The largest difference, and an error message if it exceeds the tolerance, else "".

    Probabilities are compared absolutely, predictions relative to the largest of them, labels exactly unless the best two
    probabilities are within twice the tolerance.
    """
    worst = 0.0
    for name in (PROBABILITIES, PREDICTION):
        if name in found:
            want = expected[name].reshape(found[name].shape)
            scale = 1.0 if name == PROBABILITIES else float(np.abs(want).max()) or 1.0
            difference = np.abs(found[name] - want).reshape(len(want), -1).max(axis=1) / scale
            row = int(np.argmax(difference))
            if not difference[row] <= tolerance:
                return float(difference[row]), (
                    f"{name} of row {row} differ by {difference[row]:.1e}, more than {tolerance:.0e}: "
                    f"the pipeline gives {want[row]}, the split {found[name][row]}"
                )
            worst = max(worst, float(difference[row]))
    if LABEL in found and (wrong := _wrong_label(found[LABEL], expected, tolerance)) is not None:
        want_label, have_label = expected[LABEL][wrong], _text(found[LABEL][wrong])
        return worst, f'label of row {wrong}: the pipeline gives "{want_label}", the split "{have_label}"'
    return worst, ""


def _wrong_label(labels: Array, expected: Mapping[str, Array], tolerance: float) -> int | None:
    """The first row whose label differs from the pipeline's."""
    for row, (have, want) in enumerate(zip(labels.tolist(), expected[LABEL].tolist(), strict=True)):
        if _text(have) != _text(want):
            ranked = np.sort(expected[PROBABILITIES][row])[-2:] if PROBABILITIES in expected else np.array([0.0, 1.0])
            if ranked[-1] - ranked[0] > 2 * tolerance:
                return row
    return None


def _text(label: Any) -> str:
    if isinstance(label, bytes):
        return label.decode()
    return str(int(label) if isinstance(label, bool) else label)
