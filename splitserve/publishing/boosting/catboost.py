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

import msgspec
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


_UNKNOWN = "\0 unknown"
"""Stands for any category that a model does not know."""


def check_columns(estimator: Any, *, takes_categories: bool = False) -> None:
    """Refuse columns that are encoded inside of CatBoost, by names.

    Args:
        estimator: fitted.
        takes_categories: whether categories are left to `on_codes`.

    Raises:
        NotConvertible: there are some.
    """
    for kind in ("text", "embedding") if takes_categories else ("cat", "text", "embedding"):
        if getattr(estimator, f"get_{kind}_feature_indices")():
            raise _encoded_inside(estimator, kind)


def _encoded_inside(estimator: Any, kind: str) -> NotConvertible:
    numbers = getattr(estimator, f"get_{kind}_feature_indices")()
    found = ", ".join(str(estimator.feature_names_[number]) for number in numbers)
    other = ", or with one_hot_max_size of at least their number of categories, as the last step" if kind == "cat" else ""
    return NotConvertible(
        f"{type(estimator).__name__} with {kind}_features ({found}) has no ONNX form; encode these columns in a "
        f"ColumnTransformer step (OneHotEncoder or TargetEncoder) and fit without naming them{other}"
    )


def written(estimator: Any) -> dict[str, Any]:
    """The JSON model."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "model.json")
        estimator.save_model(str(file), format="json")
        model: dict[str, Any] = json.loads(file.read_bytes())
    return model


def on_codes(estimator: Any, known: Mapping[int, list[Any]]) -> Any:
    """The estimator, taking codes of categories: numbers from 0, or NaN of a category that it does not know.

    Its trees compare hashes of categories. Which category has which hash is asked of CatBoost, by a model whose trees are one
    comparison each.

    Args:
        estimator: fitted.
        known: by column, its categories in the order of their codes.

    Raises:
        NotConvertible: it has category statistics (``ctr_data``), or the trees compare with a category that is not known.
    """
    model = written(estimator)
    if model.get("ctr_data"):
        raise _encoded_inside(estimator, "cat")
    infos = model["features_info"]
    n_before = sum(len(each["borders"]) for each in infos["float_features"])
    compared = [
        (each["flat_feature_index"], each["feature_index"], value)
        for each in infos["categorical_features"]
        for value in each.get("values", ())
    ]
    splits = [
        {"split_type": "OneHotFeature", "cat_feature_index": number, "value": value, "split_index": n_before + place}
        for place, (_, number, value) in enumerate(compared)
    ]
    model.pop("trees", None)
    model["oblivious_trees"] = [{"splits": [each], "leaf_values": [0, 1], "leaf_weights": [1, 1]} for each in splits]
    model["scale_and_bias"] = [1, [0]]
    codes: dict[tuple[int, int], list[int]] = {}
    if compared:
        rows = np.full((max(map(len, known.values())), len(estimator.feature_names_)), np.nan)
        for column, categories in known.items():
            rows[:, column] = np.arange(len(rows)) % len(categories)
        is_equal = _loaded(estimator, model).calc_leaf_indexes(_decoded(rows, known, estimator.feature_names_))
        for place, (column, number, value) in enumerate(compared):
            codes[number, value] = np.flatnonzero(is_equal[: len(known[column]), place]).tolist()
            if not codes[number, value]:
                raise NotConvertible(
                    f'{type(estimator).__name__} knows a category of "{estimator.feature_names_[column]}" that X does not have; '
                    "publish with rows that have every category"
                )
    kind = type(estimator)

    class OnCodes(kind):  # type: ignore[misc,valid-type]
        category_codes_ = codes

        def predict(self, rows: Any, *given: Any, **options: Any) -> Any:
            return kind.predict(self, _decoded(rows, known, self.feature_names_), *given, **options)

        def predict_proba(self, rows: Any, *given: Any, **options: Any) -> Any:
            return kind.predict_proba(self, _decoded(rows, known, self.feature_names_), *given, **options)

    OnCodes.__name__, OnCodes.__qualname__, OnCodes.__module__ = kind.__name__, kind.__qualname__, kind.__module__
    if not hasattr(kind, "predict_proba"):
        del OnCodes.predict_proba
    found = OnCodes.__new__(OnCodes)  # CatBoost's own copy forgets some attributes
    found.__dict__.update(estimator.__dict__)
    return found


def _loaded(estimator: Any, model: Mapping[str, Any]) -> Any:
    """A bare model of the library, whose class the estimator's inherits from."""
    base = next(each for each in type(estimator).__mro__ if each.__name__ == "CatBoost")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "model.json")
        file.write_text(json.dumps(model))
        return base().load_model(str(file), format="json")


def _decoded(rows: Any, known: Mapping[int, list[Any]], names: Sequence[str]) -> Any:
    """Codes -> a DataFrame with categories, as CatBoost takes them."""
    import pandas as pd

    columns = {}
    for number, name in enumerate(names):
        column = np.asarray(rows, np.float64)[:, number]
        columns[name] = [known[number][int(each)] if each == each else _UNKNOWN for each in column] if number in known else column
    return pd.DataFrame(columns)


class _Features(msgspec.Struct, frozen=True):
    """What the model says of its features by their numbers, and the codes of the categories that have a hash."""

    floats: Mapping[int, Any]
    categories: Mapping[int, Any]
    codes: Mapping[tuple[int, int], list[int]]


class _CatBoost(Boosted):
    library, versions, compares = "catboost", ("1.2.8", "1.3"), np.float32
    losses = REGRESSORS

    @cached_property
    def model(self) -> Mapping[str, Any]:
        check_columns(
            self.estimator, takes_categories=hasattr(self.estimator, "category_codes_")
        )  # those were left to `on_codes`
        return written(self.estimator)

    @cached_property
    def known(self) -> _Features:
        infos = self.model["features_info"]
        floats, categories = (
            {each["feature_index"]: each for each in infos.get(f"{kind}_features", ())} for kind in ("float", "categorical")
        )
        return _Features(floats, categories, getattr(self.estimator, "category_codes_", {}))

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
        flat = [_symmetric(tree, self.known, self.n_groups) for tree in self.model.get("oblivious_trees", ())]
        return flat + [_nested(tree, self.known, self.n_groups) for tree in self.model.get("trees", ())]

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


def _symmetric(tree: Mapping[str, Any], features: _Features, n_groups: int) -> tuple[Tree, Array]:
    """With the same split in all nodes of a level; that of the last level is the lowest bit of a leaf's number."""
    splits = tree.get("splits") or []
    depth = len(splits)
    n_inner = 2**depth - 1
    levels = np.repeat(np.arange(depth), 2 ** np.arange(depth))  # the root is node 0, the children of n are 2n + 1 and 2n + 2
    asked = [splits[depth - 1 - level] for level in levels]
    left = np.append(2 * np.arange(n_inner) + 1, np.full(2**depth, -1))
    values = np.array(tree["leaf_values"], np.float64).reshape(2**depth, n_groups)
    return _tree(asked, features, left, left + 1), np.concatenate([np.zeros((n_inner, n_groups)), values])


def _nested(root: Mapping[str, Any], features: _Features, n_groups: int) -> tuple[Tree, Array]:
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
    asked = [node["split"] for node in inner]
    return _tree(asked, features, sides[:, 0].copy(), sides[:, 1].copy()), np.concatenate(
        [np.zeros((len(inner), n_groups)), values]
    )


def _tree(splits: Sequence[Mapping[str, Any]], features: _Features, left: Array, right: Array) -> Tree:
    """Of the splits of its inner nodes, which come first."""
    feature, threshold = np.zeros(len(left), np.int64), np.zeros(len(left))
    nan_left, members = np.zeros(len(left), bool), {}
    for node, split in enumerate(splits):
        if split["split_type"] == "OneHotFeature":
            number = split["cat_feature_index"]
            feature[node] = features.categories[number]["flat_feature_index"]
            members[node] = features.codes[number, split["value"]]
            left[node], right[node] = right[node], left[node]  # members go right, all others left
        else:
            info = features.floats[split["float_feature_index"]]
            feature[node], threshold[node] = info["flat_feature_index"], np.float32(split["border"])
            nan_left[node] = info["nan_value_treatment"] != "AsTrue"
    return Tree(feature, threshold, left, right, nan_left, members)


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
