"""Columns of categories that reach the estimator as such: what it does to them first becomes a step of the preprocessor.

HistGradientBoosting, LightGBM and XGBoost take pandas' categories and compute with their codes, alone or inside of another
estimator. The codes are those that the fitted model knows; where it does not store them (XGBoost before 3.1), those of the data
that is published.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import msgspec
import numpy as np
from sklearn.compose import ColumnTransformer
from sklearn.pipeline import Pipeline

from splitserve.publishing.boosting import catboost, is_boosted
from splitserve.publishing.boosting.xgboost import learner_of, model_of
from splitserve.publishing.errors import NotConvertible
from splitserve.publishing.estimators.trees import HistogramCodes, present
from splitserve.publishing.training_data import text_for_categories
from splitserve.transformers import CategoryCodes, Unseen

Known = dict[str, list[Any]]
"""By column of categories, those with the codes 0, 1, 2 …"""


class Coded(msgspec.Struct, frozen=True):
    """The step that makes codes, None if there is nothing to encode, and the estimator that takes what it makes."""

    step: CategoryCodes | None
    estimator: Any


def coded(estimator: Any, features: Any, every: Callable[[], Any] | None = None) -> Coded:
    """How an estimator encodes its columns, or those inside of it do.

    Args:
        estimator: fitted.
        features: a row or more as it gets them, (n_rows, n_features): a DataFrame or an array.
        every: gives all rows, for CatBoost, whose models have no categories but hashes of them; these rows by default.

    Raises:
        NotConvertible: columns are not of numbers, and the estimator's codes are not known; names them.
    """
    if _library(estimator) == "catboost" and estimator.get_cat_feature_indices():
        return _of_catboost(estimator, features if every is None else every())
    parts = list(_parts(estimator, set()))
    for part in parts:
        if _library(part) == "catboost":
            catboost.check_columns(part)
    names = _category_columns(features)
    if not names:
        return Coded(None, _on_codes(estimator, {}, []))
    encoding = [part for part in parts if _library(part) in ("sklearn", "lightgbm", "xgboost")]
    if not encoding or any(isinstance(part, ColumnTransformer) for part in parts):
        raise NotConvertible(
            f"{type(estimator).__name__} gets columns that are not numbers ({_listed(features, names)}), which have no ONNX form "
            f"there; {_way_out(estimator)}"
        )
    columns = [str(name) for name in features.columns]
    known, unseen = _known(encoding, features, names)
    return Coded(CategoryCodes([known.get(name) for name in columns], unseen=unseen), _on_codes(estimator, known, columns))


def _parts(part: Any, seen: set[int]) -> Iterator[Any]:
    """The estimators in a fitted object, itself included, that may take categories as such, and what may encode columns."""
    if id(part) in seen:
        return
    seen.add(id(part))
    if is_boosted(part) or isinstance(part, ColumnTransformer) or getattr(part, "_preprocessor", None) is not None:
        yield part
        return
    inner: list[Any] = []
    if isinstance(part, list | tuple):
        inner = list(part)
    elif isinstance(part, np.ndarray) and part.dtype.kind == "O":
        inner = part.ravel().tolist()
    elif type(part).__module__.startswith("sklearn."):
        inner = list(getattr(part, "__dict__", {}).values())
    for each in inner:
        yield from _parts(each, seen)


def _library(part: Any) -> str:
    return type(part).__module__.partition(".")[0]


def _known(parts: list[Any], features: Any, names: list[str]) -> tuple[Known, Unseen]:
    """The categories that estimators have codes for, and what an unseen one gets.

    LightGBM and XGBoost compute with their own codes; HistGradientBoosting finds its categories among the codes of any.

    Raises:
        NotConvertible: they do not agree.
    """
    known: Known = {}
    found: list[tuple[list[list[Any]], Unseen]] = []
    for part in parts:
        if _library(part) == "lightgbm":
            found.append((part.booster_.pandas_categorical or [], "missing"))
        elif _library(part) == "xgboost":
            found.append(_of_xgboost(part, features, names))
        else:
            found.append(([], "missing"))
    for part, (listed, unseen) in zip(parts, found, strict=True):
        kind = type(part).__name__
        if _library(part) != "sklearn" and len(listed) != len(names):
            raise NotConvertible(
                f"{kind} was fitted on {len(listed)} columns of categories, X has {len(names)} ({', '.join(names)}); publish "
                "with a DataFrame of the dtypes of training"
            )
        for name, categories in zip(names, listed, strict=False):
            if known.setdefault(name, categories) != categories or unseen != found[0][1]:
                raise NotConvertible(
                    f"{kind} has other codes of categories ({name}) than {type(parts[0]).__name__} beside it; encode the "
                    "column in a ColumnTransformer step, e.g. by OneHotEncoder or TargetEncoder"
                )
    for part in parts:
        if _library(part) == "sklearn":
            for name, categories in _of_histogram(part, features.columns).items():
                if name in names:
                    known.setdefault(name, []).extend(each for each in categories if each not in known[name])
    return known, found[0][1]


def _listed(features: Any, names: list[str]) -> str:
    """With their types."""
    found = {str(name): str(dtype) for name, dtype in features.dtypes.items()}
    return ", ".join(f"{name}: {found[name]}" for name in names)


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


def _of_histogram(model: Any, columns: Any) -> Known:
    """The categories of HistGradientBoosting, in the order of its codes."""
    chosen = np.flatnonzero(model.is_categorical_).tolist()
    listed = model._preprocessor.named_transformers_["encoder"].categories_
    return {str(columns[place]): present(each) for place, each in zip(chosen, listed, strict=True)}


def _of_catboost(estimator: Any, features: Any) -> Coded:
    """CatBoost compares hashes of categories, of text and of whole numbers alike."""
    catboost.check_columns(estimator, takes_categories=True)
    if features is None:  # the transforms refuse rows of X
        return Coded(None, estimator)
    known = {}
    for number in estimator.get_cat_feature_indices():
        column = features.iloc[:, number] if hasattr(features, "iloc") else np.asarray(features)[:, number]
        known[number] = [each for each in dict.fromkeys(column.tolist()) if each is not None and each == each]
    step = CategoryCodes([known.get(number) for number in range(len(estimator.feature_names_))])
    return Coded(step, catboost.on_codes(estimator, known))


def _on_codes(estimator: Any, known: Known, columns: list[str]) -> Any:
    """The estimator, where each HistGradientBoosting takes numbers: codes of ``known``, in the columns that it has."""
    if not any(_library(part) == "sklearn" for part in _parts(estimator, set())):
        return estimator
    estimator = copy.deepcopy(estimator)
    for part in _parts(estimator, set()):
        if _library(part) != "sklearn" or isinstance(part, ColumnTransformer):
            continue
        names = columns or [str(number) for number in range(len(part.is_categorical_))]
        part._preprocessor = HistogramCodes.of(
            part,
            [
                [known[name].index(each) for each in categories] if name in known else categories
                for name, categories in _of_histogram(part, names).items()
            ],
        )
    return estimator


def _of_xgboost(estimator: Any, features: Any, names: list[str]) -> tuple[list[list[Any]], Unseen]:
    """Since 3.1 the model has its categories, and takes an unknown one for the next known one in the order of bytes.

    Raises:
        NotConvertible: ``features`` have text in their place, or they are damaged: XGBoost measures text in characters, and loses
            bytes of text that is not ASCII.
    """
    if texts := [name for name in names if not hasattr(features[name], "cat")]:
        raise NotConvertible(f"{type(estimator).__name__} gets {text_for_categories(texts)}")
    stored = model_of(learner_of(estimator)).get("cats")
    if not stored or not stored["enc"]:
        return [features[name].cat.categories.tolist() for name in names], "after"
    known = []
    for each in stored["enc"]:
        if "offsets" not in each and each.get("values"):
            known.append(list(each["values"]))
        elif ends := each.get("offsets"):
            text = bytes(byte % 256 for byte in each["values"])
            known.append([text[start:end].decode(errors="replace") for start, end in pairwise(ends)])
    for name, categories in zip(names, known, strict=False):
        given = features[name].cat.categories.tolist()
        if categories != given and not all(str(category).isascii() for category in (*categories, *given)):
            raise NotConvertible(
                f'{type(estimator).__name__} stored categories of "{name}" as {categories}, and looks them up so: this version '
                "of XGBoost damages text that is not ASCII; encode the column in a step before, e.g. by OrdinalEncoder("
                'handle_unknown="use_encoded_value", unknown_value=np.nan), or rename its categories, and fit again'
            )
    return known, "next"
