"""Which columns of a DataFrame clients must send, and which whole numbers of them may be missing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np

from splitserve.oip.limits import RequestLimits
from splitserve.publishing import samples
from splitserve.repository.manifest import Column, Rows
from splitserve.runtimes.preprocessor import to_dense
from splitserve.runtimes.rows import Rowset
from splitserve.signature import TensorSpec

_N_ALONE = 64
"""Up to so many columns of whole numbers are tried one by one if not all of them may be missing."""

_N_TRIED = 16


def without_unused(transformer: Any, data: Rowset) -> tuple[Rowset, tuple[str, ...]]:
    """The data without columns that no transform selects, and their names.

    Args:
        transformer: fitted transforms.
        data: a DataFrame; arrays are returned as they are.
    """
    if not hasattr(data, "columns"):
        return data, ()
    unused = _unselected(transformer)
    kept = [name for name in data.columns if name not in unused]
    if not unused or not kept or len(kept) == len(data.columns):
        return data, ()
    probe = samples.take(data, samples.spread(len(data), _N_TRIED))
    if not _same(transformer, probe, probe[kept]):
        return data, ()
    return data[kept], tuple(name for name in data.columns if name in unused)


def _unselected(transformer: Any) -> set[str]:
    """Columns of training that a ColumnTransformer, or each of a FeatureUnion, drops before anything else sees them."""
    if getattr(transformer, "steps", None):
        return _unselected(transformer.steps[0][1])
    if members := getattr(transformer, "transformer_list", None):
        found = [_unselected(member) for _, member in members if not _is_dropped(member)]
        return set.intersection(*found) if found else set()
    chosen = getattr(transformer, "_transformer_to_input_indices", None)  # where scikit-learn keeps the selection
    names = getattr(transformer, "feature_names_in_", None)
    if chosen is None or names is None:
        return set()
    parts = transformer.named_transformers_
    used = {index for name, indices in chosen.items() if name in parts and not _is_dropped(parts[name]) for index in indices}
    return {str(name) for index, name in enumerate(names) if index not in used}


def _is_dropped(part: Any) -> bool:
    return isinstance(part, str) and part == "drop"


def _same(transformer: Any, rows: Rowset, others: Rowset, kinds: str = "") -> bool:
    """Whether the transforms give the same numbers for both, of the same dtype or of dtypes of these kinds."""
    try:
        want, have = (to_dense(transformer.transform(each)) for each in (rows, others))
    except Exception:  # they refuse what they were not fitted on, with whatever error
        return False
    if want.shape != have.shape or (want.dtype != have.dtype and not {want.dtype.kind, have.dtype.kind} <= set(kinds)):
        return False
    return bool(np.array_equal(want, have, equal_nan="f" in (want.dtype.kind, have.dtype.kind)))


def with_gaps(
    transformer: Any, data: Rowset, rows: Rows, specs: Sequence[TensorSpec], *, takes_nan: bool, all_as_floats: bool
) -> tuple[Rows, tuple[TensorSpec, ...], tuple[str, ...]]:
    """Let columns of whole numbers be missing where the transforms accept it: they are sent as FP64.

    Args:
        transformer: fitted transforms.
        data: rows of the training data.
        rows: their form.
        specs: the signature.
        takes_nan: whether features may be NaN.
        all_as_floats: features become floats, so theirs may be whole numbers.

    Returns:
        The form, the signature, and the names of these columns.
    """
    whole = [column.name for column in rows.columns if rows.form == "frame" and np.dtype(_plain(column)).kind in "iu"]
    kinds = "biuf" if all_as_floats else ""
    probe = samples.take(data, samples.spread(len(data), _N_TRIED))
    accepted = whole if whole and _accepts_all(transformer, probe, whole, takes_nan, kinds) else []
    if len(accepted) < len(whole) <= _N_ALONE:
        accepted = [name for name in whole if _accepts_all(transformer, probe, [name], takes_nan, kinds)]
        if not _same(transformer, probe, probe.astype(dict.fromkeys(accepted, np.float64)), kinds):
            accepted = []
    names = set(accepted)
    columns = tuple(msgspec.structs.replace(each, dtype="float64") if each.name in names else each for each in rows.columns)
    changed = tuple(TensorSpec(spec.name, "FP64", spec.shape) if spec.name in names else spec for spec in specs)
    return msgspec.structs.replace(rows, columns=columns), changed, tuple(accepted)


def _plain(column: Column) -> Any:
    try:
        return np.dtype(column.dtype)
    except TypeError:
        return object


def _accepts_all(transformer: Any, rows: Rowset, names: list[str], takes_nan: bool, kinds: str) -> bool:
    """Whether these columns may be missing all at once, and mean the same as float64."""
    wide = rows.astype(dict.fromkeys(names, np.float64))
    if (wide[names].abs() > 2**53).to_numpy().any() or not _same(transformer, rows, wide, kinds):
        return False
    gaps = wide[:1].copy()
    gaps[names] = np.nan
    try:
        with np.errstate(all="ignore"):
            features = to_dense(transformer.transform(gaps))
    except Exception:  # they refuse missing values, with whatever error
        return False
    return takes_nan or features.dtype.kind != "f" or not np.isnan(features).any()


def said(unused: Sequence[str], gaps: Sequence[str], n_inputs: int) -> tuple[str, ...]:
    """Messages for who publishes."""
    found = []
    if n_inputs > RequestLimits().max_inputs:
        found.append(
            f"requests have {n_inputs} inputs, one a column: set PROXY_MAX_INPUTS and PREPROCESS_MAX_INPUTS to that, or publish "
            "with X.to_numpy(), which is one input"
        )
    if unused:
        found.append(f"no transform selects {_listed(unused)}: clients need not send it, and it is ignored if they do")
    if gaps:
        found.append(f"{_listed(gaps)}, whole numbers in X, may be missing or have decimals: sent as FP64")
    return tuple(found)


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(f'"{name}"' for name in names[:8])
    return f"{shown} and {len(names) - 8} more" if len(names) > 8 else shown
