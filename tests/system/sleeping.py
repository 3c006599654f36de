"""A transformer that takes its time, however many rows there are and whatever else the machine does."""

from __future__ import annotations

import threading
from typing import Any

from sklearn.base import BaseEstimator, TransformerMixin


class Sleeping(TransformerMixin, BaseEstimator):
    """Passes rows on after ``seconds``."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def fit(self, X: Any, y: Any = None) -> Sleeping:
        return self

    def __sklearn_is_fitted__(self) -> bool:
        return True

    def transform(self, X: Any) -> Any:
        threading.Event().wait(self.seconds)
        return X
