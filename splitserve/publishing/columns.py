"""Which columns of a DataFrame clients must send, and which whole numbers of them may be missing or have decimals."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np
import pandas as pd

from splitserve.arrays import Array
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
    if not same(transformer, probe, probe[kept]):
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


def same(transformer: Any, rows: Rowset, others: Rowset, kinds: str = "") -> bool:
    """Whether the transforms give the same numbers for both, of the same dtype or of dtypes of these kinds."""
    try:
        want, have = (to_dense(transformer.transform(each)) for each in (rows, others))
    except Exception:  # they refuse what they were not fitted on, with whatever error
        return False
    if want.shape != have.shape or (want.dtype != have.dtype and not {want.dtype.kind, have.dtype.kind} <= set(kinds)):
        return False
    if want.dtype.kind == "O":  # numbers beside booleans or text
        return pd.DataFrame(want).equals(pd.DataFrame(have)) and (bool(kinds) or _types(want) == _types(have))
    return bool(np.array_equal(want, have, equal_nan="f" in (want.dtype.kind, have.dtype.kind)))


def _types(features: Array) -> list[type]:
    return [type(value) for value in features.ravel().tolist()]


class AsFloats(msgspec.Struct, frozen=True):
    """Columns of whole numbers that are sent as FP64: ``gaps`` may be missing or have decimals, ``decimals`` only the latter."""

    gaps: tuple[str, ...] = ()
    decimals: tuple[str, ...] = ()


def with_floats(
    transformer: Any, data: Rowset, rows: Rows, specs: Sequence[TensorSpec], *, refuses: str, all_as_floats: bool
) -> tuple[Rows, tuple[TensorSpec, ...], AsFloats]:
    """Let columns of whole numbers be missing or have decimals where the transforms accept it: they are sent as FP64.

    Args:
        transformer: fitted transforms.
        data: rows of the training data.
        rows: their form.
        specs: the signature.
        refuses: as for `preprocessor_half`: where features that are NaN are refused, columns may have decimals without being
            missing.
        all_as_floats: features become floats, so theirs may be whole numbers.

    Returns:
        The form, the signature, and these columns.
    """
    whole = [column.name for column in rows.columns if rows.form == "frame" and np.dtype(_plain(column)).kind in "iu"]
    kinds = "biuf" if all_as_floats else ""
    probe = samples.take(data, samples.spread(len(data), _N_TRIED))
    takes_nan = refuses == "inf" or (all_as_floats and not refuses)

    def accepted(names: list[str], change: float) -> list[str]:
        if not names or _accepts_all(transformer, probe, names, change, takes_nan, kinds):
            return names
        if len(names) > _N_ALONE:
            return []
        return [name for name in names if _accepts_all(transformer, probe, [name], change, takes_nan, kinds)]

    gaps = accepted(whole, np.nan)
    decimals = accepted([name for name in whole if name not in gaps], 0.5) if refuses == "nan" else []
    names = {*gaps, *decimals}
    if not same(transformer, probe, probe.astype(dict.fromkeys(names, np.float64)), kinds):
        names, gaps, decimals = set(), [], []
    columns = tuple(msgspec.structs.replace(each, dtype="float64") if each.name in names else each for each in rows.columns)
    changed = tuple(TensorSpec(spec.name, "FP64", spec.shape) if spec.name in names else spec for spec in specs)
    return msgspec.structs.replace(rows, columns=columns), changed, AsFloats(tuple(gaps), tuple(decimals))


def _plain(column: Column) -> Any:
    try:
        return np.dtype(column.dtype)
    except TypeError:
        return object


def _accepts_all(transformer: Any, rows: Rowset, names: list[str], change: float, takes_nan: bool, kinds: str) -> bool:
    """Whether this may be added to these columns all at once, and they mean the same as float64."""
    wide = rows.astype(dict.fromkeys(names, np.float64))
    if (wide[names].abs() > 2**53).to_numpy().any() or not same(transformer, rows, wide, kinds):
        return False
    changed = wide[:1].copy()
    changed[names] += change
    try:
        with np.errstate(all="ignore"):
            features = to_dense(transformer.transform(changed))
    except Exception:  # they refuse it, with whatever error
        return False
    return takes_nan or not pd.isna(features).any()


def said(unused: Sequence[str], floats: AsFloats, rows: Rows) -> tuple[str, ...]:
    """Messages for who publishes."""
    found, n_inputs = [], len(rows.columns)
    if n_inputs > RequestLimits().max_inputs:
        found.append(
            f"requests have {n_inputs} inputs, one a column: set PROXY_MAX_INPUTS and PREPROCESS_MAX_INPUTS to that, or publish "
            "with X.to_numpy(), which is one input"
        )
    if unused:
        found.append(f"no transform selects {_listed(unused)}: clients need not send it, and it is ignored if they do")
    if texts := [column.name for column in rows.columns if column.missing and not column.dtype.startswith("datetime64")]:
        found.append(f"{_listed(texts)}: empty text is a missing value, as on the wire they are the same")
    for names, what in ((floats.gaps, "be missing or have decimals"), (floats.decimals, "have decimals")):
        if names:
            found.append(f"{_listed(names)}, whole numbers in X, may {what}: sent as FP64")
    return tuple(found)


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(f'"{name}"' for name in names[:8])
    return f"{shown} and {len(names) - 8} more" if len(names) > 8 else shown
