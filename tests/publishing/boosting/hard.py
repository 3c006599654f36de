"""Rows made to be difficult for one estimator: on each threshold and one float to each side of it, missing, fractional, far."""

from __future__ import annotations

from typing import Any

import numpy as np

from splitserve.publishing.boosting import thresholds

_VALUES = (np.nan, 0.0, -0.0, 1e-36, -1e-36, 1e-35, 1e-30, 1e30, -1e30, 2.5, -0.5, -1.0, -3.0, 63.0, 64.0, 1e6, 3.1e9)
N_THRESHOLDS = 400


def hard_rows(estimator: Any, rows: np.ndarray) -> np.ndarray:
    random = np.random.default_rng(1)
    made = [rows, random.normal(size=(100, rows.shape[1])) * 3, np.full((1, rows.shape[1]), np.nan)]
    splits = {
        (feature, at) for features, ats in thresholds(estimator) for feature, at in zip(features.tolist(), ats, strict=True)
    }
    for feature, at in sorted(splits)[:: max(1, len(splits) // N_THRESHOLDS)]:
        with np.errstate(over="ignore"):
            near = [at, np.nextafter(at, at.dtype.type(np.inf)), np.nextafter(at, at.dtype.type(-np.inf))]
        for value in (each for each in map(float, near) if np.isfinite(each)):
            made.append(_with(rows, random, feature, value))
    for feature in range(rows.shape[1]):
        made += [_with(rows, random, feature, value) for value in _VALUES for _ in range(2)]
    return np.concatenate(made)


def _with(rows: np.ndarray, random: np.random.Generator, feature: int, value: float) -> np.ndarray:
    row = rows[[random.integers(len(rows))]].copy()
    row[:, feature] = value
    return row
