"""LightGBM's estimators: features, thresholds and sums are float64, compared by ``<=``.

Source: LightGBM, include/LightGBM/tree.h (NumericalDecision, CategoricalDecision); src/io/tree.cpp (the text format);
src/c_api.cpp (RowPairFunctionFromDenseMatric); src/objective (ConvertOutput).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import msgspec
import numpy as np

from splitserve.arrays import Array
from splitserve.publishing.boosting.boosted import Boosted, Link, identity
from splitserve.publishing.errors import NotConvertible
from splitserve.publishing.estimators.form import Regressor, constant_rows, converts, two_columns
from splitserve.publishing.estimators.trees import Tree, leaf_numbers, tree_sums
from splitserve.publishing.graph import Value, concat

OBJECTIVES: Mapping[str, Link] = {
    **dict.fromkeys(["regression", "regression_l1", "huber", "fair", "quantile", "mape", "lambdarank", "rank_xendcg"], identity),
    **dict.fromkeys(["poisson", "gamma", "tweedie"], Value.exp),
    **dict.fromkeys(["binary", "multiclassova", "cross_entropy"], Value.sigmoid),
    "cross_entropy_lambda": lambda margin: (margin.exp() + 1.0).log(),
    "multiclass": Value.softmax,
    "": identity,
}
"""By objective, what makes predictions of margins; the objective "" is a callable."""

PREDICT_OPTIONS = {
    "pred_early_stop": False,
    "predict_raw_score": False,
    "raw_score": False,
    "predict_leaf_index": False,
    "predict_contrib": False,
    "start_iteration_predict": 0,
    "num_iteration_predict": -1,
}
"""Parameters of an estimator that change what `predict` gives, with the values that change nothing."""

_ZERO = float(np.float32(1e-35))
"""Values up to this magnitude are 0: kZeroThreshold."""

_CATEGORICAL, _DEFAULT_LEFT = 1, 2
_MISSING_ZERO = 1


class _Linear(msgspec.Struct, frozen=True):
    """What the leaves of a tree of ``linear_tree`` add: for each leaf a constant, features and a coefficient for each of them."""

    constants: Array
    features: Sequence[Sequence[int]]
    coefficients: Sequence[Sequence[float]]


class _Read(msgspec.Struct, frozen=True):
    """A tree of the text format: its values (n_nodes,), and features of which 0 is a missing value."""

    tree: Tree
    values: Array
    zero_is_missing: set[int]
    linear: _Linear | None


class _LightGBM(Boosted):
    library, versions, compares = "lightgbm", ("4.6", "4.8"), np.float64

    @cached_property
    def blocks(self) -> list[dict[str, str]]:
        """The header of the text format, then a block for each tree up to the best iteration where training stopped early."""
        given = self.estimator.get_params()
        for option, neutral in PREDICT_OPTIONS.items():
            if given.get(option, neutral) not in (neutral, None):
                raise NotConvertible(
                    f"{type(self.estimator).__name__} with {option}={given[option]!r} has no ONNX form, since it changes "
                    "what predict gives; fit without it"
                )
        text = self.estimator.booster_.model_to_string()
        parts = text.partition("\nend of trees")[0].split("\nTree=")
        return [dict(line.partition("=")[::2] for line in part.splitlines()) for part in parts]

    @cached_property
    def read(self) -> list[_Read]:
        return [_read(fields) for fields in self.blocks[1:]]

    @cached_property
    def trees(self) -> Sequence[Tree]:
        return [each.tree for each in self.read]

    @property
    def n_groups(self) -> int:
        return int(self.blocks[0]["num_tree_per_iteration"])

    @cached_property
    def known(self) -> Value:
        """The rows as trees compare them."""
        graph, rows = self.graph, self.x.astype(np.float64)
        is_zero = rows.abs() <= _ZERO
        found = graph.where(is_zero, 0.0, rows)
        n_features = int(self.blocks[0]["max_feature_idx"]) + 1
        if missing := set().union(*(each.zero_is_missing for each in self.read)):
            found = graph.where(_of(missing, n_features, is_zero), np.nan, found)
        if codes := {int(each.tree.feature[node]) for each in self.read for node in each.tree.members}:
            found = graph.where(_of(codes, n_features, found.abs() < 1.0), 0.0, found)  # -0.5 is category 0
        return found

    @cached_property
    def answer(self) -> tuple[Value, Value]:
        """What `predict` gives for each group, and the margins (n_rows, n_groups)."""
        header = self.blocks[0]
        objective, _, rest = header.get("objective", "").partition(" ")
        if objective not in OBJECTIVES:
            raise NotConvertible(
                f'{type(self.estimator).__name__} with objective="{objective}" has no ONNX form; use one of '
                f"{', '.join(filter(None, OBJECTIVES))}"
            )
        trees = [(each.tree, each.values) for each in self.read]
        if any(each.linear is not None for each in self.read):
            margin = self._linear().reshape(-1, len(trees) // self.n_groups, self.n_groups).running_sum(1)
        else:
            groups = [trees[group :: self.n_groups] for group in range(self.n_groups)]
            margin = tree_sums(self.known, groups, np.zeros(self.n_groups))
        if "average_output" in header:
            margin = margin / float(len(self.read) // self.n_groups)
        words = dict(word.partition(":")[::2] for word in rest.split())
        if "sqrt" in words:  # of reg_sqrt
            return margin * margin.abs(), margin
        return OBJECTIVES[objective](margin * float(words.get("sigmoid", 1.0))), margin

    def _linear(self) -> Value:
        """(n_rows, n_trees) of ``linear_tree``: terms of a leaf, one after the other, or its value where a feature is NaN."""
        leaves = leaf_numbers(self.known, self.trees)
        parts = [each.linear or _Linear(each.values[each.tree.leaves], [], []) for each in self.read]
        n_leaves, n_terms = (
            sum(len(part.constants) for part in parts),
            max(1, *(len(each) for part in parts for each in part.features)),
        )
        n_features = int(self.blocks[0]["max_feature_idx"]) + 1
        features, coefficients = np.full((n_leaves, n_terms), n_features), np.zeros((n_leaves, n_terms))
        start = 0
        for part in parts:
            for leaf, (columns, factors) in enumerate(zip(part.features, part.coefficients, strict=True), start):
                features[leaf, : len(columns)], coefficients[leaf, : len(columns)] = columns, factors
            start += len(part.constants)
        graph = self.graph
        rows = concat([self.known, constant_rows(self.x, [0.0])])  # what leaves with fewer terms multiply by 0
        columns_of_rows = graph.constant(features).take(leaves, axis=0).reshape(-1, len(parts) * n_terms)
        values = graph.op("GatherElements", rows, columns_of_rows, axis=1).reshape(-1, len(parts), n_terms)
        factors_of_rows = graph.constant(coefficients, np.float64).take(leaves, axis=0)
        constants = graph.constant(np.concatenate([part.constants for part in parts])[:, np.newaxis], np.float64)
        total = concat([constants.take(leaves, axis=0), values * factors_of_rows], axis=2).running_sum(2)
        otherwise = graph.constant(np.concatenate([each.values[each.tree.leaves] for each in self.read]), np.float64)
        is_missing = values.is_nan().astype(np.int64).max(2, keepdims=False) > 0
        return graph.where(is_missing, otherwise.take(leaves, axis=0), total)


def _of(features: set[int], n_features: int, condition: Value) -> Value:
    """The condition, where it is about one of the features."""
    return condition.logical_and(condition.graph.constant([number in features for number in range(n_features)]))


def _read(fields: Mapping[str, str]) -> _Read:
    leaf_values = _numbers(fields, "leaf_value", np.float64)
    n_inner = len(leaf_values) - 1
    values = np.concatenate([np.zeros(n_inner), leaf_values])
    decision, feature, threshold = (
        _numbers(fields, name, dtype)
        for name, dtype in (("decision_type", np.int64), ("split_feature", np.int64), ("threshold", np.float64))
    )
    left, right = (_children(_numbers(fields, f"{side}_child", np.int64), n_inner) for side in ("left", "right"))
    in_set, missing = (decision & _CATEGORICAL) != 0, decision >> 2 & 3
    nan_left = np.where(missing == 0, threshold >= 0.0, (decision & _DEFAULT_LEFT) != 0)  # NaN is 0 where none is expected
    rest = np.zeros(n_inner + 1)
    tree = Tree(
        feature=np.append(feature, rest).astype(np.int64),
        threshold=np.append(threshold, rest),
        left=left,
        right=right,
        nan_left=np.append(nan_left & ~in_set, rest) != 0,
        members=_members(fields, threshold, in_set),
    )
    linear = _linear_leaves(fields) if fields.get("is_linear") == "1" else None
    return _Read(tree, values, set(feature[(missing == _MISSING_ZERO) & ~in_set].tolist()), linear)


def _linear_leaves(fields: Mapping[str, str]) -> _Linear:
    ends = np.cumsum(_numbers(fields, "num_features", np.int64))[:-1]
    features = [part.tolist() for part in np.split(_numbers(fields, "leaf_features", np.int64), ends)]
    coefficients = [part.tolist() for part in np.split(_numbers(fields, "leaf_coeff", np.float64), ends)]
    return _Linear(_numbers(fields, "leaf_const", np.float64), features, coefficients)


def _numbers(fields: Mapping[str, str], name: str, dtype: Any) -> Array:
    return np.array(fields.get(name, "").split(), dtype=dtype)


def _children(numbers: Array, n_inner: int) -> Array:
    """Leaves, which LightGBM counts from -1 downwards, come after the inner nodes; they have no children."""
    return np.append(np.where(numbers < 0, n_inner + ~numbers, numbers), np.full(n_inner + 1, -1))


def _members(fields: Mapping[str, str], threshold: Array, in_set: Array) -> dict[int, list[int]]:
    """The categories of each node that has a set, from its bits."""
    bounds, words = _numbers(fields, "cat_boundaries", np.int64), _numbers(fields, "cat_threshold", np.int64)
    found = {}
    for node in np.flatnonzero(in_set).tolist():
        which = int(threshold[node])
        bits = words[bounds[which] : bounds[which + 1]].tolist()
        found[node] = [32 * place + bit for place, word in enumerate(bits) for bit in range(32) if word >> bit & 1]
    return found


@converts("lightgbm.LGBMClassifier")
class LightGBMClassifier(_LightGBM):
    @cached_property
    def predict_proba(self) -> Value:
        if len(self.classes) < 2:
            raise self.one_class()
        if "objective" not in self.blocks[0]:
            raise NotConvertible(
                "LGBMClassifier with a callable objective gives raw scores instead of labels and has no ONNX form; use "
                "LGBMRegressor, or a built-in objective"
            )
        found, _ = self.answer
        return two_columns(found) if self.n_groups == 1 else found

    @cached_property
    def decision_function(self) -> Value:
        return self.answer[1]

    @cached_property
    def class_index(self) -> Value:
        if self.n_groups == 1:
            return self.predict_proba.argmax()
        return self.answer[1].argmax()  # the exponentials of equal ones may differ in the last place


@converts("lightgbm.LGBMRegressor", "lightgbm.LGBMRanker")
class LightGBMRegressor(_LightGBM, Regressor):
    @cached_property
    def predict(self) -> Value:
        return self.answer[0]
