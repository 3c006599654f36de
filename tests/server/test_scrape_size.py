"""A scrape of a service with 100 models of 5 releases each: how large it is, and what is done in one turn of the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from prometheus_client import utils

from proxy.service import ProxyService
from splitserve.oip.messages import InferRequest
from splitserve.server.lifecycle import background
from splitserve.server.metrics import Metrics, StageMetrics
from splitserve.signature import TensorSpec
from splitserve.telemetry.families import PROTOCOLS
from splitserve.telemetry.registry import Snapshot
from splitserve.telemetry.rendering import Renderer
from splitserve.tensors import Tensor
from splitserve.testing import FakeInference, signature

N_MODELS, N_RELEASES = 100, 5
MAX_BYTES = 1_000_000
MAX_READ = 1000
"""Series that are read in one turn: less than a microsecond each."""
MAX_RENDERED = 420
"""Values that are rendered in one turn: some microseconds each where their lines are new."""

PLACES = [
    (f"a-model-with-a-name-{model:03}", f"{release}.{release}")
    for model in range(N_MODELS)
    for release in range(1, N_RELEASES + 1)
]
SPEC = [TensorSpec("x", "FP32", ("batch", 1))]


async def many_releases() -> tuple[Metrics, StageMetrics]:
    """The proxy's metrics after a request to each release over each protocol."""
    service = ProxyService(FakeInference(*(signature(model, SPEC, version=release) for model, release in PLACES)))
    await service.refresh()
    metrics = Metrics()
    stage = StageMetrics("proxy", service, protocols=PROTOCOLS, batcher=service.batcher)
    recorder = metrics.add("proxy", stage)
    await metrics.refresh()
    for model, release in PLACES:
        await service.infer(InferRequest(model, (Tensor("x", "FP32", (1, 1), bytes(4)),), version=release))
        for protocol in PROTOCOLS:
            recorder.succeeded(protocol, model, release, 0.0, 0.0)
    return metrics, stage


async def test_a_large_scrape_is_small_and_made_in_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests are answered between the slices, also at the first scrape, when no line is known."""
    metrics, stage = await many_releases()
    n_in_turn, most = 0, 0

    def counting(original: Callable[[Any], str]) -> Callable[[Any], str]:
        def count(value: Any) -> str:
            nonlocal n_in_turn, most
            n_in_turn += 1
            most = max(most, n_in_turn)
            return original(value)

        return count

    async def other_work() -> None:
        nonlocal n_in_turn
        while True:
            n_in_turn = 0
            await asyncio.sleep(0)

    counted = counting(utils.floatToGoString)
    for module in ("utils", "exposition", "openmetrics.exposition"):
        monkeypatch.setattr(f"prometheus_client.{module}.floatToGoString", counted)
    snapshot: Snapshot = await metrics.snapshot()
    renderer = Renderer(metrics.registry.families)
    async with background(other_work()):
        texts = [await renderer.render(snapshot, accept) for accept in ("", "application/openmetrics-text") for _ in range(2)]

    assert sum(len(values) for values in snapshot.values()) > 10 * len(PLACES)
    assert max(len(text) for text, _ in texts) < MAX_BYTES
    assert 0 < most <= MAX_RENDERED
    assert longest_run(stage) <= MAX_READ


def longest_run(stage: StageMetrics) -> int:
    """The largest number of samples that are read without a pause."""
    n_read, longest = 0, 0
    for sample in stage.collect():
        n_read = 0 if sample is None else n_read + 1
        longest = max(longest, n_read)
    return longest
