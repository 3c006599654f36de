"""What the proxy counts while it serves: over REST, gRPC and a stream."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import AsyncIterator

import grpc
import httpx
import pytest

from proxy.faces import Faces
from proxy.service import ProxyService
from proxy.settings import ProxySettings
from splitserve.api.inference import inference_pb2 as pb
from splitserve.batching.queue import BatchLimits
from splitserve.errors import Unavailable
from splitserve.oip.messages import UNAVAILABLE, InferRequest, InferResponse, ModelState
from splitserve.oip.protobuf import SERVICE
from splitserve.server.metrics import Metrics, StageMetrics
from splitserve.signature import TensorSpec
from splitserve.telemetry import families
from splitserve.telemetry.families import PROTOCOLS
from splitserve.telemetry.recorders import HistogramValue
from splitserve.telemetry.registry import Labels, Snapshot, Value
from splitserve.testing import FakeInference, signature

ECHO = signature("echo", [TensorSpec("x", "FP32", ("batch", 1))], version="2.1")
ROWS = {"inputs": [{"name": "x", "datatype": "FP32", "shape": [2, 1], "data": [1.0, 2.0]}]}


class Failing(FakeInference):
    """Answers, unless it is told not to."""

    is_down = False

    async def infer(self, request: InferRequest) -> InferResponse:
        if self.is_down:
            raise Unavailable("it is down", stage="preprocess")
        return await super().infer(request)


class Counted:
    """The proxy's faces, their metrics, and clients."""

    def __init__(self, backend: Failing, service: ProxyService, metrics: Metrics, http: int, grpc_port: int) -> None:
        self.backend, self.service, self.metrics = backend, service, metrics
        self.http, self.grpc_port = http, grpc_port

    async def infer(self, model: str = "echo", body: object = None) -> int:
        async with httpx.AsyncClient(trust_env=False, verify=False, timeout=60) as client:
            answer = await client.post(f"http://127.0.0.1:{self.http}/v2/models/{model}/infer", json=body or ROWS)
        return answer.status_code

    async def predict(self, body: object) -> int:
        """Over V1."""
        async with httpx.AsyncClient(trust_env=False, verify=False, timeout=60) as client:
            answer = await client.post(f"http://127.0.0.1:{self.http}/v1/models/echo:predict", json=body)
        return answer.status_code

    async def snapshot(self) -> Snapshot:
        return await self.metrics.snapshot()


@pytest.fixture
async def counted() -> AsyncIterator[Counted]:
    backend = Failing(ECHO)
    service = ProxyService(backend, limits=BatchLimits(max_queue_size=1))
    await service.refresh()
    config = ProxySettings(http_port=0, grpc_port=0, grace_s=1.0)
    metrics, budget = Metrics(), config.byte_budget()
    stage = StageMetrics("proxy", service, protocols=PROTOCOLS, batcher=service.batcher, budget=budget)
    recorder = metrics.add("proxy", stage)
    await metrics.refresh()
    async with Faces(service, config, budget=budget, recorder=recorder) as faces, asyncio.timeout(60):
        yield Counted(backend, service, metrics, faces.http.port, faces.grpc.port)


def requests(snapshot: Snapshot) -> dict[Labels, Value]:
    """Those that were counted, by model, release, protocol and code."""
    return {labels[1:]: value for labels, value in snapshot[families.REQUESTS.name].items() if value}


def message() -> bytes:
    tensor = pb.ModelInferRequest.InferInputTensor(name="x", datatype="FP32", shape=[1, 1])
    tensor.contents.fp32_contents.append(1.0)
    data: bytes = pb.ModelInferRequest(model_name="echo", inputs=[tensor]).SerializeToString()
    return data


async def test_requests_are_counted_by_protocol_and_code(counted: Counted) -> None:
    """On every path that a request may take, with the release that answered."""
    assert await counted.infer() == 200
    async with grpc.aio.insecure_channel(f"127.0.0.1:{counted.grpc_port}") as channel:
        await channel.unary_unary(f"/{SERVICE}/ModelInfer")(message())
        stream = channel.stream_stream(f"/{SERVICE}/ModelStreamInfer")()
        await stream.write(message())
        await stream.read()
        await stream.done_writing()
        await stream.read()
    assert await counted.infer("made-up") == 404
    assert await counted.predict({"instances": "none"}) == 400
    assert await counted.infer(body={"inputs": []}) == 400
    counted.backend.is_down = True
    assert await counted.infer() == 503

    assert requests(await counted.snapshot()) == {
        ("echo", "2.1", "rest", "OK"): 1,
        ("echo", "2.1", "grpc", "OK"): 1,
        ("echo", "2.1", "stream", "OK"): 1,
        ("unknown", "", "rest", "NOT_FOUND"): 1,
        ("echo", "2.1", "rest", "INVALID_ARGUMENT"): 1,
        ("echo", "", "rest", "INVALID_ARGUMENT"): 1,
        ("echo", "2.1", "rest", "UNAVAILABLE"): 1,
    }


async def test_a_phase_has_as_many_durations_as_requests(counted: Counted) -> None:
    """Count, sum and buckets are of one moment; the phases of a request are within it."""
    for _ in range(3):
        await counted.infer()

    found = await counted.snapshot()

    seconds = {labels[1]: value for labels, value in found[families.PHASE_SECONDS.name].items()}
    whole = found[families.REQUEST_SECONDS.name]["proxy", "rest"]
    assert isinstance(whole, HistogramValue)
    assert seconds.keys() == {"queue", "hop", "encode"}
    assert {sum(value.counts) for value in seconds.values()} == {3} == {sum(whole.counts)}  # type: ignore[union-attr]
    assert sum(value.sum for value in seconds.values()) < whole.sum  # type: ignore[union-attr]
    assert found[families.CALL_ROWS.name]["proxy",].sum == 6.0  # type: ignore[union-attr]
    assert found[families.ROWS.name]["proxy", "echo", "2.1"] == 6
    assert found[families.INFERENCES.name]["proxy", "echo", "2.1", "succeeded"] == 3


async def test_what_is_known_at_the_start_exists_at_zero(counted: Counted) -> None:
    """So that ``increase`` sees the first error and the first refusal."""
    found = await counted.snapshot()

    assert found[families.INFERENCES.name] == {
        ("proxy", "echo", "2.1", "succeeded"): 0,
        ("proxy", "echo", "2.1", "failed"): 0,
    }
    counted_at_zero = {labels[3:] for labels in found[families.REQUESTS.name] if labels[1:3] == ("echo", "2.1")}
    assert counted_at_zero == {(protocol, code) for protocol in PROTOCOLS for code in ("OK", *families.FAILURES)}
    assert set(found[families.REQUESTS.name].values()) == {0}
    assert set(found[families.REFUSED.name].values()) == {0}
    for family in (families.QUEUED, families.IN_FLIGHT, families.CALLS_IN_FLIGHT):
        assert found[family.name] == {("proxy", "echo", "2.1"): 0}
    assert found[families.ADMISSION_LIMIT.name] == {("proxy", "echo", "2.1"): math.inf}
    assert found[families.BYTES_IN_FLIGHT.name] == {("proxy",): 0}
    assert found[families.READY.name] == {("proxy",): 1}


async def test_refusals_are_counted_by_their_reason(counted: Counted, monkeypatch: pytest.MonkeyPatch) -> None:
    """One is in a call and one is queued, which is the limit: the third is refused."""
    monkeypatch.setattr("splitserve.batching.batcher.OVERDUE_S", 60.0)  # a call that is held starts no other
    held, occupancy = asyncio.Event(), counted.service.batcher.occupancy

    async def hold(request: InferRequest) -> InferResponse:
        await held.wait()
        return InferResponse(request.model, request.version, request.inputs)

    counted.backend.infer = hold  # type: ignore[method-assign]
    waiting = []
    for expected in ((0, 1), (1, 1)):
        waiting.append(asyncio.create_task(counted.infer()))
        while occupancy("echo") != expected:  # noqa: ASYNC110
            await asyncio.sleep(0)
    third = await counted.infer()
    found = await counted.snapshot()
    held.set()

    assert (third, await asyncio.gather(*waiting)) == (429, [200, 200])
    assert {labels[1]: n for labels, n in found[families.REFUSED.name].items() if n} == {"queue_full": 1}
    assert found[families.QUEUED.name] == {("proxy", "echo", "2.1"): 1}
    assert found[families.IN_FLIGHT.name] == {("proxy", "echo", "2.1"): 2}
    assert found[families.CALLS_IN_FLIGHT.name] == {("proxy", "echo", "2.1"): 1}


async def test_series_of_a_model_that_went_go(counted: Counted) -> None:
    """And none is made for it by what still refers to it."""
    await counted.infer()
    counted.backend.states = [ModelState("other", "1.1", UNAVAILABLE)]
    counted.backend.signatures[("other", "1.1")] = signature("other", [TensorSpec("x", "FP32", ("batch", 1))], version="1.1")
    await counted.service.refresh()

    found = await counted.snapshot()

    assert not [name for name, values in found.items() if any("echo" in labels for labels in values)]
    assert found[families.READY.name] == {("proxy",): 0}


async def test_metrics_that_fail_fail_no_request(counted: Counted, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither recording nor reading."""
    monkeypatch.setattr(StageMetrics, "_durations", lambda _: json.loads("broken"))
    monkeypatch.setattr("splitserve.telemetry.requests.bisect_left", None)

    assert await counted.infer() == 200
    failures = (await counted.snapshot())[families.TELEMETRY_FAILURES.name]
    assert failures["proxy",] == 1  # where reading has failed, the part is missing


@pytest.mark.parametrize(
    ("headers", "query", "status"),
    [
        ({"content-encoding": "br"}, "", 415),
        ({"content-type": "multipart/form-data; boundary=b"}, "", 415),
        ({"request-timeout": "soon"}, "", 400),
        ({}, "?priority=1", 400),
    ],
    ids=["encoding", "media type", "timeout", "parameter of a job"],
)
@pytest.mark.parametrize("path", ["/v2/models/echo/infer", "/v1/models/echo:predict"])
async def test_requests_whose_headers_are_refused_are_counted(
    counted: Counted, path: str, headers: dict[str, str], query: str, status: int
) -> None:
    """As those whose bodies are, with the same code."""
    async with httpx.AsyncClient(trust_env=False, verify=False, timeout=60) as client:
        answer = await client.post(f"http://127.0.0.1:{counted.http}{path}{query}", content=json.dumps(ROWS), headers=headers)
    requests = (await counted.snapshot())[families.REQUESTS.name]

    assert answer.status_code == status
    assert "x-request-id" in answer.headers
    assert requests["proxy", "echo", "", "rest", "INVALID_ARGUMENT"] == 1
