"""Pipelines as people write them: what is published and served by the tests that compare with scikit-learn.

To add one, add a line to `PIPELINES`: the estimator, the data set that it is fitted on, and the steps before it. `ESTIMATORS` has
each class of scikit-learn that predicts, from `estimator_cases`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from sklearn.calibration import CalibratedClassifierCV
from sklearn.compose import make_column_transformer
from sklearn.decomposition import PCA, TruncatedSVD
from sklearn.ensemble import (
    AdaBoostClassifier,
    BaggingClassifier,
    BaggingRegressor,
    ExtraTreesClassifier,
    ExtraTreesRegressor,
    GradientBoostingClassifier,
    GradientBoostingRegressor,
    HistGradientBoostingClassifier,
    HistGradientBoostingRegressor,
    RandomForestClassifier,
    RandomForestRegressor,
    StackingClassifier,
    VotingClassifier,
    VotingRegressor,
)
from sklearn.exceptions import ConvergenceWarning
from sklearn.feature_extraction.text import CountVectorizer, TfidfVectorizer
from sklearn.feature_selection import SelectKBest
from sklearn.impute import SimpleImputer
from sklearn.linear_model import (
    BayesianRidge,
    ElasticNet,
    HuberRegressor,
    Lasso,
    LinearRegression,
    LogisticRegression,
    PoissonRegressor,
    Ridge,
    RidgeClassifier,
    SGDClassifier,
)
from sklearn.multiclass import OneVsRestClassifier
from sklearn.naive_bayes import BernoulliNB, GaussianNB, MultinomialNB
from sklearn.neighbors import KNeighborsClassifier, KNeighborsRegressor, NearestCentroid
from sklearn.neural_network import MLPClassifier, MLPRegressor
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import (
    KBinsDiscretizer,
    MinMaxScaler,
    OneHotEncoder,
    OrdinalEncoder,
    PolynomialFeatures,
    PowerTransformer,
    QuantileTransformer,
    RobustScaler,
    StandardScaler,
)
from sklearn.svm import SVC, SVR, LinearSVC
from sklearn.tree import DecisionTreeClassifier, DecisionTreeRegressor, ExtraTreeClassifier

from tests.publishing import estimator_cases

N_TRAIN = 300
CITIES = ("Oslo", "Lima", "Bonn", "Kyiv")
WORDS = np.array(["good", "bad", "film", "very", "not", "plot", "the", "actor"])


def numbers(n_rows: int, seed: int) -> np.ndarray:
    """Five measurements."""
    return np.random.default_rng(seed).normal(size=(n_rows, 5)) * [1, 10, 0.1, 100, 1] + [0, 5, 0, 50, -3]


def grid(n_rows: int, seed: int) -> np.ndarray:
    """Five columns of a few whole numbers: many rows are equal, and many trees cast equal votes."""
    return np.random.default_rng(seed).integers(0, 4, size=(n_rows, 5)).astype(np.float64)


def tenths(n_rows: int, seed: int) -> np.ndarray:
    """Measurements with one decimal, which neither float32 nor float64 represents: thresholds fall on values that occur."""
    return (numbers(n_rows, seed) * [1, 0.1, 10, 0.01, 1]).round(1)


def gaps(n_rows: int, seed: int) -> np.ndarray:
    """As `grid`, with missing values."""
    return np.where(np.random.default_rng(seed + 1).random((n_rows, 5)) < 0.1, np.nan, grid(n_rows, seed))


def epochs(n_rows: int, seed: int) -> np.ndarray:
    """Seconds since 1970, ids, and a measurement."""
    random = np.random.default_rng(seed)
    seconds = 1.7e9 + random.integers(0, 3600, n_rows)
    return np.column_stack([seconds, random.integers(10**8, 10**8 + 500, n_rows), random.normal(size=n_rows)]).astype(np.float64)


def frame(n_rows: int, seed: int) -> pd.DataFrame:
    """Columns of all kinds, numbers and text with gaps."""
    random = np.random.default_rng(seed)
    return pd.DataFrame(
        {
            "age": np.where(random.random(n_rows) < 0.1, np.nan, random.integers(18, 90, n_rows)),
            "income": random.lognormal(10, 1, n_rows),
            "city": np.where(random.random(n_rows) < 0.1, None, random.choice(CITIES, n_rows)),
            "rooms": random.integers(1, 7, n_rows),
            "is_new": random.random(n_rows) < 0.5,
        }
    )


def counts(n_rows: int, seed: int) -> np.ndarray:
    """Numbers of words."""
    return np.random.default_rng(seed).poisson(1.5, size=(n_rows, 6)).astype(np.float64)


def texts(n_rows: int, seed: int) -> np.ndarray:
    """Short texts."""
    random = np.random.default_rng(seed)
    return np.array([" ".join(random.choice(WORDS, 5)) for _ in range(n_rows)], dtype=object)


def _score(rows: Any) -> np.ndarray:
    """(n_rows,) a number that depends on the rows, from which targets are made."""
    if isinstance(rows, pd.DataFrame):
        return rows["age"].fillna(50) / 20 + np.log(rows["income"]) + (rows["city"] == "Oslo") + rows["is_new"]
    if rows.dtype == object:
        return np.array([text.count("good") - text.count("bad") + 0.1 * len(text) for text in rows])
    filled = np.nan_to_num(rows)
    spread = filled.std(axis=0)
    return ((filled - filled.mean(axis=0)) / np.where(spread > 0, spread, 1))[:, :3].sum(axis=1)


def two(rows: Any) -> np.ndarray:
    score = np.asarray(_score(rows))
    return (score > np.median(score)).astype(int)


def three(rows: Any) -> np.ndarray:
    score = np.asarray(_score(rows)) + np.random.default_rng(7).normal(size=len(rows)) * 0.3
    return np.digitize(score, np.quantile(score, [0.33, 0.66]))


def named(rows: Any) -> np.ndarray:
    return np.array(["low", "middle", "high"])[three(rows)]


def amount(rows: Any) -> np.ndarray:
    return np.asarray(_score(rows)) * 10 + np.random.default_rng(7).normal(size=len(rows))


def far_amount(rows: Any) -> np.ndarray:
    """As `amount`, around 1e7, where float32 counts by 1."""
    return 1e7 + amount(rows)


def positive(rows: Any) -> np.ndarray:
    return np.exp(amount(rows) / 40)


def one(rows: Any) -> np.ndarray:
    return np.zeros(len(rows), int)


def columns(**options: Any) -> Any:
    """The usual steps for a frame."""
    return make_column_transformer(
        (make_pipeline(SimpleImputer(), StandardScaler()), ["age", "income", "rooms"]),
        (make_pipeline(SimpleImputer(strategy="most_frequent"), OneHotEncoder(handle_unknown="ignore", **options)), ["city"]),
        ("passthrough", ["is_new"]),
    )


class Case(NamedTuple):
    """A pipeline that is fitted by `fitted`."""

    steps: tuple[Any, ...]
    rows: Callable[[int, int], Any]
    target: Callable[[Any], np.ndarray]

    def fitted(self) -> Any:
        """The fitted pipeline, and the rows that it was fitted on."""
        rows = self.rows(N_TRAIN, 0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # how well it fits is not what is tested
            return make_pipeline(*self.steps).fit(rows, self.target(rows)), rows


class EstimatorCase(NamedTuple):
    """An estimator as the only step of a pipeline; every tenth of its rows is farther out than those of training."""

    fit: Callable[[], tuple[Any, np.ndarray]]
    name: str

    def fitted(self) -> Any:
        """The fitted pipeline, and the rows that it was fitted on."""
        estimator, rows = self.fit()
        return make_pipeline(estimator), rows

    def rows(self, n_rows: int, seed: int) -> np.ndarray:
        rows = estimator_cases.rows(self.name, n_rows, seed)
        if self.name not in estimator_cases.COUNTS:
            rows[::10] *= 10
        return rows


N_TRAIN_ESTIMATOR = 120


def _fitted_variant(estimator: Any) -> tuple[Any, np.ndarray]:
    """Of one with text for classes."""
    rows = estimator_cases.rows("", N_TRAIN_ESTIMATOR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return estimator.fit(rows, estimator_cases.TARGETS["text"](rows)), rows


ESTIMATORS: dict[str, EstimatorCase] = {
    **{
        name: EstimatorCase(partial(estimator_cases.fitted, name, N_TRAIN_ESTIMATOR), name)
        for name in estimator_cases.with_predict()
    },
    **{
        case: EstimatorCase(partial(_fitted_variant, estimator), "")
        for case, (estimator, kind) in estimator_cases.VARIANTS.items()
        if kind == "text"
    },
}

R = {"random_state": 0}
PIPELINES: dict[str, Case] = {
    "logistic regression": Case((StandardScaler(), LogisticRegression()), numbers, two),
    "logistic regression, three classes": Case((StandardScaler(), LogisticRegression()), numbers, named),
    "logistic regression of tenths": Case((LogisticRegression(max_iter=3000),), tenths, three),
    "logistic regression of columns": Case((columns(), LogisticRegression()), frame, named),
    "logistic regression of bins": Case((KBinsDiscretizer(4, quantile_method="linear"), LogisticRegression()), numbers, three),
    "logistic regression of polynomials": Case(
        (StandardScaler(), PolynomialFeatures(2), LogisticRegression(max_iter=2000)), numbers, two
    ),
    "logistic regression of components": Case((StandardScaler(), PCA(3), LogisticRegression()), numbers, three),
    "logistic regression of the best": Case((StandardScaler(), SelectKBest(k=3), LogisticRegression()), numbers, two),
    "logistic regression of quantiles": Case((QuantileTransformer(n_quantiles=50), LogisticRegression()), numbers, two),
    "logistic regression of powers": Case((PowerTransformer(), LogisticRegression()), numbers, two),
    "logistic regression of imputed": Case((SimpleImputer(add_indicator=True), LogisticRegression()), gaps, three),
    "ridge classifier": Case((StandardScaler(), RidgeClassifier()), numbers, three),
    "linear support vectors": Case((StandardScaler(), LinearSVC(**R)), numbers, three),
    "support vectors": Case((StandardScaler(), SVC()), numbers, three),
    "support vectors, two classes": Case((StandardScaler(), SVC(kernel="linear")), numbers, two),
    "gradient descent, logistic": Case((StandardScaler(), SGDClassifier(loss="log_loss", **R)), numbers, three),
    "gradient descent, hinge": Case((StandardScaler(), SGDClassifier(**R)), numbers, two),
    "tree": Case((DecisionTreeClassifier(max_depth=5, **R),), grid, three),
    "tree with gaps": Case((DecisionTreeClassifier(max_depth=5, **R),), gaps, three),
    "tree of tenths": Case((DecisionTreeClassifier(**R),), tenths, named),
    "tree of scaled": Case((StandardScaler(), DecisionTreeClassifier(**R)), tenths, two),
    "tree of columns": Case((columns(), DecisionTreeClassifier(max_depth=6, **R)), frame, named),
    "extra tree": Case((ExtraTreeClassifier(max_depth=5, **R),), grid, three),
    "forest": Case((RandomForestClassifier(20, **R),), grid, three),
    "forest with gaps": Case((RandomForestClassifier(20, **R),), gaps, two),
    "forest of scaled": Case((StandardScaler(), RandomForestClassifier(30, **R)), numbers, named),
    "forest of columns": Case((columns(sparse_output=False), RandomForestClassifier(20, **R)), frame, three),
    "forest of one class": Case((RandomForestClassifier(5, **R),), grid, one),
    "extra trees": Case((ExtraTreesClassifier(20, **R),), grid, three),
    "boosted": Case((GradientBoostingClassifier(n_estimators=20, **R),), tenths, three),
    "boosted, two classes": Case((StandardScaler(), GradientBoostingClassifier(n_estimators=20, **R)), numbers, two),
    "histograms": Case((HistGradientBoostingClassifier(max_iter=20, **R),), gaps, three),
    "histograms of tenths": Case((HistGradientBoostingClassifier(max_iter=20, **R),), tenths, two),
    "histograms of epochs": Case((HistGradientBoostingClassifier(max_iter=20, **R),), epochs, two),
    "histograms of scaled": Case((StandardScaler(), HistGradientBoostingClassifier(max_iter=20, **R)), tenths, named),
    "adaptive boosting": Case((AdaBoostClassifier(n_estimators=10, **R),), numbers, two),
    "bagged trees": Case((BaggingClassifier(DecisionTreeClassifier(), 10, **R),), grid, three),
    "one against the rest": Case((OneVsRestClassifier(LogisticRegression()),), grid, three),
    "one tree against the rest": Case((OneVsRestClassifier(DecisionTreeClassifier(**R)),), grid, three),
    "voting": Case(
        (StandardScaler(), VotingClassifier([("a", LogisticRegression()), ("b", GaussianNB())], voting="soft")), numbers, three
    ),
    "stacked": Case(
        (StackingClassifier([("a", LogisticRegression()), ("b", DecisionTreeClassifier(max_depth=3, **R))]),), grid, two
    ),
    "calibrated": Case((StandardScaler(), CalibratedClassifierCV(LinearSVC(**R))), numbers, two),
    "Gaussian naive Bayes": Case((StandardScaler(), GaussianNB()), numbers, three),
    "multinomial naive Bayes": Case((MultinomialNB(),), counts, three),
    "Bernoulli naive Bayes": Case((BernoulliNB(),), counts, two),
    "neighbours": Case((StandardScaler(), KNeighborsClassifier(4)), numbers, three),
    "neighbours on a grid": Case((KNeighborsClassifier(5),), numbers, two),
    "centroids": Case((StandardScaler(), NearestCentroid()), numbers, three),
    "network": Case((StandardScaler(), MLPClassifier((8,), max_iter=2000, **R)), numbers, three),
    "words": Case((CountVectorizer(), MultinomialNB()), texts, two),
    "weighted words": Case((TfidfVectorizer(), LogisticRegression()), texts, named),
    "components of words": Case((TfidfVectorizer(), TruncatedSVD(4, **R), LogisticRegression()), texts, two),
    "linear regression": Case((StandardScaler(), LinearRegression()), numbers, amount),
    "linear regression far from zero": Case((StandardScaler(), LinearRegression()), numbers, far_amount),
    "ridge": Case((columns(), Ridge()), frame, amount),
    "lasso": Case((RobustScaler(), Lasso(0.1)), numbers, amount),
    "elastic net": Case((MinMaxScaler(), ElasticNet(0.01)), numbers, amount),
    "Bayesian ridge": Case((StandardScaler(), BayesianRidge()), numbers, amount),
    "Huber": Case((StandardScaler(), HuberRegressor()), numbers, amount),
    "Poisson": Case((StandardScaler(), PoissonRegressor()), numbers, positive),
    "support vector regression": Case((StandardScaler(), SVR()), numbers, amount),
    "tree regression": Case((DecisionTreeRegressor(**R),), gaps, amount),
    "tree regression far from zero": Case((DecisionTreeRegressor(**R),), tenths, far_amount),
    "forest regression": Case((RandomForestRegressor(20, **R),), gaps, amount),
    "extra trees regression": Case((ExtraTreesRegressor(20, **R),), grid, far_amount),
    "boosted regression": Case((GradientBoostingRegressor(n_estimators=20, **R),), tenths, amount),
    "histogram regression": Case((HistGradientBoostingRegressor(max_iter=20, **R),), epochs, amount),
    "histogram regression of columns": Case(
        (
            make_column_transformer(
                (OrdinalEncoder(handle_unknown="use_encoded_value", unknown_value=-1), ["city"]),
                ("passthrough", ["age", "income", "rooms"]),
            ),
            HistGradientBoostingRegressor(max_iter=20, **R),
        ),
        frame,
        far_amount,
    ),
    "bagged regression": Case((BaggingRegressor(DecisionTreeRegressor(), 10, **R),), grid, amount),
    "voting regression": Case(
        (VotingRegressor([("a", LinearRegression()), ("b", DecisionTreeRegressor(max_depth=3, **R))]),), numbers, amount
    ),
    "neighbour regression": Case((StandardScaler(), KNeighborsRegressor(3)), numbers, amount),
    "network regression": Case((StandardScaler(), MLPRegressor(hidden_layer_sizes=(8,), max_iter=3000, **R)), numbers, amount),
}

CASES: dict[str, Case | EstimatorCase] = {**PIPELINES, **ESTIMATORS}
