"""Jobs in a container: docker-compose.jobs.yml over docker-compose.yml."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.compose.conftest import Model, started
from tests.compose.stack import Stack, wait_until

pytestmark = [pytest.mark.compose, pytest.mark.xdist_group("compose"), pytest.mark.timeout(900)]

NAME = "breast-cancer"
LISTENS_BEYOND_LOOPBACK = """
import socket
with socket.socket() as probe:
    print(probe.connect_ex((socket.gethostbyname(socket.gethostname()), 8031)) == 0)
"""


@pytest.fixture
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
