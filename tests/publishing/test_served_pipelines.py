"""Pipelines as people write them, published and served: the answers over REST and gRPC, merged under load, are scikit-learn's.

A tenth of the rows are hard. What the pipeline refuses, the service has to refuse, or the row is not sent.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from splitserve import publish
from splitserve.client import Client
from splitserve.publishing.convert import expected_of, outputs_of
from splitserve.publishing.hard_rows import splits_of
from tests.publishing.pipelines import CASES, ESTIMATORS, PIPELINES, Case
from tests.system.processes import System

TOLERANCE = 1e-4
N_ROWS, N_ROWS_LONG = 200, 10_000
SOME = list(PIPELINES)[::5]
"""What is served in every run; `make test-long` serves all."""
N_ROWS_OF_REQUEST = {"gRPC": 7, "REST": 11}
N_ROWS_OF_REQUEST_LONG = {"gRPC": 37, "REST": 101}


def held_out(case: Case, pipeline: Any, trained: Any, n_rows: int) -> Any:
    """Rows that training did not have, every tenth made difficult in one or two of its columns."""
    random = np.random.default_rng(11)
    rows = case.rows(n_rows, 99)
    if isinstance(rows, pd.DataFrame):
        hard = {name: strange_values(trained[name].to_numpy(), []) for name in rows.columns}
        for row in range(0, n_rows, 10):
            for name in random.choice(rows.columns, 2):
                if hard[name]:
                    rows.loc[row, name] = hard[name][random.integers(len(hard[name]))]
        return rows
    if rows.dtype == object:
        rows[::10] = random.choice(np.array(["", "unseen", "good good bad", "GOOD film", "é"], object), len(rows[::10]))
        return rows
    has_steps = len(pipeline.steps) > 1
    splits = [] if has_steps else splits_of(pipeline.steps[-1][1], rows.shape[1])
    for row in range(0, n_rows, 10):
        for column in random.choice(rows.shape[1], 2):
            values = strange_values(trained[:, column], [at for feature, at in splits if feature == column])
            rows[row, column] = values[random.integers(len(values))]
    return rows


def strange_values(known: np.ndarray, thresholds: list[float]) -> list[Any]:
    """Missing, unseen, extreme, far, zero, another row's, at a threshold and beside it."""
    if known.dtype.kind == "O":
        return [None, "Atlantis"]
    if known.dtype.kind == "b":
        return []
    low, high = float(np.nanmin(known)), float(np.nanmax(known))
    if known.dtype.kind in "iu":
        return [int(low), int(high), int(high + 10 * (high - low))]
    near = [beside for at in thresholds for beside in (np.nextafter(at, -np.inf), at, np.nextafter(at, np.inf), np.float32(at))]
    seen = known[np.isfinite(known)][:20].tolist()
    return [np.nan, low, high, low - 10 * (high - low), high + 10 * (high - low), 0.0, *map(float, near), *seen]


def accepted(pipeline: Any, rows: Any) -> np.ndarray:
    """Numbers of the rows that the pipeline does not refuse: refused are some of every tenth."""
    fine = [row for row in range(len(rows)) if row % 10]
    hard = [row for row in range(0, len(rows), 10) if answers(pipeline, taken(rows, [row])) is not None]
    return np.array(sorted([*fine, *hard]))


def taken(rows: Any, chosen: Any) -> Any:
    return rows.iloc[chosen] if isinstance(rows, pd.DataFrame) else rows[chosen]


def answers(pipeline: Any, rows: Any) -> dict[str, np.ndarray] | None:
    """The pipeline's own, None if it refuses a row."""
    try:
        with warnings.catch_warnings(), np.errstate(all="ignore"):
            warnings.simplefilter("ignore")
            predicted = pipeline.predict(rows)
            if not hasattr(pipeline, "classes_"):
                return {"prediction": predicted}
            found = {"label": predicted}
            if hasattr(pipeline, "predict_proba"):
                found["probabilities"] = pipeline.predict_proba(rows)
            return found
    except ValueError:
        return None


def text(label: Any) -> Any:
    return label.decode() if isinstance(label, bytes) else label


def expected_answers(case: str, pipeline: Any, rows: Any) -> Mapping[str, np.ndarray]:
    """The pipeline's own: of estimators also scores, and labels and probabilities by target."""
    if case in PIPELINES:
        found = answers(pipeline, rows)
        assert found is not None, case
        return found
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        return expected_of(pipeline, rows, outputs_of(pipeline))


def differences(found: Mapping[str, Any], expected: Mapping[str, np.ndarray]) -> list[str]:
    """Wrong labels, and numbers that are off by more than the tolerance."""
    said = []
    for name, array in found.items():
        if name.startswith("label"):
            want = np.asarray(expected[name]).ravel().tolist()
            wrong = [
                row for row, pair in enumerate(zip(map(text, array.ravel().tolist()), want, strict=True)) if pair[0] != pair[1]
            ]
            said += [f"{len(wrong)} wrong in {name}, the first in row {wrong[0]}"] if wrong else []
            continue
        want = np.asarray(expected[name], np.float64)
        have = array.reshape(want.shape).astype(np.float64)
        spread = float(np.nanpercentile(want, 95) - np.nanpercentile(want, 5)) or 1.0
        scale = 1.0 if name.startswith("probabilities") else np.fmax(spread, np.abs(want - np.nanmedian(want)))
        is_same = (have == want) | (np.isnan(have) & np.isnan(want))
        worst = float(np.where(is_same, 0, np.abs(have - want) / scale).max())
        said += [] if worst <= TOLERANCE else [f"{name} differ by {worst:.1e}"]
    return said


def check(folder: Path, cases: list[str], *, n_rows: int, sizes: Mapping[str, int], is_fused: bool) -> None:
    """Publish and serve; ask over both protocols at once, in many requests, which the proxy merges.

    Args:
        folder: of the repository.
        cases: which.
        n_rows: that each is asked.
        sizes: rows of a request, by protocol; they differ so that merged calls have requests of both.
        is_fused: in one process.
    """
    fitted = {}
    for case in cases:
        fitted[case] = CASES[case].fitted()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            publish(*fitted[case], name=model_of(case), repository=folder)

    patience = {"PROXY_MAX_QUEUE_WAIT_MS": "60000", "PREDICT_MAX_QUEUE_WAIT_MS": "60000"}  # however busy the machine
    system = System(folder, is_fused=is_fused, **patience)
    complaints, n_requests, n_runs = [], 0, 0
    try:
        system.wait_until_settled()
        with Client(system.grpc, timeout_s=120) as grpc, Client(f"http://{system.http}", timeout_s=120) as rest:
            for case, (pipeline, trained) in fitted.items():
                sent, expected = asked(case, pipeline, trained, n_rows)
                found = answered({"gRPC": grpc, "REST": rest}, model_of(case), sent, sizes)
                for protocol, answer in found.items():
                    said = [repr(answer)] if isinstance(answer, Exception) else differences(answer, expected)
                    complaints += [f"{case} over {protocol}: {each}" for each in said]
                statistics = system.rest(f"/v2/models/{model_of(case)}/stats")[1]["model_stats"][0]
                n_requests += statistics["inference_stats"]["success"]["count"]
                n_runs += statistics["execution_count"]
    finally:
        system.stop()

    assert complaints == []
    assert n_requests >= len(cases) * sum(n_rows * 0.85 // size for size in sizes.values())
    assert n_runs < n_requests  # some were merged


def model_of(case: str) -> str:
    return f"m{list(CASES).index(case)}"


def asked(case: str, pipeline: Any, trained: Any, n_rows: int) -> tuple[Any, Mapping[str, np.ndarray]]:
    """Rows that the pipeline answers, and its answers."""
    made = CASES[case]
    sent = made.rows(n_rows, 99)
    if isinstance(made, Case):
        rows = held_out(made, pipeline, trained, n_rows)
        chosen = accepted(pipeline, rows)
        assert len(chosen) > 0.85 * n_rows
        sent = taken(rows, chosen)
    return sent, expected_answers(case, pipeline, sent)


def answered(clients: Mapping[str, Client], model: str, sent: Any, sizes: Mapping[str, int]) -> dict[str, Any]:
    """Answers or errors by protocol, which are asked at once."""
    payload = sent if isinstance(sent, pd.DataFrame) or sent.dtype != object else sent.reshape(-1, 1)
    found: dict[str, Any] = {}

    def ask(protocol: str) -> None:
        try:
            client = clients[protocol]
            found[protocol] = client.infer(model, payload, chunk_rows=sizes[protocol], concurrency=16)
        except Exception as error:
            found[protocol] = error

    threads = [threading.Thread(target=ask, args=(protocol,)) for protocol in clients]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def test_there_are_sixty_kinds() -> None:
    assert len(PIPELINES) >= 60
    assert len(ESTIMATORS) > 100
    assert len(SOME) > 10


def test_served_pipelines_answer_as_scikit_learn(tmp_path: Path) -> None:
    """Some of them."""
    check(tmp_path, SOME, n_rows=N_ROWS, sizes=N_ROWS_OF_REQUEST, is_fused=True)


@pytest.mark.long
@pytest.mark.timeout(7200)
def test_every_served_pipeline_answers_many_rows_as_scikit_learn(tmp_path: Path) -> None:
    """Served split."""
    check(tmp_path, list(CASES), n_rows=N_ROWS_LONG, sizes=N_ROWS_OF_REQUEST_LONG, is_fused=False)
