"""Whether a preprocessor's features mean, in numbers, what a predictor was trained on.

Shapes, names and vocabularies may agree while the numbers do not: a scaler in other units, a refitted PCA, other imputer values,
other bin edges. The golden samples of a predictor hold the raw rows and the features that it was trained on. A preprocessor is
run on these rows; where another one made the features then, both are run on rows that show their fitted parameters.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import msgspec
import numpy as np

from splitserve.arrays import Array, from_array, to_array
from splitserve.errors import SplitserveError
from splitserve.repository.golden import Golden, scale_of
from splitserve.repository.manifest import BOUNDS, Manifest
from splitserve.runtimes.preprocessor import Preprocessor
from splitserve.signature import fits
from splitserve.tensors import Tensor

_N_SHOWN = 5
_N_PROBED = 16
_N_COLUMNS = 2000
"""Wider inputs, such as pictures, are probed unchanged."""


class FeatureDifference(msgspec.Struct, frozen=True):
    """A feature whose value is not the one that the predictor was trained on."""

    feature: str
    row: int
    trained_on: str
    got: str

    def __str__(self) -> str:
        return f"{self.feature}: {self.trained_on} in training, {self.got} now (row {self.row})"


def feature_differences(preprocessor: Preprocessor, predictor: Manifest, golden: Golden) -> list[FeatureDifference]:
    """Features that differ from those that the predictor was trained on, one entry a feature, the first row that shows it.

    Args:
        preprocessor: loaded.
        predictor: its manifest; ``trained_on`` is not empty.
        golden: its golden samples, with raw rows.
    """
    if differences := fits(predictor.trained_on, preprocessor.inputs):
        return [FeatureDifference("the raw rows", 0, "of the signature of training", differences[0])]
    try:
        found = preprocessor.sent(preprocessor.transform(golden.rows))
    except SplitserveError as error:
        return [FeatureDifference("the raw rows", 0, "accepted", f"refused: {error.message}")]
    return _differences(preprocessor.manifest.feature_names, golden.inputs, found)


def differences_between(first: Preprocessor, second: Preprocessor, rows: Sequence[Tensor]) -> list[FeatureDifference]:
    """Features in which two preprocessors differ, on rows that show their fitted parameters.

    Args:
        first: the one that made the features that a predictor was trained on.
        second: the one to compare.
        rows: raw rows (n_rows, …) to make probing rows of, such as the golden rows of both.
    """
    for probe in probes(rows):
        try:
            want, have = (each.sent(each.transform(probe)) for each in (first, second))
        except SplitserveError:  # what one of them refuses gets no answer, so no wrong one
            continue
        if differences := _differences(second.manifest.feature_names, want, have):
            return differences
    return []


def probes(rows: Sequence[Tensor]) -> Iterator[tuple[Tensor, ...]]:
    """Rows that show fitted parameters: unchanged, and with one input at a time missing, unseen, at its extremes and beyond.

    Args:
        rows: raw rows (n_rows, …) by input.
    """
    yield tuple(rows)
    n_rows = min(rows[0].n_rows, _N_PROBED)
    arrays = [to_array(tensor)[:n_rows] for tensor in rows]
    for number, (tensor, array) in enumerate(zip(rows, arrays, strict=True)):
        every = to_array(tensor)
        for column in range(array.shape[1]) if array.ndim == 2 and array.shape[1] <= _N_COLUMNS else ():
            for value in _values(tensor.datatype, every[:, column]):
                changed = array.copy()
                changed[:, column] = value
                yield tuple(
                    from_array(each.name, changed if place == number else kept, each.datatype)
                    for place, (each, kept) in enumerate(zip(rows, arrays, strict=True))
                )


def _values(datatype: str, column: Array) -> list[Any]:
    if datatype == "BYTES":
        return [b"", b"\xc2\xa7 unseen"]
    if column.dtype.kind == "f":
        finite = column[np.isfinite(column)].astype(np.float64)
        low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 1.0)
        spread = (high - low) or 1.0
        return [np.nan, low, high, low - spread, high + spread, (low + high) / 2]
    if column.dtype.kind in "iu":
        return [column.min(), column.max()]
    return []


def _differences(names: Sequence[str], want: Sequence[Tensor], have: Sequence[Tensor]) -> list[FeatureDifference]:
    found = {tensor.name: tensor for tensor in have}
    differences: list[FeatureDifference] = []
    for tensor in want:
        other = found.get(tensor.name)
        if other is None or (other.datatype, other.shape) != (tensor.datatype, tensor.shape):
            form = f"{other.datatype} {list(other.shape)}" if other else "nothing"
            differences.append(FeatureDifference(f'"{tensor.name}"', 0, f"{tensor.datatype} {list(tensor.shape)}", form))
            continue
        differences += _differing_columns(tensor, to_array(tensor), to_array(other), names)
    return differences


def _differing_columns(tensor: Tensor, want: Array, have: Array, names: Sequence[str]) -> Iterator[FeatureDifference]:
    n_rows = len(want)
    wide_want, wide_have = want.reshape(n_rows, -1), have.reshape(n_rows, -1)
    if want.dtype.kind == "f":
        scale = np.array([scale_of(wide_want[:, column]) for column in range(wide_want.shape[1])])
        with np.errstate(invalid="ignore"):
            difference = np.abs(wide_want.astype(np.float64) - wide_have.astype(np.float64)) / scale
        same = (wide_want == wide_have) | (np.isnan(wide_want) & np.isnan(wide_have))
        beyond = ~same & ~(difference <= BOUNDS[tensor.datatype])
    else:
        beyond = wide_want != wide_have
    for column in map(int, np.flatnonzero(beyond.any(axis=0))):
        row = int(np.argmax(beyond[:, column]))
        name = names[column] if len(names) == wide_want.shape[1] else f"{tensor.name}[{column}]"
        yield FeatureDifference(f'"{name}"', row, str(wide_want[row, column]), str(wide_have[row, column]))


def listed(differences: Sequence[FeatureDifference]) -> str:
    """A few of them, for a message."""
    more = f" and {len(differences) - _N_SHOWN} more" if len(differences) > _N_SHOWN else ""
    return "; ".join(map(str, differences[:_N_SHOWN])) + more
