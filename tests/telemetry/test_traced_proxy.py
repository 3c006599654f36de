"""The proxy with a hop behind it: which spans it makes, and which context reaches the next stage."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from typing import Any

import grpc
import httpx
import pytest
import structlog

from proxy.faces import Faces
from proxy.service import ProxyService
from proxy.settings import ProxySettings
from splitserve.api.inference import inference_pb2 as pb
from splitserve.errors import Unavailable
from splitserve.oip import protobuf
from splitserve.oip.messages import InferRequest, InferResponse
from splitserve.oip.protobuf import SERVICE
from splitserve.remote.inference import RemoteInference
from splitserve.server.logs import RequestLog
from splitserve.server.metrics import Metrics, StageMetrics
from splitserve.signature import TensorSpec
from splitserve.telemetry.families import PROTOCOLS
from splitserve.telemetry.rendering import OPENMETRICS, render
from splitserve.telemetry.traces import Sampler, TraceContext
from splitserve.testing import FakeInference, serving, signature
from tests.telemetry.traced import CALLER, NOT_SAMPLED, SAMPLED, TRACE, tracing

ECHO = signature("echo", [TensorSpec("x", "FP32", ("batch", 1))], version="2.1")
ROW = {"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 1], "data": [1.0]}]}
STATE, BAGGAGE = "vendor=1", "user=ann"


class Gated(FakeInference):
    """The next stage. ``gate``: requests wait for it."""

    def __init__(self) -> None:
        super().__init__(ECHO)
        self.gate = asyncio.Event()
        self.gate.set()
        self.n_cancelled = 0
        self.is_down = False

    async def infer(self, request: InferRequest) -> InferResponse:
        self.requests.append(request)
        if self.is_down:
            raise Unavailable("it is down", stage="preprocess")
        try:
            await self.gate.wait()
        except asyncio.CancelledError:
            self.n_cancelled += 1
            raise
        return self._answer(request)


class Served:
    """The proxy's faces, and what is behind them."""

    def __init__(self, backend: Gated, faces: Faces, hop: RemoteInference, service: ProxyService, metrics: Metrics) -> None:
        self.target = hop.target
        self.backend, self.hop, self.service, self.metrics = backend, hop, service, metrics
        self.grpc = f"127.0.0.1:{faces.grpc.port}"
        self.rest = httpx.AsyncClient(base_url=f"http://127.0.0.1:{faces.http.port}", trust_env=False, timeout=30)

    async def infer(self, *headers: tuple[str, str], body: object = ROW) -> httpx.Response:
        return await self.rest.post("/v2/models/echo/infer", json=body, headers=[*headers, ("x-request-id", "r1")])

    @property
    def sent(self) -> TraceContext | None:
        """The context of the last request that reached the next stage."""
        return self.backend.requests[-1].trace


async def until(claim: object) -> None:
    async with asyncio.timeout(30):
        while not claim():  # type: ignore[operator]  # noqa: ASYNC110 - there is no event for it
            await asyncio.sleep(0.005)


@pytest.fixture(params=["stream", "unary"])
async def served(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Served]:
    """Over a stream to the next stage, and by unary calls."""
    async with AsyncExitStack() as stack:
        backend = Gated()
        target = await stack.enter_async_context(serving(backend, stage="preprocess"))
        monkeypatch.setattr(
            "splitserve.batching.batcher.OVERDUE_S", 600.0
        )  # what arrives during a call waits, however slow we are
        if request.param == "unary":
            monkeypatch.setattr("splitserve.remote.stream.StreamTarget.is_direct", False)
        hop = await stack.enter_async_context(RemoteInference(target, stage="preprocess"))
        service = ProxyService(hop)
        await service.refresh()
        config = ProxySettings(http_port=0, grpc_port=0, grace_s=1.0)
        metrics = Metrics()
        recorder = metrics.add("proxy", StageMetrics("proxy", service, protocols=PROTOCOLS, batcher=service.batcher))
        faces = await stack.enter_async_context(Faces(service, config, recorder=recorder))
        await until(lambda: hop.n_streams == (request.param == "stream"))
        made = Served(backend, faces, hop, service, metrics)
        await stack.enter_async_context(made.rest)
        yield made


@pytest.mark.parametrize("traceparent", [SAMPLED, NOT_SAMPLED, f"00-{TRACE}-{CALLER}-03", f"cc-{TRACE}-{CALLER}-01-more"])
async def test_without_tracing_the_context_goes_on_unchanged(served: Served, traceparent: str) -> None:
    response = await served.infer(("traceparent", traceparent), ("tracestate", STATE), ("baggage", BAGGAGE))
    assert response.status_code == 200
    assert served.sent is not None
    assert served.sent.items() == [("traceparent", traceparent), ("tracestate", STATE), ("baggage", BAGGAGE)]
    assert served.backend.requests[-1].parameters == {}


INVALID = (f"ff-{TRACE}-{CALLER}-01", f"00-{'0' * 32}-{CALLER}-01", SAMPLED.upper(), "rubbish")


@pytest.mark.parametrize("ratio", [None, 0.0, 1.0])
async def test_what_goes_on(served: Served, ratio: float | None) -> None:
    """With tracing off, on, and for requests that are not sampled: flags, none, invalid ones, two headers."""

    async def sent(*headers: str) -> TraceContext | None:
        response = await served.infer(*[("traceparent", header) for header in headers], ("tracestate", STATE))
        assert response.status_code == 200
        return served.sent

    async def check() -> None:
        for flags in ("00", "01", "03"):
            context = await sent(f"00-{TRACE}-{CALLER}-{flags}")
            assert context is not None
            is_changed = ratio is not None and flags != "00"  # the parent is the span of this process
            assert (context.traceparent[:36], context.traceparent[52:]) == (f"00-{TRACE}-", f"-{flags}")
            assert (context.traceparent[36:52] != CALLER) == is_changed
            assert context.tracestate == STATE
        for headers in ((), *((value,) for value in INVALID), (SAMPLED, SAMPLED)):
            context = await sent(*headers)
            if ratio != 1.0:
                assert context is None
                continue
            assert context is not None
            assert context.trace_id not in (TRACE, "0" * 32)
            assert (context.traceparent[-2:], context.tracestate) == ("01", "")

    if ratio is None:
        await check()
        return
    with tracing(Sampler(ratio)) as recorded:
        await check()
    assert len(recorded.named("POST /v2/models/{model}/infer")) == (2 if ratio == 0 else 2 + 2 + len(INVALID))


async def test_a_request_that_is_sent_alone_is_one_tree(served: Served) -> None:
    with tracing() as recorded:
        response = await served.infer(("traceparent", SAMPLED))
        assert response.status_code == 200
        await until(lambda: len(recorded) == 3)
    edge, call = (
        recorded.named("POST /v2/models/{model}/infer")[0],
        next(span for span in recorded.spans if span.kind == "client"),
    )
    stage = next(span for span in recorded.spans if span.kind == "server" and span is not edge)
    assert {span.trace_id for span in (edge, call, stage)} == {TRACE}
    assert [span.parent_id for span in (edge, call, stage)] == [CALLER, edge.span_id, call.span_id]
    verb = "ModelStreamInfer" if served.hop.n_streams else "ModelInfer"
    assert call.name == stage.name == f"{SERVICE}/{verb}"
    assert (
        edge.attributes
        | {
            "http.request.method": "POST",
            "http.route": "/v2/models/{model}/infer",
            "http.response.status_code": 200,
            "url.path": "/v2/models/echo/infer",
            "url.scheme": "http",
            "splitserve.model": "echo",
            "splitserve.release": "2.1",
            "splitserve.rows": 1,
            "splitserve.batch.requests": 1,
            "splitserve.request_id": "r1",
        }
        == edge.attributes
    )
    assert call.attributes["rpc.response.status_code"] == stage.attributes["rpc.response.status_code"] == "OK"
    assert isinstance(call.attributes["server.port"], int)


async def test_requests_that_are_merged_have_a_trace_of_their_call_linked_both_ways(served: Served) -> None:
    """Also where only some of them are sampled."""
    served.backend.gate.clear()
    with tracing() as recorded:
        first = asyncio.create_task(served.infer(("traceparent", NOT_SAMPLED)))
        await until(lambda: served.backend.requests)
        parents = [f"00-{n:032x}-{n:016x}-01" for n in (1, 2)]
        others = [asyncio.create_task(served.infer(("traceparent", parent))) for parent in (*parents, NOT_SAMPLED)]
        await until(lambda: served.service.batcher.occupancy("echo")[0] == 3)
        served.backend.gate.set()
        assert [response.status_code for response in await asyncio.gather(first, *others)] == [200] * 4
        await until(lambda: len(recorded) == 5)
    members = sorted(recorded.named("POST /v2/models/{model}/infer"), key=lambda span: span.trace_id)
    (call,) = recorded.named("batch echo")
    assert [member.trace_id for member in members] == [f"{n:032x}" for n in (1, 2)]
    assert [member.links for member in members] == [[(call.trace_id, call.span_id)]] * 2
    assert sorted(call.links) == [(member.trace_id, member.span_id) for member in members]
    assert not call.parent_id
    for span in (call, *members):
        assert (span.attributes["splitserve.batch.requests"], span.attributes["splitserve.batch.rows"]) == (3, 3)
    assert {span.kind for span in recorded.spans if span.trace_id == call.trace_id} == {"internal", "client", "server"}


async def test_each_span_ends_however_its_request_does(served: Served) -> None:
    """Callers that leave, deadlines that pass, answers: mixed in the same calls."""
    served.backend.gate.clear()
    sent = [f"{n:032x}" for n in range(1, 61)]

    async def one(trace_id: str, timeout: str) -> None:
        headers = (("traceparent", f"00-{trace_id}-{CALLER}-01"), ("request-timeout", timeout))
        await served.infer(*headers)

    with tracing() as recorded:
        leaving = [asyncio.create_task(one(trace_id, "30")) for trace_id in sent[:20]]
        staying = [asyncio.create_task(one(trace_id, "30")) for trace_id in sent[40:]]
        await until(lambda: sum(len(queue.requests) for queue in served.service.batcher.queues.values()) == 40)
        await asyncio.gather(*[one(trace_id, "0.1") for trace_id in sent[20:40]])
        for task in leaving:
            task.cancel()
        await asyncio.gather(*leaving, return_exceptions=True)
        served.backend.gate.set()
        await asyncio.gather(*staying)
        await until(lambda: len(recorded.named("POST /v2/models/{model}/infer")) == len(sent))
    edges = {span.trace_id: span for span in recorded.named("POST /v2/models/{model}/infer")}
    statuses = [edges[trace_id].attributes["http.response.status_code"] for trace_id in sent]
    assert statuses == [499] * 20 + [504] * 20 + [200] * 20
    assert {span.parent_id for span in edges.values()} == {CALLER}


async def test_a_request_over_grpc_has_its_context_in_metadata(served: Served) -> None:
    message = request_message()
    async with grpc.aio.insecure_channel(served.grpc) as channel:
        with tracing() as recorded:
            call = channel.unary_unary(f"/{SERVICE}/ModelInfer")
            await call(message.SerializeToString(), metadata=(("traceparent", SAMPLED), ("tracestate", STATE)))  # type: ignore[misc]
    edge = next(span for span in recorded.spans if span.parent_id == CALLER)
    assert (edge.name, edge.kind, edge.tracestate) == (f"{SERVICE}/ModelInfer", "server", STATE)
    assert edge.attributes["rpc.system.name"] == "grpc"


async def test_a_trace_begins_at_the_stage_that_a_client_calls(served: Served) -> None:
    """What comes from another stage without a context was left out there."""
    with tracing() as recorded:
        message = protobuf.decode_request(request_message())
        await served.hop.infer(message)
        assert recorded.spans == []
        async with grpc.aio.insecure_channel(served.target) as channel:
            call: Any = channel.unary_unary(f"/{SERVICE}/ModelInfer")
            await call(request_message().SerializeToString())
        await until(lambda: len(recorded) == 1)
    assert [(span.name, span.parent_id) for span in recorded.spans] == [(f"{SERVICE}/ModelInfer", "")]


def request_message(identity: str = "1", **parameters: str) -> pb.ModelInferRequest:
    message = pb.ModelInferRequest(model_name="echo", id=identity, raw_input_contents=[b"\0" * 4])
    message.inputs.add(name="x", datatype="FP32", shape=[1, 1])
    for name, value in parameters.items():
        message.parameters[name].string_param = value
    return message


async def test_each_message_on_a_stream_has_its_own_context(served: Served) -> None:
    """Three callers share a stream that is cancelled: each of their spans has its parent and ends."""
    served.backend.gate.clear()
    parents = [f"{n:016x}" for n in (1, 2, 3)]
    async with grpc.aio.insecure_channel(served.grpc) as channel:
        with tracing() as recorded:
            stream = channel.stream_stream(f"/{SERVICE}/ModelStreamInfer")(metadata=(("traceparent", SAMPLED),))
            for number, parent in enumerate(parents):
                await stream.write(
                    request_message(str(number), traceparent=f"00-{number + 1:032x}-{parent}-01").SerializeToString()
                )
            await stream.write(request_message("3").SerializeToString())
            await until(lambda: served.backend.requests and served.service.batcher.occupancy("echo")[0] == 3)
            stream.cancel()
            await until(lambda: len([span for span in recorded.spans if span.parent_id in (*parents, CALLER)]) == 4)
    edges = {span.parent_id: span for span in recorded.spans if span.parent_id in (*parents, CALLER)}
    assert [edges[parent].trace_id for parent in parents] == [f"{n:032x}" for n in (1, 2, 3)]
    assert edges[CALLER].trace_id == TRACE  # of the stream, for a message without one
    assert {span.attributes["rpc.response.status_code"] for span in edges.values()} == {"CANCELLED"}
    served.backend.gate.set()


async def test_no_request_fails_for_its_context(served: Served) -> None:
    """60 entries and 10 KB go on within limits; what is not ASCII does not."""
    state = ",".join([f"a{n}={'x' * 160}" for n in range(60)])
    baggage = ",".join([f"k{n}={'v' * 160}" for n in range(60)])
    response = await served.infer(("traceparent", SAMPLED), ("tracestate", state), ("baggage", baggage))
    assert response.status_code == 200
    assert served.sent is not None
    assert len(served.sent.tracestate) <= 512
    assert 7000 < len(served.sent.baggage) <= 8192
    headers = {b"traceparent": SAMPLED.encode(), b"baggage": "k=é".encode(), b"tracestate": b"a=\xff"}
    response = await served.rest.post("/v2/models/echo/infer", json=ROW, headers=headers)
    assert response.status_code == 200
    assert served.sent.items() == [("traceparent", SAMPLED)]


async def test_failures_are_spans_too(served: Served) -> None:
    """With the status, also before the request is decoded; an error of the caller is none of the server."""
    with tracing() as recorded:
        assert (
            await served.rest.post("/v2/models/echo/infer", content=b"{", headers={"traceparent": SAMPLED})
        ).status_code == 400
        assert (await served.rest.post("/v2/models/none/infer", json=ROW, headers={"traceparent": SAMPLED})).status_code == 404
        served.backend.is_down = True
        assert (await served.infer(("traceparent", SAMPLED))).status_code == 503
    edges = [finished for finished in recorded if finished.span.parent_id == CALLER]
    assert [edge.span.attributes["http.response.status_code"] for edge in edges] == [400, 404, 503]
    assert [edge.error for edge in edges] == ["", "", "UNAVAILABLE"]
    calls = [finished for finished in recorded if finished.span.kind == "client"]
    assert calls
    assert {call.error for call in calls} == {"UNAVAILABLE"}


async def test_a_tracer_that_fails_fails_no_request(served: Served) -> None:
    with tracing():
        from splitserve.telemetry.traces import Tracing

        def fail(_: object) -> None:
            raise RuntimeError

        assert Tracing.tracer is not None
        Tracing.tracer._export = fail
        assert (await served.infer(("traceparent", SAMPLED))).status_code == 200
        assert Tracing.tracer.n_failures >= 2


async def test_the_line_of_a_request_has_its_trace(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RequestLog, "every", 1)
    with structlog.testing.capture_logs() as log:
        await served.infer(("traceparent", NOT_SAMPLED))
        with tracing() as recorded:
            await served.infer()
    lines = [line for line in log if line["event"] == "infer"]
    assert len(lines) == 4  # of two requests at two stages
    assert {line["trace_id"] for line in lines} == {TRACE, recorded.spans[-1].trace_id}
    assert {line["request_id"] for line in lines} == {"r1"}  # at both stages


async def test_buckets_of_latency_have_the_trace_of_a_request_as_exemplar(served: Served) -> None:
    """In OpenMetrics; Prometheus' own format has none."""
    with tracing():
        await served.infer(("traceparent", SAMPLED))
    snapshot = await served.metrics.snapshot()
    text, _ = await render(snapshot, served.metrics.registry.families, f"{OPENMETRICS}; version=1.0.0")
    lines = [line for line in text.decode().splitlines() if "request_duration_seconds_bucket" in line and " # " in line]
    assert len(lines) == 1
    assert f'trace_id="{TRACE}"' in lines[0]
    plain, _ = await render(snapshot, served.metrics.registry.families, "text/plain")
    assert TRACE not in plain.decode()
