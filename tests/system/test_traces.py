"""Traces of real processes, as a collector receives them."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Iterator
from typing import Any

import grpc
import httpx
import pytest

from splitserve.api.inference import inference_pb2 as pb
from splitserve.oip.protobuf import SERVICE
from tests.collector import Collector, Received, trees
from tests.demo_models import Demos
from tests.system.processes import PATIENCE_S, Process, System, free_ports, wait_until
from tests.system.test_telemetry import children

MODEL = "breast-cancer"
EDGE = ("POST /v2/models/{model}/infer", f"{SERVICE}/ModelInfer", f"{SERVICE}/ModelStreamInfer")
N_REST, N_UNARY, N_STREAM = 400, 300, 300
AT_A_TIME = 20
"""Of each: few enough that admission control refuses none."""


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    with Collector() as collector:
        yield collector


@pytest.fixture
def fresh(collector: Collector) -> Collector:
    """Without the spans of other tests."""
    collector.spans.clear()
    return collector


def variables(collector: Collector) -> dict[str, str]:
    return {
        "MODELS": MODEL,
        "OTEL_EXPORTER_OTLP_ENDPOINT": collector.http_url,
        "OTEL_BSP_SCHEDULE_DELAY": "50",
        "OTEL_BSP_MAX_QUEUE_SIZE": "10000",
    }


@pytest.fixture(scope="module")
def split(demos: Demos, collector: Collector) -> Iterator[System]:
    system = System(demos.repository, **variables(collector))
    yield system
    system.stop()


@pytest.fixture(scope="module")
def fused(demos: Demos, collector: Collector) -> Iterator[System]:
    system = System(demos.repository, is_fused=True, **variables(collector))
    yield system
    system.stop()


def body_of(system: System) -> dict[str, Any]:
    """A request of one row, once the model is ready."""
    wait_until(lambda: system.rest(f"/v2/models/{MODEL}/ready")[0] == 200, "the model is ready")
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


def message_of(body: dict[str, Any], identity: str) -> bytes:
    message = pb.ModelInferRequest(model_name=MODEL, id=identity)
    for each in body["inputs"]:
        tensor = message.inputs.add(name=each["name"], datatype=each["datatype"], shape=each["shape"])
        contents = tensor.contents.fp64_contents if each["datatype"] == "FP64" else tensor.contents.fp32_contents
        contents.extend(each["data"])
    return message.SerializeToString()


async def send(system: System, body: dict[str, Any]) -> None:
    """1,000 requests: over REST, by unary calls, and on a stream, all at a time."""

    async def over_rest() -> None:
        limits = httpx.Limits(max_connections=AT_A_TIME)
        async with httpx.AsyncClient(trust_env=False, timeout=PATIENCE_S, limits=limits) as client:
            url = f"http://{system.http}/v2/models/{MODEL}/infer"
            answers = await asyncio.gather(*[client.post(url, json=body) for _ in range(N_REST)])
        assert {answer.status_code for answer in answers} == {200}

    async def over_grpc(channel: grpc.aio.Channel) -> None:
        call: Any = channel.unary_unary(f"/{SERVICE}/ModelInfer")
        turn = asyncio.Semaphore(AT_A_TIME)

        async def one(n: int) -> None:
            async with turn:
                await call(message_of(body, str(n)))

        await asyncio.gather(*map(one, range(N_UNARY)))

    async def on_a_stream(channel: grpc.aio.Channel) -> None:
        turn = asyncio.Semaphore(AT_A_TIME)

        async def messages() -> Any:
            for n in range(N_STREAM):
                await turn.acquire()
                yield message_of(body, str(n))

        streaming: Any = channel.stream_stream(f"/{SERVICE}/ModelStreamInfer")
        n_answers = 0
        async for answer in streaming(messages()):
            assert not pb.ModelStreamInferResponse.FromString(answer).error_message
            n_answers += 1
            turn.release()
        assert n_answers == N_STREAM

    async with grpc.aio.insecure_channel(system.grpc) as channel:
        await asyncio.gather(over_rest(), over_grpc(channel), on_a_stream(channel))


def edges_in(spans: list[Received]) -> list[Received]:
    """The spans of what clients have sent, none of which had a context."""
    return [span for span in spans if span.name in EDGE and not span.parent_id]


def is_whole(spans: list[Received]) -> bool:
    """Whether all requests are there, with all that their spans refer to."""
    known = {(span.trace_id, span.span_id) for span in spans}
    answered = {span.parent_id for span in spans if span.kind == "server"}
    return (
        len(edges_in(spans)) == N_REST + N_UNARY + N_STREAM
        and all(not span.parent_id or (span.trace_id, span.parent_id) in known for span in spans)
        and all(link in known for span in spans for link in span.links)
        and all(span.span_id in answered for span in spans if span.kind == "client")
    )


@pytest.mark.parametrize("kind", ["split", "fused"])
def test_each_of_many_requests_is_one_tree(kind: str, request: pytest.FixtureRequest, fresh: Collector) -> None:
    """Alone over all stages; if it is merged it ends at the proxy, linked with the call both ways."""
    system: System = request.getfixturevalue(kind)
    asyncio.run(send(system, body_of(system)))

    spans = fresh.wait_for(is_whole, "all spans")
    by_trace, by_id = trees(spans), {(span.trace_id, span.span_id): span for span in spans}
    assert all(len([span for span in tree if not span.parent_id]) == 1 for tree in by_trace.values())
    edges = edges_in(spans)
    assert [sum(span.name == name for span in edges) for name in EDGE] == [N_REST, N_UNARY, N_STREAM]
    assert any(edge.links for edge in edges)
    for edge in edges:
        tree = by_trace[edge.trace_id]
        if edge.links:
            assert tree == [edge]
            (call,) = (by_id[link] for link in edge.links)
            assert (edge.trace_id, edge.span_id) in call.links
            assert call.attributes["splitserve.batch.requests"] == len(call.links) == edge.attributes["splitserve.batch.requests"]
            tree = by_trace[call.trace_id]
        if kind == "split":
            assert {span.service for span in tree} == {"splitserve-proxy", "splitserve-preprocess", "splitserve-predict"}
        else:
            assert {f"preprocess {MODEL}", f"predict {MODEL}"} < {span.name for span in tree}
    for span in spans:
        if span.parent_id and span.service == by_id[span.trace_id, span.parent_id].service:
            assert span.start_ns >= by_id[span.trace_id, span.parent_id].start_ns - 5_000_000  # wall clocks may be set


def test_spans_of_all_workers_arrive(demos: Demos, fresh: Collector) -> None:
    """The exporter is made after the fork; also in a worker that has replaced one that was killed."""
    http, grpc_port = free_ports(2)
    process = Process(
        "fused_service",
        {
            "MODEL_REPOSITORY": str(demos.repository),
            "PROXY_WORKERS": "2",
            "PROXY_HTTP_PORT": str(http),
            "PROXY_GRPC_PORT": str(grpc_port),
            **variables(fresh),
        },
    )

    def pids() -> set[int]:
        # Each request has a connection of its own, which any worker may accept.
        httpx.post(f"http://127.0.0.1:{http}/v2/models/none/infer", json={"inputs": []}, trust_env=False, timeout=PATIENCE_S)
        return {span.resource["process.pid"] for span in fresh.spans}

    try:
        wait_until(lambda: len(process.events("listening")) == 2, "both workers listen")
        first = set(children(process.pid)[:2])
        wait_until(lambda: pids() == first, "spans of both workers")
        os.kill(min(first), signal.SIGKILL)
        wait_until(lambda: len(process.events("listening")) == 3, "another worker listens")
        wait_until(lambda: len(pids()) == 3, "spans of the new worker")
    finally:
        assert process.stop() == 0
