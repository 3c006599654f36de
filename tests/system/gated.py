"""A transformer that a test can block: it signals when a call has entered, and continues when released."""

from __future__ import annotations

import threading
import uuid
from pathlib import Path
from typing import Any

from sklearn.base import BaseEstimator, TransformerMixin

HELD = 1.0
"""A row that begins with this value is held."""


class Gate(TransformerMixin, BaseEstimator):
    """Passes rows on; a row that begins with `HELD` waits until the file ``released`` is in ``folder``."""

    def __init__(self, folder: str) -> None:
        self.folder = folder

    def fit(self, X: Any, y: Any = None) -> Gate:
        return self

    def __sklearn_is_fitted__(self) -> bool:
        return True

    def transform(self, X: Any) -> Any:
        if X[0][0] == HELD:
            folder = Path(self.folder)
            (folder / f"entered-{uuid.uuid4()}").touch()
            while not (folder / "released").exists():
                threading.Event().wait(0.01)
        return X
