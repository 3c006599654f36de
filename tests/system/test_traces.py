"""Traces of real processes, as a collector receives them."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tests.collector import Collector, Received, trees
from tests.demo_models import Demos
from tests.system.processes import System, wait_until

MODEL = "breast-cancer"


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    with Collector() as collector:
        yield collector


@pytest.fixture(scope="module")
def system(demos: Demos, collector: Collector) -> Iterator[System]:
    system = System(
        demos.repository,
        MODELS=MODEL,
        OTEL_EXPORTER_OTLP_ENDPOINT=collector.http_url,
        OTEL_BSP_SCHEDULE_DELAY="50",
        OTEL_BSP_MAX_QUEUE_SIZE="10000",
    )
    wait_until(lambda: system.rest(f"/v2/models/{MODEL}/ready")[0] == 200, "the model is ready")
    yield system
    system.stop()


def body_for(system: System) -> dict[str, Any]:
    metadata = system.rest(f"/v2/models/{MODEL}")[1]
    return {
        "inputs": [
            {
                "name": each["name"],
                "datatype": each["datatype"],
                "shape": [1, *each["shape"][1:]],
                "data": [1.0] * each["shape"][-1],
            }
            for each in metadata["inputs"]
        ]
    }


def roots(spans: list[Received]) -> list[Received]:
    return [span for span in spans if not span.parent_id]


def test_each_of_many_requests_is_one_tree(system: System, collector: Collector) -> None:
    """1,000 at a time: alone over three processes, or merged, with links both ways."""
    body = body_for(system)
    with ThreadPoolExecutor(32) as pool:
        answers = list(pool.map(lambda _: system.rest(f"/v2/models/{MODEL}/infer", body)[0], range(1000)))
    assert answers == [200] * 1000

    def is_whole(spans: list[Received]) -> bool:
        ids = {span.span_id for span in spans}
        known = {(span.trace_id, span.span_id) for span in spans}
        edge = [span for span in spans if span.name.startswith("POST")]
        calls = [span for span in spans if span.kind == "client"]
        answered = {span.parent_id for span in spans if span.kind == "server"}
        return (
            len(edge) == 1000
            and all(not span.parent_id or span.parent_id in ids for span in spans)
            and all(link in known for span in edge for link in span.links)
            and all(call.span_id in answered for call in calls)
        )

    spans = collector.wait_for(is_whole, "all spans")
    by_trace, by_id = trees(spans), {(span.trace_id, span.span_id): span for span in spans}
    assert all(len(roots(tree)) == 1 for tree in by_trace.values())
    for edge in (span for span in spans if span.name.startswith("POST")):
        tree = by_trace[edge.trace_id]
        if not edge.links:
            assert {span.service for span in tree} == {"splitserve-proxy", "splitserve-preprocess", "splitserve-predict"}
            continue
        assert tree == [edge]
        (call,) = (by_id[link] for link in edge.links)
        assert (edge.trace_id, edge.span_id) in call.links
        assert call.attributes["splitserve.batch.requests"] == len(call.links) == edge.attributes["splitserve.batch.requests"]
        assert {span.service for span in by_trace[call.trace_id]} >= {"splitserve-proxy", "splitserve-preprocess"}
