"""An estimator of each class of scikit-learn, with rows that it can be fitted on."""

from __future__ import annotations

import warnings
from functools import cache
from typing import Any

import numpy as np
from sklearn.base import is_classifier, is_clusterer, is_outlier_detector
from sklearn.calibration import CalibratedClassifierCV
from sklearn.cluster import Birch, BisectingKMeans, MeanShift
from sklearn.compose import ColumnTransformer, TransformedTargetRegressor
from sklearn.decomposition import PCA
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis, QuadraticDiscriminantAnalysis
from sklearn.dummy import DummyClassifier, DummyRegressor
from sklearn.ensemble import (
    AdaBoostClassifier,
    AdaBoostRegressor,
    BaggingClassifier,
    BaggingRegressor,
    GradientBoostingClassifier,
    GradientBoostingRegressor,
    HistGradientBoostingRegressor,
    IsolationForest,
    RandomForestClassifier,
    RandomForestRegressor,
    StackingClassifier,
    StackingRegressor,
    VotingClassifier,
    VotingRegressor,
)
from sklearn.feature_selection import SelectKBest
from sklearn.gaussian_process import GaussianProcessClassifier, GaussianProcessRegressor
from sklearn.gaussian_process.kernels import (
    RBF,
    ConstantKernel,
    DotProduct,
    Matern,
    RationalQuadratic,
    WhiteKernel,
)
from sklearn.kernel_ridge import KernelRidge
from sklearn.linear_model import (
    GammaRegressor,
    LinearRegression,
    LogisticRegression,
    Perceptron,
    Ridge,
    RidgeClassifier,
    RidgeClassifierCV,
    SGDClassifier,
    TweedieRegressor,
)
from sklearn.mixture import BayesianGaussianMixture, GaussianMixture
from sklearn.model_selection import FixedThresholdClassifier
from sklearn.multiclass import OneVsOneClassifier, OneVsRestClassifier, OutputCodeClassifier
from sklearn.multioutput import ClassifierChain, MultiOutputClassifier, MultiOutputRegressor, RegressorChain
from sklearn.naive_bayes import GaussianNB
from sklearn.neighbors import (
    KNeighborsClassifier,
    KNeighborsRegressor,
    LocalOutlierFactor,
    NearestCentroid,
    RadiusNeighborsClassifier,
    RadiusNeighborsRegressor,
)
from sklearn.neural_network import MLPClassifier, MLPRegressor
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import (
    MinMaxScaler,
    PolynomialFeatures,
    PowerTransformer,
    QuantileTransformer,
    RobustScaler,
    StandardScaler,
)
from sklearn.semi_supervised import LabelPropagation, LabelSpreading, SelfTrainingClassifier
from sklearn.svm import SVC, SVR, LinearSVC, NuSVC, NuSVR, OneClassSVM
from sklearn.tree import DecisionTreeClassifier, DecisionTreeRegressor
from sklearn.utils import discovery

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


@cache
def all_estimators() -> tuple[tuple[str, Any], ...]:
    """Names and classes of all of scikit-learn's, for which its files are searched."""
    return tuple(discovery.all_estimators())


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
_VARIANTS: list[tuple[Any, str]] = [
    (VotingClassifier(_SEVERAL, voting="soft", weights=[1, 2]), "text"),
    (VotingClassifier([*_SEVERAL, ("c", _TREE)]), "two"),
    (StackingClassifier(_SEVERAL, passthrough=True, cv=2), "two"),
    (StackingClassifier(_SEVERAL, stack_method="predict", cv=2), "classes"),
    (AdaBoostClassifier(_TREE, n_estimators=5), "text"),
    (AdaBoostClassifier(_TREE, n_estimators=5), "two"),
    (BaggingClassifier(LogisticRegression(), 5, max_features=2, random_state=0), "text"),
    (BaggingClassifier(RidgeClassifier(), 5, random_state=0), "classes"),
    (BaggingRegressor(Ridge(), 5, random_state=0), "targets"),
    (AdaBoostRegressor(DecisionTreeRegressor(max_depth=3), n_estimators=9, random_state=0), "number"),
    (RandomForestRegressor(5, random_state=0), "targets"),
    (RandomForestClassifier(5, random_state=0), "labels"),
    (TransformedTargetRegressor(LinearRegression(), transformer=StandardScaler()), "number"),
    (VotingRegressor([("a", Ridge()), ("b", RandomForestRegressor(3, random_state=0))]), "number"),
    (StackingRegressor([("a", RandomForestRegressor(3, random_state=0))], cv=2), "number"),
    (SVC(probability=True), "two"),
    (SVC(probability=True), "classes"),
    (NuSVC(probability=True, nu=0.3), "text"),
    (SVC(kernel="poly", degree=2, coef0=1), "text"),
    (SVC(kernel="sigmoid"), "classes"),
    (SVC(break_ties=True), "classes"),
    (SVC(decision_function_shape="ovo"), "classes"),
    (SVC(kernel="linear"), "two"),
    (KNeighborsClassifier(3, weights="distance"), "text"),
    (KNeighborsClassifier(4), "both"),
    (KNeighborsClassifier(4, metric="manhattan"), "classes"),
    (KNeighborsClassifier(4, p=3), "classes"),
    (KNeighborsClassifier(4, metric="chebyshev", algorithm="brute"), "two"),
    (KNeighborsRegressor(4, weights="distance"), "targets"),
    (RadiusNeighborsClassifier(1.0, outlier_label="zz", weights="distance"), "text"),
    (RadiusNeighborsRegressor(1.0), "number"),
    (RadiusNeighborsRegressor(1.5, weights="distance"), "targets"),
    (LogisticRegression(solver="liblinear"), "two"),
    (SGDClassifier(loss="log_loss"), "classes"),
    (SGDClassifier(loss="modified_huber"), "text"),
    (SGDClassifier(loss="modified_huber"), "two"),
    (Perceptron(), "text"),
    (RidgeClassifier(), "two"),
    (RidgeClassifier(), "labels"),
    (RidgeClassifierCV(), "text"),
    (LinearDiscriminantAnalysis(), "two"),
    (QuadraticDiscriminantAnalysis(), "two"),
    (GaussianProcessClassifier(1.0 * RBF(1.0)), "two"),
    (GaussianProcessClassifier(1.0 * Matern(nu=1.5), multi_class="one_vs_one"), "classes"),
    (GaussianProcessRegressor(RBF(1.0) + WhiteKernel() + DotProduct(), normalize_y=True), "targets"),
    (
        GaussianProcessRegressor(RationalQuadratic() * ConstantKernel(2.0) + WhiteKernel(), optimizer=None),
        "number",
    ),
    (OneVsRestClassifier(SVC()), "classes"),
    (OneVsRestClassifier(DecisionTreeClassifier(max_depth=2)), "text"),
    (OneVsRestClassifier(LogisticRegression()), "labels"),
    (OneVsRestClassifier(LinearSVC()), "labels"),
    (OneVsRestClassifier(LogisticRegression()), "two"),
    (OneVsOneClassifier(LinearSVC()), "text"),
    (OneVsOneClassifier(DecisionTreeClassifier(max_depth=2)), "two"),
    (OneVsOneClassifier(Perceptron()), "two"),
    (OutputCodeClassifier(LinearSVC(), random_state=0), "text"),
    (ClassifierChain(LogisticRegression(), order=[1, 0]), "labels"),
    (ClassifierChain(DecisionTreeClassifier(max_depth=3), chain_method="predict_proba"), "labels"),
    (RegressorChain(Ridge(), order=[1, 0]), "targets"),
    (MultiOutputClassifier(RandomForestClassifier(3)), "both"),
    (MultiOutputClassifier(LinearSVC()), "both"),
    (CalibratedClassifierCV(LinearSVC(), cv=2), "text"),
    (CalibratedClassifierCV(LinearSVC(), cv=2), "two"),
    (CalibratedClassifierCV(GaussianNB(), method="isotonic", cv=2), "classes"),
    (CalibratedClassifierCV(RandomForestClassifier(5), method="isotonic", cv=2), "two"),
    (CalibratedClassifierCV(LinearSVC(), method="temperature", cv=2), "classes"),
    (CalibratedClassifierCV(GaussianNB(), method="temperature", cv=2), "two"),
    (CalibratedClassifierCV(LinearSVC(), method="temperature", cv=2), "two"),
    (MLPClassifier((5,), activation="tanh"), "labels"),
    (MLPClassifier((5,), activation="logistic"), "two"),
    (MLPRegressor(hidden_layer_sizes=(5, 3)), "targets"),
    (DummyClassifier(strategy="prior"), "text"),
    (DummyClassifier(strategy="most_frequent"), "both"),
    (DummyClassifier(strategy="constant", constant="low"), "text"),
    (DummyRegressor(), "targets"),
    (GaussianMixture(3, covariance_type="tied"), ""),
    (GaussianMixture(3, covariance_type="diag"), ""),
    (GaussianMixture(3, covariance_type="spherical"), ""),
    (BayesianGaussianMixture(n_components=3, weight_concentration_prior_type="dirichlet_distribution"), ""),
    (BayesianGaussianMixture(n_components=3, covariance_type="diag"), ""),
    (LabelPropagation("knn"), "classes"),
    (LabelSpreading(gamma=2), "text"),
    (KernelRidge(kernel="laplacian"), "targets"),
    (KernelRidge(kernel="polynomial", gamma=0.5), "number"),
    (SVR(), "number"),
    (NuSVR(kernel="linear"), "number"),
    (OneClassSVM(nu=0.1), ""),
    (IsolationForest(max_features=2, n_estimators=10, contamination=0.1), ""),
    (LocalOutlierFactor(novelty=True, n_neighbors=5), ""),
    (TransformedTargetRegressor(Ridge(), func=np.log, inverse_func=np.exp), "number"),
    (TransformedTargetRegressor(Ridge(), transformer=PowerTransformer()), "targets"),
    (TransformedTargetRegressor(Ridge(), transformer=PowerTransformer("box-cox")), "number"),
    (TransformedTargetRegressor(Ridge(), transformer=QuantileTransformer(n_quantiles=50)), "number"),
    (
        TransformedTargetRegressor(Ridge(), transformer=QuantileTransformer(n_quantiles=50, output_distribution="normal")),
        "number",
    ),
    (TransformedTargetRegressor(Ridge(), transformer=MinMaxScaler()), "number"),
    (
        VotingClassifier(
            [
                ("a", make_pipeline(StandardScaler(), PCA(2), LogisticRegression())),
                (
                    "b",
                    make_pipeline(
                        ColumnTransformer(
                            [("a", RobustScaler(), [0, 1]), ("b", "passthrough", slice(2, 3))], remainder=MinMaxScaler()
                        ),
                        PolynomialFeatures(2),
                        SelectKBest(k=3),
                        RidgeClassifier(),
                    ),
                ),
            ]
        ),
        "text",
    ),
    (StackingClassifier([("a", KNeighborsClassifier()), ("b", SVC())], final_estimator=RandomForestClassifier(5), cv=2), "text"),
    (AdaBoostClassifier(n_estimators=5), "two"),
    (GradientBoostingClassifier(n_estimators=5), "text"),
    (HistGradientBoostingRegressor(max_iter=5, loss="gamma"), "number"),
    (FixedThresholdClassifier(LogisticRegression(), threshold=0.3, pos_label=0, response_method="predict_proba"), "two"),
    (FixedThresholdClassifier(LinearSVC(), threshold=0.1), "two"),
    (GammaRegressor(), "number"),
    (TweedieRegressor(power=1.5), "number"),
    (TweedieRegressor(power=0, link="log"), "number"),
    (NearestCentroid(priors="empirical"), "text"),
    (NearestCentroid(metric="manhattan"), "text"),
    (LinearRegression(), "targets"),
    (Ridge(), "targets"),
    (SelfTrainingClassifier(SVC(probability=True)), "two"),
    (Birch(n_clusters=3), ""),
    (MeanShift(), ""),
    (BisectingKMeans(4), ""),
    (VotingClassifier([("a", LogisticRegression()), ("b", QuadraticDiscriminantAnalysis())]), "two"),
    (MultiOutputRegressor(GradientBoostingRegressor(n_estimators=3)), "targets"),
    (BaggingRegressor(n_estimators=5), "targets"),
]
VARIANTS: dict[str, tuple[Any, str]] = {f"{' '.join(repr(each).split())}, {kind}": (each, kind) for each, kind in _VARIANTS}
"""More of a class: an estimator and its y: "classes", "two", "text", "number", "targets", "labels", "both" or ""."""


def _classes(x: np.ndarray) -> np.ndarray:
    signal = x[:, 0] + 0.5 * x[:, -1]
    return np.digitize(signal, np.quantile(signal, [1 / 3, 2 / 3]))


TARGETS: dict[str, Any] = {
    "classes": _classes,
    "two": lambda x: (_classes(x) > 0).astype(int),
    "text": lambda x: np.array(["low", "middle", "to the top"])[_classes(x)],
    "number": lambda x: np.abs(x[:, 0]) + 0.1,
    "targets": lambda x: x[:, [0, -1]],
    "labels": lambda x: np.c_[_classes(x) > 0, x[:, 1] > 0].astype(int),
    "both": lambda x: np.c_[_classes(x), x[:, 1] > 0],
    "": lambda x: None,
}
"""y of each kind, made from rows."""

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
