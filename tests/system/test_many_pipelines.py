"""Every kind of estimator, published and served by processes, answers as scikit-learn does: over both faces at once, merged."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.pipeline import make_pipeline

from splitserve import Client, publish
from splitserve.publishing.convert import expected_of
from tests.publishing import estimator_cases as cases
from tests.system.processes import System, wait_until

N_ROWS = 10_000
MIXED_SIZES = {"grpc": 37, "rest": 101}
"""Rows of a request over each face, so that merged calls have rows of both."""


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_every_estimator_answers_ten_thousand_rows_as_scikit_learn(tmp_path: Path) -> None:
    """A tenth of them ten times farther out than those of training; no label is wrong."""
    fitted: dict[str, Any] = {}
    for name, (estimator, x) in kinds():
        fitted[name] = make_pipeline(estimator)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            publish(fitted[name], x, name=name, repository=tmp_path)

    system = System(tmp_path, is_fused=True, PROXY_MAX_QUEUE_WAIT_MS="60000")  # however busy the machine
    complaints, n_requests, n_calls = [], 0, 0
    try:
        wait_until(lambda: all(system.rest(f"/v2/models/{name}/ready")[0] == 200 for name in fitted), "all models")
        with Client(system.grpc) as by_grpc, Client(f"http://{system.http}") as by_rest, ThreadPoolExecutor(2) as threads:
            for name, pipeline in fitted.items():
                asked = rows(name)
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    expected = expected_of(pipeline, asked)
                answers = [
                    threads.submit(client.infer, name, {"features": asked}, chunk_rows=MIXED_SIZES[face])
                    for face, client in (("grpc", by_grpc), ("rest", by_rest))
                ]
                for face, answer in zip(MIXED_SIZES, answers, strict=True):
                    complaints += [f"{name} over {face}: {each}" for each in differences(answer.result(), expected)]
                statistics = system.rest(f"/v2/models/{name}/stats")[1]["model_stats"][0]
                n_requests += statistics["inference_stats"]["success"]["count"]
                n_calls += statistics["execution_count"]
    finally:
        system.stop()

    assert complaints == []
    assert n_calls < n_requests  # some were merged


def kinds() -> Iterator[tuple[str, tuple[Any, np.ndarray]]]:
    """Each class of scikit-learn, and more kinds with text for classes: a name, fitted on which rows."""
    for name in cases.with_predict():
        yield name, cases.fitted(name, n_rows=120)
    x = cases.rows("", 120)
    for number, (estimator, kind) in enumerate(cases.VARIANTS.values()):
        if kind == "text":
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                yield f"text-{number}-{type(estimator).__name__}", (estimator.fit(x, cases.TARGETS[kind](x)), x)


def rows(name: str) -> np.ndarray:
    asked = cases.rows(name, N_ROWS, seed=1)
    if name not in cases.COUNTS:
        asked[::10] *= 10
    return asked


def differences(found: Mapping[str, np.ndarray], expected: Mapping[str, np.ndarray]) -> list[str]:
    """Wrong labels, and numbers that are off by more than 1e-4 of their spread."""
    said = []
    for name, array in found.items():
        want = np.asarray(expected[name]).reshape(array.shape)
        if name.startswith("label"):
            texts = [each.decode() if isinstance(each, bytes) else each for each in array.ravel().tolist()]
            n_wrong = sum(have != right for have, right in zip(texts, want.ravel().tolist(), strict=True))
            said += [f"{n_wrong} wrong in {name}"] if n_wrong else []
        else:
            off = np.abs(array - want)
            off[np.isnan(array) & np.isnan(want)] = 0
            scale = 1.0 if name.startswith("probabilities") else float(np.nanmax(want) - np.nanmin(want)) or 1.0
            worst = float(off.max() / scale)
            said += [] if worst <= 1e-4 else [f"{name} is off by {worst:.1e}"]
    return said
