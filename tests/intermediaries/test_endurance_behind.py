"""Minutes behind reverse proxies: streams that stay open, and calls while the proxies are restarted again and again."""

from __future__ import annotations

import asyncio
import threading
import time
from pathlib import Path

import pytest

from tests.intermediaries.backends import Pool
from tests.intermediaries.balancers import Balancer, Envoy, Nginx
from tests.intermediaries.calls import calling, echo_request, hold_request
from tests.intermediaries.conftest import KINDS, addresses

pytestmark = [pytest.mark.intermediaries, pytest.mark.long, pytest.mark.timeout(900)]

STREAM_S = 300.0
SOAK_S = 600.0
RESTART_INTERVAL_S = 60.0


@pytest.mark.parametrize("interval_s", [0.1, 20.0])
async def test_streams_stay_open_for_five_minutes(pool: Pool, tmp_path: Path, interval_s: float) -> None:
    """Through each kind at the same time, with messages all the time, and with long silences."""
    balancers = [kind(tmp_path / f"balancer{number}", addresses(pool)) for number, kind in enumerate(KINDS.values())]
    end = time.monotonic() + STREAM_S

    async def keep_talking(balancer: Balancer) -> None:
        async with calling(balancer.grpc) as caller:
            stream = caller.stream()
            number = 0
            while time.monotonic() < end:
                content = number.to_bytes(4, "little") * 16
                await stream.write(echo_request(content))
                assert (await stream.read()).infer_response.raw_output_contents[0] == content
                number += 1
                await asyncio.sleep(interval_s)
            await stream.done_writing()
            assert (await stream.code()).name == "OK", balancer.name

    try:
        async with asyncio.TaskGroup() as group:
            for balancer in balancers:
                group.create_task(keep_talking(balancer))
    finally:
        for balancer in balancers:
            balancer.stop()


@pytest.mark.parametrize("kind", [Nginx, Envoy], ids=lambda kind: kind.name)
async def test_ten_minutes_with_a_restart_each_minute(kind: type[Balancer], restarted: Pool, tmp_path: Path) -> None:
    """No call is lost, and none gets another's answer."""
    balancer = kind(tmp_path / "balancer", addresses(restarted))
    done = threading.Event()
    n_calls = 0

    def keep_restarting() -> None:
        end = time.monotonic() + SOAK_S
        while not done.is_set() and time.monotonic() < end:
            done.wait(RESTART_INTERVAL_S)
            restarted.restart_each(balancer.wait_until_healthy)

    async def keep_calling(number: int) -> None:
        nonlocal n_calls
        async with calling(balancer.grpc) as caller:
            while not done.is_set():
                await caller.echo(n_calls.to_bytes(4, "little") * (16 << number))
                await caller.infer(hold_request(10))
                n_calls += 2

    async def restart() -> None:
        try:
            await asyncio.to_thread(keep_restarting)
        finally:
            done.set()

    try:
        async with asyncio.TaskGroup() as group:
            group.create_task(restart())
            for number in range(8):
                group.create_task(keep_calling(number))
    finally:
        done.set()
        balancer.stop()
    print(f"{n_calls} calls through {balancer.name}")
