"""Latency histograms against what a client measures, in virtual time: both see the same clock."""

from __future__ import annotations

import asyncio
import json
import math
import time
from bisect import bisect_left

import prometheus_client.exposition  # noqa: F401 - otherwise imported in a thread, for which virtual time does not wait
import pytest

from proxy.rest.app import RestApp
from proxy.rest.config import RestConfig
from proxy.service import ProxyService
from splitserve.batching.batcher import Batcher
from splitserve.oip.messages import InferRequest, InferResponse, ServerMetadata
from splitserve.server.metrics import Metrics, StageMetrics
from splitserve.signature import TensorSpec
from splitserve.telemetry.families import FAMILIES, PHASE_SECONDS, REQUEST_SECONDS
from splitserve.telemetry.reading import Interval, Scrape
from splitserve.telemetry.recorders import LATENCY_BOUNDS
from splitserve.telemetry.registry import Snapshot
from splitserve.telemetry.rendering import render
from splitserve.testing import FakeInference, signature
from splitserve.wire.byte_budget import ByteBudget
from splitserve.wire.http1.messages import HttpRequest, HttpResponse, RequestBody
from tests.virtual_time import VirtualTimeLoop

ECHO = signature("echo", [TensorSpec("x", "FP32", ("batch", 1))], version="1.1")
BODY = json.dumps({"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 1], "data": [1.0]}]}).encode()
BY_NAME = {family.name: family for family in FAMILIES}


class Slow(FakeInference):
    """Takes as long as it is told."""

    takes_s = 0.0

    async def infer(self, request: InferRequest) -> InferResponse:
        await asyncio.sleep(self.takes_s)
        return await super().infer(request)


class Measured:
    """A proxy's REST face without a socket, its metrics, and a client with a clock."""

    def __init__(self) -> None:
        self.backend = Slow(ECHO)
        self.service = ProxyService(self.backend)
        self.metrics = Metrics()
        stage = StageMetrics("proxy", self.service, protocols=("rest",), batcher=self.service.batcher)
        config = RestConfig(
            metadata=ServerMetadata("test", "0"), max_body_bytes=1000, default_timeout_s=200, max_timeout_s=200, grace_s=1
        )
        self.app = RestApp(self.service, config, recorder=self.metrics.add("proxy", stage))

    async def infer(self, takes_s: float) -> float:
        """The seconds that a client measures."""
        self.backend.takes_s = takes_s
        body = RequestBody(1000, ByteBudget(1000))
        body.feed(BODY)
        body.complete()
        answered: asyncio.Future[HttpResponse] = asyncio.get_running_loop().create_future()
        headers = {b"content-type": b"application/json"}
        began = time.monotonic()
        self.app.answer(HttpRequest(0, body, "POST", "/v2/models/echo/infer", headers), answered.set_result)  # type: ignore[arg-type]
        assert (await answered).status == 200
        return time.monotonic() - began

    async def snapshot(self) -> Snapshot:
        return await self.metrics.snapshot()


@pytest.mark.parametrize("durations_s", [
    [0.0007 * 1.12**step for step in range(101)],  # 0.7 ms … 58 s
    [0.002] * 97 + [90.0] * 3,
    [0.0251] * 100,
], ids=["spread", "two peaks", "all alike"])  # fmt: skip
def test_quantiles_are_those_that_a_client_measures(durations_s: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    """p50 and p99 of the histogram are in the bucket of the client's, also of requests that take longer than a minute."""

    async def main() -> tuple[list[float], Interval]:
        measured = Measured()
        await measured.service.refresh()
        before = await measured.snapshot()
        seen_s = [await measured.infer(takes_s) for takes_s in durations_s]
        texts = [(await render(snapshot, BY_NAME, ""))[0].decode() for snapshot in (before, await measured.snapshot())]
        return seen_s, Interval(Scrape(texts[0], 0.0), Scrape(texts[1], 1.0))

    loop = VirtualTimeLoop()
    monkeypatch.setattr(time, "monotonic", loop.time)
    monkeypatch.setitem(Batcher.__init__.__kwdefaults__, "clock", loop.time)
    try:
        seen_s, interval = loop.run_until_complete(main())
    finally:
        loop.close()

    for q in (0.5, 0.99):
        expected_s = sorted(seen_s)[math.ceil(q * len(seen_s)) - 1]
        for family, labels in ((REQUEST_SECONDS, {}), (PHASE_SECONDS, {"phase": "hop"})):
            found_s = interval.quantile(family, q, stage="proxy", **labels)
            assert found_s is not None
            assert bisect_left(LATENCY_BOUNDS, found_s) == bisect_left(LATENCY_BOUNDS, expected_s), (family.name, q)
