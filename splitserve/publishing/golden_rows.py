"""Where golden rows come from: rows of the training data, rows that the publisher chose, or generated ones."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import msgspec
import numpy as np

from splitserve.arrays import Array, objects
from splitserve.publishing import samples
from splitserve.publishing.errors import PublishError
from splitserve.publishing.training_data import as_rows
from splitserve.repository.manifest import GoldenRows, Rows
from splitserve.runtimes.rows import Rowset, frame, is_missing

N_SYNTHETIC = 64
_N_WORDS = 8
_SEED = 0


class Chosen(msgspec.Struct, frozen=True):
    """Golden rows (n_rows, …), of the kind of the training data, and where they come from."""

    rows: Rowset
    source: GoldenRows


def choose(golden: Any, data: Rowset, form: Rows, learnt: Collection[str]) -> Chosen:
    """The golden rows of a publication.

    Args:
        golden: "rows": rows of the training data; "synthetic": generated; or a DataFrame or array of the publisher's own.
        data: the training data.
        form: its kind.
        learnt: the categories that the transforms were fitted on, as text.

    Raises:
        PublishError: it is none of these, or the rows have other columns than the data.
    """
    if isinstance(golden, str):
        if golden == "rows":
            return Chosen(samples.take(data, samples.golden_rows(data, learnt)), "rows")
        if golden == "synthetic":
            return Chosen(synthetic(data, form, learnt), "synthetic")
        raise PublishError(f'golden: expected "rows", "synthetic", or a DataFrame or array of rows, got "{golden}"')
    own = as_rows(golden)
    if form.form == "frame":
        wanted = [column.name for column in form.columns]
        if not hasattr(own, "columns") or set(wanted) - set(own.columns):
            raise PublishError(f"golden: expected a DataFrame with the columns of X ({', '.join(wanted[:10])}), got {_form(own)}")
        own = own[wanted].astype({column.name: column.dtype for column in form.columns if _is_number(data[column.name])})
    elif hasattr(own, "columns") or own.shape[1:] != data.shape[1:]:
        raise PublishError(
            f"golden: expected an array of shape (n_rows, {', '.join(map(str, data.shape[1:]))}) like X, got {_form(own)}"
        )
    else:
        own = own.astype(data.dtype) if data.dtype.kind in "fiub" else own
    return Chosen(samples.take(own, samples.spread(len(own), samples.N_GOLDEN_MAX)), "own")


def _form(rows: Rowset) -> str:
    if hasattr(rows, "columns"):
        return f"columns {', '.join(map(str, rows.columns[:10]))}"
    return f"an array of shape {rows.shape}"


def _is_number(column: Any) -> bool:
    return isinstance(column.dtype, np.dtype) and column.dtype.kind in "fiub"


def synthetic(data: Rowset, form: Rows, learnt: Collection[str] = ()) -> Rowset:
    """Synthetic rows: each column drawn independently, from its range or from its categories. The same in every run.

    Args:
        data: the training data: of a column of numbers, the smallest and largest are used, and, where they are categories that
            the transforms have learnt, all; of text, only words that the transforms have learnt.
        form: its kind.
        learnt: the categories that the transforms were fitted on, as text.
    """
    random = np.random.default_rng(_SEED)
    if form.form == "frame":
        return frame(form.columns, [_column(data[column.name], learnt, random) for column in form.columns])
    if form.element in ("str", "bytes"):
        width = data.reshape(len(data), -1).shape[1]
        values = [_texts(list(data.reshape(len(data), -1)[:, place]), learnt, random) for place in range(width)]
        rows = [[column[row] for column in values] for row in range(N_SYNTHETIC)]
        return objects([each for row in rows for each in row], (N_SYNTHETIC, *data.shape[1:]))
    if data.ndim != 2:
        drawn = _numbers(data.ravel(), (N_SYNTHETIC, *data.shape[1:]), learnt, random)
        return drawn.astype(data.dtype)
    columns = [_numbers(data[:, place], (N_SYNTHETIC,), learnt, random) for place in range(data.shape[1])]
    return np.stack(columns, axis=1).astype(data.dtype)


def _column(column: Any, learnt: Collection[str], random: np.random.Generator) -> Any:
    if _is_number(column):
        return _numbers(column.to_numpy(), (N_SYNTHETIC,), learnt, random).astype(column.dtype)
    if column.dtype.kind in "Mm":
        return column.min() + (column.max() - column.min()) * random.uniform(size=N_SYNTHETIC)
    if column.dtype.kind in "fiub" and str(column.dtype) != "category":  # pandas' nullable numbers
        drawn = _numbers(column.to_numpy(dtype=np.float64, na_value=np.nan), (N_SYNTHETIC,), learnt, random)
        return np.where(np.isnan(drawn), np.nan, drawn >= 0.5) if column.dtype.kind == "b" else drawn
    if str(column.dtype) == "category":
        present = column.cat.remove_unused_categories().cat.categories
        return _cycled(present.tolist(), column.isna().any())
    return _texts(column.tolist(), learnt, random)


def _numbers(values: Array, shape: tuple[int, ...], learnt: Collection[str], random: np.random.Generator) -> Array:
    """Uniform between the smallest and the largest; whole where all are; learnt categories in turn; one missing if any is."""
    if values.dtype.kind == "b":
        return np.resize([True, False], shape)
    finite = values[np.isfinite(values)] if values.dtype.kind == "f" else values
    if not finite.size:
        return np.full(shape, np.nan)
    distinct = np.unique(finite)
    if learnt and len(distinct) <= len(learnt) and all(str(each) in learnt for each in distinct.tolist()):
        drawn = np.resize(distinct, shape).astype(values.dtype)
    elif values.dtype.kind in "iu":
        drawn = random.integers(finite.min(), finite.max(), shape, dtype=values.dtype, endpoint=True)
    else:
        low, high, share = float(finite.min()), float(finite.max()), random.uniform(size=shape)
        drawn = np.clip(low * (1 - share) + high * share, low, high)  # low + share * (high - low) may overflow
        drawn = (np.rint(drawn) if (finite == np.rint(finite)).all() else drawn).astype(values.dtype)
    if values.dtype.kind == "f" and np.isnan(values).any():
        drawn.reshape(len(drawn), -1)[random.integers(len(drawn))] = np.nan
    return drawn


def _texts(values: list[Any], learnt: Collection[str], random: np.random.Generator) -> list[Any]:
    """The categories of a column in turn; of other text, sentences of learnt words."""
    present = {value for value in values if not is_missing(value)}
    has_missing = any(map(is_missing, values))
    if categories := sorted((value for value in present if value in learnt), key=str):
        return _cycled(categories, has_missing, next(filter(is_missing, values), None))
    words = sorted(learnt) or ["word"]
    texts: list[Any] = [" ".join(random.choice(words, _N_WORDS)) for _ in range(N_SYNTHETIC)]
    return [text.encode() for text in texts] if any(isinstance(value, bytes) for value in present) else texts


def _cycled(categories: list[Any], has_missing: bool, missing: Any = np.nan) -> list[Any]:
    every = [*categories, *([missing] if has_missing else [])] or [missing]
    return [every[row % len(every)] for row in range(N_SYNTHETIC)]
