from __future__ import annotations

from collections.abc import Iterator

import pytest
import trustme

from tests import certificates
from tests.certificates import Files
from tests.intermediaries.backends import Pool, Stage
from tests.intermediaries.balancers import Address, Balancer, Envoy, Haproxy, Nginx, NginxWithoutKeepalive


@pytest.fixture(scope="session")
def stage() -> Iterator[Stage]:
    stage = Stage()
    yield stage
    stage.stop()


@pytest.fixture(scope="session")
def pool(stage: Stage) -> Iterator[Pool]:
    """Two proxies that no test restarts."""
    pool = Pool(stage)
    yield pool
    pool.stop()


@pytest.fixture(scope="session")
def tls(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return certificates.write(tmp_path_factory.mktemp("certificates"), trustme.CA())


KINDS = {kind.name: kind for kind in (Nginx, NginxWithoutKeepalive, Haproxy, Envoy)}
OVER_TLS = {f"{kind.name} over TLS": kind for kind in (Nginx, Haproxy)}


@pytest.fixture(scope="session", params=[*KINDS, *OVER_TLS])
def balancer(
    request: pytest.FixtureRequest, pool: Pool, tls: Files, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Balancer]:
    """Each kind in front of both proxies."""
    files = tls if request.param in OVER_TLS else None
    balancer = (KINDS | OVER_TLS)[request.param](tmp_path_factory.mktemp("balancer"), addresses(pool), files)
    yield balancer
    balancer.stop()


@pytest.fixture(scope="session", params=KINDS)
def plain_balancer(request: pytest.FixtureRequest, pool: Pool, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Balancer]:
    """Those without TLS, for bytes that are sent as they are."""
    balancer = KINDS[request.param](tmp_path_factory.mktemp("balancer"), addresses(pool))
    yield balancer
    balancer.stop()


@pytest.fixture
def restarted(stage: Stage) -> Iterator[Pool]:
    """Two proxies for tests that restart them. They say "not ready" for a while before they take no more calls."""
    pool = Pool(stage, PROXY_DRAIN_DELAY_S="1.5")
    yield pool
    pool.stop()


def addresses(pool: Pool) -> list[Address]:
    return [Address(each.http_port, each.grpc_port) for each in pool.backends]
