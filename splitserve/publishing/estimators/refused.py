"""Estimators that cannot be published, each with the reason and the nearest one that can."""

from __future__ import annotations

from typing import Any

REFUSED: dict[str, str] = {}
"""By the name of a class of scikit-learn."""


def reason_for(estimator: Any) -> str:
    """Why a fitted estimator cannot be published, and what to do; "" if nothing is known against it."""
    if not type(estimator).__module__.startswith("sklearn."):
        return ""
    return REFUSED.get(type(estimator).__name__, "")
