"""What one call of a preprocessor, and of its predictor, costs in µs: ``python -m benchmarks.transforms``.

Calls the objects that the services call, in one thread, without a wire: a row of the table is the median over `ROUNDS` rounds, in
which the cases alternate, so that a noisy machine affects all alike. ``--only NAME`` measures the cases whose names contain it.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import skimage.data
from sklearn.datasets import load_breast_cancer
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.impute import SimpleImputer
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from splitserve.publishing import publish, publish_preprocessor
from splitserve.repository.bundle import BundleKey
from splitserve.repository.folder import Repository
from splitserve.runtimes import predictor, preprocessor
from splitserve.runtimes.rows import to_tensors
from splitserve.tensors import Tensor
from training import demo, imagenet

N_ROWS = (1, 8, 64, 512)
ROUNDS = 15
ROUND_S = 0.02
"""A case is called for about this long in each round."""

SLOW_N_ROWS = 8
"""The most rows that pictures are measured with."""

SYLLABLES = ("ba", "do", "fe", "ki", "lu", "mo")


class TransformCase(NamedTuple):
    """Something to call, with so many rows."""

    name: str
    n_rows: int
    call: Callable[[], Any]


def scaler() -> tuple[Any, Any]:
    features, _ = load_breast_cancer(return_X_y=True)
    return StandardScaler().fit(features), features


def imputer_and_scaler() -> tuple[Any, Any]:
    features, _ = load_breast_cancer(return_X_y=True)
    features = np.where(np.random.default_rng(0).random(features.shape) < 0.05, np.nan, features)
    return make_pipeline(SimpleImputer(), StandardScaler()).fit(features), features


def tfidf() -> tuple[Any, Any]:
    """Texts of 20 words (512,)."""
    words = ["".join(word) for word in itertools.product(SYLLABLES, repeat=3)]
    texts = np.array([" ".join(row) for row in np.random.default_rng(0).choice(words, (512, 20))], dtype=np.object_)
    return TfidfVectorizer().fit(texts), texts


def pictures() -> tuple[Any, Any]:
    """JPEG files (4, 1) of about 500 x 400 pixels."""
    names = ("chelsea", "coffee", "rocket", "astronaut")
    files = [[imagenet._encode(getattr(skimage.data, name)(), "JPEG")] for name in names]
    return imagenet.transforms(), np.array(files, dtype=np.object_)


TRANSFORMS: dict[str, Callable[[], tuple[Any, Any]]] = {
    "StandardScaler, 30 floats": scaler,
    "SimpleImputer and StandardScaler": imputer_and_scaler,
    "TF-IDF": tfidf,
    "imagenet pictures": pictures,
}


def cases(repository: Path) -> list[TransformCase]:
    """The transforms alone, then the demo models: both halves, as they are loaded from their bundles."""
    found: list[TransformCase] = []
    for index, (name, make) in enumerate(TRANSFORMS.items()):
        transformer, rows = make()
        bundle = publish_preprocessor(transformer, rows, name=f"case-{index}", repository=repository)
        found += _transform_cases(name, preprocessor.load(bundle), rows)
    for name in ("penguins", "breast-cancer"):
        train, input_name = demo.DEMOS[name]
        pipeline, rows = train()
        publish(pipeline, rows, name=name, repository=repository, input_name=input_name)
        first = preprocessor.load(Repository(repository).open(BundleKey(name, "preprocess", 1)))
        second = predictor.load(Repository(repository).open(BundleKey(name, "predict", 1)))
        found += _transform_cases(name, first, rows)
        for n_rows in N_ROWS:
            features = first.transform(_sent(first, rows, n_rows))
            found.append(TransformCase(f"{name}: predictor", n_rows, partial(second.infer, features)))
    return found


def _transform_cases(name: str, loaded: Any, rows: Any) -> list[TransformCase]:
    found = []
    for n_rows in N_ROWS:
        if "pictures" in name and n_rows > SLOW_N_ROWS:
            continue
        inputs = _sent(loaded, rows, n_rows)
        found.append(TransformCase(f"{name}: preprocessor", n_rows, partial(_answer, loaded, inputs)))
    return found


def _answer(loaded: Any, inputs: tuple[Tensor, ...]) -> Any:
    return loaded.answer(loaded.transform(inputs))


def _sent(loaded: Any, rows: Any, n_rows: int) -> tuple[Tensor, ...]:
    """The tensors of a request with so many rows, repeated from the start where there are fewer."""
    indices = np.arange(n_rows) % len(rows)
    chosen = rows.iloc[indices] if hasattr(rows, "iloc") else rows[indices]
    return to_tensors(loaded.manifest.rows, loaded.inputs, chosen)


def measure(measured: list[TransformCase]) -> dict[tuple[str, int], float]:
    """Median µs a call by name and rows."""
    times: dict[tuple[str, int], list[float]] = {(case.name, case.n_rows): [] for case in measured}
    gc.disable()
    for _ in range(ROUNDS):
        for case in measured:
            times[case.name, case.n_rows].append(_time(case.call))
    return {key: statistics.median(found) for key, found in times.items()}


def _time(call: Callable[[], Any]) -> float:
    """The µs of one call: CPU time of this thread, so that other work on the machine does not count."""
    call()
    start, n_calls = time.thread_time(), 0
    while (spent := time.thread_time() - start) < ROUND_S:
        for _ in range(5):
            call()
        n_calls += 5
    return spent / n_calls * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description="What one call of a preprocessor and of a predictor costs.")
    parser.add_argument("--only", default="", help="measure the cases whose names contain this")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        measured = [case for case in cases(Path(folder)) if arguments.only in case.name]
        found = measure(measured)
    print("| µs a call, by rows | " + " | ".join(map(str, N_ROWS)) + " |")
    print("|---|" + "---|" * len(N_ROWS))
    for name in dict.fromkeys(case.name for case in measured):
        cells = [f"{found[name, n_rows]:.0f}" if (name, n_rows) in found else "" for n_rows in N_ROWS]
        print(f"| {name} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
