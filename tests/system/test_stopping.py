"""Stopping by a real signal: calls in flight are answered, later ones are refused."""

from __future__ import annotations

import signal
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from splitserve import Client, publish_predictor, publish_preprocessor, release
from tests.system.gated import HELD, Gate
from tests.system.models import slow_model, softmax_model
from tests.system.processes import UNRELEASED, Process, System, wait_until

N_FEATURES = 3
HELD_ROW = [HELD] * N_FEATURES
GATED = "tests.system.gated"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where the gate leaves its files and where the models are."""
    zeros = np.zeros((2, N_FEATURES), np.float32)
    gate = Gate(str(tmp_path))
    publish_preprocessor(gate, zeros, name="gated", repository=tmp_path / "models", trusted_modules=[GATED])
    publish_predictor(softmax_model(N_FEATURES), zeros, name="gated", repository=tmp_path / "models")
    release("gated", "1.1", repository=tmp_path / "models", accept_unknown_features=True, trusted_modules=[GATED])
    return tmp_path


@contextmanager
def gated_system(folder: Path, **settings: Any) -> Iterator[System]:
    """A system with a gated model, which is released at the end."""
    root = str(Path(__file__).parents[2])
    system = System(folder / "models", PREPROCESS_TRUSTED_MODULES=GATED, PYTHONPATH=root, **settings)
    try:
        yield system.wait_until_settled()
    finally:
        (folder / "released").touch()
        system.stop()


def over_rest(system: System) -> Any:
    status, answer = system.rest("/v1/models/gated:predict", {"instances": [HELD_ROW]})
    return status == 200 and answer["predictions"]


def over_grpc(system: System) -> Any:
    with Client(system.grpc, max_attempts=1) as client:
        return client.infer("gated", {"features": np.array([HELD_ROW], np.float32)})["scores"].tolist()


@pytest.mark.parametrize(("is_fused", "number"), [(False, signal.SIGTERM), (True, signal.SIGINT)])
def test_the_edge_answers_what_is_in_flight_and_then_stops(folder: Path, is_fused: bool, number: int) -> None:
    """Not ready first, then the calls in flight are answered on both faces, then exit status 0 and nothing listens."""
    with gated_system(folder, is_fused=is_fused, PROXY_DRAIN_DELAY_S="1") as system, ThreadPoolExecutor() as pool:
        edge = system.processes["fused" if is_fused else "proxy"]
        answers = [pool.submit(call, system) for call in (over_rest, over_grpc)]
        wait_until(lambda: len(list(folder.glob("entered-*"))) == 2, "both calls in flight")

        edge.signal(number)
        edge.wait_for("draining")
        ready, reason = system.rest("/v2/health/ready")
        (folder / "released").touch()

        assert [np.shape(answer.result()) for answer in answers] == [(1, 2), (1, 2)]
        assert (ready, reason["error"]) == (503, "draining")
        assert edge.wait() == 0
        host, port = system.http.split(":")
        with pytest.raises(OSError, match="refused"):
            socket.create_connection((host, int(port)), timeout=1)


def test_preprocess_answers_what_is_in_flight(folder: Path) -> None:
    """The stage behind the edge drains too."""
    with gated_system(folder) as system, ThreadPoolExecutor() as pool:
        answer = pool.submit(over_rest, system)
        wait_until(lambda: list(folder.glob("entered-*")), "the call in flight")

        system.processes["preprocess"].signal()
        system.processes["preprocess"].wait_for("draining")
        (folder / "released").touch()

        assert np.shape(answer.result()) == (1, 2)
        assert system.processes["preprocess"].wait() == 0


def test_predict_answers_what_is_in_flight(tmp_path: Path) -> None:
    """A model that is running when the signal comes runs to its end, and its answer is sent."""
    zeros = np.zeros((1, N_FEATURES), np.float32)
    publish_predictor(slow_model(N_FEATURES, n_rounds=3000), zeros, name="slow", repository=tmp_path)
    process = Process("predict_service", {"MODEL_REPOSITORY": str(tmp_path), "PREDICT_GRPC_PORT": "0", **UNRELEASED})
    port = process.wait_for("listening")["grpc_port"]
    process.wait_for("ready")
    idle = process.cpu_s()
    with Client(f"127.0.0.1:{port}") as client, ThreadPoolExecutor() as pool:
        answer = pool.submit(client.infer, "slow", {"features": np.ones((1, N_FEATURES), np.float32)})
        wait_until(lambda: answer.done() or process.cpu_s() > idle + 0.3, "the model running")

        process.signal()
        process.wait_for("draining")

        assert not answer.done()
        assert answer.result()["scores"].tolist() == [[1.0] * N_FEATURES]
        assert process.wait() == 0


def test_a_second_signal_ends_a_service_at_once(folder: Path) -> None:
    """A second signal does not wait for calls in flight."""
    with gated_system(folder, is_fused=True) as system, ThreadPoolExecutor() as pool:
        answer = pool.submit(over_grpc, system)
        wait_until(lambda: list(folder.glob("entered-*")), "the call in flight")

        system.processes["fused"].signal()
        system.processes["fused"].wait_for("draining")
        system.processes["fused"].signal()

        assert system.processes["fused"].wait() == 128 + signal.SIGTERM
        assert answer.exception() is not None


def test_a_call_that_outlasts_the_grace_period_is_cancelled(folder: Path) -> None:
    """A service waits for its calls for at most its grace period."""
    with gated_system(folder, PROXY_GRACE_S="1") as system, ThreadPoolExecutor() as pool:
        answer = pool.submit(over_grpc, system)
        wait_until(lambda: list(folder.glob("entered-*")), "the call in flight")

        system.processes["proxy"].signal()

        assert system.processes["proxy"].wait() == 0
        assert answer.exception() is not None
