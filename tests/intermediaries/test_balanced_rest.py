"""REST requests through reverse proxies of other makers: connections that are kept, bodies in all forms, clients that go away."""

from __future__ import annotations

import asyncio
import gzip
import json
import os
import ssl
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.intermediaries.backends import Backend, Pool, Stage
from tests.intermediaries.balancers import Address, Balancer, Envoy, Haproxy, Nginx
from tests.intermediaries.raw_http import RawConnection
from tests.intermediaries.relay import Relay
from tests.system.processes import wait_until

pytestmark = [pytest.mark.intermediaries, pytest.mark.timeout(120)]

MIB = 1024 * 1024
ECHO, HOLD = "/v2/models/echo/infer", "/v2/models/hold/infer"


@pytest.fixture(scope="module")
def client(balancer: Balancer) -> Iterator[httpx.Client]:
    verify = ssl.create_default_context(cafile=balancer.tls.ca) if balancer.tls else False
    with httpx.Client(base_url=f"http{'s' if balancer.tls else ''}://{balancer.http}", verify=verify, timeout=60) as client:
        yield client


def echo_body(content: bytes) -> tuple[bytes, dict[str, str]]:
    """A request in the binary form, and its headers."""
    parameters = {"binary_data_size": len(content)}
    tensor = {"name": "INPUT0", "datatype": "UINT8", "shape": [1, len(content)], "parameters": parameters}
    head = json.dumps({"inputs": [tensor], "parameters": {"binary_data_output": True}}).encode()
    return head + content, {"inference-header-content-length": str(len(head)), "content-type": "application/octet-stream"}


def check_echo(answer: httpx.Response, content: bytes) -> None:
    assert answer.status_code == 200, answer.text[:500]
    assert answer.content[int(answer.headers["inference-header-content-length"]) :] == content


@pytest.mark.parametrize("n_at_once", [1, 32])
async def test_no_request_is_lost(client: httpx.Client, n_at_once: int) -> None:
    """1,000 requests, each answered with what it sent."""
    numbers = iter(range(1_000))

    async def one_after_another() -> None:
        for number in numbers:
            content = number.to_bytes(4, "little") * 16
            body, headers = echo_body(content)
            check_echo(await asyncio.to_thread(client.post, ECHO, content=body, headers=headers), content)

    async with asyncio.TaskGroup() as group:
        for _ in range(n_at_once):
            group.create_task(one_after_another())


@pytest.mark.parametrize("n_mib", [4, 30, 60])
@pytest.mark.parametrize("is_chunked", [False, True])
def test_large_bodies(client: httpx.Client, n_mib: int, is_chunked: bool) -> None:
    """Both ways; with a length that is known before, and in chunks."""
    content = os.urandom(n_mib * MIB)
    body, headers = echo_body(content)
    sent = (body[at : at + 100_000] for at in range(0, len(body), 100_000)) if is_chunked else body

    check_echo(client.post(ECHO, content=sent, headers=headers), content)


def test_a_body_over_the_limit_is_refused_with_a_status(client: httpx.Client) -> None:
    """413, and no bad gateway, although the answer comes before the body has been read; the next request is answered."""
    body, headers = echo_body(bytes(70 * MIB))

    assert client.post(ECHO, content=body, headers=headers).status_code == 413
    assert client.get("/v2/health/live").status_code == 200


@pytest.mark.parametrize("is_chunked", [False, True])
def test_a_client_that_expects_100_continue(plain_balancer: Balancer, is_chunked: bool) -> None:
    """Its body is sent once it has been told to go on."""
    body = json.dumps({"inputs": [{"name": "INPUT0", "datatype": "UINT8", "shape": [1, 3], "data": [1, 2, 3]}]}).encode()
    length = b"Transfer-Encoding: chunked" if is_chunked else b"Content-Length: %d" % len(body)
    with RawConnection(plain_balancer.http) as connection:
        connection.send(b"POST %b HTTP/1.1\r\nHost: test\r\n%b\r\nExpect: 100-continue\r\n\r\n" % (ECHO.encode(), length))
        first = connection.response()
        assert first is not None
        assert first.status == 100

        connection.send(b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body) if is_chunked else body)

        answer = connection.final_response()
        assert answer is not None
        assert (answer.status, json.loads(answer.body)["outputs"][0]["data"]) == (200, [1, 2, 3])


def test_a_client_that_goes_away_in_its_upload(plain_balancer: Balancer) -> None:
    """It costs nobody else anything: connections to the proxies that it left half used are not used for others."""
    for _ in range(20):
        with RawConnection(plain_balancer.http) as connection:
            connection.send(b"POST %b HTTP/1.1\r\nHost: test\r\nContent-Length: 200000\r\n\r\n" % ECHO.encode() + bytes(150_000))
        assert httpx.get(f"http://{plain_balancer.http}/v2/health/live").status_code == 200


def test_a_client_that_goes_away_before_its_answer(plain_balancer: Balancer, pool: Pool) -> None:
    """nginx, haproxy and Envoy close their connection to the proxy, which gives the request up."""
    body = json.dumps({"inputs": [{"name": "MS", "datatype": "INT32", "shape": [1, 1], "data": [61_001]}]}).encode()
    n_before = pool.n_ended("CANCELLED")
    n_held = pool.stage.count(61_001)
    with RawConnection(plain_balancer.http) as connection:
        connection.send(b"POST %b HTTP/1.1\r\nHost: test\r\nContent-Length: %d\r\n\r\n%b" % (HOLD.encode(), len(body), body))
        wait_until(lambda: pool.stage.count(61_001) > n_held, "the request is held")

    wait_until(lambda: pool.n_ended("CANCELLED") > n_before, "the proxy gives it up")
    assert httpx.get(f"http://{plain_balancer.http}/v2/health/live").status_code == 200


def test_errors_keep_their_status_and_body(client: httpx.Client) -> None:
    answers = [client.get("/v2/models/missing"), client.post(ECHO, content=b"{"), client.get("/nothing"), client.put(ECHO)]

    assert [answer.status_code for answer in answers] == [404, 400, 404, 405]
    assert all(answer.json()["error"] for answer in answers)


def test_head_requests(client: httpx.Client) -> None:
    """Headers as of a GET, without a body; the next answer on the connection is its own."""
    for _ in range(3):
        head = client.head("/v2/health/ready")
        assert (head.status_code, head.content) == (200, b"")
        assert client.get("/v2").json()["name"] == "splitserve"


def test_compressed_bodies(client: httpx.Client) -> None:
    content = bytes(100_000)
    body, headers = echo_body(content)
    headers |= {"content-encoding": "gzip", "accept-encoding": "gzip"}

    check_echo(client.post(ECHO, content=gzip.compress(body), headers=headers), content)


@pytest.mark.parametrize("kind", [Nginx, Haproxy, Envoy], ids=lambda kind: kind.name)
def test_connections_to_the_proxy_are_kept(kind: type[Balancer], stage: Stage, tmp_path: Path) -> None:
    """200 requests after each other, of clients that come and go, use one connection to the proxy, or two."""
    backend = Backend(stage.address)
    with Relay(backend.http) as relay:
        balancer = kind(tmp_path / "balancer", [Address(relay.port, backend.grpc_port)])
        try:
            n_before = relay.n_connections  # those of health checks
            for _ in range(50):
                with httpx.Client(base_url=f"http://{balancer.http}") as client:
                    body, headers = echo_body(b"x")
                    check_echo(client.post(ECHO, content=body, headers=headers), b"x")
                    assert client.get("/v2/health/live").status_code == 200
                    assert client.get("/v2/models/missing").status_code == 404
                    assert client.post(ECHO, content=b"{").status_code == 400
        finally:
            balancer.stop()
            backend.stop()

    n_checks = relay.sent.count(b"/v2/health/ready") if kind is Haproxy else 0  # one connection each
    assert relay.n_connections - n_before - n_checks <= 2
