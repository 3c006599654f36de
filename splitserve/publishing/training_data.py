"""What every publication checks first: that the estimator is fitted, and that the data has rows of a kind the wire can carry."""

from __future__ import annotations

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


def as_rows(X: Any) -> Rowset:
    """A DataFrame as it is, anything else as an array whose leading dimension is the rows."""
    if hasattr(X, "columns") and hasattr(X, "iloc"):
        rows = X
    elif hasattr(X, "toarray"):
        raise PublishError("X is a sparse matrix, which the protocol cannot carry; publish with X.toarray()")
    else:
        try:
            rows = np.asarray(X)
        except ValueError as error:
            raise PublishError(f"X is not an array: {error}") from error
    if rows.ndim == 0 or len(rows) == 0:
        raise PublishError("X has no rows; golden samples are taken from it")
    return rows
