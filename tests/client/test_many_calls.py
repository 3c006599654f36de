"""Many calls at once: none is lost, and the server is not flooded."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import numpy as np
import pytest

from splitserve import AsyncClient
from splitserve.errors import Overloaded, Unavailable
from splitserve.oip.messages import InferRequest, InferResponse, ModelMetadata
from splitserve.signature import TensorSpec
from splitserve.testing import FakeInference, signature
from tests.client.scripted import X, answer, http, scripted
from tests.client.ways import WAYS, Way, way_name

ECHO = signature("echo", [TensorSpec("x", "FP32", ("batch", 2))])
ASYNC = [way for way in WAYS if way.is_async]


class Admitting(FakeInference):
    """Refuses requests beyond a number at once, as a proxy does; counts metadata requests."""

    def __init__(self, n_admitted: int) -> None:
        super().__init__(ECHO)
        self.n_most = self._n_now = self.n_metadata = 0
        self._n_admitted = n_admitted

    async def infer(self, request: InferRequest) -> InferResponse:
        if self._n_now == self._n_admitted:
            raise Overloaded("full")
        self._n_now += 1
        self.n_most = max(self.n_most, self._n_now)
        await asyncio.sleep(0)
        self._n_now -= 1
        return InferResponse("echo", "1", request.inputs, request.id)

    async def metadata(self, model: str, version: str = "") -> ModelMetadata:
        self.n_metadata += 1
        return await super().metadata(model, version)


@pytest.mark.heavy
@pytest.mark.parametrize("way", ASYNC, ids=way_name)
async def test_five_thousand_calls_at_once_are_all_answered(way: Way) -> None:
    """Each with its own answer; the signature is fetched once."""
    service = Admitting(10_000)

    async with way.serving(service) as address, AsyncClient(address, timeout_s=60) as client:
        answers = await asyncio.gather(*(client.infer("echo", [[number, 1]]) for number in range(5_000)))

    assert [answer["x"][0, 0] for answer in answers] == list(range(5_000))
    assert service.n_metadata == 1
    assert service.n_most <= 64


async def test_requests_in_flight_are_limited_as_configured(way: Way) -> None:
    """The others wait in the client."""
    service = Admitting(3)

    async with way.to(service, max_concurrency=3, retry_on=[Unavailable]) as client:
        await asyncio.gather(*(client.infer("echo", [[number, 1]]) for number in range(50)))

    assert service.n_most <= 3


async def test_an_overloaded_server_is_asked_again_until_the_deadline(way: Way) -> None:
    """More often than a server that fails, and without spending the budget for those."""
    refusals = iter(range(7))

    def refusing(request: InferRequest) -> InferResponse:
        for _ in refusals:
            raise Overloaded("full")
        return InferResponse("echo", "1", request.inputs)

    service = FakeInference(ECHO, answer=refusing)
    async with way.to(service, max_attempts=2) as client:
        client._client._core._retries._uniform = lambda low, high: 0.0
        result = await client.infer("echo", [[1, 2]])

    assert result["x"].tolist() == [[1, 2]]
    assert len(service.requests) == 8


@pytest.mark.parametrize("options", [{"retry_on": [Unavailable]}, {"max_attempts": 1}])
async def test_retries_of_refused_requests_can_be_turned_off(way: Way, options: dict[str, Any]) -> None:
    """By leaving the error out of ``retry_on``, or by allowing one attempt."""

    def refusing(request: InferRequest) -> InferResponse:
        raise Overloaded("full")

    service = FakeInference(ECHO, answer=refusing)
    async with way.to(service, **options) as client:
        with pytest.raises(Overloaded, match="full"):
            await client.infer("echo", [[1, 2]])

    assert len(service.requests) == 1


async def test_429_of_any_server_is_retried(rest: Way) -> None:
    """After the pause that it asks for."""
    async with scripted(http(429, {}, retry_after="0"), answer(1)) as server, rest.at(server.url) as client:
        result = await client.infer("echo", X)

    assert result["y"].tolist() == [[1]]
    assert len(server.asked) == 2


class Slow(FakeInference):
    """Answers its first request when it is told to."""

    def __init__(self) -> None:
        super().__init__(ECHO)
        self.arrived, self.gate = asyncio.Event(), asyncio.Event()

    async def infer(self, request: InferRequest) -> InferResponse:
        self.arrived.set()
        await self.gate.wait()
        return await super().infer(request)


@pytest.mark.parametrize("way", ASYNC, ids=way_name)
async def test_waiting_for_a_turn_is_not_the_servers_silence(way: Way) -> None:
    """The timeout of a call begins when it may be sent: a call that waits here is not out of time."""
    service = Slow()

    async with way.serving(service) as address, AsyncClient(address, max_concurrency=1) as client:
        first = asyncio.create_task(client.infer("echo", [[1, 1]], timeout_s=60))
        await service.arrived.wait()
        second = asyncio.create_task(client.infer("echo", [[2, 2]], timeout_s=60))
        await asyncio.sleep(0)  # it waits for its turn
        client._core._clock = lambda: time.monotonic() + 1_000  # longer than its timeout
        service.gate.set()
        answers = await asyncio.gather(first, second)

    np.testing.assert_array_equal(np.concatenate([each["x"] for each in answers]), [[1, 1], [2, 2]])


@pytest.mark.parametrize("way", ASYNC, ids=way_name)
async def test_calls_that_are_cancelled_give_their_turn_back(way: Way) -> None:
    """So that a client does not run out of them."""
    service = Slow()

    async with way.serving(service) as address, AsyncClient(address, max_concurrency=1) as client:
        for _ in range(3):
            service.arrived.clear()
            call = asyncio.create_task(client.infer("echo", [[1, 1]]))
            await service.arrived.wait()
            call.cancel()
            await asyncio.gather(call, return_exceptions=True)
        service.gate.set()
        result = await client.infer("echo", [[1, 1]])

    assert result["x"].tolist() == [[1, 1]]
