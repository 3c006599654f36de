"""Columns of categories that reach the estimator as such: what it does to them first becomes a step of the preprocessor.

HistGradientBoosting, LightGBM and XGBoost take pandas' categories and compute with their codes. The codes are those that the
fitted model knows; where it does not store them (XGBoost before 3.1), those of the data that is published.
"""

from __future__ import annotations

import copy
from itertools import pairwise
from typing import Any

import msgspec
import numpy as np
from sklearn.pipeline import Pipeline

from splitserve.publishing.boosting.catboost import check_columns
from splitserve.publishing.boosting.xgboost import learner_of, model_of
from splitserve.publishing.errors import NotConvertible
from splitserve.transformers import CategoryCodes, Unseen


class Coded(msgspec.Struct, frozen=True):
    """The step that makes codes, None if there is nothing to encode, and the estimator that takes what it makes."""

    step: CategoryCodes | None
    estimator: Any


def coded(estimator: Any, features: Any) -> Coded:
    """How an estimator encodes its columns.

    Args:
        estimator: fitted.
        features: rows as it gets them, (n_rows, n_features): a DataFrame or an array.

    Raises:
        NotConvertible: columns are of text or categories, and the estimator's codes are not known; names them.
    """
    library = type(estimator).__module__.partition(".")[0]
    if library == "catboost":
        check_columns(estimator)
    if getattr(estimator, "is_categorical_", None) is not None and getattr(estimator, "_preprocessor", None) is not None:
        return _of_histogram(estimator)
    names = _category_columns(features)
    if not names:
        return Coded(None, estimator)
    unseen: Unseen = "missing"
    if library == "lightgbm":
        known = estimator.booster_.pandas_categorical or []
    elif library == "xgboost":
        known, unseen = _of_xgboost(estimator, features, names)
    else:
        raise NotConvertible(
            f"{type(estimator).__name__} gets columns of text or categories ({', '.join(names)}), which have no ONNX form "
            f"there; {_way_out(estimator)}"
        )
    if len(known) != len(names):
        raise NotConvertible(
            f"{type(estimator).__name__} was fitted on {len(known)} columns of categories, X has {len(names)} "
            f"({', '.join(names)}); publish with a DataFrame of the dtypes of training"
        )
    by_name = dict(zip(names, known, strict=True))
    return Coded(CategoryCodes([by_name.get(str(name)) for name in features.columns], unseen=unseen), estimator)


def _way_out(estimator: Any) -> str:
    """How the columns are encoded before the estimator; it may do so itself, in a pipeline of its own."""
    name = type(estimator).__name__
    if isinstance(getattr(estimator, "best_estimator_", None), Pipeline):
        return f"publish the best_estimator_ of the {name}, which is a Pipeline"
    if any(isinstance(getattr(estimator, inner, None), Pipeline) for inner in ("regressor_", "estimator", "base_estimator")):
        return f"move the transforms in front of it, make_pipeline(transforms, {name}(model)), and fit again"
    return "encode them in a ColumnTransformer step, e.g. by OneHotEncoder or TargetEncoder"


def _category_columns(features: Any) -> list[str]:
    """Names of the columns that are not numbers."""
    if not hasattr(features, "columns"):
        return []
    return [str(name) for name, dtype in features.dtypes.items() if getattr(dtype, "kind", "O") not in "biuf"]


def _of_histogram(estimator: Any) -> Coded:
    """HistGradientBoosting moves categorical columns to the front; without its own encoder it takes what that makes."""
    is_category = np.asarray(estimator.is_categorical_, bool)
    known = iter(estimator._preprocessor.named_transformers_["encoder"].categories_)
    listed = [_present(next(known)) if each else None for each in is_category.tolist()]
    order = [*np.flatnonzero(is_category).tolist(), *np.flatnonzero(~is_category).tolist()]
    inner = copy.copy(estimator)
    inner._preprocessor = None
    return Coded(CategoryCodes(listed, order=order), inner)


def _present(categories: Any) -> list[Any]:
    """Without the missing value, which comes last."""
    return [each for each in categories.tolist() if each is not None and each == each]


def _of_xgboost(estimator: Any, features: Any, names: list[str]) -> tuple[list[list[Any]], Unseen]:
    """Since 3.1 the model has its categories, and takes an unknown one for the next known one in the order of bytes."""
    stored = model_of(learner_of(estimator)).get("cats")
    if not stored or not stored["enc"]:
        return [features[name].cat.categories.tolist() for name in names], "after"
    known = []
    for each in stored["enc"]:
        if "offsets" not in each and each.get("values"):
            known.append(list(each["values"]))
        elif ends := each.get("offsets"):
            text = bytes(byte % 256 for byte in each["values"])
            known.append([text[start:end].decode() for start, end in pairwise(ends)])
    return known, "next"
