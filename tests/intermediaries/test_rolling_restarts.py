"""Both proxies behind a reverse proxy are restarted one after the other under load, and no caller notices."""

from __future__ import annotations

import asyncio
import contextlib
import json
import urllib.request
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import grpc
import pytest

from tests.intermediaries.backends import Pool
from tests.intermediaries.balancers import Balancer, Envoy, Haproxy, HaproxyCheckingTheGrpcPort, Nginx, NginxWithoutKeepalive
from tests.intermediaries.calls import calling, echo_request, hold_request
from tests.intermediaries.conftest import addresses

pytestmark = [pytest.mark.intermediaries, pytest.mark.timeout(180)]

N_AT_ONCE = 8


@pytest.fixture(params=[Nginx, NginxWithoutKeepalive, Haproxy, HaproxyCheckingTheGrpcPort, Envoy], ids=lambda kind: kind.name)
def balancer(request: pytest.FixtureRequest, restarted: Pool, tmp_path: Path) -> Iterator[Balancer]:
    balancer = request.param(tmp_path / "balancer", addresses(restarted))
    yield balancer
    balancer.stop()


async def test_no_unary_call_is_lost(balancer: Balancer, restarted: Pool) -> None:
    """Short and longer ones, from a caller that retries nothing that may have been processed."""
    async with calling(balancer.grpc) as caller:
        numbers = iter(range(10**9))

        async def call() -> None:
            number = next(numbers)
            if number % 10:
                await caller.echo(number.to_bytes(4, "little") * 16)
            else:
                await caller.infer(hold_request(50))

        n_calls = await under_load(call, lambda: restarted.restart_each(balancer.wait_until_healthy))

    assert n_calls > 100


async def test_no_rest_request_is_lost(balancer: Balancer, restarted: Pool) -> None:
    """On a connection each, kept by the client or not."""
    body = json.dumps({"inputs": [{"name": "INPUT0", "datatype": "UINT8", "shape": [1, 3], "data": [1, 2, 3]}]}).encode()

    def post() -> None:
        with urllib.request.urlopen(f"http://{balancer.http}/v2/models/echo/infer", body, timeout=30) as answer:
            assert json.load(answer)["outputs"][0]["data"] == [1, 2, 3]

    n_calls = await under_load(
        lambda: asyncio.to_thread(post), lambda: restarted.restart_each(balancer.wait_until_healthy)
    )  # fmt: skip

    assert n_calls > 100


async def under_load(call: Callable[[], Awaitable[None]], work: Callable[[], None]) -> int:
    """Repeat a call while some work is done in a thread; fails with the first call that does. How many calls were made."""
    done = asyncio.Event()
    n_calls = 0

    async def keep_calling() -> None:
        nonlocal n_calls
        while not done.is_set():
            await call()
            n_calls += 1

    async with asyncio.TaskGroup() as group:
        for _ in range(N_AT_ONCE):
            group.create_task(keep_calling())
        await asyncio.to_thread(work)
        done.set()
    return n_calls


async def test_a_call_in_flight_is_answered_before_its_proxy_stops(balancer: Balancer, restarted: Pool) -> None:
    """It takes longer than what the proxy serves on for."""
    async with calling(balancer.grpc) as caller:
        calls = [asyncio.ensure_future(_held(caller.infer, 3_000 + number)) for number in range(4)]
        for number in range(4):
            await asyncio.to_thread(restarted.stage.wait_for, 3_000 + number)

        for backend in restarted.backends:
            backend.drain()

        assert await asyncio.gather(*calls) == [3_000, 3_001, 3_002, 3_003]
    assert [await asyncio.to_thread(backend.wait) for backend in restarted.backends] == [0, 0]


async def _held(infer: Callable[..., Awaitable[object]], ms: int) -> int:
    await infer(hold_request(ms))
    return ms


async def test_a_stream_ends_with_a_status_when_its_proxy_stops(balancer: Balancer, restarted: Pool) -> None:
    """What was sent on it is answered; the client opens another one, which the next proxy takes.

    haproxy 2.6 ends a stream that the server ends first by RST_STREAM, whoever the server is.
    """
    async with calling(balancer.grpc) as caller:
        stream = caller.stream()
        await stream.write(echo_request(b"before"))
        assert (await stream.read()).infer_response.raw_output_contents[0] == b"before"

        await asyncio.to_thread(lambda: [backend.stop() for backend in restarted.backends])

        with contextlib.suppress(grpc.aio.AioRpcError):
            assert await stream.read() is grpc.aio.EOF
        is_haproxy = balancer.name.startswith("haproxy")
        assert (await stream.code()).name in ("OK", "UNAVAILABLE", *(["CANCELLED"] if is_haproxy else []))

        restarted.backends[0].start()
        await asyncio.to_thread(balancer.wait_until_healthy, 1)
        again = caller.stream()
        await again.write(echo_request(b"after"))
        assert (await again.read()).infer_response.raw_output_contents[0] == b"after"


async def test_envoy_drains(restarted: Pool, tmp_path: Path) -> None:
    """Its own draining: what is in flight through it is answered."""
    balancer = Envoy(tmp_path / "draining", addresses(restarted))
    try:
        async with calling(balancer.grpc) as caller:
            call = asyncio.ensure_future(_held(caller.infer, 1_500))
            await asyncio.to_thread(restarted.stage.wait_for, 1_500)

            balancer.ask("POST", "/drain_listeners?graceful")

            assert await call == 1_500
    finally:
        balancer.stop()


async def test_calls_are_spread_over_both(restarted: Pool, tmp_path: Path) -> None:
    """Envoy balances calls, not connections: one channel reaches both proxies, and both connections stay."""
    balancer = Envoy(tmp_path / "spreading", addresses(restarted))
    try:
        async with calling(balancer.grpc) as caller:
            await caller.echo_many(1000, 8)
        clusters = json.loads(balancer.ask("GET", "/clusters?format=json"))["cluster_statuses"]
        hosts = next(cluster for cluster in clusters if cluster["name"] == "grpc")["host_statuses"]
        counts = [{stat["name"]: int(stat.get("value", 0)) for stat in host["stats"]} for host in hosts]
    finally:
        balancer.stop()

    assert [count["rq_success"] for count in counts] == pytest.approx([500, 500], abs=50)
    assert [count["cx_total"] for count in counts] == [1, 1]


async def test_envoy_tries_another_proxy_when_one_has_died(restarted: Pool, tmp_path: Path) -> None:
    """Killed, without a word: calls that were not begun go to the other one."""
    balancer = Envoy(tmp_path / "retrying", addresses(restarted))
    try:
        async with calling(balancer.grpc) as caller:
            await caller.echo_many(20, 1)
            restarted.backends[0].kill()
            await caller.echo_many(200, 1)
    finally:
        balancer.stop()
