"""What the three libraries' forms share."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import numpy as np
from sklearn.exceptions import NotFittedError
from sklearn.utils.validation import check_is_fitted

from splitserve.arrays import Array
from splitserve.publishing.errors import NotConvertible
from splitserve.publishing.estimators.form import Form, form_of
from splitserve.publishing.estimators.trees import Tree
from splitserve.publishing.graph import Graph, Value

LIBRARIES = ("xgboost", "lightgbm", "catboost")

Link = Callable[[Value], Value]
"""From the sums of leaves to what `predict` or `predict_proba` gives."""


def identity(margin: Value) -> Value:
    return margin


class Boosted(Form):
    """A form of a library's estimator.

    ``library`` is its module, ``versions`` the lowest that is supported and the first that is not, ``compares`` the dtype in
    which features are compared.
    """

    library: str
    versions: tuple[str, str]
    compares: Any

    def __init__(self, estimator: Any, x: Value) -> None:
        super().__init__(estimator, x)
        found = str(sys.modules[self.library].__version__)
        lowest, beyond = self.versions
        if not parsed(lowest) <= parsed(found) < parsed(beyond):
            raise NotConvertible(
                f"{type(estimator).__name__} of {self.library} {found}: publishing is tested with {lowest} up to, not including, "
                f"{beyond}; install such a version and load or fit the model with it"
            )

    @cached_property
    def trees(self) -> Sequence[Tree]:
        """Those that `predict` uses."""
        raise NotImplementedError

    def one_class(self) -> NotConvertible:
        name = type(self.estimator).__name__
        return NotConvertible(f"{name} was fitted on one class, which has no ONNX form; fit it on rows of at least two classes")


def parsed(version: str) -> tuple[int, ...]:
    numbers = []
    for part in version.split(".")[:3]:
        if not part.isdigit():
            break
        numbers.append(int(part))
    return tuple(numbers)


def is_boosted(estimator: Any) -> bool:
    """Whether an object is a fitted estimator of one of the three libraries, so that `thresholds` knows it."""
    if type(estimator).__module__.partition(".")[0] not in LIBRARIES:
        return False
    try:
        check_is_fitted(estimator)
    except (NotFittedError, TypeError):  # or it is another object of the library
        return False
    return True


def thresholds(estimator: Any) -> list[tuple[Array, Array]]:
    """What an estimator compares its features with: for each tree, features and thresholds in the dtype of the comparison.

    A row goes left where ``feature <= threshold``. Splits by category are not among them.

    Raises:
        NotConvertible: the estimator is not supported.
    """
    form = form_of(estimator, Graph(np.float64).input("features", 1))
    assert isinstance(form, Boosted)
    return [_splits(tree, form.compares) for tree in form.trees]


def _splits(tree: Tree, dtype: Any) -> tuple[Array, Array]:
    chosen = np.setdiff1d(np.flatnonzero(tree.left >= 0), list(tree.members))
    return tree.feature[chosen], tree.threshold[chosen].astype(dtype)
