"""An estimator of each class of scikit-learn, with rows that it can be fitted on."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
from sklearn.base import is_classifier, is_clusterer, is_outlier_detector
from sklearn.compose import TransformedTargetRegressor
from sklearn.decomposition import PCA
from sklearn.ensemble import (
    AdaBoostClassifier,
    AdaBoostRegressor,
    BaggingClassifier,
    BaggingRegressor,
    RandomForestClassifier,
    RandomForestRegressor,
    StackingClassifier,
    StackingRegressor,
    VotingClassifier,
    VotingRegressor,
)
from sklearn.linear_model import LinearRegression, LogisticRegression, Perceptron, Ridge, RidgeClassifier
from sklearn.naive_bayes import GaussianNB
from sklearn.preprocessing import StandardScaler
from sklearn.svm import LinearSVC
from sklearn.tree import DecisionTreeClassifier, DecisionTreeRegressor
from sklearn.utils import all_estimators

N_FEATURES = 4
COUNTS = ("MultinomialNB", "ComplementNB", "CategoricalNB")
"""Classes that are fitted on whole numbers."""

INNER: dict[str, dict[str, Any]] = {
    **{
        name: {"estimator": LogisticRegression()}
        for name in (
            *(
                "ClassifierChain",
                "FixedThresholdClassifier",
                "MultiOutputClassifier",
                "OneVsOneClassifier",
                "OneVsRestClassifier",
            ),
            *("OutputCodeClassifier", "SelfTrainingClassifier", "TunedThresholdClassifierCV", "RFE", "RFECV"),
            "FrozenEstimator",
        )
    },
    **{name: {"estimator": Ridge()} for name in ("MultiOutputRegressor", "RegressorChain")},
    "GridSearchCV": {"estimator": LogisticRegression(), "param_grid": {"C": [0.5, 1.0]}, "cv": 2},
    "RandomizedSearchCV": {"estimator": LogisticRegression(), "param_distributions": {"C": [0.5, 1.0]}, "cv": 2, "n_iter": 1},
    "StackingClassifier": {"estimators": [("a", DecisionTreeClassifier(max_depth=2)), ("b", LinearSVC())], "cv": 2},
    "StackingRegressor": {"estimators": [("a", DecisionTreeRegressor(max_depth=2)), ("b", Ridge())], "cv": 2},
    "VotingClassifier": {"estimators": [("a", DecisionTreeClassifier(max_depth=2)), ("b", Perceptron()), ("c", GaussianNB())]},
    "VotingRegressor": {"estimators": [("a", DecisionTreeRegressor(max_depth=2)), ("b", Ridge())]},
    "TransformedTargetRegressor": {"func": np.log1p, "inverse_func": np.expm1},
    "LocalOutlierFactor": {"novelty": True},
    "IsotonicRegression": {"out_of_bounds": "clip"},
    "RadiusNeighborsClassifier": {"outlier_label": "most_frequent", "radius": 1.5},
    "RadiusNeighborsRegressor": {"radius": 5.0},
    "SelfTrainingClassifier": {"estimator": LogisticRegression(), "threshold": 0.5},
    "AffinityPropagation": {"random_state": 0},
    "MultiTaskElasticNetCV": {"cv": 2},
    "MultiTaskLassoCV": {"cv": 2},
    "CCA": {"n_components": 1},
    "PLSCanonical": {"n_components": 1},
    **{name: {"alpha": 0.01} for name in ("ElasticNet", "Lasso", "LassoLars", "QuantileRegressor", "MultiTaskLasso")},
    "OrthogonalMatchingPursuitCV": {"max_iter": 3},
    "LassoLarsIC": {"noise_variance": 0.01},
    "Pipeline": {"steps": [("scale", StandardScaler()), ("model", LogisticRegression())]},
    "DummyRegressor": {"strategy": "quantile", "quantile": 0.3},
}
SMALL = {"n_estimators": 5, "max_iter": 300, "random_state": 0}
"""Parameters that keep a fit short, where a class has them."""

ITERATIONS = {"HistGradientBoostingClassifier": 5, "HistGradientBoostingRegressor": 5, "BayesianGaussianMixture": 50}


def with_predict() -> list[str]:
    """Names of scikit-learn's classes whose instances predict."""
    return sorted(name for name, kind in all_estimators() if hasattr(kind, "predict") or name in ("LocalOutlierFactor",))


def make(name: str) -> Any:
    """An estimator of this class, not fitted."""
    kind = dict(all_estimators())[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of classes that will go
        made = kind(**INNER.get(name, {}))
    known = made.get_params(deep=False)
    chosen = {key: value for key, value in SMALL.items() if key in known and key not in INNER.get(name, {})}
    if name in ITERATIONS:
        chosen["max_iter"] = ITERATIONS[name]
    return made.set_params(**chosen)


def rows(name: str, n_rows: int, seed: int = 0) -> np.ndarray:
    """(n_rows, n_features) of a kind that the class accepts."""
    random = np.random.default_rng(seed)
    if name in COUNTS:
        return random.integers(0, 5, (n_rows, N_FEATURES)).astype(float)
    return random.normal(size=(n_rows, 1 if name == "IsotonicRegression" else N_FEATURES))


def target(estimator: Any, name: str, x: np.ndarray, *, n_classes: int = 3) -> Any:
    """y of a kind that the estimator takes."""
    signal = x[:, 0] + 0.5 * x[:, -1]
    classes = np.digitize(signal, np.quantile(signal, np.linspace(0, 1, n_classes + 1)[1:-1]))
    if name in ("MultiOutputClassifier", "ClassifierChain"):
        return np.c_[classes > 0, x[:, 1] > x[:, 1].mean()].astype(int)
    if name.startswith("MultiTask") or name in ("MultiOutputRegressor", "RegressorChain"):
        return np.c_[signal, x[:, 1]]
    if is_classifier(estimator):
        return (classes > 0).astype(int) if "Threshold" in name else classes
    if is_clusterer(estimator) or is_outlier_detector(estimator):
        return None
    return np.abs(signal) + 0.1  # positive, for Poisson and gamma


def fitted(name: str, n_rows: int = 60) -> tuple[Any, np.ndarray]:
    """An estimator of this class and the rows that it was fitted on."""
    x = rows(name, n_rows)
    estimator = make(name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if name == "FrozenEstimator":
            estimator.estimator.fit(x, target(estimator.estimator, name, x))
        y = target(estimator, name, x)
        return estimator.fit(x, y), x


_TREE = DecisionTreeClassifier(max_depth=2)
_SEVERAL = [("a", GaussianNB()), ("b", LogisticRegression())]
VARIANTS: dict[str, tuple[Any, str]] = {
    "soft vote": (VotingClassifier(_SEVERAL, voting="soft", weights=[1, 2]), "text"),
    "hard vote, two classes": (VotingClassifier([*_SEVERAL, ("c", _TREE)]), "two"),
    "stack with the rows": (StackingClassifier(_SEVERAL, passthrough=True, cv=2), "two"),
    "stack of predictions": (StackingClassifier(_SEVERAL, stack_method="predict", cv=2), "classes"),
    "boosted trees of text": (AdaBoostClassifier(_TREE, n_estimators=5), "text"),
    "boosted, two classes": (AdaBoostClassifier(_TREE, n_estimators=5), "two"),
    "bagged, columns apart": (BaggingClassifier(LogisticRegression(), 5, max_features=2, random_state=0), "text"),
    "bagged, without probabilities": (BaggingClassifier(RidgeClassifier(), 5, random_state=0), "classes"),
    "bagged, several targets": (BaggingRegressor(Ridge(), 5, random_state=0), "targets"),
    "boosted regression": (AdaBoostRegressor(DecisionTreeRegressor(max_depth=3), n_estimators=9, random_state=0), "number"),
    "forest, several targets": (RandomForestRegressor(5, random_state=0), "targets"),
    "forest, several labels": (RandomForestClassifier(5, random_state=0), "labels"),
    "target, scaled": (TransformedTargetRegressor(LinearRegression(), transformer=StandardScaler()), "number"),
    "vote of several": (VotingRegressor([("a", Ridge()), ("b", RandomForestRegressor(3, random_state=0))]), "number"),
    "stack of forests": (StackingRegressor([("a", RandomForestRegressor(3, random_state=0))], cv=2), "number"),
}
"""More of a class: an estimator and its y: "classes", "two", "text", "number", "targets" or "labels"."""


TEXTS = np.array(["a good film", "a bad film", "hello world", "very good"] * 15)
TRANSFORMS: dict[str, dict[str, Any]] = {
    "ColumnTransformer": {"transformers": [("scale", StandardScaler(), [0, 1])]},
    "CountVectorizer": {"max_features": 20},
    "FeatureUnion": {"transformer_list": [("scale", StandardScaler()), ("components", PCA(2))]},
    "FrozenEstimator": {"estimator": StandardScaler().fit(np.zeros((3, N_FEATURES)))},
    "GridSearchCV": {"estimator": PCA(), "param_grid": {"n_components": [1, 2]}, "cv": 2},
    "HashingVectorizer": {"n_features": 32},
    "Pipeline": {"steps": [("scale", StandardScaler())]},
    "QuantileTransformer": {"n_quantiles": 20},
    "RandomizedSearchCV": {"estimator": PCA(), "param_distributions": {"n_components": [1, 2]}, "n_iter": 1, "cv": 2},
    "RFECV": {"estimator": LogisticRegression(), "cv": 2},
    "SelectFromModel": {"estimator": LogisticRegression()},
    "SequentialFeatureSelector": {"estimator": LogisticRegression(), "cv": 2},
    "SparseCoder": {"dictionary": np.eye(N_FEATURES)},
    "StackingClassifier": INNER["StackingClassifier"],
    "StackingRegressor": INNER["StackingRegressor"],
    "VotingRegressor": INNER["VotingRegressor"],
    "VotingClassifier": {"estimators": [("a", LogisticRegression()), ("b", GaussianNB())], "voting": "soft"},
    "RFE": {"estimator": LogisticRegression()},
}
_CODES = ("OneHotEncoder", "OrdinalEncoder", "TargetEncoder")


def with_transform() -> list[str]:
    """Names of scikit-learn's classes whose instances transform."""
    return sorted(name for name, kind in all_estimators() if hasattr(kind, "transform"))


def fitted_transformer(name: str) -> tuple[Any, Any]:
    """A transformer of this class and the rows that it was fitted on."""
    kind = dict(all_estimators())[name]
    made = kind(**TRANSFORMS.get(name, {}))
    known = made.get_params(deep=False)
    chosen: dict[str, Any] = {key: value for key, value in SMALL.items() if key in known and key != "max_iter"}
    if "n_components" in known and "Random" not in name:
        chosen["n_components"] = 1 if "PLS" in name or name in ("CCA", "LinearDiscriminantAnalysis") else 2
    elif "n_components" in known:
        chosen["n_components"] = 2
    made.set_params(**chosen)
    if name.endswith("Vectorizer"):
        x: Any = TEXTS
    elif name in _CODES:
        x = np.random.default_rng(0).integers(0, 4, (60, 2))
    elif name == "KernelCenterer":
        x = np.eye(N_FEATURES)
    else:
        x = np.abs(rows(name, 60))  # positive, for chi squared, NMF and their like
    y = (np.arange(len(x)) % 3 == 0 if np.ndim(x) == 1 else x[:, 0] > np.median(x[:, 0])).astype(int)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return made.fit(x, y), x
