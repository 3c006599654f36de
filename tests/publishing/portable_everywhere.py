"""Publishes transforms of every kind with the scikit-learn that is installed, with what it answers to hard rows; and checks that
their plans answer the same elsewhere.

``publish FOLDER`` runs in an environment that has scikit-learn and what publishing needs, ``check FOLDER`` anywhere.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from splitserve.arrays import from_array, to_array
from splitserve.errors import InvalidInput
from splitserve.repository import golden as goldens
from splitserve.repository.bundle import BundleKey
from splitserve.repository.folder import Repository
from splitserve.repository.golden import Golden
from splitserve.runtimes import preprocessor
from splitserve.runtimes.plans.files import OPERATIONS
from splitserve.tensors import Tensor

N_TRAIN = 200
N_ULPS = 4
NOTES = ("A small bird, a bird!", "it flew", "Über den Café-Dächern", "", "bird bird flew away", "x  y", "good film not bad")


def transformers() -> Iterator[tuple[str, Any, Any]]:
    """Name, transformer, and rows that it is fitted on."""
    import pandas as pd
    from sklearn import preprocessing as p
    from sklearn.compose import make_column_transformer as columns
    from sklearn.decomposition import PCA, TruncatedSVD
    from sklearn.feature_extraction.text import CountVectorizer, HashingVectorizer, TfidfVectorizer
    from sklearn.feature_selection import VarianceThreshold
    from sklearn.impute import KNNImputer, MissingIndicator, SimpleImputer
    from sklearn.pipeline import FeatureUnion
    from sklearn.pipeline import make_pipeline as steps

    random = np.random.default_rng(0)
    X = random.normal(size=(N_TRAIN, 5)) * [1, 10, 0.1, 100, 1] + [0, 5, 0, 50, -3]
    gaps = np.where(random.random(X.shape) < 0.1, np.nan, X)
    frame = pd.DataFrame(
        {
            "age": np.where(random.random(N_TRAIN) < 0.1, np.nan, random.integers(18, 90, N_TRAIN)),
            "income": random.lognormal(10, 1, N_TRAIN),
            "city": pd.Series(
                np.where(random.random(N_TRAIN) < 0.1, None, random.choice(["Oslo", "Lima", "Bonn"], N_TRAIN)), dtype=object
            ),
            "rooms": random.integers(1, 7, N_TRAIN),
            "is_new": random.random(N_TRAIN) < 0.5,
        }
    )
    texts = np.array([NOTES[place] for place in random.integers(0, len(NOTES), N_TRAIN)], dtype=object)
    of_city = steps(SimpleImputer(strategy="most_frequent"), p.OneHotEncoder(handle_unknown="ignore"))
    of_arrays = {
        "standard": (p.StandardScaler(), X),
        "min-max": (p.MinMaxScaler(clip=True), gaps),
        "max-abs": (p.MaxAbsScaler(), gaps.astype(np.float32)),
        "robust": (p.RobustScaler(), gaps),
        "normalizer": (p.Normalizer(), X),
        "binarizer": (p.Binarizer(threshold=0.5), X),
        "power": (p.PowerTransformer(), gaps),
        "box-cox": (p.PowerTransformer("box-cox"), np.abs(X) + 0.5),
        "quantiles": (p.QuantileTransformer(n_quantiles=50), gaps),
        "normal-quantiles": (p.QuantileTransformer(n_quantiles=50, output_distribution="normal"), X),
        "bins": (p.KBinsDiscretizer(4, strategy="uniform"), X),
        "ordinal-bins": (p.KBinsDiscretizer(3, strategy="kmeans", encode="ordinal"), X),
        "polynomials": (steps(p.StandardScaler(), p.PolynomialFeatures(2)), X),
        "imputer": (SimpleImputer(add_indicator=True), gaps),
        "neighbours": (KNNImputer(n_neighbors=3), gaps),
        "indicator": (steps(MissingIndicator(error_on_new=False), p.MaxAbsScaler()), gaps),
        "union": (FeatureUnion([("a", p.StandardScaler()), ("b", VarianceThreshold())]), X),
        "components": (steps(p.StandardScaler(), PCA(3)), X),
        "whitened": (PCA(2, whiten=True), X),
        "decomposition": (TruncatedSVD(2, random_state=0), X),
        "logarithm": (p.FunctionTransformer(np.log1p), np.abs(X)),
        "root": (p.FunctionTransformer(np.sqrt), np.abs(X)),
        "words": (CountVectorizer(), texts),
        "weighted-words": (TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True), texts),
        "characters": (TfidfVectorizer(analyzer="char_wb", ngram_range=(2, 4), strip_accents="unicode"), texts),
        "hashed-words": (steps(HashingVectorizer(n_features=64), p.MaxAbsScaler()), texts),
        "components-of-words": (steps(TfidfVectorizer(), TruncatedSVD(3, random_state=0)), texts),
        "columns": (
            columns(
                (steps(SimpleImputer(), p.StandardScaler()), ["age", "income", "rooms"]),
                (of_city, ["city"]),
                ("passthrough", ["is_new"]),
            ),
            frame,
        ),
        "strict-columns": (columns((p.OneHotEncoder(drop="first"), ["city"]), (p.RobustScaler(), ["income"])), frame),
        "ordinal-columns": (
            columns(
                (p.OrdinalEncoder(handle_unknown="use_encoded_value", unknown_value=-1), ["city", "rooms"]),
                ("passthrough", ["age"]),
            ),
            frame,
        ),
        "rare-columns": (
            columns((p.OneHotEncoder(min_frequency=50, handle_unknown="infrequent_if_exist"), ["city", "rooms"])),
            frame,
        ),
        "targets": (columns((p.TargetEncoder(random_state=0), ["city", "rooms"])), frame),
    }
    for name, (transformer, rows) in of_arrays.items():
        yield name, transformer.fit(rows, np.arange(N_TRAIN) % 2), rows


def publish(folder: Path) -> None:
    """Publish each, and store what scikit-learn answers: ``NAME.npz``, and the rows that it refuses: ``NAME.refused.npz``."""
    import sklearn

    from splitserve import publish_preprocessor
    from splitserve.publishing import hard_rows
    from splitserve.publishing.compile import odd_rows
    from splitserve.runtimes import sklearn_pipeline
    from splitserve.runtimes.preprocessor import Preprocessor, to_dense
    from splitserve.runtimes.rows import to_rows, to_tensors

    counts = {}
    for name, transformer, rows in transformers():
        bundle = publish_preprocessor(
            transformer, rows, name=name, repository=folder / "models", precision="FP64", row_wise=False
        )
        manifest = bundle.manifest
        assert manifest.rows is not None
        training = to_tensors(manifest.rows, manifest.inputs, rows)
        blocks = [[to_array(each) for each in odd_rows(manifest.inputs, Golden(training, ()))]]
        blocks += [list(block.arrays) for block in hard_rows.of_raw(training, manifest.rows, manifest.inputs).blocks()]
        joined = [np.concatenate(parts) for parts in zip(*blocks, strict=True)]
        loaded = sklearn_pipeline.load(bundle.read("pipeline.skops"))
        check = Preprocessor(manifest, loaded)
        answered, answers, refused = [], [], []
        for row in range(len(joined[0])):
            tensors = tensors_of(manifest, [array[row : row + 1] for array in joined])
            try:
                check.transform(tensors)
                with np.errstate(all="ignore"):
                    answers.append(to_dense(sklearn_pipeline.transform(loaded, to_rows(manifest.rows, manifest.inputs, tensors))))
                answered.append(row)
            except InvalidInput:
                refused.append(row)
        outputs = (from_array("features", np.concatenate(answers)),)
        inputs = tensors_of(manifest, [array[answered] for array in joined])
        (folder / f"{name}.npz").write_bytes(goldens.encode(Golden(inputs, outputs)))
        (folder / f"{name}.refused.npz").write_bytes(
            goldens.encode(Golden(tensors_of(manifest, [array[refused] for array in joined]), ()))
        )
        counts[name] = (bool(manifest.portable), manifest.not_portable, len(answered), len(refused))
    print(msgspec.json.encode({"scikit-learn": sklearn.__version__, "counts": counts}).decode())


def tensors_of(manifest: Any, arrays: list[Any]) -> tuple[Tensor, ...]:
    return tuple(from_array(spec.name, array, spec.datatype) for spec, array in zip(manifest.inputs, arrays, strict=True))


def check(folder: Path) -> None:
    """Load each bundle by its plan, and print how many of the answers differ: in bits, or of rounded operations by more than 4
    units in the last place, or of refusals; and whether scikit-learn was imported. Rows are alone, as they were for scikit-learn.
    """
    differ, n_rows, worst = {}, 0, 0.0
    for path in sorted((folder / "models").iterdir()):
        bundle = Repository(folder / "models").open(BundleKey(path.name, "preprocess", 1))
        loaded = preprocessor.load(bundle)
        assert loaded.runtime == "plan", (path.name, loaded.warnings)
        plan = msgspec.json.decode(bundle.read("plan.json"))
        is_exact = all(OPERATIONS[step["operation"]].IS_EXACT for step in plan["steps"])
        spec = msgspec.structs.replace(bundle.manifest.outputs[0], name="features")
        stored = goldens.decode((folder / f"{path.name}.npz").read_bytes(), bundle.manifest.inputs, (spec,))
        found = np.concatenate([to_array(loaded.transform(one)[0]) for one in rows_of(stored.inputs)])
        want = to_array(stored.outputs[0]).astype(np.float64)
        same = (found == want) & (np.signbit(found) == np.signbit(want)) | (np.isnan(found) & np.isnan(want))
        if not is_exact:
            with np.errstate(all="ignore"):
                off = np.abs(found - want) / np.spacing(np.maximum(np.abs(found), np.abs(want)))
                same |= (off <= N_ULPS) | (found == want)
                scale = np.abs(want[np.isfinite(want)]).max(initial=1)
                worst = max(worst, float(np.nanmax(np.where(np.isfinite(want), np.abs(found - want) / scale, 0), initial=0)))
        refused = goldens.decode((folder / f"{path.name}.refused.npz").read_bytes(), bundle.manifest.inputs, ())
        n_taken = sum(taken(loaded, one) for one in rows_of(refused.inputs))
        n_rows += len(want) + refused.inputs[0].n_rows
        if not same.all() or n_taken:
            differ[path.name] = [int((~same.all(axis=1)).sum()), n_taken, is_exact]
    imported = [name for name in ("sklearn", "skops", "pandas", "scipy") if name in sys.modules]
    print(msgspec.json.encode({"differ": differ, "rows": n_rows, "worst": worst, "imported": imported}).decode())


def rows_of(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Each row alone."""
    arrays = [to_array(tensor) for tensor in tensors]
    for row in range(len(arrays[0])):
        yield [from_array(each.name, array[row : row + 1], each.datatype) for each, array in zip(tensors, arrays, strict=True)]


def taken(loaded: Any, tensors: Sequence[Tensor]) -> bool:
    """Whether a row is answered that scikit-learn refuses."""
    try:
        loaded.transform(tensors)
    except InvalidInput:
        return False
    return True


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    {"publish": publish, "check": check}[sys.argv[1]](Path(sys.argv[2]))
