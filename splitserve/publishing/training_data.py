"""What every publication checks first: that the estimator is fitted, and that the data has rows of a kind the wire can carry."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from sklearn.exceptions import NotFittedError
from sklearn.utils.validation import check_is_fitted

from splitserve.publishing.errors import PublishError
from splitserve.runtimes.rows import Rowset

INPUT_NAME = "features"
"""Name of a preprocessor's input if the data is one array, of its output, and of a converted predictor's input."""


def check_fitted(transformer: Any) -> None:
    try:
        check_is_fitted(transformer)
    except NotFittedError as error:
        raise PublishError(f"{type(transformer).__name__} is not fitted; call fit first") from error
    except TypeError as error:
        raise PublishError(f"expected a scikit-learn estimator, got {type(transformer).__name__}") from error


def not_a_pipeline(given: Any) -> str:
    """What to publish in place of something that is no pipeline."""
    name = type(given).__name__
    if hasattr(given, "best_estimator_"):
        best = type(given.best_estimator_).__name__
        way_out = "best_estimator_" if best == "Pipeline" else f"make_pipeline(search.best_estimator_), a {best}"
        return f"expected a scikit-learn Pipeline, got {name}; publish its {way_out}"
    if hasattr(given, "refit") and hasattr(given, "cv_results_"):
        return f"expected a scikit-learn Pipeline, got {name} without best_estimator_; fit it with refit=True and publish that"
    if hasattr(given, "predict"):
        return (
            f"expected a scikit-learn Pipeline, got {name}; publish make_pipeline(model), after the transforms that it was "
            "fitted behind, if any"
        )
    if hasattr(given, "transform"):
        return f"expected a scikit-learn Pipeline that ends with an estimator, got {name}; publish_preprocessor takes transforms"
    return f"expected a scikit-learn Pipeline, got {name}; publish_preprocessor and publish_predictor take the halves"


def misfit(transformer: Any, rows: Rowset, reason: str, name: str = "X") -> str:
    """Why rows do not fit a pipeline or its transforms, and, where texts come as a table, what to do."""
    first = _first_of(transformer)
    way_out = ""
    if hasattr(first, "build_analyzer") and rows.ndim == 2:  # a vectorizer of texts; iterating over a DataFrame gives its columns
        kind = type(first).__name__
        way_out = f"; {kind} takes a list or column of texts, not a table: "
        if rows.shape[1] == 1:
            column = f'["{rows.columns[0]}"]' if hasattr(rows, "columns") else "[:, 0]"
            way_out += f"publish with {name}{column}"
        else:
            way_out += f'fit it on one column with make_column_transformer(({kind}(), "COLUMN"))'
    elif hasattr(rows, "dtypes") and re.search("categor|could not convert string", reason):
        texts = [str(column) for column, dtype in rows.dtypes.items() if str(dtype) in ("object", "str", "string")]
        if texts:
            reason, way_out = reason.rstrip("."), f"; {name} has {text_for_categories(texts)}"
    return f"{name} does not fit the {'pipeline' if hasattr(transformer, 'predict') else 'transforms'}: {reason}{way_out}"


def text_for_categories(names: Sequence[str]) -> str:
    """What these columns are, and what to do."""
    return (
        f"columns of text ({', '.join(names)}): if training had them as categories, publish with rows of the dtype category, "
        "which Parquet files keep and CSV files do not"
    )


def _first_of(transformer: Any) -> Any:
    """What sees the rows first; of a union its first member."""
    for attribute in ("steps", "transformer_list"):
        if members := getattr(transformer, attribute, None):
            return _first_of(members[0][1])
    return transformer


def as_rows(X: Any) -> Rowset:
    """A DataFrame as it is, anything else as an array whose leading dimension is the rows."""
    if hasattr(X, "columns") and hasattr(X, "iloc"):
        rows = X
    elif hasattr(X, "toarray"):
        raise PublishError(
            "X is a sparse matrix, which the protocol cannot carry; publish with X.toarray(), for XGBoost with NaN in place of "
            "zeros, since it takes the zeros of a sparse matrix for missing values"
        )
    else:
        try:
            rows = np.asarray(X)
        except ValueError as error:
            raise PublishError(f"X is not an array: {error}") from error
    if rows.ndim == 0 or len(rows) == 0:
        raise PublishError("X has no rows; golden samples are taken from it")
    return rows
