"""Decision trees and what consists of them, with the same leaves and the same sums as in scikit-learn.

ONNX's operator for trees adds leaf values in float32, in an order that depends on threads. Here it only finds the leaf of each
tree; the values are looked up in float64 and added in scikit-learn's order. So labels are the same at ties, too, alone or in a
batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import msgspec
import numpy as np
from onnx import numpy_helper

from splitserve.arrays import Array
from splitserve.publishing.errors import NotConvertible
from splitserve.publishing.estimators.form import Form, Regressor, Target, converts, form_of, two_columns
from splitserve.publishing.estimators.refused import reason_for
from splitserve.publishing.graph import Value, concat

_SUM, _AT_MOST = 1, 0
"""ONNX's aggregate function SUM and node mode BRANCH_LEQ."""

_BEYOND, _NAN, _NEGATIVE = 2**31, -1, -2
"""What stands for categories that no model has, for NaN, and for negative numbers."""

_PARTS = ("feature", "split", "nan", "true id", "true is leaf", "false id", "false is leaf", "root", "target", "weight")


class Tree(msgspec.Struct, frozen=True):
    """A tree as arrays over its nodes; ``left`` is -1 at leaves. A row goes left where ``feature <= threshold``, and where it is
    NaN and ``nan_left`` says so. A node in ``members`` asks instead whether the feature, rounded down, is one of the categories,
    numbers from 0.
    """

    feature: Array
    threshold: Array
    left: Array
    right: Array
    nan_left: Array
    members: Mapping[int, Sequence[int]] = {}

    @property
    def leaves(self) -> Array:
        """Indices of the nodes that are leaves."""
        return np.flatnonzero(self.left < 0)


_ONE_LEAF = Tree(np.array([0]), np.array([0.0]), np.array([-1]), np.array([-1]), np.array([False]))
_TWO_LEAVES = Tree(np.zeros(3, int), np.zeros(3), np.array([1, -1, -1]), np.array([2, -1, -1]), np.zeros(3, bool))


def tree_of(fitted: Any, features: Array | None = None) -> Tree:
    """Of scikit-learn's ``tree_``; ``features`` are the columns that its own columns are."""
    nodes = fitted.__getstate__()["nodes"]
    nan_left = nodes["missing_go_to_left"] if "missing_go_to_left" in nodes.dtype.names else np.zeros(len(nodes), np.uint8)
    feature = np.maximum(nodes["feature"], 0)
    return Tree(
        feature=feature if features is None else np.asarray(features)[feature],
        threshold=nodes["threshold"],
        left=nodes["left_child"],
        right=nodes["right_child"],
        nan_left=nan_left != 0,
    )


def leaf_numbers(x: Value, trees: Sequence[Tree]) -> Value:
    """(n_rows, n_trees) of the leaf that each row comes to, counted over all trees.

    Args:
        x: (n_rows, n_features), in the datatype in which scikit-learn compares: float32 for trees, float64 for histograms.
        trees: at least one.

    Raises:
        NotConvertible: more leaves than float32 can count.
    """
    numbers = []
    for tree in trees:
        if (n_leaves := len(tree.leaves)) > 2**24:
            raise NotConvertible(f"a tree of {n_leaves} leaves is too large; limit max_depth or max_leaf_nodes")
        numbers.append(np.arange(n_leaves))
    found = _ensemble(x, trees, [each.astype(x.dtype) for each in numbers])
    starts = np.cumsum([0, *(len(tree.leaves) for tree in trees[:-1])])
    return found.astype(np.int64) + x.graph.constant(starts.astype(np.int64))


def tree_sums(x: Value, groups: Sequence[Sequence[tuple[Tree, Array]]], starts: Array | Value) -> Value:
    """(n_rows, n_groups): for each group its start and the leaves of its trees, added one after the other in the starts' dtype.

    Args:
        x: (n_rows, n_features), in the datatype in which the trees compare.
        groups: the trees of each, with their values (n_nodes,).
        starts: (n_groups,), or (n_rows, n_groups).
    """
    n_trees = max(map(len, groups))
    given = None if isinstance(starts, np.ndarray) else starts
    rows = np.zeros(len(groups), starts.dtype) if given is not None else np.asarray(starts)
    is_first = n_trees == 0 or bool(np.any(rows))  # a start is a tree of one leaf
    listed: list[tuple[Tree, Array]] = []
    for group, start in zip(groups, rows.reshape(-1, 1), strict=True):
        padding = [(_ONE_LEAF, np.zeros(1))] * (n_trees - len(group))
        listed += [*[(_ONE_LEAF, start)] * is_first, *group, *padding]
    wide = x.astype(np.result_type(x.dtype, rows.dtype))
    found = _ensemble(wide, [tree for tree, _ in listed], [values[tree.leaves] for tree, values in listed]).astype(rows.dtype)
    if len(groups) == 1:
        if given is not None:
            found = concat([given, found])
        return found.running_sum(1, keepdims=True) if given is not None or len(listed) > 1 else found
    found = found.reshape(-1, len(groups), n_trees + is_first)
    if given is not None:
        found = concat([given.reshape(-1, len(groups), 1), found], axis=2)
    return found.running_sum(2)


def _ensemble(x: Value, trees: Sequence[Tree], weights: Sequence[Array]) -> Value:
    """(n_rows, n_trees) of the weight of the leaf that each row comes to in each tree.

    Args:
        x: (n_rows, n_features), float32 or float64.
        trees: at least one.
        weights: (n_leaves,) of each tree, in the datatype of ``x``.
    """
    x, trees = _with_memberships(x, trees)
    parts: dict[str, list[Any]] = {name: [] for name in _PARTS}
    features, splits, nans, true_ids, true_leaf, false_ids, false_leaf, roots, targets, ordered = parts.values()
    n_nodes = n_leaves = 0
    for which, (tree, values) in enumerate(zip(trees, weights, strict=True)):
        if tree.left[0] < 0:  # ONNX Runtime 1.22 takes another tree's leaf for that of a tree without a question
            tree, values = _TWO_LEAVES, np.repeat(values[:1], 2)
        leaves, inner = tree.leaves, np.flatnonzero(tree.left >= 0)
        place = np.zeros(len(tree.left), np.int64)  # of each node among the inner ones or among the leaves
        place[inner], place[leaves] = n_nodes + np.arange(len(inner)), n_leaves + np.arange(len(leaves))
        if place[tree.left[0]] == place[tree.right[0]]:  # ONNX Runtime 1.22 takes that for a tree of one leaf
            alone = tree.left[0] if tree.left[tree.left[0]] < 0 else tree.right[0]
            other = leaves[leaves != alone][0]
            place[[alone, other]] = place[[other, alone]]
        roots.append(n_nodes)
        children = [(place[side[inner]], tree.left[side[inner]] < 0) for side in (tree.left, tree.right)]
        asked = (tree.feature[inner], tree.threshold[inner], tree.nan_left[inner])
        for listed, new in zip((features, splits, nans), asked, strict=True):
            listed.append(new)
        for (ids, leaf_or_not), (new_ids, new_leaf) in zip(
            ((true_ids, true_leaf), (false_ids, false_leaf)), children, strict=True
        ):
            ids.append(new_ids)
            leaf_or_not.append(new_leaf)
        targets.append(np.full(len(leaves), which))
        ordered.append(values[np.argsort(place[leaves])])
        n_nodes += len(inner)
        n_leaves += len(leaves)
    thresholds = np.concatenate(splits).astype(np.float64)
    attributes = {
        "nodes_featureids": _integers(features),
        "nodes_missing_value_tracks_true": _integers(nans),
        "nodes_truenodeids": _integers(true_ids),
        "nodes_trueleafs": _integers(true_leaf),
        "nodes_falsenodeids": _integers(false_ids),
        "nodes_falseleafs": _integers(false_leaf),
        "leaf_targetids": _integers(targets),
        "tree_roots": roots,
        "nodes_modes": numpy_helper.from_array(np.full(n_nodes, _AT_MOST, np.uint8), "modes"),
        "nodes_splits": numpy_helper.from_array(thresholds if x.dtype == np.float64 else float32_at_most(thresholds), "splits"),
        "leaf_weights": numpy_helper.from_array(np.concatenate(ordered).astype(x.dtype), "leaves"),
    }
    return x.graph.op("TreeEnsemble", x, n_targets=len(trees), aggregate_function=_SUM, post_transform=0, **attributes)


def _with_memberships(x: Value, trees: Sequence[Tree]) -> tuple[Value, Sequence[Tree]]:
    """The rows with a column in front for each set of categories, -1 for members and 1 for others, and trees that ask for those.

    BRANCH_MEMBER is not used: ONNX Runtime makes a chain of comparisons of it, and up to 1.24 compares the subtrees of the links
    with each other, so that loading a model of some hundred categories does not end (microsoft/onnxruntime#27391).
    """
    columns: dict[tuple[int, bool, tuple[int, ...]], int] = {}  # of feature, whether NaN is a member, and categories
    asked = []
    for tree in trees:
        for node, categories in tree.members.items():
            key = (int(tree.feature[node]), bool(tree.nan_left[node]), tuple(sorted(categories)))
            asked.append(columns.setdefault(key, len(columns)))
    if not columns:
        return x, trees
    places, changed = iter(asked), []
    for tree in trees:
        feature, threshold, nan_left = tree.feature + len(columns), tree.threshold.copy(), tree.nan_left.copy()
        for node in tree.members:
            feature[node], threshold[node], nan_left[node] = next(places), 0.0, False
        changed.append(msgspec.structs.replace(tree, feature=feature, threshold=threshold, nan_left=nan_left, members={}))
    return concat([_memberships(x, list(columns)), x]), changed


def _memberships(x: Value, sets: Sequence[tuple[int, bool, tuple[int, ...]]]) -> Value:
    """(n_rows, n_sets): -1 for members of each set, 1 for others.

    Args:
        x: rows (n_rows, n_features).
        sets: a feature, whether NaN is a member, and categories.
    """
    graph, features = x.graph, sorted({feature for feature, *_ in sets})
    whole = x.take(features)
    whole, is_nan = graph.op("Floor", whole), whole.is_nan()
    whole = graph.where(is_nan, float(_NAN), graph.where(whole >= 0.0, whole.minimum(float(_BEYOND)), float(_NEGATIVE)))
    keyed = whole.astype(np.int64) + graph.constant(_BEYOND * 2 * np.arange(len(features)))
    keys: list[int] = []
    values: list[int] = []
    tables, order = [], []
    for number, feature in enumerate(features):
        own = [place for place, each in enumerate(sets) if each[0] == feature]
        known = np.unique(np.concatenate([sets[place][2] for place in own])).astype(np.int64)
        keys += [*(known + _BEYOND * 2 * number).tolist(), _BEYOND * 2 * number + _NAN]
        values += range(1, len(known) + 2)
        table = np.ones((len(known) + 2, len(own)), np.int8)  # other categories, those of the sets, NaN
        for column, place in enumerate(own):
            table[1 + np.searchsorted(known, sets[place][2]), column] = -1
            table[-1, column] = -1 if sets[place][1] else 1
        tables.append(table)
        order += own
    places = graph.op("LabelEncoder", keyed, keys_int64s=keys, values_int64s=values, default_int64=0)
    found = [graph.constant(table).take(places.take(number), axis=0) for number, table in enumerate(tables)]
    return concat(found).take(np.argsort(order)).astype(x.dtype)


def _integers(parts: Sequence[Array]) -> list[int]:
    listed: list[int] = np.concatenate(parts).astype(int).tolist()
    return listed


def leaf_values(x: Value, trees: Sequence[Tree], values: Sequence[Array]) -> Value:
    """(n_rows, n_trees, n_values) of the leaves that the rows come to, in the values' dtype.

    Args:
        x: as for `leaf_numbers`.
        trees: at least one.
        values: (n_nodes, n_values) of each tree.
    """
    table = np.concatenate([value[tree.leaves] for tree, value in zip(trees, values, strict=True)])
    return x.graph.constant(table, table.dtype).take(leaf_numbers(x, trees), axis=0)


def float32_at_most(thresholds: Array) -> Array:
    """The greatest float32 that is not above each number: for a float32, being at most the one is being at most the other."""
    with np.errstate(over="ignore"):
        rounded = thresholds.astype(np.float32)
    above = rounded.astype(np.float64) > thresholds
    rounded[above] = np.nextafter(rounded[above], np.float32(-np.inf))
    return rounded


def _narrow(x: Value) -> Value:
    """Rows as scikit-learn's trees take them."""
    return x.astype(np.float32)


class _Trees(Form):
    """One tree or the mean of several; with several targets, too."""

    @cached_property
    def fitted(self) -> list[Any]:
        return list(getattr(self.estimator, "estimators_", [self.estimator]))

    def mean(self, values: Sequence[Array]) -> Value:
        """(n_rows, n_values) of the trees' values, (n_nodes, n_values) each, summed in the order of the trees."""
        trees = [tree_of(each.tree_) for each in self.fitted]
        if values[0].shape[1] == 1:
            total = tree_sums(
                _narrow(self.x), [[(tree, value[:, 0]) for tree, value in zip(trees, values, strict=True)]], np.zeros(1)
            )
        else:
            total = leaf_values(_narrow(self.x), trees, values).running_sum(1)
        return total if len(trees) == 1 else total / float(len(trees))


@converts(
    *(f"sklearn.{name}Classifier" for name in ("DecisionTree", "ExtraTree", "RandomForest", "ExtraTrees")),
)
class TreeClassifier(_Trees):
    @cached_property
    def targets(self) -> Sequence[Form]:
        if self.estimator.n_outputs_ == 1:
            return [self]
        return [Target(self, classes, self._shares(number), None) for number, classes in enumerate(self.estimator.classes_)]

    @cached_property
    def predict_proba(self) -> Value:
        return self._shares(0)

    def _shares(self, target: int) -> Value:
        n_classes = np.atleast_1d(self.estimator.n_classes_)[target]
        return self.mean([each.tree_.value[:, target, :n_classes] for each in self.fitted])


@converts(*(f"sklearn.{name}Regressor" for name in ("DecisionTree", "ExtraTree", "RandomForest", "ExtraTrees")))
class TreeRegressor(_Trees, Regressor):
    @cached_property
    def predict(self) -> Value:
        return self.mean([each.tree_.value[:, :, 0] for each in self.fitted])


class _GradientBoosting(Form):
    """GradientBoosting: the initial estimator's answer, then each stage's values times the learning rate."""

    @cached_property
    def raw(self) -> Value:
        """(n_rows, n_trees_per_stage)."""
        model = self.estimator
        groups = [
            [(tree_of(each.tree_), model.learning_rate * each.tree_.value[:, 0, 0]) for each in trees]
            for trees in model.estimators_.T
        ]
        return tree_sums(_narrow(self.x), groups, self.initial)

    @property
    def initial(self) -> Array | Value:
        """(n_trees_per_stage,), or (n_rows, n_trees_per_stage)."""
        first = self.estimator.init_
        is_same = first == "zero" or type(first).__name__.startswith("Dummy")
        if is_same and not reason_for(first):
            row = np.zeros((1, self.estimator.n_features_in_), np.float32)
            return np.ravel(self.estimator._raw_predict_init(row)).astype(np.float64)
        return self.initial_of(form_of(first, _narrow(self.x))).astype(np.float64)

    def initial_of(self, form: Form) -> Value:
        """Likewise, of the initial estimator's form."""
        raise NotImplementedError


@converts("sklearn.GradientBoostingRegressor")
class GradientBoostingRegressor(_GradientBoosting, Regressor):
    def initial_of(self, form: Form) -> Value:
        return form.predict

    @cached_property
    def predict(self) -> Value:
        return self.raw


@converts("sklearn.GradientBoostingClassifier")
class GradientBoostingClassifier(_GradientBoosting):
    def initial_of(self, form: Form) -> Value:
        given = form.predict_proba.astype(np.float64)
        least = float(np.finfo(np.float64).eps)  # as scikit-learn clips it, to avoid infinities
        given = given.maximum(least).minimum(1 - least)
        if self.raw_width > 1:
            return given.log() - given.log().mean()
        positive = given.take([1])
        if self.estimator.loss == "exponential":
            return 0.5 * (positive / (1.0 - positive)).log()
        return (positive / (1.0 - positive)).log()

    @cached_property
    def decision_function(self) -> Value:
        return self.raw

    @cached_property
    def predict_proba(self) -> Value:
        if self.raw_width > 1:
            return self.raw.softmax()
        return two_columns((2.0 * self.raw if self.estimator.loss == "exponential" else self.raw).sigmoid())

    @cached_property
    def class_index(self) -> Value:
        if self.raw_width > 1:
            return self.raw.argmax()
        return (self.raw.take(0) >= 0.0).astype(np.int64)

    @property
    def raw_width(self) -> int:
        return int(self.estimator.estimators_.shape[1])


def _categories_to_the_left(predictor: Any, known: Array, place_of: Array) -> dict[int, list[int]]:
    """By node. A category that the node's feature never had goes where NaN goes.

    Args:
        predictor: scikit-learn's tree.
        known: (n_categorical, 8) bits of the categories in training.
        place_of: by feature, its place among those.

    Source: sklearn, ensemble/_hist_gradient_boosting/_predictor.pyx.
    """
    found = {}
    for node in np.flatnonzero((predictor.nodes["is_categorical"] != 0) & (predictor.nodes["is_leaf"] == 0)).tolist():
        fields = predictor.nodes[node]
        left, seen = (
            _bits(row) for row in (predictor.raw_left_cat_bitsets[fields["bitset_idx"]], known[place_of[fields["feature_idx"]]])
        )
        found[node] = np.flatnonzero(left | ~seen if fields["missing_go_to_left"] else left).tolist()
    return found


def _bits(words: Array) -> Array:
    """(8,) of 32 bits -> (256,) booleans."""
    return np.unpackbits(np.asarray(words, "<u4").view(np.uint8), bitorder="little") != 0


class HistogramCodes(msgspec.Struct, frozen=True):
    """What HistGradientBoosting does to rows: columns of categories come first, as codes, NaN where a category is unknown.

    ``categories`` are those of each categorical column as numbers, in the order of their codes; ``order`` are the columns.
    """

    categories: Sequence[Sequence[float]]
    order: Sequence[int]

    @classmethod
    def of(cls, model: Any, known: Sequence[Sequence[float]] | None = None) -> HistogramCodes | None:
        """Of a fitted model; None if it has no columns of categories.

        Args:
            model: fitted.
            known: the categories of its categorical columns, where they are not numbers in training.

        Raises:
            NotConvertible: they are not numbers, and not given.
        """
        given = getattr(model, "_preprocessor", None)
        if given is None or isinstance(given, cls):
            return given
        is_category = np.asarray(model.is_categorical_, bool)
        if known is None:
            known = [present(each) for each in given.named_transformers_["encoder"].categories_]
        if not all(isinstance(each, int | float) for column in known for each in column):
            raise NotConvertible(
                f"{type(model).__name__} with categorical_features of text has no ONNX form here; encode the columns in a "
                "ColumnTransformer step (OneHotEncoder or TargetEncoder) and fit without categorical_features"
            )
        order = [*np.flatnonzero(is_category).tolist(), *np.flatnonzero(~is_category).tolist()]
        return cls([[float(each) for each in column] for column in known], order)

    def transform(self, rows: Any) -> Array:
        """(n_rows, n_features) of numbers, as scikit-learn's own object does it."""
        found = np.array(rows, np.float64)[:, self.order]
        for place, categories in enumerate(self.categories):
            codes = {category: float(code) for code, category in enumerate(categories)}
            found[:, place] = [codes.get(value, np.nan) for value in found[:, place].tolist()]
        return found

    def encoded(self, x: Value) -> Value:
        """Likewise in a graph, in float64."""
        graph, parts = x.graph, []
        for column, categories in zip(self.order, self.categories, strict=False):
            keys = {np.array(category, x.dtype).item(): code for code, category in reversed([*enumerate(categories)])}
            tensors = {
                "keys_tensor": np.array([*keys], x.dtype),
                "values_tensor": np.array([*keys.values()], x.dtype),
                "default_tensor": np.array([np.nan], x.dtype),
            }
            given = {name: numpy_helper.from_array(values, name) for name, values in tensors.items()}
            parts.append(graph.op("LabelEncoder", x.take([column]), **given))
        if numbers := self.order[len(parts) :]:
            parts.append(x.take(numbers))
        return concat(parts).astype(np.float64)


def present(categories: Any) -> list[Any]:
    """Without the missing value, which comes last."""
    return [each for each in categories.tolist() if each is not None and each == each]


class _HistGradientBoosting(Form):
    """HistGradientBoosting on numbers and on categories that are numbers."""

    @cached_property
    def raw(self) -> Value:
        """(n_rows, n_trees_per_iteration)."""
        model = self.estimator
        codes = HistogramCodes.of(model)
        rows = self.x.astype(np.float64) if codes is None else codes.encoded(self.x)
        known, place_of = model._bin_mapper.make_known_categories_bitsets()
        stages = model._predictors
        starts = np.ravel(model._baseline_prediction).astype(np.float64)
        groups: list[list[tuple[Tree, Array]]] = [[] for _ in starts]
        for stage in stages:
            for group, each in zip(groups, stage, strict=True):
                nodes = each.nodes
                is_leaf = nodes["is_leaf"] != 0
                tree = Tree(
                    feature=nodes["feature_idx"],
                    threshold=nodes["num_threshold"],
                    left=np.where(is_leaf, -1, nodes["left"].astype(np.int64)),
                    right=nodes["right"].astype(np.int64),
                    nan_left=nodes["missing_go_to_left"] != 0,
                    members=_categories_to_the_left(each, known, place_of),
                )
                group.append((tree, nodes["value"]))
        return tree_sums(rows, groups, starts)


@converts("sklearn.HistGradientBoostingRegressor")
class HistGradientBoostingRegressor(_HistGradientBoosting, Regressor):
    @cached_property
    def predict(self) -> Value:
        return self.raw.exp() if self.estimator.loss in ("poisson", "gamma") else self.raw


@converts("sklearn.HistGradientBoostingClassifier")
class HistGradientBoostingClassifier(_HistGradientBoosting):
    @cached_property
    def decision_function(self) -> Value:
        return self.raw

    @cached_property
    def predict_proba(self) -> Value:
        return self.raw.softmax() if self.estimator.n_trees_per_iteration_ > 1 else two_columns(self.raw.sigmoid())

    @cached_property
    def class_index(self) -> Value:
        if self.estimator.n_trees_per_iteration_ > 1:
            return self.raw.argmax()
        return (self.raw.take(0) > 0.0).astype(np.int64)
