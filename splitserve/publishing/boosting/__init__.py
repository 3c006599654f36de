"""XGBoost, LightGBM and CatBoost estimators -> ONNX, from the trees that each library writes, with its own comparisons and sums.

None of the three is imported: an estimator brings its library with it. Other makers' converters are not used.
"""

from __future__ import annotations

from splitserve.publishing.boosting import catboost, lightgbm, xgboost
from splitserve.publishing.boosting.boosted import is_boosted, thresholds

__all__ = ["catboost", "is_boosted", "lightgbm", "thresholds", "xgboost"]
