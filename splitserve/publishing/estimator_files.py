"""Files with a fitted estimator or transforms -> the object."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import joblib

from splitserve.publishing.errors import PublishError
from splitserve.repository.manifest import PIPELINE_FILE, BundleError
from splitserve.runtimes import sklearn_pipeline

PICKLES = (".joblib", ".pkl", ".pickle")

BOOSTING_TYPES = frozenset(
    {
        "collections.OrderedDict",  # in which LightGBM has its best scores
        "lightgbm.basic.Booster",
        *(f"lightgbm.sklearn.LGBM{kind}" for kind in ("Classifier", "Regressor", "Ranker")),
        "xgboost.core.Booster",
        *(f"xgboost.sklearn.XGB{kind}" for kind in ("Classifier", "Regressor", "Ranker", "RFClassifier", "RFRegressor")),
        *(f"catboost.core.CatBoost{kind}" for kind in ("", "Classifier", "Regressor", "Ranker")),
    }
)
"""What skops files of the three libraries' estimators hold, beside what is trusted anyway. Services do not load them: they become
graphs.
"""


def read_skops(path: Path, what: str, trusted_modules: Sequence[str]) -> Any:
    """The object in a skops file. Runs no code of its own.

    Args:
        path: of the file.
        what: it is called in errors.
        trusted_modules: further modules whose types may be in it.

    Raises:
        PublishError: it cannot be read, or has types that are not allowed.
    """
    try:
        data = sklearn_pipeline.uncompressed(_contents(path, what))
        way_out = "name their modules with --trusted-module if you trust them"
        return sklearn_pipeline.load(data, trusted_modules, trusted_types=BOOSTING_TYPES, way_out=way_out)
    except BundleError as error:
        raise PublishError(f"{what}: {str(error).removeprefix(f'{PIPELINE_FILE}: ')}") from error


def read_pickle(path: Path, what: str) -> Any:
    """The object in a pickle, whose code is run.

    Args:
        path: of the file.
        what: it is called in errors.

    Raises:
        PublishError: it cannot be read.
    """
    _contents(path, what)
    try:
        return joblib.load(path)
    except Exception as error:  # a pickle may raise anything
        raise PublishError(f"{what}: {path.name} cannot be read: {type(error).__name__}: {error}") from error


def _contents(path: Path, what: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise PublishError(f"{what}: {error.strerror}") from error
