"""Fitted transforms -> ``plan.json`` and ``plan.npz``, compared with the transforms, as a service runs them."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from splitserve.arrays import Array, from_array, to_array
from splitserve.publishing import hard_rows, samples
from splitserve.publishing.compile import odd_rows
from splitserve.repository.golden import Golden
from splitserve.repository.manifest import PLAN_ARRAYS_FILE, PLAN_FILE, BundleError, Manifest, Rows
from splitserve.runtimes import sklearn_pipeline
from splitserve.runtimes.plans import files
from splitserve.runtimes.plans.files import Plan
from splitserve.runtimes.plans.layouts import PlanError
from splitserve.runtimes.plans.planner import NotPlanned, make_plan
from splitserve.runtimes.preprocessor import to_dense
from splitserve.runtimes.rows import to_rows
from splitserve.tensors import Tensor

N_ULPS = 4
"""Numbers of rounded operations may differ by so many units in the last place."""

_N_ROWS = 256
"""Rows of the training data that the plan is compared on, beside golden, odd and hard ones."""

_N_REFUSED = 16
"""At most so many rows of a kind that the transforms mostly refuse: each is found by several calls."""

Features = Callable[[Sequence[Tensor]], Array]


class NotPortable(Exception):
    """There is no portable plan; the message says which step is the reason."""


def portable_plan(
    transformer: Any, manifest: Manifest, golden: Sequence[Tensor], rows: Sequence[Tensor]
) -> tuple[dict[str, bytes], Plan]:
    """The files of a plan, and the plan that is read from them.

    Args:
        transformer: as loaded from its file.
        manifest: of the bundle.
        golden: inputs of the golden samples, checked against the signature.
        rows: of the training data, likewise.

    Raises:
        NotPortable: a step is not supported, or the plan differs from the transforms.
    """
    form = manifest.rows
    if form is None:
        raise NotPortable("there are no rows")
    try:
        planned = make_plan(transformer, form, manifest.inputs)
        text, arrays = files.encode(planned.steps, manifest.fingerprint)
        plan = files.decode(text, arrays, form, manifest.inputs, manifest.outputs[0], manifest.fingerprint)
    except (NotPlanned, PlanError, BundleError) as error:
        raise NotPortable(str(error)) from None
    original = _original(transformer, form, manifest)
    is_exact = files.is_exact(planned.steps)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scikit-learn's, about values that are made to be strange
        for kind, tensors in _compared(manifest, form, golden, rows):
            if difference := _difference(original, plan, tensors, is_exact=is_exact):
                raise NotPortable(f"the plan differs from the transforms on {kind}: {difference}")
    return {PLAN_FILE: text, PLAN_ARRAYS_FILE: arrays}, plan


def _original(transformer: Any, rows: Rows, manifest: Manifest) -> Features:
    def features(tensors: Sequence[Tensor]) -> Array:
        with np.errstate(all="ignore"):
            return to_dense(sklearn_pipeline.transform(transformer, to_rows(rows, manifest.inputs, tensors)))

    return features


def _compared(
    manifest: Manifest, form: Rows, golden: Sequence[Tensor], rows: Sequence[Tensor]
) -> Iterator[tuple[str, Sequence[Tensor]]]:
    yield "golden rows", golden
    yield "rows of X", _chosen(rows, samples.spread(rows[0].n_rows, _N_ROWS))
    yield "generated rows", odd_rows(manifest.inputs, Golden(tuple(golden), ()))
    for block in hard_rows.of_raw(rows, form, manifest.inputs).blocks():
        arrays = block.arrays
        if block.kind == "infinite":
            chosen = samples.spread(block.n_rows, _N_REFUSED)
            arrays = tuple(array[chosen] for array in arrays)
        specs = zip(manifest.inputs, arrays, strict=True)
        yield f"hard rows, {block.kind}", [from_array(spec.name, array, spec.datatype) for spec, array in specs]


def _chosen(tensors: Sequence[Tensor], rows: Sequence[int]) -> list[Tensor]:
    return [from_array(tensor.name, to_array(tensor)[list(rows)], tensor.datatype) for tensor in tensors]


def _difference(original: Features, plan: Features, tensors: Sequence[Tensor], *, is_exact: bool) -> str:
    """Between the features of these rows, and about which are refused; "" if there is none. Without values: rows may be of X."""
    n_rows = tensors[0].n_rows
    if not n_rows:
        return ""
    wanted, found = _answer(original, tensors), _answer(plan, tensors)
    if wanted is not None and found is not None:
        return _unequal(wanted, found, is_exact=is_exact)
    if n_rows == 1:
        if wanted is None and found is None:
            return ""
        return "the transforms refuse a row" if wanted is None else "the plan refuses a row"
    halves = (range(n_rows // 2), range(n_rows // 2, n_rows))
    return next(filter(None, (_difference(original, plan, _chosen(tensors, half), is_exact=is_exact) for half in halves)), "")


def _answer(features: Features, tensors: Sequence[Tensor]) -> Array | None:
    try:
        return features(tensors)
    except Exception:  # transforms may raise anything about a value; that too is a refusal
        return None


def _unequal(wanted: Array, found: Array, *, is_exact: bool) -> str:
    if (wanted.dtype, wanted.shape) != (found.dtype, found.shape):
        return f"expected {wanted.dtype} {list(wanted.shape[1:])}, got {found.dtype} {list(found.shape[1:])}"
    same = wanted == found
    if wanted.dtype.kind == "f":
        if is_exact:
            same &= np.signbit(wanted) == np.signbit(found)
        else:
            with np.errstate(all="ignore"):
                same |= np.abs(wanted - found) <= N_ULPS * np.spacing(np.maximum(np.abs(wanted), np.abs(found)))
        same |= np.isnan(wanted) & np.isnan(found)
    if same.all():
        return ""
    at = np.unravel_index(int(np.argmin(same)), same.shape)
    return f"feature {[int(place) for place in at[1:]]} has another value"
