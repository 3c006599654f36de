"""What callers see of a fault: two replicas of each stage under steady load by the Python client, with the retries that it has.

Whatever happens, no answer is wrong (P-44): each is compared with what the pipeline says in this process.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator, Sequence

import pytest

from benchmarks.steady import TIMEOUT_S, Reference, SteadyLoad
from tests.compose.conftest import Model, probe, wait_until_ready
from tests.compose.stack import Container, Stack, wait_until

pytestmark = [pytest.mark.compose, pytest.mark.xdist_group("compose"), pytest.mark.timeout(900)]

STAGES = ("preprocess", "predict")
TWO = {"proxy": 2, "preprocess": 2, "predict": 2}

SLACK_S = 1.0
"""What a busy machine may add to the time in which a request ends."""


@pytest.fixture(scope="module")
def references(models: dict[str, Model]) -> dict[str, Reference]:
    return {name: Reference(model.pipeline, model.rows) for name, model in models.items()}


@pytest.fixture(scope="module")
def doubled(docker: str, project: str, repository: object, models: dict[str, Model]) -> Iterator[Stack]:
    """Two replicas of each service."""
    running = Stack(docker, f"{project}-faults", repository, n_proxies=2)
    try:
        running.build()
        running.up(**TWO)
        wait_until_ready(running, models)
        yield running
    finally:
        running.down()


@pytest.fixture
def load(doubled: Stack, references: dict[str, Reference]) -> Iterator[SteadyLoad]:
    """Over gRPC to both proxies, over REST to one, and every replica has work."""
    with SteadyLoad([*grpc_urls(doubled), doubled.http], references) as running:
        wait_for_work(replicas(doubled))
        yield running
    assert running.wrong == []


def grpc_urls(stack: Stack) -> list[str]:
    """One name with every proxy behind it."""
    return ["ipv4:" + ",".join(f"127.0.0.1:{port}" for port in stack.grpc_ports)]


def replicas(stack: Stack, *services: str) -> list[Container]:
    return [container for service in services or STAGES for container in stack.containers(service)]


def wait_for_work(containers: Sequence[Container]) -> None:
    """Until each has answered some more calls."""
    before = [container.n_events("infer") for container in containers]

    def are_working() -> bool:
        return all(each.n_events("infer") >= count + 5 for each, count in zip(containers, before, strict=True))

    wait_until(are_working, "work for every replica")


@pytest.mark.parametrize("service", STAGES)
def test_a_replica_that_is_killed_is_not_missed(doubled: Stack, load: SteadyLoad, service: str) -> None:
    """SIGKILL: what it had is tried on the other one; docker starts it again, and it gets its part."""
    killed = doubled.containers(service)[0]

    killed.signal(signal.SIGKILL)

    wait_until(lambda: killed.facts()["RestartCount"] > 0, "started again")
    wait_for_work(replicas(doubled))
    assert load.failures == []


@pytest.mark.parametrize("service", STAGES)
def test_a_replica_that_is_frozen_is_not_waited_for(doubled: Stack, load: SteadyLoad, service: str) -> None:
    """SIGSTOP: its connections stay open and say nothing. Others are asked; it is back after SIGCONT."""
    frozen = doubled.containers(service)[0]

    frozen.signal(signal.SIGSTOP)
    try:
        load.wait_for(200)
    finally:
        frozen.signal(signal.SIGCONT)

    wait_for_work(replicas(doubled))
    assert load.failures == []


@pytest.mark.parametrize("service", STAGES)
@pytest.mark.parametrize("how", ["cut_off", "disconnected"])
def test_a_replica_without_a_network_is_not_missed_for_long(doubled: Stack, load: SteadyLoad, service: str, how: str) -> None:
    """Packets that vanish, or an interface that does: nothing fails, nothing outlasts its deadline, and work once it is mended."""
    lost = doubled.containers(service)[0]

    with getattr(lost, how)():
        load.wait_for(300)

    wait_for_work(replicas(doubled))
    assert load.failures == []
    assert [outcome for outcome in load.outcomes if outcome.seconds > TIMEOUT_S + SLACK_S] == []
