"""Pipelines as people write them, published and served: the answers over REST and gRPC, merged under load, are scikit-learn's.

A tenth of the rows are hard. What the pipeline refuses, the service has to refuse, or the row is not sent.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import pytest

from splitserve import publish
from splitserve.client import Client
from splitserve.publishing.hard_rows import splits_of
from tests.publishing.pipelines import CASES, Case
from tests.system.processes import System

TOLERANCE = 1e-4
N_ROWS, N_ROWS_LONG = 200, 10_000
SOME = list(CASES)[::5]
"""What is served in every run; `make test-long` serves all."""


class Served(NamedTuple):
    """Clients of a running system by protocol, and fitted pipelines with the rows of training."""

    clients: dict[str, Client]
    pipelines: dict[str, tuple[Any, Any]]


def model_of(case: str) -> str:
    return f"m{list(CASES).index(case)}"


@contextmanager
def serving(folder: Path, cases: list[str], *, is_fused: bool) -> Iterator[Served]:
    fitted = {}
    for case in cases:
        pipeline, rows = CASES[case].fitted()
        publish(pipeline, rows, name=model_of(case), repository=folder)
        fitted[case] = (pipeline, rows)
    running = System(folder, is_fused=is_fused).wait_until_settled()
    rest, grpc = Client(f"http://{running.http}", timeout_s=120), Client(running.grpc, timeout_s=120)
    with rest, grpc:
        yield Served({"REST": rest, "gRPC": grpc}, fitted)
    running.stop()


@pytest.fixture(scope="module")
def system(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """Some of the pipelines, served in one process."""
    with serving(tmp_path_factory.mktemp("models"), SOME, is_fused=True) as served:
        yield served


@pytest.fixture(scope="module")
def whole_system(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """All pipelines, served split."""
    with serving(tmp_path_factory.mktemp("models"), list(CASES), is_fused=False) as served:
        yield served


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


def differences(found: Any, expected: dict[str, np.ndarray]) -> str:
    """What is wrong; "" if nothing."""
    if "label" in expected:
        wrong = [
            row
            for row, (have, want) in enumerate(zip(map(text, found["label"].tolist()), expected["label"].tolist(), strict=True))
            if have != want
        ]
        if wrong:
            return f"{len(wrong)} wrong labels, the first in row {wrong[0]}"
    for name in ("probabilities", "prediction"):
        if name in expected:
            want = np.asarray(expected[name], np.float64)
            have = found[name].reshape(want.shape).astype(np.float64)
            middle = np.median(want)
            scale = (
                1.0
                if name == "probabilities"
                else np.maximum(np.percentile(want, 95) - np.percentile(want, 5), np.abs(want - middle))
            )
            worst = np.nanmax(np.where(have == want, 0, np.abs(have - want) / scale))
            if not worst <= TOLERANCE:
                return f"{name} differ by {worst:.1e}"
    return ""


def check(served: Served, case: str, n_rows: int) -> None:
    """Over both protocols at once, in many small requests, which the proxy merges."""
    pipeline, trained = served.pipelines[case]
    rows = held_out(CASES[case], pipeline, trained, n_rows)
    chosen = accepted(pipeline, rows)
    sent = taken(rows, chosen)
    expected = answers(pipeline, sent)
    assert expected is not None
    assert len(chosen) > 0.85 * n_rows
    payload = sent if isinstance(sent, pd.DataFrame) or sent.dtype != object else sent.reshape(-1, 1)
    found: dict[str, Any] = {}

    def ask(protocol: str, client: Client) -> None:
        try:
            found[protocol] = client.infer(model_of(case), payload, chunk_rows=7, concurrency=16)
        except Exception as error:
            found[protocol] = error

    threads = [threading.Thread(target=ask, args=each) for each in served.clients.items()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    for protocol in served.clients:
        assert not isinstance(found[protocol], Exception), (protocol, found[protocol])
        assert not differences(found[protocol], expected), protocol


def test_there_are_sixty_kinds() -> None:
    assert len(CASES) >= 60
    assert len(SOME) > 10


@pytest.mark.parametrize("case", SOME)
def test_a_served_pipeline_answers_as_scikit_learn(system: Served, case: str) -> None:
    check(system, case, N_ROWS)


@pytest.mark.long
@pytest.mark.parametrize("case", CASES)
def test_every_served_pipeline_answers_as_scikit_learn_to_many_rows(whole_system: Served, case: str) -> None:
    check(whole_system, case, N_ROWS_LONG)
