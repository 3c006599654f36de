"""Jobs in a container: docker-compose.jobs.yml over docker-compose.yml."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from tests.compose.conftest import Model, started
from tests.compose.stack import Stack, wait_until
from tests.jobs.test_kills import ended, insist, submit

pytestmark = [pytest.mark.compose, pytest.mark.xdist_group("compose"), pytest.mark.timeout(900)]

NAME = "breast-cancer"
LISTENS_BEYOND_LOOPBACK = """
import socket
with socket.socket() as probe:
    print(probe.connect_ex((socket.gethostbyname(socket.gethostname()), 8031)) == 0)
"""


@pytest.fixture(scope="module")
def stack(docker: str, project: str, repository: Path, models: dict[str, Model]) -> Iterator[Stack]:
    overlay = "docker-compose.jobs.yml"
    with started(Stack(docker, f"{project}-jobs", repository, overlays=[overlay]), models) as running:
        yield running


def test_jobs_survive_their_container(stack: Stack, models: dict[str, Model]) -> None:
    """They are in a volume that the unprivileged user may write; only the proxy reaches the service."""
    row = models[NAME].rows[0].tolist()
    with httpx.Client(base_url=stack.http, timeout=60) as client:
        plain = client.post(f"/v1/models/{NAME}:predict", json={"instances": [row]}).json()
        submitted = client.post(f"/v1/models/{NAME}:predict", json={"instances": [row]}, headers={"Prefer": "respond-async"})
        job = submitted.json()
        wait_until(lambda: client.get(f"/v2/jobs/{job['id']}").json()["status"] == "succeeded", "the job's end")
        stack.compose("kill", "jobs")
        stack.compose("rm", "--force", "jobs")
        away = client.get(f"/v2/jobs/{job['id']}")
        stack.compose("up", "--no-build", "--detach", "--wait", "--wait-timeout", "120", "--no-recreate")
        result = client.get(f"/v2/jobs/{job['id']}/result")

    status = stack.container("jobs").python("print(open('/proc/1/status').read())")
    mode = stack.container("jobs").python("import os; print(oct(os.stat('/var/lib/splitserve/jobs').st_mode)[-3:])").strip()
    assert submitted.status_code == 202
    assert away.status_code == 503
    assert result.json() == plain
    assert "Uid:\t10001\t10001" in status
    assert mode == "700"
    assert stack.container("proxy").python(LISTENS_BEYOND_LOOPBACK).strip() == "False"


@contextmanager
def with_postgres(stack: Stack) -> Iterator[Stack]:
    """The same services, with the database beside them."""
    password = "not/only:letters"
    extended = stack.extended(
        "tests/compose/postgres.yml",
        COMPOSE_PROFILES="postgres",
        SPLITSERVE_JOBS_PASSWORD=password,
        SPLITSERVE_JOBS_DATABASE="postgresql://splitserve@postgres/splitserve",
    )
    try:
        extended.compose("build", "postgres")
        extended.up()
        yield extended
    finally:
        extended.down()


def test_no_job_is_lost_or_run_twice_when_the_database_restarts(stack: Stack, models: dict[str, Model]) -> None:
    """It is killed while callers submit and jobs run. Callers are told to come back (503) until it is there again."""
    model = models[NAME]
    with with_postgres(stack) as running:
        status, rows, states, results = asyncio.run(load_while_the_database_restarts(running, model.rows))

    assert status == 503
    assert len({state["id"] for state in states}) == len(rows)
    assert {state["status"] for state in states} == {"succeeded"}
    found = np.array([result.json()["predictions"][0]["probabilities"] for result in results])
    np.testing.assert_allclose(found, model.pipeline.predict_proba(np.array(rows)), atol=1e-5)


async def load_while_the_database_restarts(
    stack: Stack, table: np.ndarray
) -> tuple[int, list[list[float]], list[dict[str, Any]], list[httpx.Response]]:
    """Callers that submit, wait for the end and submit again, until each has had a job after the restart.

    Returns:
        The status of a submit while the database is down; of each job its row, its state at the end of all, and its result.
    """
    n_callers, table = 12, table.tolist()
    is_up_again = asyncio.Event()
    rows: list[list[float]] = []
    jobs: list[str] = []
    finished: list[str] = []

    async def caller(client: httpx.AsyncClient) -> None:
        is_last = False
        while not is_last:
            is_last = is_up_again.is_set()
            row = [value * (1 + 1e-6 * len(rows)) for value in table[len(rows) % len(table)]]
            rows.append(row)
            index = len(rows) - 1
            jobs.append("")
            finished.append("")
            jobs[index] = await submit(client, row)
            finished[index] = (await ended(client, jobs[index]))["finished"]

    async with httpx.AsyncClient(base_url=stack.http, timeout=30) as client:
        await submit(client, table[0])
        callers = asyncio.gather(*[caller(client) for _ in range(n_callers)])
        while not any(finished):  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        await asyncio.to_thread(stack.compose, "kill", "postgres")
        meanwhile = await client.post(f"/v2/models/{NAME}/jobs", json=v2_request(table[0]))
        await asyncio.to_thread(stack.compose, "start", "postgres")
        is_up_again.set()
        async with asyncio.timeout(180):
            await callers
        states = [(await insist(client, "GET", f"/v2/jobs/{job}", until=200)).json() for job in jobs]
        results = [await insist(client, "GET", f"/v2/jobs/{job}/result", until=200) for job in jobs]
    assert [state["finished"] for state in states] == finished  # a second result would have changed it
    return meanwhile.status_code, rows, states, results


def v2_request(row: list[float]) -> dict[str, Any]:
    return {"inputs": [{"name": "rows", "datatype": "FP32", "shape": [1, len(row)], "data": row}]}
