"""CatBoost's estimators: features and borders are float32, compared by ``>``; sums are float64.

Source: catboost, the JSON model format; core.py (predict).
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from splitserve.arrays import Array
from splitserve.publishing.boosting.boosted import Boosted, Link, identity
from splitserve.publishing.errors import NotConvertible
from splitserve.publishing.estimators.form import Regressor, converts, two_columns
from splitserve.publishing.estimators.trees import Tree, leaf_values, tree_sums
from splitserve.publishing.graph import Value

CLASSIFIERS: Mapping[str, Link] = {
    **dict.fromkeys(["Logloss", "CrossEntropy", "MultiClassOneVsAll"], Value.sigmoid),
    "MultiClass": Value.softmax,
}
"""By loss function, what makes probabilities of margins."""

RANKERS = (
    *("QueryRMSE", "QuerySoftMax", "PairLogit", "PairLogitPairwise", "YetiRank", "YetiRankPairwise", "StochasticRank"),
    *("LambdaMart",),
)

REGRESSORS: Mapping[str, Link] = {
    **dict.fromkeys(
        [
            *("RMSE", "MAE", "Quantile", "MultiQuantile", "LogLinQuantile", "MAPE", "Lq", "Expectile", "Huber", "LogCosh"),
            *("MultiRMSE", "MultiRMSEWithMissingValues", "SurvivalAft", "Cox", *RANKERS, "callable"),
        ],
        identity,
    ),
    **dict.fromkeys(["Poisson", "Tweedie"], Value.exp),
}
"""Likewise, predictions; "callable" is an object with derivatives."""


def check_columns(estimator: Any) -> None:
    """Refuse columns that are encoded inside of CatBoost, by names.

    Raises:
        NotConvertible: there are some.
    """
    for kind in ("cat", "text", "embedding"):
        numbers = getattr(estimator, f"get_{kind}_feature_indices")()
        if found := [str(estimator.feature_names_[number]) for number in numbers]:
            raise NotConvertible(
                f"{type(estimator).__name__} with {kind}_features ({', '.join(found)}) has no ONNX form; encode these "
                "columns in a ColumnTransformer step (OneHotEncoder or TargetEncoder) and fit without naming them"
            )


class _CatBoost(Boosted):
    library, versions, compares = "catboost", ("1.2.8", "1.3"), np.float32
    losses = REGRESSORS

    @cached_property
    def model(self) -> Mapping[str, Any]:
        check_columns(self.estimator)
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder, "model.json")
            self.estimator.save_model(str(file), format="json")
            model: dict[str, Any] = json.loads(file.read_bytes())
        return model

    @cached_property
    def floats(self) -> Mapping[int, Any]:
        return {each["feature_index"]: each for each in self.model["features_info"]["float_features"]}

    @cached_property
    def link(self) -> Link:
        given = self.estimator.get_params()
        loss = given.get("loss_function", given.get("objective"))
        if loss is None or isinstance(loss, str):
            loss = str(self.estimator.get_all_params()["loss_function"]).partition(":")[0]
        else:
            loss = "callable"
        if loss not in self.losses:
            raise NotConvertible(
                f"{type(self.estimator).__name__} with loss_function {loss} has no ONNX form; use one of {', '.join(self.losses)}"
            )
        return self.losses[loss]

    @cached_property
    def read(self) -> list[tuple[Tree, Array]]:
        """Trees and their values (n_nodes, n_groups)."""
        flat = [_symmetric(tree, self.floats, self.n_groups) for tree in self.model.get("oblivious_trees", ())]
        return flat + [_nested(tree, self.floats, self.n_groups) for tree in self.model.get("trees", ())]

    @property
    def n_groups(self) -> int:
        return len(self.model["scale_and_bias"][1])

    @cached_property
    def trees(self) -> Sequence[Tree]:
        return [tree for tree, _ in self.read]

    @cached_property
    def margin(self) -> Value:
        """(n_rows, n_groups)."""
        scale, bias = self.model["scale_and_bias"]
        rows = self.x.astype(np.float32)
        if self.n_groups == 1 or not self.read:
            groups = [[(tree, values[:, group]) for tree, values in self.read] for group in range(self.n_groups)]
            total = tree_sums(rows, groups, np.zeros(self.n_groups))
        else:
            total = leaf_values(rows, self.trees, [values for _, values in self.read]).running_sum(1)
        return total * float(scale) + np.array([bias], np.float64)


def _symmetric(tree: Mapping[str, Any], floats: Mapping[int, Any], n_groups: int) -> tuple[Tree, Array]:
    """With the same split in all nodes of a level; that of the last level is the lowest bit of a leaf's number."""
    splits = tree.get("splits") or []
    depth = len(splits)
    n_inner = 2**depth - 1
    levels = np.repeat(np.arange(depth), 2 ** np.arange(depth))  # the root is node 0, the children of n are 2n + 1 and 2n + 2
    found = _split_arrays([splits[depth - 1 - level] for level in levels], floats)
    left = np.append(2 * np.arange(n_inner) + 1, np.full(2**depth, -1))
    values = np.array(tree["leaf_values"], np.float64).reshape(2**depth, n_groups)
    return _tree(found, left, left + 1, 2**depth), np.concatenate([np.zeros((n_inner, n_groups)), values])


def _nested(root: Mapping[str, Any], floats: Mapping[int, Any], n_groups: int) -> tuple[Tree, Array]:
    inner, ends = ([root], []) if "split" in root else ([], [root])
    children: list[tuple[int, ...]] = []
    for node in inner:  # grows while it is read
        numbers = []
        for child in (node["left"], node["right"]):
            kin = inner if "split" in child else ends
            numbers.append(len(kin) if kin is inner else ~len(kin))
            kin.append(child)
        children.append(tuple(numbers))
    sides = np.array(children, np.int64).reshape(-1, 2)
    sides = np.concatenate([np.where(sides < 0, len(inner) + ~sides, sides), np.full((len(ends), 2), -1)])
    values = np.array([end["value"] for end in ends], np.float64).reshape(len(ends), n_groups)
    found = _split_arrays([node["split"] for node in inner], floats)
    return _tree(found, sides[:, 0], sides[:, 1], len(ends)), np.concatenate([np.zeros((len(inner), n_groups)), values])


def _split_arrays(splits: Sequence[Mapping[str, Any]], floats: Mapping[int, Any]) -> tuple[Array, Array, Array]:
    """Features, borders, and whether NaN is not above the border."""
    infos = [floats[split["float_feature_index"]] for split in splits]
    return (
        np.array([info["flat_feature_index"] for info in infos], np.int64),
        np.array([split["border"] for split in splits], np.float32).astype(np.float64),
        np.array([info["nan_value_treatment"] != "AsTrue" for info in infos], bool),
    )


def _tree(found: tuple[Array, Array, Array], left: Array, right: Array, n_leaves: int) -> Tree:
    feature, threshold, nan_left = (np.append(array, np.zeros(n_leaves, array.dtype)) for array in found)
    return Tree(feature, threshold, left, right, nan_left)


@converts("catboost.CatBoostClassifier")
class CatBoostClassifier(_CatBoost):
    losses = CLASSIFIERS

    @cached_property
    def predict_proba(self) -> Value:
        found = self.link(self.margin)
        return two_columns(found) if self.n_groups == 1 else found

    @cached_property
    def class_index(self) -> Value:
        if self.n_groups > 1:
            return self.margin.argmax()
        threshold = float(self.estimator.get_probability_threshold())
        return (self.margin.take(0) > math.log(threshold / (1 - threshold))).astype(np.int64)


@converts("catboost.CatBoostRegressor", "catboost.CatBoostRanker", "catboost.CatBoost")
class CatBoostRegressor(_CatBoost, Regressor):
    @cached_property
    def predict(self) -> Value:
        return self.link(self.margin)
