"""Proof that something answers the same for a row whatever else is in the call, and which golden rows hold on other machines.

Works on loaded things through one function, ``run``: tensors (n_rows, …) in, tensors (n_rows, …) out. The bounds are fixed: they
are never learnt from a difference that was seen, since a difference that is a fault would then excuse itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from splitserve.arrays import Array, from_array, to_array
from splitserve.publishing.errors import PublishError
from splitserve.repository.golden import scale_of
from splitserve.repository.manifest import BOUNDS, Tolerance
from splitserve.tensors import Tensor

Run = Callable[[tuple[Tensor, ...]], Sequence[Tensor]]

BATCH_SIZES = (1, 2, 7, 64)
"""Sizes of the calls whose answers are compared."""

N_ULP = 4
"""A golden row is kept if its answer stays within its tolerance when each number moves by so many units in the last place."""

_N_ALONE = 32
_N_MOVED_ALONE = 32
"""Up to so many numbers of a row are also moved one by one; each move runs all rows once."""

_N_PATTERNS = 16


def tolerances_of(outputs: Sequence[Tensor], bounds: Mapping[str, float] = BOUNDS) -> dict[str, Tolerance]:
    """The tolerance of each floating-point output: its datatype's bound, relative to the output's scale.

    Args:
        outputs: (n_rows, …) as they came out; the scale is the largest finite magnitude among them.
        bounds: by datatype.
    """
    return {
        tensor.name: Tolerance(rtol=0.0, atol=bounds[tensor.datatype] * scale_of(to_array(tensor)))
        for tensor in outputs
        if tensor.datatype in bounds
    }


def row_wise_difference(run: Run, inputs: Sequence[Tensor], bounds: Mapping[str, float] = BOUNDS) -> str:
    """Where an answer depends on the other rows of its call, or on chance; "" if it never does.

    Runs the rows all together twice, permuted, repeated, and in calls of `BATCH_SIZES`.

    Args:
        run: what is examined.
        inputs: rows (n_rows, …) of each input.
        bounds: of differences by datatype, relative to the output's scale.

    Raises:
        SplitserveError: as ``run`` raises it.
    """
    arrays = [to_array(tensor) for tensor in inputs]
    n_rows = len(arrays[0])
    together = run(tuple(inputs))
    for what, rows in _arrangements(n_rows):
        found = run(_taken(inputs, arrays, rows))
        if difference := _difference(together, found, rows, bounds, what, f"a call of {n_rows}"):
            return difference
    return ""


def threads_difference(one: Run, several: Run, inputs: Sequence[Tensor], bounds: Mapping[str, float] = BOUNDS) -> str:
    """Where an answer depends on the number of threads; "" if it never does.

    Args:
        one: what is examined, with one thread.
        several: the same with several.
        inputs: rows (n_rows, …) of each input.
        bounds: as for `row_wise_difference`.
    """
    rows = np.arange(inputs[0].n_rows)
    return _difference(one(tuple(inputs)), several(tuple(inputs)), rows, bounds, "with several threads", "a call with one thread")


def _difference(
    together: Sequence[Tensor], found: Sequence[Tensor], rows: Array, bounds: Mapping[str, float], what: str, other: str
) -> str:
    """Where the answers to some of the rows differ from those to all; "" if nowhere.

    Args:
        together: the answers to all rows.
        found: the answers to ``rows``.
        rows: numbers of rows.
        bounds: of differences by datatype, relative to the output's scale.
        what: how ``found`` came about.
        other: how ``together`` did.
    """
    wanted = [to_array(tensor) for tensor in together]
    had = [to_array(tensor) for tensor in found]
    for tensor, want, have in zip(together, wanted, had, strict=True):
        if have.shape != (len(rows), *want.shape[1:]):
            return f'output "{tensor.name}" has shape {list(have.shape)} for {len(rows)} rows {what}'
        row, difference = _worst_row(want[rows], have, scale_of(want) if want.dtype.kind == "f" else 1.0)
        is_beyond = difference > bounds.get(tensor.datatype, 0.0)
        if is_beyond and not (tensor.datatype not in bounds and _is_rounding(row, int(rows[row]), together, wanted, had, bounds)):
            return (
                f'output "{tensor.name}" of row {int(rows[row])} {what} differs by {difference:.2g} of its scale from the '
                f"same row in {other}"
            )
    return ""


def _arrangements(n_rows: int) -> Iterator[tuple[str, Array]]:
    """What is tried: a description, and which rows in which order."""
    yield "in the same call, sent again", np.arange(n_rows)
    yield "in another order", np.random.default_rng(0).permutation(n_rows)
    yield "repeated", np.repeat(np.arange(min(n_rows, _N_ALONE)), 3)
    for size in BATCH_SIZES:
        if size == 1:
            for row in range(min(n_rows, _N_ALONE)):
                yield "alone", np.array([row])
        elif size < n_rows:
            yield f"in a call of {size}", np.arange(size)
            yield f"in a call of {size}", np.arange(n_rows - size, n_rows)


def _taken(inputs: Sequence[Tensor], arrays: Sequence[Array], rows: Array) -> tuple[Tensor, ...]:
    return tuple(from_array(tensor.name, array[rows], tensor.datatype) for tensor, array in zip(inputs, arrays, strict=True))


def _worst_row(want: Array, have: Array, scale: float) -> tuple[int, float]:
    """The row that differs most, and by how much, relative to the scale; infinite where values cannot be subtracted."""
    if want.dtype.kind == "f":
        wide_want, wide_have = want.astype(np.float64), have.astype(np.float64)
        with np.errstate(invalid="ignore"):
            difference = np.abs(wide_want - wide_have) / scale
        same = (wide_want == wide_have) | (np.isnan(wide_want) & np.isnan(wide_have))
        difference = np.where(same, 0.0, np.where(np.isnan(difference), np.inf, difference))
    else:
        difference = np.where(want == have, 0.0, np.inf)
    by_row = difference.reshape(len(difference), -1).max(axis=1, initial=0.0)
    row = int(np.argmax(by_row))
    return row, float(by_row[row])


def _is_rounding(
    place: int, row: int, together: Sequence[Tensor], wanted: Sequence[Array], had: Sequence[Array], bounds: Mapping[str, float]
) -> bool:
    """Whether rounding decided a label that differs: the best two scores are closer than rounding can tell apart, and not the
    same in both answers. Of equal scores the label must be the same, too.
    """
    for tensor, scores, others in zip(together, wanted, had, strict=True):
        if tensor.datatype in bounds and scores.ndim == 2 and scores.shape[1] > 1:
            best = np.sort(scores[row].astype(np.float64))[-2:]
            is_close = best[1] - best[0] <= 2 * bounds[tensor.datatype] * scale_of(scores)
            return bool(is_close and not np.array_equal(scores[row], others[place]))
    return False


def stable_rows(run: Run, inputs: Sequence[Tensor], tolerances: Mapping[str, Tolerance]) -> list[int]:
    """Row numbers whose answer stays within its tolerance when each number of the row moves by `N_ULP` units in the last place.

    exp, log and matrix products differ in the last places between processors; rows at a tie or next to a threshold would refuse a
    good version on another machine, so they prove equality where it is published and are not kept as golden rows.

    Args:
        run: what is examined.
        inputs: rows (n_rows, …).
        tolerances: of its outputs.
    """
    arrays = [to_array(tensor) for tensor in inputs]
    n_rows = len(arrays[0])
    want = {tensor.name: to_array(tensor) for tensor in run(tuple(inputs))}
    is_stable = np.ones(n_rows, dtype=bool)
    for moved in _moved(inputs, arrays):
        try:
            found = run(moved)
        except Exception:  # a value at the end of its range: try the rows one by one
            found = _one_by_one(run, moved, n_rows)
        for tensor in found:
            is_stable &= _within(want[tensor.name], to_array(tensor), tolerances.get(tensor.name, Tolerance()))
    return [int(row) for row in np.flatnonzero(is_stable)]


def _moved(inputs: Sequence[Tensor], arrays: Sequence[Array]) -> Iterator[tuple[Tensor, ...]]:
    """The rows with their numbers moved: all at once, then each feature alone or, where that is too much, in patterns."""
    movable = [_is_measured(array) for array in arrays]
    n_features = sum(int(where.sum()) for where in movable)
    if not n_features:
        return
    for sign in (1, -1):
        yield _apply(inputs, arrays, [sign * where for where in movable])
    if n_features <= _N_MOVED_ALONE:
        for number, where in enumerate(movable):
            for place in map(tuple, np.argwhere(where)):
                for sign in (1, -1):
                    signs = [np.zeros(array.shape[1:], dtype=int) for array in arrays]
                    signs[number][place] = sign
                    yield _apply(inputs, arrays, signs)
    else:
        random = np.random.default_rng(0)
        for _ in range(_N_PATTERNS):
            yield _apply(inputs, arrays, [random.choice([-1, 1], size=where.shape) * where for where in movable])


def _is_measured(array: Array) -> Array:
    """By feature, whether it is a measured number; whole numbers are codes or counts, which every machine computes exactly."""
    if array.dtype.kind != "f":
        return np.zeros(array.shape[1:], dtype=int)
    with np.errstate(invalid="ignore"):
        is_whole = (array == np.round(array)) | ~np.isfinite(array)
    measured: Array = (~is_whole.all(axis=0)).astype(int)
    return measured


def _apply(inputs: Sequence[Tensor], arrays: Sequence[Array], signs: Sequence[Any]) -> tuple[Tensor, ...]:
    moved = []
    for tensor, array, sign in zip(inputs, arrays, signs, strict=True):
        if not np.any(sign):
            moved.append(tensor)
            continue
        with np.errstate(over="ignore"):
            changed = array
            for _ in range(N_ULP):
                changed = np.where(
                    sign > 0, np.nextafter(changed, np.inf), np.where(sign < 0, np.nextafter(changed, -np.inf), changed)
                )
        moved.append(from_array(tensor.name, np.where(np.isfinite(array), changed, array).astype(array.dtype), tensor.datatype))
    return tuple(moved)


def _one_by_one(run: Run, inputs: Sequence[Tensor], n_rows: int) -> list[Tensor]:
    """The answers row by row; a row that is refused gets NaN, zero or nothing, so it is not stable."""
    arrays = [to_array(tensor) for tensor in inputs]
    parts: list[Sequence[Tensor] | None] = []
    for row in range(n_rows):
        try:
            parts.append(run(_taken(inputs, arrays, np.array([row]))))
        except Exception:  # this row is refused when it is moved
            parts.append(None)
    like = next((part for part in parts if part is not None), None)
    if like is None:
        raise PublishError("no golden row can be run with its numbers moved by a few units in the last place")
    joined = []
    for number, tensor in enumerate(like):
        rows = [to_array(part[number]) if part is not None else _impossible(to_array(tensor)) for part in parts]
        joined.append(from_array(tensor.name, np.concatenate(rows), tensor.datatype))
    return joined


def _impossible(array: Array) -> Array:
    """An answer that differs from every real one."""
    if array.dtype.kind == "f":
        return np.full_like(array, np.inf)
    return np.full_like(array, b"\0refused\0" if array.dtype.kind == "O" else np.array(-1).astype(array.dtype))


def _within(want: Array, have: Array, tolerance: Tolerance) -> Any:
    """By row, whether all elements are within the tolerance."""
    if want.dtype.kind == "f":
        wide_want, wide_have = want.astype(np.float64), have.astype(np.float64)
        with np.errstate(invalid="ignore"):
            near = np.abs(wide_want - wide_have) <= tolerance.atol + tolerance.rtol * np.abs(wide_want)
        same = near | (wide_want == wide_have) | (np.isnan(wide_want) & np.isnan(wide_have))
    else:
        same = want == have
    return same.reshape(len(same), -1).all(axis=1)
