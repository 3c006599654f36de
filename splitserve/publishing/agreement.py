"""Compares the answers of two halves with those of the pipeline that they were split from."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec
import numpy as np

from splitserve.arrays import Array, to_array
from splitserve.publishing.convert import LABEL, PREDICTION, PROBABILITIES, SCORES, ModelOutput, expected_of
from splitserve.publishing.errors import NotConvertible, PublishError
from splitserve.publishing.halves import PredictorHalf, PreprocessorHalf
from splitserve.publishing.training_data import misfit
from splitserve.runtimes.rows import Rowset
from splitserve.tensors import Tensor

ROUNDING = 1e-9
"""Probabilities that differ by less may be ordered differently when they are summed in another order, at float64."""

_N_SHOWN = 8


def expected_answer(pipeline: Any, rows: Rowset, outputs: Sequence[ModelOutput]) -> Mapping[str, Array]:
    """The pipeline's answer, under the output names of the converted model.

    Raises:
        NotConvertible: an answer is no array.
        PublishError: the rows do not fit the pipeline.
    """
    try:
        answers = expected_of(pipeline, rows, outputs)
    except NotConvertible:
        raise
    except Exception as error:  # a step may raise anything
        raise PublishError(misfit(pipeline, rows, str(error))) from error
    n_rows = rows.shape[0] if hasattr(rows, "shape") else len(rows)  # a sparse matrix has no len
    for name, answer in answers.items():
        if len(answer) != n_rows:
            raise PublishError(misfit(pipeline, rows, f"it gives {len(answer)} values of {name} for {n_rows} rows"))
    return answers


def split_answer(preprocessor: PreprocessorHalf, predictor: PredictorHalf, inputs: Sequence[Tensor]) -> dict[str, Array]:
    """The answer of the two halves, as a service loads them, to rows as clients send them."""
    outputs = predictor.runtime.infer(preprocessor.runtime.transform(inputs))
    return {tensor.name: to_array(tensor) for tensor in outputs}


class Scale(msgspec.Struct, frozen=True):
    """What differences of an output are measured by: the spread of the pipeline's answers to the training data, by target.

    Predictions of 1.7e9 plus or minus 10 differ by 10, not by 1.7e9. Far from the training data, whose answers
    are around ``centre``, the distance from it is the measure. Probabilities are measured by 1.
    """

    spread: Array
    centre: Array

    def of(self, want: Array) -> Array:
        """The measure of each element of (n_rows, n_values)."""
        with np.errstate(invalid="ignore", over="ignore"):
            measure: Array = np.fmax(self.spread, np.abs(want - self.centre))
        return measure


def scales_of(expected: Mapping[str, Array]) -> dict[str, Scale]:
    """Of the pipeline's answers to the training data, by output."""
    return {name: _scale_of(np.asarray(want)) for name, want in expected.items() if kind_of(name) in (PREDICTION, SCORES)}


def _scale_of(want: Array) -> Scale:
    by_value = want.reshape(len(want), -1).astype(np.float64)
    finite = np.where(np.isfinite(by_value), by_value, np.nan)
    if np.isnan(finite).all(axis=0).any():
        return Scale(np.ones(by_value.shape[1]), np.zeros(by_value.shape[1]))
    low, high = np.nanmin(finite, axis=0), np.nanmax(finite, axis=0)
    spread = np.where(high > low, high - low, np.where(high != 0, np.abs(high), 1.0))
    return Scale(spread, (low + high) / 2)


def compare(
    found: Mapping[str, Array],
    expected: Mapping[str, Array],
    tolerance: float,
    *,
    precision: str = "FP64",
    scales: Mapping[str, Scale] | None = None,
    row_name: Callable[[int], str] = "row {}".format,
) -> tuple[dict[str, float], str]:
    """The largest difference of each output, and an error message if one exceeds the tolerance, else "".

    Probabilities are compared absolutely, predictions and scores relative to their spread. Labels are compared exactly. The only
    exception is at float64, where the order of a sum may decide: if the best two probabilities differ by less than `ROUNDING`,
    but do differ. At float32 there is none, since the model can be computed at float64 instead. The difference of a label is 0,
    or 1 if one differs.

    Args:
        found: the split's answer, by output.
        expected: the pipeline's.
        tolerance: see `publish`.
        precision: of the features.
        scales: of the answers to the training data; of ``expected`` by default.
        row_name: what the message calls a row.
    """
    measures = scales_of(expected) if scales is None else scales
    worst: dict[str, float] = {}
    for name in found:
        kind = kind_of(name)
        if kind not in (PROBABILITIES, PREDICTION, SCORES):
            continue
        have = found[name].reshape(len(found[name]), -1).astype(np.float64)
        want = expected[name].reshape(have.shape).astype(np.float64)
        with np.errstate(invalid="ignore", over="ignore"):
            difference = np.abs(have - want) / (1.0 if kind == PROBABILITIES else measures[name].of(want))
        same = (have == want) | (np.isnan(have) & np.isnan(want))
        by_row = np.where(same, 0.0, np.where(np.isnan(difference), np.inf, difference)).max(axis=1, initial=0.0)
        row = int(np.argmax(by_row)) if len(by_row) else 0
        worst[name] = float(by_row.max(initial=0.0))
        if not worst[name] <= tolerance:
            return worst, (
                f"{name} of {row_name(row)} differ by {by_row[row]:.1e}, more than {tolerance:.0e}: "
                f"the pipeline gives {_few(want[row])}, the split {_few(have[row])}"
            )
    for name in found:
        if kind_of(name) != LABEL:
            continue
        rows = _differing_rows(found[name], expected[name])
        worst[name] = float(bool(rows))
        wrong = next((row for row in rows if not (precision == "FP64" and _is_rounding(name, row, expected, measures))), None)
        if wrong is not None:
            want_label, have_label = expected[name][wrong], _text(found[name][wrong])
            return worst, f'{name} of {row_name(wrong)}: the pipeline gives "{want_label}", the split "{have_label}"'
    return worst, ""


def larger(first: Mapping[str, float], second: Mapping[str, float]) -> dict[str, float]:
    """The larger difference of each output."""
    return {name: max(first.get(name, 0.0), second.get(name, 0.0)) for name in {**first, **second}}


def _few(numbers: Array) -> str:
    """At most 8 numbers of a row."""
    return str(numbers if len(numbers) > 1 else numbers[0]) if len(numbers) <= _N_SHOWN else f"{numbers[:_N_SHOWN]} …"


def kind_of(name: str) -> str:
    """What an output is, whatever its target is called."""
    return name.partition("_")[0]


def _differing_rows(labels: Array, expected: Array) -> list[int]:
    """Rows whose label differs from the pipeline's."""
    pairs = zip(labels.tolist(), expected.tolist(), strict=True)
    return [row for row, (have, want) in enumerate(pairs) if _text(have) != _text(want)]


def _is_rounding(name: str, row: int, expected: Mapping[str, Array], scales: Mapping[str, Scale]) -> bool:
    """Whether the order of a sum may decide the label: the best two probabilities, or a score and 0, are close but not equal."""
    scores = expected.get(name.replace(LABEL, PROBABILITIES, 1))
    if scores is not None and scores.ndim == 2 and scores.shape[1] > 1:
        best = np.sort(scores[row])[-2:]
        return bool(0 < best[1] - best[0] <= ROUNDING)
    decided = expected.get(name.replace(LABEL, SCORES, 1))
    return decided is not None and bool(np.all(np.abs(decided[row]) <= ROUNDING * scales[SCORES].spread))


def _text(label: Any) -> str:
    if isinstance(label, bytes):
        return label.decode()
    return str(int(label) if isinstance(label, bool) else label)
