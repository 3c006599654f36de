"""The limits that ship, and those that are tested at other faces too: at the limit and one past it, on a stream as elsewhere."""

from __future__ import annotations

import asyncio
import gzip
import json
from pathlib import Path
from typing import Any

import grpc
import pytest

from predict_service.settings import PredictSettings
from preprocess_service.settings import PreprocessSettings
from proxy.service import ProxyService
from proxy.settings import ProxySettings
from splitserve.api.inference import inference_pb2 as pb
from splitserve.batching.admission import FIRST_LIMIT
from splitserve.oip.limits import MAX_JSON_DEPTH, MAX_NAME_LENGTH
from splitserve.oip.messages import InferRequest, InferResponse, remaining_s
from splitserve.oip.protobuf import SERVICE
from splitserve.repository.bundle import MAX_BUNDLE_BYTES
from splitserve.server import settings
from splitserve.tensors import MAX_RANK
from splitserve.testing import FakeInference
from tests.contracts.faces import MODELS, Served, served

MIB = 1024 * 1024
ROW = {"name": "x", "datatype": "FP32", "shape": [1, 2], "data": [1.0, 2.5]}
Input = pb.ModelInferRequest.InferInputTensor
Wanted = pb.ModelInferRequest.InferRequestedOutputTensor
FLAG = pb.InferParameter(bool_param=True)


def test_the_default_limits_are_these() -> None:
    """In literals, as docs/security.md has them."""
    proxy = settings.read(ProxySettings)

    assert proxy.max_message_bytes == 64 * MIB
    assert proxy.max_in_flight_bytes == 512 * MIB
    assert (proxy.max_inputs, proxy.max_outputs, proxy.max_parameters) == (64, 64, 64)
    assert proxy.max_element_bytes == MIB
    assert (proxy.max_headers, proxy.max_header_bytes, proxy.max_url_bytes) == (100, 64 * 1024, 8 * 1024)
    assert proxy.max_chunks == 65_536
    assert (proxy.header_timeout_s, proxy.min_body_bytes_per_s) == (10, 1000)
    assert (proxy.keep_alive_s, proxy.write_timeout_s) == (75, 30)
    assert (proxy.max_connections, proxy.max_streams, proxy.max_metadata_bytes) == (2000, 1024, 16 * 1024)
    assert (proxy.default_timeout_s, proxy.max_timeout_s) == (30, 300)
    assert (proxy.max_queue_wait_ms, FIRST_LIMIT) == (1000, 256)
    assert (MAX_JSON_DEPTH, MAX_RANK, MAX_NAME_LENGTH) == (64, 16, 128)
    assert MAX_BUNDLE_BYTES == 4 * 1024 * MIB


@pytest.mark.parametrize("kind", [PreprocessSettings, PredictSettings])
def test_other_services_have_the_same_default_limits(kind: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Callers that reach them directly meet the same limits."""
    monkeypatch.setenv("MODEL_REPOSITORY", str(tmp_path))
    own, proxy = settings.read(kind), settings.read(ProxySettings)

    for name in ("max_message_bytes", "max_in_flight_bytes", "max_inputs", "max_outputs", "max_parameters", "max_rows",
                 "max_element_bytes", "max_metadata_bytes", "max_streams", "max_connections"):  # fmt: skip
        assert getattr(own, name) == getattr(proxy, name), name


def message(**changes: Any) -> bytes:
    """A good request, with changes to its only tensor or to itself."""
    of_tensor = {name: changes.pop(name) for name in ("datatype", "shape") if name in changes}
    tensor = Input(**{"name": "x", "datatype": "FP32", "shape": [1, 2], **of_tensor})
    request = pb.ModelInferRequest(**{"model_name": "echo", "inputs": [tensor], "raw_input_contents": [bytes(8)], **changes})
    return bytes(request.SerializeToString())


LIMITS: dict[str, tuple[dict[str, Any], Any, str]] = {
    "inputs": (
        {"max_inputs": 3},
        lambda n: {"inputs": [Input(name="x", datatype="FP32", shape=[0, 2])] * (3 + n), "raw_input_contents": [b""] * (3 + n)},
        "the limit is 3",
    ),
    "outputs": ({"max_outputs": 3}, lambda n: {"outputs": [Wanted(name="x")] * (3 + n)}, "the limit is 3"),
    "parameters": ({"max_parameters": 3}, lambda n: {"parameters": {str(i): FLAG for i in range(3 + n)}}, "the limit is 3"),
    "rows": (
        {"max_rows": 3},
        lambda n: {"shape": [3 + n, 2], "raw_input_contents": [bytes(8 * (3 + n))]},
        "the limit is 3",
    ),
    "element": (
        {"max_element_bytes": 3},
        lambda n: {"datatype": "BYTES", "shape": [1], "raw_input_contents": [bytes([3 + n, 0, 0, 0]) + b"b" * (3 + n)]},
        "the limit is 3",
    ),
    "name": ({}, lambda n: {"model_name": "m" * (128 + n)}, "the limit is 128"),
    "bytes in flight": ({"max_in_flight_bytes": len(message())}, lambda n: {"id": "" if not n else "x"}, "exceed the limit"),
}  # fmt: skip


@pytest.mark.parametrize("limit", LIMITS)
async def test_a_request_on_a_stream_at_a_limit_is_accepted_and_beyond_it_refused(limit: str) -> None:
    """One beyond it gets the same message as a unary call, and the stream stays open."""
    options, changes, words = LIMITS[limit]
    async with served(**options) as system:
        stream = system.channel.stream_stream(f"/{SERVICE}/ModelStreamInfer")()

        async def ask(data: bytes) -> str:
            await stream.write(data)
            return str(pb.ModelStreamInferResponse.FromString(await stream.read()).error_message)

        async def unary(data: bytes) -> str:
            try:
                await system.channel.unary_unary(f"/{SERVICE}/ModelInfer")(data, timeout=30)
            except grpc.aio.AioRpcError as error:
                return error.details() or ""
            return ""

        assert words not in await ask(message(**changes(0)))
        assert words in await ask(message(**changes(1)))
        assert words not in await unary(message(**changes(0)))
        assert words in await unary(message(**changes(1)))
        assert await ask(message()) == ""
        await stream.done_writing()


async def test_bytes_in_flight_are_counted_over_all_faces() -> None:
    """P-20, G03: while one request holds the budget others are refused with 429, over REST and gRPC; then taken again."""
    entered, released = asyncio.Event(), asyncio.Event()

    class Held(FakeInference):
        async def infer(self, request: InferRequest) -> InferResponse:
            entered.set()
            await released.wait()
            return InferResponse(request.model, request.version, request.inputs, request.id)

    backend = Held(*MODELS)
    body = json.dumps({"inputs": [ROW]}).encode()

    async def post(system: Served, content: bytes = body, **headers: str) -> Any:
        return await system.rest.post("/v2/models/echo/infer", content=content, headers=headers, timeout=60)

    async with served(backend=backend, service=ProxyService(backend), max_in_flight_bytes=2 * len(body) - 1) as system:
        first = asyncio.create_task(post(system))
        await entered.wait()

        refused = await post(system)
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await system.channel.unary_unary(f"/{SERVICE}/ModelInfer")(message(id="x" * len(body)), timeout=30)
        released.set()

        assert (refused.status_code, refused.headers["retry-after"]) == (429, "1")
        assert raised.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert (await first).status_code == 200
        assert (await post(system)).status_code == 200
        inflated = await post(system, gzip.compress(body + b" " * len(body)), **{"content-encoding": "gzip"})
        assert inflated.status_code == 429
        assert (await post(system)).status_code == 200


async def test_a_message_on_a_stream_that_does_not_say_has_the_default_deadline() -> None:
    """As a unary call without a timeout has."""
    async with served(max_timeout_s=100, default_timeout_s=50) as system:
        stream = system.channel.stream_stream(f"/{SERVICE}/ModelStreamInfer")()
        await stream.write(message())
        await stream.read()
        await stream.done_writing()

        assert 30 < remaining_s(system.backend.requests[0].deadline) <= 50


@pytest.mark.parametrize("face", ["REST", "gRPC", "stream"])
async def test_a_deadline_is_clamped_to_the_maximum_timeout(face: str) -> None:
    """A longer timeout is reduced to the maximum; on a stream, whose messages have no deadline, it is that of the parameter."""
    async with served(max_timeout_s=100, default_timeout_s=50) as system:
        for asked, given in ((99, 99), (101, 100), (10**6, 100)):
            system.backend.requests.clear()
            if face == "REST":
                answer = await system.rest.post(
                    "/v2/models/echo/infer", json={"inputs": [ROW]}, headers={"request-timeout": str(asked)}
                )
                assert answer.status_code == 200
            elif face == "gRPC":
                await system.call("ModelInfer", message(), timeout=asked)
            else:
                stream = system.channel.stream_stream(f"/{SERVICE}/ModelStreamInfer")()
                await stream.write(message(parameters={"timeout": pb.InferParameter(int64_param=asked * 10**6)}))
                await stream.read()
                await stream.done_writing()
            most = min(given + 1, 100) if face == "gRPC" else given  # grpcio rounds a timeout up, by at most one in a hundred
            assert given - 20 < remaining_s(system.backend.requests[0].deadline) <= most
