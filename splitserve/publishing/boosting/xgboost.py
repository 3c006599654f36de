"""XGBoost's estimators: features, thresholds and sums are float32, compared by ``<``.

Source: xgboost, doc/model.schema; src/common/categorical.h; src/objective.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np

from splitserve.arrays import Array
from splitserve.publishing.boosting.boosted import Boosted, Link, identity
from splitserve.publishing.errors import NotConvertible
from splitserve.publishing.estimators.form import Regressor, constant_rows, converts, two_columns
from splitserve.publishing.estimators.trees import Tree, tree_sums
from splitserve.publishing.graph import Value, concat


def _hinge(margin: Value) -> Value:
    return (margin > 0.0).astype(np.float32)


def _sigmoid(margin: Value) -> Value:
    return margin.astype(np.float64).sigmoid().astype(np.float32)


def _softmax(margin: Value) -> Value:
    return margin.astype(np.float64).softmax().astype(np.float32)


def _exponential(margin: Value) -> Value:
    return margin.astype(np.float64).exp().astype(np.float32)


def _logit(probability: float) -> float:
    return -math.log(1.0 / probability - 1.0) if 0.0 < probability < 1.0 else 0.0


CLASSIFIERS: Mapping[str, tuple[Link, Callable[[float], float]]] = {
    "binary:logistic": (_sigmoid, _logit),
    "reg:logistic": (_sigmoid, _logit),
    "binary:hinge": (_hinge, float),
    "multi:softmax": (_softmax, float),
    "multi:softprob": (_softmax, float),
}
"""By objective, what makes probabilities of margins, and what makes a margin of ``base_score``."""

REGRESSORS: Mapping[str, tuple[Link, Callable[[float], float]]] = {
    **dict.fromkeys(
        [
            *("reg:squarederror", "reg:squaredlogerror", "reg:pseudohubererror", "reg:absoluteerror", "reg:quantileerror"),
            *("binary:logitraw", "rank:ndcg", "rank:map", "rank:pairwise"),
        ],
        (identity, float),
    ),
    **dict.fromkeys(["reg:logistic", "binary:logistic"], (_sigmoid, _logit)),
    "binary:hinge": (_hinge, float),
    **dict.fromkeys(["count:poisson", "reg:gamma", "reg:tweedie", "survival:cox"], (_exponential, math.log)),
    "multi:softprob": (_softmax, float),
}
"""Likewise, predictions."""


def learner_of(estimator: Any) -> Mapping[str, Any]:
    """A fitted estimator as XGBoost writes it."""
    learner: dict[str, Any] = json.loads(bytes(estimator.get_booster().save_raw("json")))["learner"]
    return learner


def model_of(learner: Mapping[str, Any]) -> Mapping[str, Any]:
    """The trees and categories of a learner, or the weights of booster="gblinear"."""
    booster = learner["gradient_booster"]
    found: Mapping[str, Any] = booster["gbtree"]["model"] if booster["name"] == "dart" else booster["model"]
    return found


class _XGBoost(Boosted):
    library, versions, compares = "xgboost", ("2.1.4", "3.3"), np.float32
    objectives = REGRESSORS

    @cached_property
    def learner(self) -> Mapping[str, Any]:
        return learner_of(self.estimator)

    @property
    def objective(self) -> str:
        return str(self.learner["objective"]["name"])

    @cached_property
    def n_groups(self) -> int:
        parameters = self.learner["learner_model_param"]
        return max(int(parameters["num_class"]), int(parameters.get("num_target", 1)), 1)

    @cached_property
    def link(self) -> tuple[Link, Callable[[float], float]]:
        if callable(self.estimator.objective) and self.objectives is CLASSIFIERS:
            raise NotConvertible(
                f"{type(self.estimator).__name__} with a callable objective gives no probabilities and has no ONNX form; use one "
                f"of {', '.join(CLASSIFIERS)}"
            )
        if self.objective not in self.objectives:
            raise NotConvertible(
                f'{type(self.estimator).__name__} with objective="{self.objective}" has no ONNX form; use one of '
                f"{', '.join(self.objectives)}"
            )
        return self.objectives[self.objective]

    @cached_property
    def present(self) -> Value:
        """The rows in float32, NaN where the estimator takes a value as missing: of a sparse matrix, zeros."""
        x, missing = self.x.astype(np.float32), self.estimator.missing
        if self.x.is_sparse:
            x = self.graph.where(x.equals(0.0), np.nan, x)
        return x if missing is None or math.isnan(missing) else self.graph.where(x.equals(float(missing)), np.nan, x)

    @cached_property
    def margin(self) -> Value:
        """(n_rows, n_groups) float32."""
        to_margin = self.link[1]
        scores = json.loads(self.learner["learner_model_param"]["base_score"])  # one for each group since 3.1
        scores = [float(score) for score in (scores if isinstance(scores, list) else [scores])]
        if self.learner["gradient_booster"]["name"] == "gblinear":
            return self._linear(to_margin(scores[0]))  # it adds the first to all groups
        start = np.broadcast_to(np.array([to_margin(score) for score in scores], np.float32), self.n_groups)
        groups: list[list[tuple[Tree, Array]]] = [[] for _ in start]
        weights = self.learner["gradient_booster"].get("weight_drop")  # of dart
        for number, (written, tree) in enumerate(zip(self.kept, self.trees, strict=True)):
            values = _values(written)
            chosen = range(self.n_groups) if values.shape[1] > 1 else [self.model["tree_info"][number]]
            for group, column in zip(chosen, values.T, strict=True):
                if weights:  # each tree is added to the start, which is subtracted again
                    column = ((start[group] + column) - start[group]) * np.float32(weights[number])
                groups[group].append((tree, column))
        return tree_sums(self.present, groups, start)

    def _linear(self, start: float) -> Value:
        """Of booster="gblinear", which adds feature by feature; those that are missing add nothing."""
        weights = np.array(self.model["weights"], np.float32).reshape(-1, self.n_groups)
        first = constant_rows(self.x, weights[-1] + np.float32(start), np.float32).reshape(-1, 1, self.n_groups)
        present = self.graph.where(self.present.is_nan(), 0.0, self.present)
        return concat([first, present.reshape(-1, len(weights) - 1, 1) * weights[:-1]]).running_sum(1)

    @cached_property
    def model(self) -> Mapping[str, Any]:
        return model_of(self.learner)

    @cached_property
    def kept(self) -> Sequence[Mapping[str, Any]]:
        """The trees as XGBoost writes them, up to the best iteration where training stopped early."""
        trees: list[Mapping[str, Any]] = self.model.get("trees", [])  # gblinear has none
        try:
            best = self.estimator.best_iteration
        except AttributeError:  # it did not stop early
            return trees
        return trees[: self.model["iteration_indptr"][best + 1]] if trees else trees

    @cached_property
    def trees(self) -> Sequence[Tree]:
        return [_tree(tree) for tree in self.kept]


def _values(tree: Mapping[str, Any]) -> Array:
    """(n_nodes, n_values); several are those of multi_strategy="multi_output_tree"."""
    n_values = max(1, int(tree["tree_param"]["size_leaf_vector"]))
    if n_values == 1:
        return np.array(tree["split_conditions"], np.float32)[:, np.newaxis]
    if "leaf_weights" not in tree:  # of older versions
        return np.array(tree["base_weights"], np.float32).reshape(-1, n_values)
    is_leaf = np.array(tree["left_children"], np.int64) < 0
    places = np.where(is_leaf, np.array(tree["right_children"], np.int64), 0)
    found: Array = np.array(tree["leaf_weights"], np.float32).reshape(-1, n_values)[places]
    return found


def _tree(tree: Mapping[str, Any]) -> Tree:
    left, right = (np.array(tree[f"{side}_children"], np.int64) for side in ("left", "right"))
    nan_left = np.array(tree["default_left"], bool)
    nodes = tree["categories_nodes"]
    spans = zip(tree["categories_segments"], tree["categories_sizes"], strict=True)
    members = dict(zip(nodes, [tree["categories"][start : start + size] for start, size in spans], strict=True))
    left[nodes], right[nodes] = right[nodes], left[nodes]  # members go right, all others left
    nan_left[nodes] = ~nan_left[nodes]
    below = np.nextafter(
        np.array(tree["split_conditions"], np.float32), np.float32(-np.inf)
    )  # x < t is x <= the float32 before t
    return Tree(np.array(tree["split_indices"], np.int64), below.astype(np.float64), left, right, nan_left, members)


@converts("xgboost.XGBClassifier", "xgboost.XGBRFClassifier")
class XGBoostClassifier(_XGBoost):
    objectives = CLASSIFIERS

    @cached_property
    def predict_proba(self) -> Value:
        n_classes = int(self.estimator.n_classes_)
        link, _ = self.link
        if n_classes < 2:
            raise self.one_class()
        if self.n_groups != (n_classes if n_classes > 2 else 1):
            name = type(self.estimator).__name__
            raise NotConvertible(f"{name} with several targets has no ONNX form; use MultiOutputClassifier({name}(...))")
        result = link(self.margin)
        return result if n_classes > 2 else two_columns(result)

    @cached_property
    def class_index(self) -> Value:
        if self.n_groups == 1:
            return (self.predict_proba.take(1) > 0.5).astype(np.int64)
        if self.objective == "multi:softmax":  # a label without probabilities, which may be equal where margins are not
            return self.margin.argmax()
        return self.predict_proba.argmax()


@converts("xgboost.XGBRegressor", "xgboost.XGBRFRegressor", "xgboost.XGBRanker")
class XGBoostRegressor(_XGBoost, Regressor):
    @cached_property
    def predict(self) -> Value:
        return self.link[0](self.margin)
