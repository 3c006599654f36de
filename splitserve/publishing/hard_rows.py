"""Rows made to be difficult, on which publishing proves that the split answers as the pipeline does.

Rows of the training data rarely show where a conversion is wrong: at the threshold of a tree, at equal scores, at missing values
and beyond what was seen. These are made from the training data and from what was fitted, at two levels: raw rows for the whole,
and feature rows for the predictor alone, since thresholds are of features. Their number does not grow with the number of columns:
each row of a wide table changes several columns.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import msgspec
import numpy as np
import onnx
from onnx import numpy_helper

from splitserve.arrays import Array, to_array
from splitserve.publishing import boosting, samples
from splitserve.publishing.estimators.trees import HistogramCodes
from splitserve.repository.manifest import Rows
from splitserve.signature import TensorSpec
from splitserve.tensors import Tensor

N_A_KIND = 64
"""Rows of one kind and value at most, not counting thresholds: from this number of columns on, a row changes several."""

N_THRESHOLDS = 256
"""Thresholds that are tried at most at each level, spread evenly over those of the model."""

N_MIXED = 256
"""Rows whose values come from different rows."""

FAR, MIXED = "far out of range", "mixed rows"
"""Kinds of hard rows, as a release records them."""

_N_RANGES = 10
"""How many times the range of a column a value of the kind `FAR` is away from it."""

_FOR_FLOAT32, _FOR_FLOAT64 = 2.0**16, 2.0**40
"""Integer columns with values above these are also tested around 2**24 and 2**53, above which float32 and float64 cannot
represent every integer."""

FAR_KINDS = (FAR, "large integers")
"""Kinds far outside the training data, where the pipeline's own answer may be made of rounding alone."""

_SEED = 0
_N_STEPS = 110
"""Halvings of an interval of float64 numbers until its ends are neighbours, and some to spare."""


class Block(msgspec.Struct, frozen=True):
    """Rows of one kind: ``arrays``, one an input, (n_rows, …), and what is special about each row, for messages."""

    kind: str
    arrays: tuple[Array, ...]
    shown: tuple[str, ...]

    @property
    def n_rows(self) -> int:
        return len(self.shown)


class _Column(msgspec.Struct, frozen=True):
    """A column of the rows: of which input, at which place of its flattened row, what it is called, and its values."""

    number: int
    place: int
    name: str
    values: Array
    takes_missing: bool


class HardRows:
    """Makes blocks of rows.

    Args:
        arrays: rows of the training data (n_rows, …), one array an input.
        names: of the inputs.
        takes_missing: by input, whether its empty text is a missing value.
    """

    def __init__(self, arrays: Sequence[Array], names: Sequence[str], takes_missing: Sequence[bool] = ()) -> None:
        flat = [array.reshape(len(array), -1) for array in arrays]
        missing = takes_missing or [False] * len(arrays)
        self._shapes = [array.shape[1:] for array in arrays]
        self._columns = [
            _Column(number, place, name if array.shape[1] == 1 else f"{name}[{place}]", array[:, place], missing[number])
            for number, (name, array) in enumerate(zip(names, flat, strict=True))
            for place in range(array.shape[1])
        ]
        kept = samples.spread(len(flat[0]), N_A_KIND)
        self._base = [array[kept] for array in flat]
        self._flat = flat
        self._random = np.random.default_rng(_SEED)

    def blocks(self) -> Iterator[Block]:
        """All kinds but thresholds."""
        for kind, value in _KINDS:
            if block := self._changed(kind, value):
                yield block
        yield self._mixed()

    def _changed(self, kind: str, value: Callable[[_Column], Any]) -> Block | None:
        """Rows with one column changed, or several where there are many columns; then a row with every one of them."""
        changes = [(column, found) for column in self._columns if (found := value(column)) is not None]
        if not changes:
            return None
        groups = [changes[start::N_A_KIND] for start in range(min(N_A_KIND, len(changes)))]
        if len(changes) > 1:
            half = self._random.random(len(changes)) < 0.5
            groups += [changes, [each for each, is_in in zip(changes, half, strict=True) if is_in] or changes]
        rows = self._rows_in_turn(len(groups))
        for row, group in enumerate(groups):
            for column, found in group:
                rows[column.number][row, column.place] = found
        return self._block(kind, rows, [_shown(group) for group in groups])

    def _mixed(self) -> Block:
        """Each column's values drawn from the training data independently of the others."""
        n_known = len(self._flat[0])
        rows = []
        for array in self._flat:
            drawn = self._random.integers(n_known, size=(N_MIXED, array.shape[1]))
            rows.append(np.take_along_axis(array, drawn, axis=0))
        return self._block(MIXED, rows, ["values of different rows"] * N_MIXED)

    def thresholds(self, transform: Callable[[list[Array]], Array], splits: Sequence[tuple[int, float]]) -> Block | None:
        """Rows whose features are at a threshold, and one float to the other side of it.

        Bisects between two values of a column that lie on different sides. Works for features that are a continuous function of
        one column; the others are left out.

        Args:
            transform: arrays as of a block -> features (n_rows, n_features), float64; raises if it refuses a row.
            splits: features and thresholds.
        """
        numeric = [column for column in self._columns if column.values.dtype.kind == "f"]
        sources = self._sources(transform, numeric)
        usable = [(feature, threshold) for feature, threshold in splits if feature in sources]
        if not usable:
            return None
        columns = [sources[feature] for feature, _ in usable]
        features, thresholds = np.array([feature for feature, _ in usable]), np.array([threshold for _, threshold in usable])

        def is_left(values: Array) -> Array:
            found = transform(self._shaped(self._with_values(columns, values)))
            side: Array = found[np.arange(len(usable)), features] <= thresholds
            return side

        low, high = _bracket(columns)
        is_crossed = is_left(low) != is_left(high)
        if not is_crossed.any():
            return None
        low, high = _bisected(is_left, low, high, np.array([column.values.dtype == np.float32 for column in columns]))
        crossed = [column for column, is_it in zip(columns, is_crossed.tolist(), strict=True) if is_it for _ in ("low", "high")]
        values = np.stack([low[is_crossed], high[is_crossed]], axis=1).ravel()
        shown = [f'"{column.name}" = {value!r}' for column, value in zip(crossed, values.tolist(), strict=True)]
        return self._block("thresholds", self._with_values(crossed, values), shown)

    def _with_values(self, columns: Sequence[_Column], values: Array) -> list[Array]:
        """One row again and again, each time with another of these values in its column."""
        rows = self._one_row(len(columns))
        for row, (column, value) in enumerate(zip(columns, values, strict=True)):
            rows[column.number][row, column.place] = value
        return rows

    def _sources(self, transform: Callable[[list[Array]], Array], numeric: Sequence[_Column]) -> dict[int, _Column]:
        """The column that each feature is made of, as far as moving one column alone moves it."""
        chosen = [numeric[index] for index in samples.spread(len(numeric), N_THRESHOLDS)] if numeric else []
        usable = [column for column in chosen if np.isfinite(column.values).any()]
        if not usable:
            return {}
        rows = self._one_row(len(usable) + 1)
        for row, column in enumerate(usable):
            known = column.values[np.isfinite(column.values)]
            now = rows[column.number][row, column.place]
            rows[column.number][row, column.place] = known.max() if now != known.max() else known.min() - 1
        found = transform(self._shaped(rows))
        with np.errstate(invalid="ignore"):
            moved = found[:-1] != found[-1]
        sources: dict[int, _Column] = {}
        for row, column in enumerate(usable):
            for feature in np.flatnonzero(moved[row]).tolist():
                sources.setdefault(feature, column)
        return sources

    def _rows_in_turn(self, n_rows: int) -> list[Array]:
        """Rows of the training data to be changed."""
        return [array[np.arange(n_rows) % len(array)] for array in self._base]

    def _one_row(self, n_rows: int) -> list[Array]:
        """One row of the training data, without missing values if there is one, again and again."""
        whole = (
            row
            for row in range(len(self._base[0]))
            if all(array.dtype.kind != "f" or np.isfinite(array[row]).all() for array in self._base)
        )
        first = next(whole, 0)
        return [np.repeat(array[first][np.newaxis], n_rows, axis=0) for array in self._base]

    def _block(self, kind: str, rows: Sequence[Array], shown: Sequence[str]) -> Block:
        return Block(kind, tuple(self._shaped(rows)), tuple(shown))

    def _shaped(self, rows: Sequence[Array]) -> list[Array]:
        """Flattened rows in the shapes of the inputs."""
        return [array.reshape(len(array), *shape) for array, shape in zip(rows, self._shapes, strict=True)]


def _bracket(columns: Sequence[_Column]) -> tuple[Array, Array]:
    """A value below and one above all finite values of each column, float64."""
    finite = [column.values[np.isfinite(column.values)].astype(np.float64) for column in columns]
    low, high = np.array([values.min() for values in finite]), np.array([values.max() for values in finite])
    return low - 1 - abs(low), high + 1 + abs(high)


def _bisected(is_left: Callable[[Array], Array], low: Array, high: Array, is_narrow: Array) -> tuple[Array, Array]:
    """Neighbouring numbers, the first on the side of ``low``, the other on that of ``high``, where these are on different sides.

    Args:
        is_left: which of some values, one a place, are left of the threshold of that place.
        low: one end of the interval of each place.
        high: the other.
        is_narrow: where numbers are of float32.
    """
    left = is_left(low)
    for _ in range(_N_STEPS):
        middle = low / 2 + high / 2
        middle = np.where(is_narrow, middle.astype(np.float32).astype(np.float64), middle)
        if not ((middle != low) & (middle != high)).any():
            break
        same = is_left(middle) == left
        low, high = np.where(same, middle, low), np.where(same, high, middle)
    return low, high


def of_raw(tensors: Sequence[Tensor], form: Rows, specs: Sequence[TensorSpec]) -> HardRows:
    """Raw rows, as a client sends them.

    Args:
        tensors: rows of the training data.
        form: of the rows.
        specs: the signature.
    """
    missing = [bool(column.missing) for column in form.columns]
    if len(missing) != len(specs):
        missing = [False] * len(specs)
    return HardRows([to_array(tensor) for tensor in tensors], [spec.name for spec in specs], missing)


def of_features(features: Array) -> HardRows:
    """Feature rows (n_rows, n_features), as the predictor gets them."""
    return HardRows([features], ["features"])


def feature_thresholds(features: Array, splits: Sequence[tuple[int, float]]) -> Block | None:
    """Feature rows at each threshold: the float32 numbers around it and, of float64 features, the float64 ones, too.

    Args:
        features: rows of the training data (n_rows, n_features), float32 or float64.
        splits: features and thresholds.
    """
    if not splits:
        return None
    made: list[tuple[int, float]] = []
    for feature, at in splits:
        with np.errstate(over="ignore"):
            near = np.float32(at)
        around = {float(near), float(np.nextafter(near, np.float32(-np.inf))), float(np.nextafter(near, np.float32(np.inf)))}
        if features.dtype == np.float64:
            halves = {(one + other) / 2 for one in around for other in around}  # where rounding to float32 changes
            exact = {at, *halves}
            around |= exact | {float(np.nextafter(each, side)) for each in exact for side in (-np.inf, np.inf)}
        made += [(feature, value) for value in sorted(around) if math.isfinite(value)]
    rows = features[np.arange(len(made)) % len(features)]
    for row, (feature, value) in enumerate(made):
        rows[row, feature] = value
    return Block("thresholds", (rows,), tuple(f"features[{feature}] = {value!r}" for feature, value in made))


def splits_of(estimator: Any, n_features: int, model: bytes = b"") -> list[tuple[int, float]]:
    """Features and thresholds of the trees in an estimator, wherever they are: at most `N_THRESHOLDS`, spread evenly.

    Args:
        estimator: fitted.
        n_features: of its input.
        model: what it was converted to, whose trees are looked at, too: those of other libraries are no Python objects.
    """
    found: dict[tuple[int, float], None] = {}
    for features, thresholds in (*_trees(estimator, set()), *(_converted_trees(model) if model else ())):
        chosen = np.isfinite(thresholds) & (features < n_features)
        found.update(dict.fromkeys(zip(features[chosen].tolist(), thresholds[chosen].tolist(), strict=True)))
    every = sorted(found)
    return [every[index] for index in samples.spread(len(every), N_THRESHOLDS)] if every else []


def _trees(part: Any, seen: set[int]) -> Iterator[tuple[Array, Array]]:
    """Features and thresholds of each tree in the attributes of a fitted object."""
    if id(part) in seen:
        return
    seen.add(id(part))
    if hasattr(part, "children_left") and hasattr(part, "threshold"):  # Tree of decision trees and forests
        inner = np.asarray(part.children_left) >= 0
        yield np.asarray(part.feature)[inner], np.asarray(part.threshold)[inner].astype(np.float64)
    elif hasattr(part, "nodes") and hasattr(part, "get_n_leaf_nodes"):  # TreePredictor of HistGradientBoosting
        nodes = part.nodes[(part.nodes["is_leaf"] == 0) & (part.nodes["is_categorical"] == 0)]
        yield nodes["feature_idx"].astype(np.int64), nodes["num_threshold"].astype(np.float64)
    elif isinstance(part, list | tuple):
        for each in part:
            yield from _trees(each, seen)
    elif isinstance(part, np.ndarray):
        if part.dtype.kind == "O":
            for each in part.ravel().tolist():
                yield from _trees(each, seen)
    elif isinstance(codes := getattr(part, "_preprocessor", None), HistogramCodes):
        for features, thresholds in _trees(part._predictors, seen):
            yield np.asarray(codes.order)[features], thresholds
    elif boosting.is_boosted(part):
        yield from boosting.thresholds(part)
    elif type(part).__module__.startswith("sklearn."):
        for each in list(getattr(part, "__dict__", {}).values()):
            yield from _trees(each, seen)


def _converted_trees(model: bytes) -> Iterator[tuple[Array, Array]]:
    """Features and thresholds of each tree operator of a model that is applied to columns of the model's input."""
    graph = onnx.load_from_string(model).graph
    known = {each.name: each for each in graph.initializer}
    columns: dict[str, Array | None] = {value.name: None for value in graph.input}  # None: all of them
    for node in graph.node:  # in topological order
        if not node.input or node.input[0] not in columns:
            continue
        of = columns[node.input[0]]
        given = {each.name: each for each in node.attribute}
        if node.op_type in ("Cast", "Identity"):
            columns[node.output[0]] = of
        elif node.op_type == "Gather" and node.input[1] in known and given["axis"].i == 1:
            chosen = numpy_helper.to_array(known[node.input[1]]).ravel()
            columns[node.output[0]] = chosen if of is None else of[chosen]
        elif node.op_type == "TreeEnsemble":
            features = np.array(given["nodes_featureids"].ints, np.int64)
            yield features if of is None else of[features], numpy_helper.to_array(given["nodes_splits"].t).astype(np.float64)


def _shown(group: Sequence[tuple[_Column, Any]]) -> str:
    column, value = group[0]
    more = f" and {len(group) - 1} more columns of the kind" if len(group) > 1 else ""
    return f'"{column.name}" = {value!r}{more}'


def _missing(column: _Column) -> Any:
    if column.values.dtype.kind == "f":
        return np.nan
    return b"" if column.values.dtype.kind == "O" and column.takes_missing else None


def _finite(column: _Column) -> Array | None:
    if column.values.dtype.kind not in "fiu":
        return None
    finite = column.values[np.isfinite(column.values)]
    return finite if finite.size else None


def _of_floats(value: float) -> Callable[[_Column], Any]:
    return lambda column: value if column.values.dtype.kind == "f" else None


def _of_texts(value: bytes) -> Callable[[_Column], Any]:
    return lambda column: value if column.values.dtype.kind == "O" else None


def _extreme(of: Callable[[Array], Any]) -> Callable[[_Column], Any]:
    return lambda column: None if (finite := _finite(column)) is None else of(finite)


def _beyond(sign: int) -> Callable[[_Column], Any]:
    """`_N_RANGES` times the range away from what was seen, as far as the datatype goes."""

    def value(column: _Column) -> Any:
        finite = _finite(column)
        if finite is None:
            return None
        low, high = float(finite.min()), float(finite.max())
        far = (high if sign > 0 else low) + sign * _N_RANGES * ((high - low) or abs(high) or 1.0)
        kind = column.values.dtype
        if kind.kind == "f":
            return float(np.clip(far, np.finfo(kind).min, np.finfo(kind).max))
        bounds = np.iinfo(kind)
        return max(int(bounds.min), min(int(bounds.max), round(far)))

    return value


def _large_integer(value: int, least: float) -> Callable[[_Column], Any]:
    """A large whole number, for columns of whole numbers that are large already."""

    def found(column: _Column) -> Any:
        finite = _finite(column)
        if finite is None or np.abs(finite.astype(np.float64)).max() < least:
            return None
        if column.values.dtype.kind == "f":
            return float(value) if (finite == np.rint(finite)).all() else None
        return value if value <= np.iinfo(column.values.dtype).max else None

    return found


def _zero(column: _Column) -> Any:
    return 0 if column.values.dtype.kind in "fiu" else None


def _flipped(value: bool) -> Callable[[_Column], Any]:
    return lambda column: value if column.values.dtype.kind == "b" else None


_KINDS: tuple[tuple[str, Callable[[_Column], Any]], ...] = (
    ("missing", _missing),
    ("infinite", _of_floats(np.inf)),
    ("infinite", _of_floats(-np.inf)),
    ("unseen text", _of_texts("\u00a7 unseen".encode())),
    ("empty text", _of_texts(b"")),
    ("booleans", _flipped(False)),
    ("booleans", _flipped(True)),
    ("extremes", _extreme(np.min)),
    ("extremes", _extreme(np.max)),
    (FAR, _beyond(1)),
    (FAR, _beyond(-1)),
    ("zeros", _zero),
    ("large integers", _large_integer(2**24, _FOR_FLOAT32)),
    ("large integers", _large_integer(2**24 + 1, _FOR_FLOAT32)),
    ("large integers", _large_integer(2**53 - 1, _FOR_FLOAT64)),
    ("large integers", _large_integer(2**53 + 1, _FOR_FLOAT64)),
)
