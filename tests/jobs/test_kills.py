"""Jobs while every process is killed at random: none is lost, none has two results, and each is what the pipeline says."""

from __future__ import annotations

import asyncio
import os
import random
import re
import signal
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from splitserve.jobs.folder import LOCK
from splitserve.jobs.records import new_id
from tests.demo_models import Demos
from tests.jobs.postgres_server import PostgresServer
from tests.system.processes import Process, free_ports, wait_until

pytestmark = pytest.mark.kills

MODEL = "breast-cancer"
AT_ONCE = 32
KILL_INTERVAL_S = (0.3, 1.5)


class Processes:
    """All services on fixed ports. One that is killed is started again at once, on the same ports and the same folder."""

    def __init__(self, repository: Path, folder: Path, postgres: PostgresServer | None) -> None:
        http, grpc, preprocess, predict, jobs = map(str, free_ports(5))
        models = {"MODEL_REPOSITORY": str(repository)}
        self.url = f"http://127.0.0.1:{http}"
        self._postgres = postgres
        database = {"JOBS_DATABASE_URL": postgres.url} if postgres else {}
        self._plans: dict[str, tuple[str, dict[str, str]]] = {
            "predict": ("predict_service", {**models, "PREDICT_GRPC_PORT": predict}),
            "preprocess": (
                "preprocess_service",
                {**models, "PREPROCESS_GRPC_PORT": preprocess, "PREPROCESS_PREDICT_TARGET": f"127.0.0.1:{predict}"},
            ),
            "proxy": (
                "proxy",
                {
                    "PROXY_HTTP_PORT": http,
                    "PROXY_GRPC_PORT": grpc,
                    "PROXY_PREPROCESS_TARGET": f"127.0.0.1:{preprocess}",
                    "PROXY_JOBS_TARGET": f"127.0.0.1:{jobs}",
                },
            ),
            "jobs": (
                "jobs_service",
                {
                    "JOBS_DIR": str(folder / "jobs"),
                    "JOBS_GRPC_PORT": jobs,
                    "JOBS_PROXY_TARGET": f"127.0.0.1:{grpc}",
                    "JOBS_LEASE_S": "2",
                    "JOBS_MAX_ATTEMPTS": "50",
                    **database,
                },
            ),
        }
        self._running = {name: Process(*plan) for name, plan in self._plans.items()}

    def kill(self, name: str) -> None:
        if name == "postgres":
            assert self._postgres is not None
            self._postgres.stop("immediate")
            self._postgres.start()
            return
        self._running[name].signal(signal.SIGKILL)
        self._running[name].wait()
        self._running[name] = Process(*self._plans[name])

    @property
    def names(self) -> list[str]:
        return [*self._plans, *(["postgres"] if self._postgres else [])]

    def stop(self) -> None:
        for process in reversed(self._running.values()):
            process.stop()


class FusedWorkers:
    """The fused service in three processes that share a folder. One that is killed is started again by their supervisor."""

    names = ("owner",)

    def __init__(self, repository: Path, folder: Path) -> None:
        http, grpc, jobs = map(str, free_ports(3))
        self.url = f"http://127.0.0.1:{http}"
        self._lock = folder / "jobs" / LOCK
        self._killed = {0}
        environment = {
            "MODEL_REPOSITORY": str(repository),
            "PROXY_HTTP_PORT": http,
            "PROXY_GRPC_PORT": grpc,
            "PROXY_WORKERS": "3",
            "JOBS_DIR": str(folder / "jobs"),
            "JOBS_GRPC_PORT": jobs,
        }
        self.service = Process("fused_service", environment)

    def _owner(self) -> int:
        found = re.search(r"process (\d+)", self._lock.read_text())
        return int(found[1]) if found else 0

    def kill(self, _: str) -> None:
        owner = wait_until(lambda: {self._owner()} - self._killed, "an owner").pop()
        self._killed.add(owner)
        os.kill(owner, signal.SIGKILL)


async def insist(client: httpx.AsyncClient, method: str, url: str, *, until: int, **options: Any) -> httpx.Response:
    """Send until it is answered as expected: what callers do while services restart."""
    while True:
        try:
            response = await client.request(method, url, **options)
        except httpx.TransportError:
            await asyncio.sleep(0.1)
            continue
        if response.status_code == until:
            return response
        assert response.status_code in (404, 429, 500, 503, 504), response.text  # 404: preprocess has not told its models yet
        await asyncio.sleep(0.1)


async def submit(client: httpx.AsyncClient, row: list[float]) -> str:
    """Submit under a key and return the id; once it is acknowledged the job must not be lost."""
    headers = {"Prefer": "respond-async", "Idempotency-Key": new_id()}
    url = f"/v1/models/{MODEL}:predict"
    return (await insist(client, "POST", url, until=202, json={"instances": [row]}, headers=headers)).json()["id"]


async def ended(client: httpx.AsyncClient, job: str) -> dict[str, Any]:
    while True:
        found = (await insist(client, "GET", f"/v2/jobs/{job}?wait=10", until=200)).json()
        if found["status"] not in ("queued", "running"):
            return found


async def run(demos: Demos, processes: Processes | FusedWorkers, n_jobs: int, n_kills: int) -> None:
    """Submit, kill, wait, compare."""
    pipeline, rows = demos.models[MODEL]
    table = np.asarray(rows)
    table = table[np.arange(n_jobs) % len(table)] * (1 + np.arange(n_jobs)[:, None] * 1e-6)
    expected = pipeline.predict_proba(table)
    turns = asyncio.Semaphore(AT_ONCE)
    choices = random.Random(16)

    async def limited(call: Any) -> Any:
        async with turns:
            return await call

    async def kill() -> None:
        for number in range(n_kills):
            await asyncio.sleep(choices.uniform(*KILL_INTERVAL_S))
            names = processes.names
            await asyncio.to_thread(processes.kill, names[number % len(names)] if n_kills < 10 else choices.choice(names))

    limits = httpx.Limits(max_connections=AT_ONCE, max_keepalive_connections=AT_ONCE)
    async with httpx.AsyncClient(base_url=processes.url, timeout=30, limits=limits) as client:
        await insist(client, "GET", f"/v2/models/{MODEL}/ready", until=200)
        killing = asyncio.create_task(kill())
        jobs = await asyncio.gather(*[limited(submit(client, row)) for row in table.tolist()])
        states = await asyncio.gather(*[limited(ended(client, job)) for job in jobs])
        await killing
        results = await asyncio.gather(*[limited(insist(client, "GET", f"/v2/jobs/{job}/result", until=200)) for job in jobs])
        again = await asyncio.gather(*[limited(ended(client, job)) for job in jobs])

    assert len(set(jobs)) == n_jobs
    assert [state["status"] for state in states] == ["succeeded"] * n_jobs
    assert [state["finished"] for state in again] == [state["finished"] for state in states]  # a second result would change it
    found = np.array([result.json()["predictions"][0]["probabilities"] for result in results])
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.fixture(params=["sqlite", pytest.param("postgres", marks=pytest.mark.postgres)])
def processes(request: pytest.FixtureRequest, demos: Demos, tmp_path: Path):
    postgres: PostgresServer | None = None
    if request.param == "postgres":
        postgres = request.getfixturevalue("postgres")
        postgres.sql("DROP SCHEMA IF EXISTS splitserve_jobs CASCADE")
    running = Processes(demos.repository, tmp_path, postgres)
    yield running
    running.stop()


async def test_no_job_is_lost_or_answered_twice_when_each_process_is_killed(demos: Demos, processes: Processes) -> None:
    """Once each."""
    await run(demos, processes, n_jobs=400, n_kills=len(processes.names))


async def test_no_job_is_lost_or_answered_twice_when_the_fused_worker_that_owns_them_is_killed(
    demos: Demos, tmp_path: Path
) -> None:
    """Another one follows it, and again; the others answer meanwhile. Then all stop together."""
    workers = FusedWorkers(demos.repository, tmp_path)
    try:
        await run(demos, workers, n_jobs=200, n_kills=2)
    finally:
        code = workers.service.stop()

    assert code == 0
    assert [event["status"] for event in workers.service.events("worker ended")] == [-signal.SIGKILL] * 2


@pytest.mark.long
@pytest.mark.timeout(1800)
async def test_no_job_of_ten_thousand_is_lost_or_answered_twice_in_sixty_kills(demos: Demos, processes: Processes) -> None:
    """At random."""
    await run(demos, processes, n_jobs=10_000, n_kills=60)
