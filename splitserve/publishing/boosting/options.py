"""Every objective, booster and option that changes what the three libraries predict: proven equal, or refused.

docs/boosting.md is written from this; tests/publishing/boosting has a case for each row.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import msgspec

from splitserve.publishing.boosting import catboost, lightgbm, xgboost


class Option(msgspec.Struct, frozen=True):
    """What is chosen, and what becomes of it; ``instead`` is what to do where it is refused."""

    library: Literal["xgboost", "lightgbm", "catboost"]
    choice: str
    instead: str = ""

    @property
    def is_equal(self) -> bool:
        return not self.instead


def _xgboost() -> Iterable[tuple[str, str]]:
    for objective in xgboost.CLASSIFIERS:
        yield f"XGBClassifier, objective={objective}", ""
    for objective in xgboost.REGRESSORS:
        yield f"{'XGBRanker' if objective.startswith('rank:') else 'XGBRegressor'}, objective={objective}", ""
    yield "XGBClassifier, any other objective", "one of those above"
    yield "XGBRegressor, objective=multi:softmax", "multi:softprob, or XGBClassifier"
    for choice in (
        *("two classes", "three classes", "twelve classes, imbalanced", "XGBRFClassifier", "XGBRFRegressor"),
        *("booster=dart", "booster=dart with early stopping", "booster=dart, a regressor"),
        *("booster=gblinear", "booster=gblinear, a regressor"),
        *("multi_strategy=multi_output_tree", "multi_strategy=multi_output_tree, three classes"),
        *("early_stopping_rounds", "early_stopping_rounds with num_parallel_tree", "num_parallel_tree"),
        *("base_score", "scale_pos_weight", "missing=-999", "missing=0", "gamma (pruned trees)", "grow_policy=lossguide"),
        *(
            "tree_method=exact",
            "tree_method=exact, gamma (pruned trees)",
            "tree_method=approx",
            "several quantiles",
            "several targets",
            "a constant target",
        ),
        *(
            "numeric categories",
            "numeric categories, max_cat_to_onehot",
            "a callable objective of a regressor",
            "features of float32",
        ),
        *("NaN in training", "NaN only in prediction", "column names that are expressions", "no trees"),
    ):
        yield choice, ""
    yield "several targets of a classifier", "MultiOutputClassifier of it"
    yield "one class", "rows of two classes"
    yield "a callable objective of a classifier", "a built-in objective"


def _lightgbm() -> Iterable[tuple[str, str]]:
    for objective in filter(None, lightgbm.OBJECTIVES):
        owner = {"lambdarank": "LGBMRanker", "rank_xendcg": "LGBMRanker", "binary": "LGBMClassifier"}.get(
            objective, "LGBMRegressor"
        )
        yield f"{'LGBMClassifier' if objective.startswith('multiclass') else owner}, objective={objective}", ""
    for choice in (
        *("two classes", "three classes", "twelve classes, imbalanced", "text classes", "boolean classes", "float classes"),
        *("boosting_type=dart", "boosting_type=dart, three classes", "boosting_type=rf", "boosting_type=rf, a classifier"),
        *("data_sample_strategy=goss", "early stopping", "early stopping, dart", "sigmoid", "is_unbalance", "scale_pos_weight"),
        *(
            "reg_sqrt",
            "zero_as_missing",
            "zero_as_missing with numeric categories",
            "use_missing=False",
            "boost_from_average=False",
        ),
        *("numeric categories", "numeric categories, one against the rest", "a constant target", "extra_trees", "no trees"),
        *(
            "a callable objective of a regressor",
            "NaN in training",
            "NaN only in prediction",
            "column names that are expressions",
        ),
        *("features of float32", "linear_tree=True", "linear_tree=True, three classes"),
    ):
        yield choice, ""
    yield "a callable objective of a classifier", "a built-in objective"
    yield "one class", "rows of two classes"
    for option in lightgbm.PREDICT_OPTIONS:
        yield option, f"without {option}"


def _catboost() -> Iterable[tuple[str, str]]:
    for loss in catboost.CLASSIFIERS:
        yield f"CatBoostClassifier, loss_function={loss}", ""
    for loss in catboost.REGRESSORS:
        if loss != "callable":
            yield f"{'CatBoostRanker' if loss in catboost.RANKERS else 'CatBoostRegressor'}, loss_function={loss}", ""
    for choice in (
        *("two classes", "three classes", "twelve classes, imbalanced", "text classes", "boolean classes", "float classes"),
        *(
            f"grow_policy={policy}, nan_mode={mode}"
            for policy in ("SymmetricTree", "Depthwise", "Lossguide")
            for mode in ("Min", "Max")
        ),
        *("nan_mode=Min, NaN only in prediction", "nan_mode=Max, NaN only in prediction", "nan_mode=Forbidden"),
        *(
            "early_stopping_rounds",
            "use_best_model=False",
            "boosting_type=Ordered",
            "set_probability_threshold",
            "set_scale_and_bias",
        ),
        *("scale_pos_weight", "auto_class_weights", "a callable objective of a regressor"),
        *("column names that are expressions", "features of float32"),
    ):
        yield choice, ""
    yield "loss_function=RMSEWithUncertainty", "RMSE"
    yield "several targets of a classifier (MultiLogloss, MultiCrossEntropy)", "MultiOutputClassifier of it"
    yield "a callable objective of a classifier", "a built-in loss function"
    yield "cat_features", "an encoding in a step before, or one_hot_max_size (see above)"
    for kind in ("text_features", "embedding_features"):
        yield kind, "an encoding in a step before"


OPTIONS = [
    *(Option("xgboost", *each) for each in _xgboost()),
    *(Option("lightgbm", *each) for each in _lightgbm()),
    *(Option("catboost", *each) for each in _catboost()),
]
