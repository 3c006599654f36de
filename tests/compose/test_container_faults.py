"""The effect of a fault on callers: two replicas of each stage under steady load by the Python client, with its retries.

No answer is ever wrong (P-44): each is compared with that of the pipeline in this process.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from benchmarks.steady import TIMEOUT_S, Reference, SteadyLoad
from tests.compose.conftest import Model, probe, started, wait_until_ready
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
def doubled(docker: str, project: str, repository: Path, models: dict[str, Model]) -> Iterator[Stack]:
    """Two replicas of each service."""
    with started(Stack(docker, f"{project}-faults", repository, n_proxies=2), models, **TWO) as running:
        yield running


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
def test_killing_a_replica_fails_no_call(doubled: Stack, load: SteadyLoad, service: str) -> None:
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


@pytest.mark.parametrize(("service", "how"), [("preprocess", "cut_off"), ("predict", "cut_off"), ("preprocess", "disconnected")])
def test_a_replica_without_a_network_is_avoided_within_seconds(doubled: Stack, load: SteadyLoad, service: str, how: str) -> None:
    """Lost packets, or a lost interface: no call fails or exceeds its deadline, and the replica is used again afterwards."""
    lost = doubled.containers(service)[0]

    with getattr(lost, how)():
        load.wait_for(200)

    wait_for_work(replicas(doubled))
    assert load.failures == []
    assert [outcome for outcome in load.outcomes if outcome.seconds > TIMEOUT_S + SLACK_S] == []


@pytest.mark.parametrize("service", STAGES)
def test_a_replica_on_a_lossy_network_delays_and_fails_no_call(doubled: Stack, load: SteadyLoad, service: str) -> None:
    """Late and lost packets: a call may take long, but is answered within its deadline."""
    with doubled.containers(service)[0].slowed():
        load.wait_for(200)

    assert load.failures == []
    assert [outcome for outcome in load.outcomes if outcome.seconds > TIMEOUT_S + SLACK_S] == []


def test_a_new_replica_gets_its_share_and_is_removed_without_a_failed_call(doubled: Stack, load: SteadyLoad) -> None:
    """Scaled out, it gets at least 0.7 of a fair share within 30 s; scaled in, no call fails."""
    before = {container.identity for container in replicas(doubled)}
    doubled.up(**TWO | {"preprocess": 3, "predict": 3})
    added = [container for container in replicas(doubled) if container.identity not in before]

    wait_until(lambda: all(share_of(each, doubled, load) >= 0.7 / 3 for each in added), "their share", patience_s=30)
    doubled.up(**TWO)
    load.wait_for(100)

    assert len(added) == 2
    assert load.failures == []


def share_of(container: Container, stack: Stack, load: SteadyLoad) -> float:
    """Of the calls of the next 60 answers, the part that went to a container of a service."""
    service = container.facts()["Config"]["Labels"]["com.docker.compose.service"]
    peers = stack.containers(service)
    before = {peer.identity: peer.n_events("infer") for peer in peers}
    load.wait_for(60)
    counts = {peer.identity: peer.n_events("infer") - before[peer.identity] for peer in peers}
    return counts[container.identity] / (sum(counts.values()) or 1)


def test_a_rolling_restart_fails_no_call(doubled: Stack, references: dict[str, Reference]) -> None:
    """SIGTERM, drained, started again, one after the other, proxies too: clients that know all proxies see no failure."""
    with SteadyLoad(grpc_urls(doubled), references) as load:
        for container in replicas(doubled, "predict", "preprocess", "proxy"):
            n_stopped = container.n_events("stopped")
            container.restart()
            assert container.n_events("stopped") == n_stopped + 1
        wait_for_work(replicas(doubled, *STAGES, "proxy"))

    assert load.failures == []
    assert load.wrong == []


def test_services_may_start_in_any_order(doubled: Stack, models: dict[str, Model]) -> None:
    """The proxies first and predict last; then predict again. Waiting services say so, and are ready when the last one is."""
    proxies, preprocess, predict = (doubled.containers(service) for service in ("proxy", *STAGES))
    ready = ["127.0.0.1:8001", "--ready"]
    doubled.compose("stop")

    for containers in (proxies, preprocess):
        for container in containers:
            container.start()
        for container in containers:
            wait_until(lambda container=container: container.n_events("listening") >= 2, "listening")
    wait_until(lambda: all(probe(each, ["127.0.0.1:8001"]) for each in proxies), "the proxies take calls")
    assert not any(probe(proxy, ready) for proxy in proxies)

    for container in predict:
        container.start()
    wait_until(lambda: all(probe(proxy, ready) for proxy in proxies), "the proxies ready")

    for container in predict:
        container.stop()
    wait_until(lambda: not any(probe(proxy, ready) for proxy in proxies), "the proxies not ready")
    for container in predict:
        container.start()
    wait_until(lambda: all(probe(proxy, ready) for proxy in proxies), "the proxies ready again")
    wait_until_ready(doubled, models)
    assert all(container.facts()["RestartCount"] == 0 for container in proxies)
