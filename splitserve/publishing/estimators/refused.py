"""Estimators of scikit-learn that cannot be published, each with the reason and the nearest one that can."""

from __future__ import annotations

from typing import Any

_ONLY_ITS_ROWS = (
    "has no predict: it labels the rows that it was fitted on and no others; KMeans, Birch and GaussianMixture label new rows, "
    "or fit a KNeighborsClassifier on its labels_"
)
_OF_TARGETS = "transforms y, not rows; use it in training, or OneHotEncoder and OrdinalEncoder for columns"
_NO_NEW_ROWS = "has no transform: it places the rows that it was fitted on and no others; PCA, KernelPCA, Isomap place new rows"
_DICTIONARIES = "takes dictionaries, which the wire cannot carry; OneHotEncoder on columns"

REFUSED: dict[str, str] = {
    **dict.fromkeys(
        (
            *("AgglomerativeClustering", "DBSCAN", "HDBSCAN", "OPTICS", "SpectralBiclustering", "SpectralClustering"),
            "SpectralCoclustering",
        ),
        _ONLY_ITS_ROWS,
    ),
    **dict.fromkeys(("LabelBinarizer", "LabelEncoder", "MultiLabelBinarizer"), _OF_TARGETS),
    **dict.fromkeys(("ClassicalMDS", "MDS", "SpectralEmbedding", "TSNE"), _NO_NEW_ROWS),
    **dict.fromkeys(("DictVectorizer", "FeatureHasher"), _DICTIONARIES),
    **dict.fromkeys(
        ("MiniBatchNMF", "NMF"),
        "gives a row other numbers in another batch (it iterates until the batch converges); TruncatedSVD, or row_wise=False",
    ),
    "PatchExtractor": "gives another number of rows than it gets; extract patches in training and in the client",
}
"""Why a class cannot be published, by its name."""

AS_TRANSFORM = {"Birch": "skops cannot store its tree; KMeans, or allow_pickle=True here and at the service"}
"""Why a class cannot be a step before the estimator; as the estimator it can."""

LIMITS: dict[str, str] = {
    "BaggingClassifier": "equal to the last bit with n_jobs=None",
    "DummyClassifier": "not with strategy='stratified' or 'uniform', which answer at random",
    "IsotonicRegression": "with out_of_bounds='clip' or 'nan'; 'raise' refuses rows, which a graph cannot",
    **dict.fromkeys(
        ("KNeighborsClassifier", "KNeighborsRegressor", "LocalOutlierFactor"),
        "metrics euclidean, manhattan, chebyshev, minkowski; which of several neighbours at one distance counts is not defined",
    ),
    "RadiusNeighborsClassifier": "with outlier_label: without it, rows without neighbours are refused, which a graph cannot",
    **dict.fromkeys(("SVC", "NuSVC", "SVR", "NuSVR", "OneClassSVM", "KernelRidge"), "not with a callable kernel"),
    "GaussianProcessClassifier": "stationary kernels: RBF, Matern, RationalQuadratic and what is made of them",
    "TransformedTargetRegressor": "functions of numpy (np.log1p and np.expm1, np.sqrt and np.square …), scalers, "
    "PowerTransformer, QuantileTransformer",
    "StackingClassifier": "with one target; MultiOutputClassifier(StackingClassifier(...)) for several",
}
"""What is supported of a class only in part, by its name."""


def reason_for(estimator: Any) -> str:
    """Why a fitted estimator cannot be published, and what to do; "" if nothing is known against it."""
    if not type(estimator).__module__.startswith("sklearn."):
        return ""
    name = type(estimator).__name__
    if name == "DummyClassifier" and estimator.strategy in ("stratified", "uniform"):
        return f"strategy={estimator.strategy!r} answers at random; strategy='prior' gives the classes' shares"
    if name == "LocalOutlierFactor" and not estimator.novelty:
        return "judges the rows that it was fitted on and no others; fit it with novelty=True"
    return REFUSED.get(name, "")
