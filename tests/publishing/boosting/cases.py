"""A fitted estimator for each row of docs/boosting.md."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import catboost as cb
import lightgbm as lgb
import numpy as np
import xgboost as xgb

N = 300
_RANDOM = np.random.default_rng(0)


def _rows() -> np.ndarray:
    """(N, 5): two of real numbers, one of tenths, one of codes from 0 to 69, one of zeros and tiny numbers; a tenth is NaN."""
    rows = _RANDOM.normal(size=(N, 5))
    rows[:, 2] = np.round(rows[:, 2], 1)
    rows[:, 3] = _RANDOM.integers(0, 70, N)
    rows[:, 4] = np.where(_RANDOM.random(N) < 0.4, 0.0, rows[:, 4])
    rows[_RANDOM.random(rows.shape) < 0.1] = np.nan
    return rows


ROWS = _rows()
WHOLE = np.nan_to_num(ROWS)
REAL = np.nansum(ROWS[:, :3], axis=1) + np.nan_to_num(ROWS[:, 3] % 7) / 3 + _RANDOM.normal(size=N) / 3
TWO = (np.median(REAL) < REAL).astype(int)
THREE = np.digitize(REAL, np.quantile(REAL, [0.2, 0.8]))
TWELVE = np.unique(np.digitize(REAL, np.quantile(REAL, 0.6 ** np.arange(11, 0, -1.0))), return_inverse=True)[1]
POSITIVE = np.exp(REAL / 3)
SHARE = 1 / (1 + np.exp(-REAL))
SEVERAL = np.stack([REAL, POSITIVE], axis=1)
NAMES = np.array(["no", "perhaps", "é"])
CODES = [3]
SMALL: dict[str, Any] = {"n_estimators": 8}

Case = Callable[[], tuple[Any, np.ndarray]]


class _Frame:
    """Rows whose columns have names that look like code."""

    def __new__(cls) -> Any:
        import pandas as pd

        return pd.DataFrame(ROWS, columns=["a < 1", "b or c", 'd "e"', "f\u00e9 \u2028", "__g__"])


def _differences(target: Any, margin: Any) -> Any:
    return margin - target, np.ones_like(target)


class _SquaredError:
    def calc_ders_range(self, margins: Any, targets: Any, weights: Any) -> Any:
        return [(target - margin, -1.0) for margin, target in zip(margins, targets, strict=True)]


def _of_xgboost() -> dict[str, Case]:
    def classifier(y: Any = TWO, x: Any = ROWS, kind: Any = xgb.XGBClassifier, fit: Any = None, **given: Any) -> Case:
        return lambda: (kind(**{**SMALL, **given}).fit(x, y, **(fit or {})), ROWS)

    def regressor(y: Any = REAL, **given: Any) -> Case:
        return classifier(y, kind=given.pop("kind", xgb.XGBRegressor), **given)

    codes = {"enable_categorical": True, "feature_types": ["q", "q", "q", "c", "q"]}
    watched = {"eval_set": [(ROWS[::-1], THREE)], "verbose": False}
    groups = {"qid": np.arange(N) // 10}
    early = {"n_estimators": 60, "early_stopping_rounds": 2, "fit": watched}
    return {
        **{f"XGBClassifier, objective={name}": classifier(objective=name) for name in ("binary:logistic", "reg:logistic")},
        "XGBClassifier, objective=binary:hinge": classifier(objective="binary:hinge"),
        **{f"XGBClassifier, objective={name}": classifier(THREE, objective=name) for name in ("multi:softmax", "multi:softprob")},
        **{f"XGBRegressor, objective={name}": regressor(SHARE, objective=name) for name in ("reg:logistic", "binary:logistic")},
        **{f"XGBRegressor, objective={name}": regressor(TWO, objective=name) for name in ("binary:logitraw", "binary:hinge")},
        **{
            f"XGBRegressor, objective={name}": regressor(POSITIVE, objective=name)
            for name in (
                *("reg:squarederror", "reg:squaredlogerror", "reg:pseudohubererror", "reg:absoluteerror", "count:poisson"),
                *("reg:gamma", "reg:tweedie", "survival:cox"),
            )
        },
        "XGBRegressor, objective=reg:quantileerror": regressor(objective="reg:quantileerror", quantile_alpha=0.3),
        "several quantiles": regressor(objective="reg:quantileerror", quantile_alpha=[0.2, 0.8]),
        "XGBRegressor, objective=multi:softprob": regressor(THREE, objective="multi:softprob", num_class=3),
        **{
            f"XGBRanker, objective={name}": classifier(
                THREE if name != "rank:map" else TWO, kind=xgb.XGBRanker, fit=groups, objective=name
            )
            for name in ("rank:ndcg", "rank:map", "rank:pairwise")
        },
        "XGBClassifier, any other objective": classifier(objective="count:poisson"),
        "XGBRegressor, objective=multi:softmax": regressor(THREE, objective="multi:softmax", num_class=3),
        "two classes": classifier(),
        "three classes": classifier(THREE),
        "twelve classes, imbalanced": classifier(TWELVE),
        "XGBRFClassifier": classifier(THREE, kind=xgb.XGBRFClassifier),
        "XGBRFRegressor": regressor(kind=xgb.XGBRFRegressor),
        "booster=dart": classifier(THREE, booster="dart", rate_drop=0.5),
        "booster=dart with early stopping": classifier(THREE, booster="dart", rate_drop=0.5, **early),
        "booster=dart, a regressor": regressor(booster="dart", rate_drop=0.5, normalize_type="forest", num_parallel_tree=3),
        "booster=gblinear": classifier(THREE, booster="gblinear"),
        "booster=gblinear, a regressor": regressor(booster="gblinear"),
        "early_stopping_rounds": classifier(THREE, **early),
        "early_stopping_rounds with num_parallel_tree": classifier(THREE, num_parallel_tree=3, subsample=0.5, **early),
        "num_parallel_tree": regressor(num_parallel_tree=4, subsample=0.5),
        "base_score": classifier(base_score=0.2),
        "scale_pos_weight": classifier(scale_pos_weight=9.0),
        "missing=-999": classifier(x=np.where(np.isnan(ROWS), -999.0, ROWS), missing=-999.0),
        "missing=0": classifier(missing=0.0),
        "gamma (pruned trees)": classifier(gamma=3.0),
        "grow_policy=lossguide": classifier(grow_policy="lossguide", max_leaves=9),
        "tree_method=exact": classifier(tree_method="exact"),
        "tree_method=exact, gamma (pruned trees)": regressor(tree_method="exact", gamma=60.0, max_depth=2),
        "tree_method=approx": classifier(tree_method="approx"),
        "several targets": regressor(SEVERAL),
        "a constant target": regressor(np.full(N, 5.0)),
        "numeric categories": classifier(THREE, max_cat_to_onehot=1, **codes),
        "numeric categories, max_cat_to_onehot": classifier(THREE, max_cat_to_onehot=100, **codes),
        "a callable objective of a regressor": regressor(objective=_differences),
        "a callable objective of a classifier": classifier(objective=_differences),
        "features of float32": classifier(x=ROWS.astype(np.float32)),
        "NaN in training": classifier(),
        "NaN only in prediction": classifier(x=WHOLE),
        "column names that are expressions": lambda: (xgb.XGBClassifier(**SMALL).fit(_clean_names(), TWO), ROWS),
        "no trees": regressor(n_estimators=0),
        "several targets of a classifier": classifier(np.stack([TWO, THREE > 1], axis=1).astype(int)),
        "multi_strategy=multi_output_tree": regressor(SEVERAL, multi_strategy="multi_output_tree"),
        "multi_strategy=multi_output_tree, three classes": classifier(THREE, multi_strategy="multi_output_tree"),
        "one class": classifier(TWO * 0),
    }


def _clean_names() -> Any:
    """XGBoost itself refuses "[", "]" and "<" in names."""
    frame = _Frame()
    return frame.rename(columns={"a < 1": "a or 1"})


def _of_lightgbm() -> dict[str, Case]:
    def classifier(y: Any = TWO, x: Any = ROWS, kind: Any = lgb.LGBMClassifier, fit: Any = None, **given: Any) -> Case:
        parameters = {**SMALL, "verbose": -1, "min_child_samples": 3, **given}
        return lambda: (kind(**parameters).fit(x, y, **(fit or {})), ROWS)

    def regressor(y: Any = REAL, **given: Any) -> Case:
        return classifier(y, kind=given.pop("kind", lgb.LGBMRegressor), **given)

    codes = {"fit": {"categorical_feature": CODES}, "min_data_per_group": 2, "cat_smooth": 1.0, "max_cat_threshold": 64}

    def early(y: Any) -> dict[str, Any]:
        stop = {"eval_set": [(ROWS[::-1], y)], "callbacks": [lgb.early_stopping(2, verbose=False)]}
        return {"fit": stop, "n_estimators": 80}

    forest = {"boosting_type": "rf", "bagging_freq": 1, "bagging_fraction": 0.6}
    groups = {"group": [10] * (N // 10)}
    return {
        **{
            f"LGBMRanker, objective={name}": classifier(THREE, kind=lgb.LGBMRanker, fit=groups, objective=name)
            for name in ("lambdarank", "rank_xendcg")
        },
        **{f"LGBMClassifier, objective={name}": classifier(THREE, objective=name) for name in ("multiclass", "multiclassova")},
        "LGBMClassifier, objective=binary": classifier(objective="binary"),
        **{
            f"LGBMRegressor, objective={name}": regressor(SHARE, objective=name)
            for name in ("cross_entropy", "cross_entropy_lambda")
        },
        **{
            f"LGBMRegressor, objective={name}": regressor(POSITIVE, objective=name)
            for name in (*("regression", "regression_l1", "huber", "fair", "quantile", "mape", "poisson", "gamma", "tweedie"),)
        },
        "two classes": classifier(),
        "three classes": classifier(THREE),
        "twelve classes, imbalanced": classifier(TWELVE),
        "text classes": classifier(NAMES[THREE]),
        "boolean classes": classifier(TWO == 1),
        "float classes": classifier(TWO + 1.0),
        "boosting_type=dart": regressor(boosting_type="dart", drop_rate=0.5),
        "boosting_type=dart, three classes": classifier(THREE, boosting_type="dart", drop_rate=0.5),
        "boosting_type=rf": regressor(**forest),
        "boosting_type=rf, a classifier": classifier(THREE, **forest),
        "data_sample_strategy=goss": classifier(data_sample_strategy="goss"),
        "early stopping": classifier(THREE, **early(THREE)),
        "early stopping, dart": regressor(boosting_type="dart", **early(REAL)),
        "sigmoid": classifier(THREE, objective="multiclassova", sigmoid=2.5),
        "is_unbalance": classifier(is_unbalance=True),
        "scale_pos_weight": classifier(scale_pos_weight=9.0),
        "reg_sqrt": regressor(reg_sqrt=True),
        "zero_as_missing": classifier(zero_as_missing=True),
        "zero_as_missing with numeric categories": classifier(zero_as_missing=True, **codes),
        "use_missing=False": classifier(use_missing=False),
        "boost_from_average=False": regressor(boost_from_average=False),
        "numeric categories": classifier(THREE, **codes),
        "numeric categories, one against the rest": classifier(THREE, max_cat_to_onehot=100, **codes),
        "a constant target": regressor(np.full(N, 5.0)),
        "extra_trees": classifier(extra_trees=True),
        "no trees": regressor(min_child_samples=N),
        "a callable objective of a regressor": regressor(objective=_differences),
        "a callable objective of a classifier": classifier(objective=_differences),
        "NaN in training": classifier(),
        "NaN only in prediction": classifier(x=WHOLE),
        "column names that are expressions": lambda: (lgb.LGBMClassifier(verbose=-1, **SMALL).fit(_letters(), TWO), ROWS),
        "features of float32": classifier(x=ROWS.astype(np.float32)),
        "linear_tree=True": regressor(linear_tree=True),
        "linear_tree=True, three classes": classifier(THREE, linear_tree=True, linear_lambda=0.1),
        "one class": classifier(TWO * 0),
        "pred_early_stop": classifier(pred_early_stop=True),
        "predict_raw_score": classifier(predict_raw_score=True),
        "raw_score": classifier(raw_score=True),
        "predict_leaf_index": classifier(predict_leaf_index=True),
        "predict_contrib": classifier(predict_contrib=True),
        "start_iteration_predict": classifier(start_iteration_predict=2),
        "num_iteration_predict": classifier(num_iteration_predict=3),
    }


def _letters() -> Any:
    """LightGBM itself refuses JSON's special characters in names."""
    frame = _Frame()
    frame.columns = ["a < 1", "b or c", "Tree=0", "feature_names=f\u00e9", "__g__"]
    return frame


def _of_catboost() -> dict[str, Case]:
    def classifier(
        y: Any = TWO, x: Any = ROWS, kind: Any = cb.CatBoostClassifier, fit: Any = None, then: Any = None, **given: Any
    ) -> Case:
        parameters = {"iterations": 8, "depth": 4, "verbose": 0, "allow_writing_files": False, "thread_count": 1, **given}

        def fitted() -> tuple[Any, np.ndarray]:
            model = kind(**parameters).fit(x, y, **(fit or {}))
            if then is not None:
                then(model)
            return model, ROWS

        return fitted

    def regressor(y: Any = REAL, **given: Any) -> Case:
        return classifier(y, kind=given.pop("kind", cb.CatBoostRegressor), **given)

    groups = {"group_id": np.arange(N) // 10}
    watched = {"eval_set": (ROWS[::-1], THREE)}
    more = {
        "StochasticRank": "StochasticRank:metric=NDCG",
        "Quantile": "Quantile:alpha=0.3",
        "Lq": "Lq:q=3",
        "Huber": "Huber:delta=1",
        "MultiQuantile": "MultiQuantile:alpha=0.1,0.9",
        "Expectile": "Expectile:alpha=0.3",
        "Tweedie": "Tweedie:variance_power=1.5",
    }
    grown = {
        f"grow_policy={policy}, nan_mode={mode}": classifier(THREE, grow_policy=policy, nan_mode=mode)
        for policy in ("SymmetricTree", "Depthwise", "Lossguide")
        for mode in ("Min", "Max")
    }
    import pandas as pd

    texts = pd.DataFrame({"amount": WHOLE[:, 0], "colour": np.array(["a red one", "a blue one", "the green one"])[THREE]})
    vectors = pd.DataFrame({"amount": WHOLE[:, 0], "vector": list(WHOLE[:, :3])})
    return {
        **{f"CatBoostClassifier, loss_function={name}": classifier(loss_function=name) for name in ("Logloss", "CrossEntropy")},
        **{
            f"CatBoostClassifier, loss_function={name}": classifier(THREE, loss_function=name)
            for name in ("MultiClass", "MultiClassOneVsAll")
        },
        **{
            f"CatBoostRegressor, loss_function={name}": regressor(POSITIVE, loss_function=more.get(name, name))
            for name in (
                *("RMSE", "MAE", "Quantile", "MultiQuantile", "LogLinQuantile", "MAPE", "Lq", "Expectile", "Huber"),
                *("LogCosh", "Poisson", "Tweedie", "Cox"),
            )
        },
        **{
            f"CatBoostRegressor, loss_function={name}": regressor(SEVERAL, loss_function=name)
            for name in ("MultiRMSE", "MultiRMSEWithMissingValues")
        },
        "CatBoostRegressor, loss_function=SurvivalAft": regressor(
            np.stack([POSITIVE, POSITIVE + 1], axis=1), loss_function="SurvivalAft"
        ),
        **{
            f"CatBoostRanker, loss_function={name}": regressor(
                TWO if name == "QuerySoftMax" else THREE / 2,
                kind=cb.CatBoostRanker,
                fit=groups,
                loss_function=more.get(name, name),
            )
            for name in (
                *("QueryRMSE", "QuerySoftMax", "PairLogit", "PairLogitPairwise", "YetiRank", "YetiRankPairwise"),
                *("StochasticRank", "LambdaMart"),
            )
        },
        "two classes": classifier(),
        "three classes": classifier(THREE),
        "twelve classes, imbalanced": classifier(TWELVE),
        "text classes": classifier(NAMES[THREE]),
        "boolean classes": classifier(TWO == 1),
        "float classes": classifier(TWO + 0.5),
        **grown,
        "nan_mode=Min, NaN only in prediction": classifier(x=WHOLE, nan_mode="Min"),
        "nan_mode=Max, NaN only in prediction": classifier(x=WHOLE, nan_mode="Max"),
        "nan_mode=Forbidden": classifier(x=WHOLE, nan_mode="Forbidden"),
        "early_stopping_rounds": classifier(THREE, iterations=80, early_stopping_rounds=2, fit=watched),
        "use_best_model=False": classifier(THREE, iterations=20, use_best_model=False, fit=watched),
        "boosting_type=Ordered": classifier(boosting_type="Ordered"),
        "set_probability_threshold": classifier(then=lambda model: model.set_probability_threshold(0.3)),
        "set_scale_and_bias": regressor(then=lambda model: model.set_scale_and_bias(2.5, [-3.0])),
        "scale_pos_weight": classifier(scale_pos_weight=5.0),
        "auto_class_weights": classifier(THREE, auto_class_weights="Balanced"),
        "a callable objective of a regressor": regressor(loss_function=_SquaredError(), eval_metric="RMSE"),
        "column names that are expressions": classifier(x=_Frame()),
        "features of float32": classifier(x=ROWS.astype(np.float32)),
        "loss_function=RMSEWithUncertainty": regressor(loss_function="RMSEWithUncertainty"),
        "several targets of a classifier (MultiLogloss, MultiCrossEntropy)": classifier(
            np.stack([TWO, THREE > 1], axis=1).astype(int), loss_function="MultiLogloss"
        ),
        "a callable objective of a classifier": classifier(loss_function=_SquaredError(), eval_metric="Logloss"),
        "cat_features": classifier(x=texts, cat_features=["colour"]),
        "text_features": classifier(x=texts, text_features=["colour"]),
        "embedding_features": classifier(x=vectors, embedding_features=["vector"]),
    }


CASES: dict[tuple[str, str], Case] = {
    (library, choice): case
    for library, cases in (("xgboost", _of_xgboost()), ("lightgbm", _of_lightgbm()), ("catboost", _of_catboost()))
    for choice, case in cases.items()
}
