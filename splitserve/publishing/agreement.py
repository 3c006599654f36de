"""Compares the answers of two halves with those of the pipeline that they were split from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from splitserve.arrays import Array, to_array
from splitserve.publishing.convert import LABEL, PREDICTION, PROBABILITIES, SCORES, expected_of
from splitserve.publishing.errors import NotConvertible, PublishError
from splitserve.publishing.halves import PredictorHalf, PreprocessorHalf
from splitserve.runtimes.rows import Rowset, to_tensors


def expected_answer(pipeline: Any, rows: Rowset, targets: Sequence[str] = ()) -> Mapping[str, Array]:
    """The pipeline's answer, under the output names of the converted model.

    Raises:
        NotConvertible: as `answers_of`.
        PublishError: the rows do not fit the pipeline.
    """
    try:
        return expected_of(pipeline, rows, targets)
    except NotConvertible:
        raise
    except Exception as error:  # a step may raise anything
        raise PublishError(f"X does not fit the pipeline: {error}") from error


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
    for name in found:
        kind = kind_of(name)
        if kind in (PROBABILITIES, PREDICTION, SCORES):
            want = expected[name].reshape(found[name].shape)
            scale = 1.0 if kind == PROBABILITIES else float(np.abs(want).max()) or 1.0
            difference = np.abs(found[name] - want).reshape(len(want), -1).max(axis=1) / scale
            row = int(np.argmax(difference))
            if not difference[row] <= tolerance:
                return float(difference[row]), (
                    f"{name} of row {row} differ by {difference[row]:.1e}, more than {tolerance:.0e}: "
                    f"the pipeline gives {want[row]}, the split {found[name][row]}"
                )
            worst = max(worst, float(difference[row]))
    for name in found:
        if kind_of(name) == LABEL and (wrong := _wrong_label(name, found[name], expected, tolerance)) is not None:
            want_label, have_label = expected[name][wrong], _text(found[name][wrong])
            return worst, f'{name} of row {wrong}: the pipeline gives "{want_label}", the split "{have_label}"'
    return worst, ""


def kind_of(name: str) -> str:
    """What an output is, whatever its target is called."""
    return name.partition("_")[0]


def _wrong_label(name: str, labels: Array, expected: Mapping[str, Array], tolerance: float) -> int | None:
    """The first row whose label differs from the pipeline's."""
    scores = expected.get(name.replace(LABEL, PROBABILITIES, 1))
    for row, (have, want) in enumerate(zip(labels.tolist(), expected[name].tolist(), strict=True)):
        if _text(have) != _text(want):
            ranked = np.array([0.0, 1.0]) if scores is None else np.sort(scores[row])[-2:]
            if ranked[-1] - ranked[0] > 2 * tolerance:
                return row
    return None


def _text(label: Any) -> str:
    if isinstance(label, bytes):
        return label.decode()
    return str(int(label) if isinstance(label, bool) else label)
