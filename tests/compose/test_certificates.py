"""Certificates that are renewed while requests come: tests/compose/tls.yml over docker-compose.yml."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import trustme

from benchmarks.steady import Reference, SteadyLoad
from splitserve import TLS, Client
from tests import certificates
from tests.compose.conftest import Model
from tests.compose.stack import SERVICES, Stack, wait_until

pytestmark = [pytest.mark.compose, pytest.mark.xdist_group("compose"), pytest.mark.timeout(900)]

PORTS = {"proxy": 8001, "preprocess": 8011, "predict": 8021}


class Secured(NamedTuple):
    """A stack, and what its certificates are made by and kept in."""

    stack: Stack
    folder: Path
    ca: trustme.CA

    def renew(self, service: str) -> None:
        """A new certificate of the same authority, and a new key, in place of the old ones."""
        folder = self.folder / service
        certificates.write(folder, self.ca, names=(service, "localhost", "127.0.0.1"))
        folder.chmod(0o755)
        for file in folder.iterdir():
            file.chmod(0o644)  # the services run as another user

    def shown(self, service: str) -> str:
        """The certificate that a handshake gets."""
        code = f"import ssl; print(ssl.get_server_certificate(('127.0.0.1', {PORTS[service]})))"
        return self.stack.container(service).python(code)


@pytest.fixture
def secured(docker: str, project: str, repository: Path, models: dict[str, Model], tmp_path: Path) -> Iterator[Secured]:
    """The services, mutual TLS between them, ready."""
    folder = tmp_path / "certificates"
    folder.mkdir(mode=0o755)
    overlay = str(Path(__file__).with_name("tls.yml"))
    stack = Stack(docker, f"{project}-tls", repository, overlays=[overlay], SPLITSERVE_CERTIFICATES=str(folder))
    running = Secured(stack, folder, trustme.CA())
    for service in SERVICES:
        running.renew(service)
    try:
        stack.build()
        stack.up()
        yield running
    finally:
        stack.down()


def test_certificates_are_renewed_under_load(secured: Secured, models: dict[str, Model]) -> None:
    """Handshakes show the new ones, no request fails, and a service that starts now gets on with those that run."""
    stack, folder = secured.stack, secured.folder
    references = {name: Reference(model.pipeline, model.rows) for name, model in models.items()}
    tls = TLS(ca_file=folder / "proxy" / "ca.pem")
    with Client(f"grpcs://{stack.grpc}", tls=tls) as client:
        for name in models:
            wait_until(lambda name=name: client.is_model_ready(name), f"model {name} ready")
    before = {service: secured.shown(service) for service in SERVICES}

    with SteadyLoad([f"grpcs://{stack.grpc}", stack.http.replace("http:", "https:")], references, tls=tls) as load:
        load.wait_for(60)
        for service in SERVICES:
            secured.renew(service)
            wait_until(lambda service=service: secured.shown(service) != before[service], f"{service}'s new certificate")
            load.wait_for(60)
        stack.up(preprocess=2, predict=2)
        added = [container for service in SERVICES for container in stack.containers(service)]
        wait_until(lambda: all(each.n_events("infer") >= 5 for each in added), "work for the new replicas")

    assert load.failures == []
    assert load.wrong == []
    assert not any(
        container.n_events("predict unreachable") or container.n_events("preprocess unreachable") for container in added
    )
