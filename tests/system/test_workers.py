"""Several processes of each service that share its ports."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from splitserve import Client
from tests.demo_models import Demos
from tests.system.processes import Process, wait_until

pytestmark = pytest.mark.xdist_group("workers")

N_WORKERS = {"predict": 2, "preprocess": 3, "proxy": 1}
"""One proxy: it has to look for every worker of preprocess by itself."""


def free_port() -> int:
    """Some port, free for now. Workers share it, so it has to have a number."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Crowd:
    """Predict, preprocess and proxy, each in so many processes."""

    def __init__(self, models: Path) -> None:
        self.http, grpc, preprocess, predict = (free_port() for _ in range(4))
        common = {"MODEL_REPOSITORY": str(models), "LOG_REQUESTS": "all"}
        self.services = {
            "predict": self._start("predict_service", "PREDICT", GRPC_PORT=predict, **common),
            "preprocess": self._start(
                "preprocess_service", "PREPROCESS", GRPC_PORT=preprocess, PREDICT_TARGET=f"127.0.0.1:{predict}", **common
            ),
            "proxy": self._start(
                "proxy", "PROXY", HTTP_PORT=self.http, GRPC_PORT=grpc, PREPROCESS_TARGET=f"127.0.0.1:{preprocess}", **common
            ),
        }

    @staticmethod
    def _start(module: str, prefix: str, **settings: object) -> Process:
        named = {
            name if name.startswith(("MODEL_", "LOG_")) else f"{prefix}_{name}": str(value) for name, value in settings.items()
        }
        return Process(module, {**named, f"{prefix}_WORKERS": str(N_WORKERS[prefix.lower()])})

    def ask(self) -> None:
        """A request over a new connection."""
        with Client(f"http://127.0.0.1:{self.http}", timeout_s=30) as client:
            client.infer("breast-cancer", {"features": np.zeros((1, 30))})

    def have_answered(self, name: str) -> set[int]:
        """The workers of a service that have answered."""
        return {event.get("worker", 0) for event in self.services[name].events("infer") if event["status"] == "OK"}


@pytest.fixture(scope="module")
def crowd(demos: Demos) -> Iterator[Crowd]:
    crowd = Crowd(demos.repository)
    try:
        yield crowd
    finally:
        for service in reversed(crowd.services.values()):
            service.stop()


def test_every_worker_of_every_service_gets_calls(crowd: Crowd) -> None:
    """The kernel chooses the worker of a connection, so the proxy reconnects until it has one to each."""

    def all_have_answered() -> bool:
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda _: crowd.ask(), range(16)))
        return all(len(crowd.have_answered(name)) == n_workers for name, n_workers in N_WORKERS.items())

    crowd.services["proxy"].wait_for("preprocess reachable")
    wait_until(all_have_answered, "an answer by each worker")


def test_a_dead_worker_is_restarted_and_all_stop_together(crowd: Crowd) -> None:
    """Requests are answered meanwhile; a signal to the first process stops all, with exit status 0.

    It stops the processes that the module shares, and so is its last test.
    """
    preprocess = crowd.services["preprocess"]
    crowd.services["proxy"].wait_for("preprocess reachable")
    n_workers, workers = N_WORKERS["preprocess"], children(preprocess.pid)

    os.kill(workers[0], signal.SIGKILL)
    for _ in range(20):
        crowd.ask()
    wait_until(lambda: len(set(children(preprocess.pid)) - {workers[0]}) == n_workers, "a new worker")
    wait_until(lambda: len(preprocess.events("listening")) == n_workers + 1, "the new worker listens")
    codes = [service.stop() for service in reversed(crowd.services.values())]

    assert len(workers) == n_workers
    assert [event["status"] for event in preprocess.events("worker ended")] == [-signal.SIGKILL]
    assert codes == [0, 0, 0]
    assert len(preprocess.events("stopped")) == n_workers


def children(pid: int) -> list[int]:
    """The processes that one has begun."""
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
