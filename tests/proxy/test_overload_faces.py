"""What callers of an overloaded proxy get on each of its faces: an immediate answer with the reason and a push-back."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest

from proxy.service import ProxyService
from splitserve.api.inference import inference_pb2 as pb
from splitserve.batching.queue import BatchLimits
from splitserve.oip.messages import InferRequest, InferResponse
from splitserve.oip.protobuf import SERVICE
from splitserve.testing import FakeInference
from tests.contracts.faces import MODELS, Served, served

QUEUE = 3
ROW = {"name": "x", "datatype": "FP32", "shape": [1, 2], "data": [1.0, 2.5]}


class Held(FakeInference):
    """Answers once it is released."""

    def __init__(self) -> None:
        super().__init__(*MODELS)
        self.released = asyncio.Event()

    async def infer(self, request: InferRequest) -> InferResponse:
        self.requests.append(request)
        await self.released.wait()
        return InferResponse(request.model, request.version, request.inputs, request.id)


@asynccontextmanager
async def full() -> AsyncIterator[tuple[Served, Held, list[asyncio.Task[Any]]]]:
    """One request in flight, and a full queue of requests of priority 5."""
    backend = Held()
    limits = BatchLimits(max_queue_size=QUEUE, max_batch_size=1, max_in_flight=1)
    async with served(service=ProxyService(backend, limits=limits), backend=backend) as system:
        calls = [asyncio.create_task(over_rest(system))]
        while not backend.requests:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        calls += [asyncio.create_task(over_rest(system, priority=5)) for _ in range(QUEUE)]
        batcher = system.service.batcher
        while batcher.occupancy("echo") != (QUEUE, 1):  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        yield system, backend, calls
        backend.released.set()
        await asyncio.gather(*calls)


async def over_rest(system: Served, **parameters: Any) -> Any:
    return await system.rest.post("/v2/models/echo/infer", json={"inputs": [ROW], "parameters": parameters}, timeout=60)


def message(**parameters: int) -> bytes:
    tensor = pb.ModelInferRequest.InferInputTensor(name="x", datatype="FP32", shape=[1, 2])
    request = pb.ModelInferRequest(model_name="echo", inputs=[tensor], raw_input_contents=[bytes(8)])
    for name, value in parameters.items():
        request.parameters[name].int64_param = value
    return bytes(request.SerializeToString())


async def test_rest_answers_429_with_retry_after() -> None:
    """P-13: at once, while a call is in flight; the model never sees the request."""
    async with full() as (system, backend, _):
        answer = await over_rest(system, priority=5)

        assert (answer.status_code, answer.headers["retry-after"]) == (429, "1")
        assert answer.json()["reason"] == "OVERLOADED"
        assert len(backend.requests) == 1
        assert not backend.released.is_set()


async def test_grpc_answers_resource_exhausted_with_push_back() -> None:
    """P-13, F12: with pushback, so that gRPC's own retries wait too."""
    async with full() as (system, backend, _):
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await system.channel.unary_unary(f"/{SERVICE}/ModelInfer")(message(priority=5), timeout=60)

        assert raised.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert ("grpc-retry-pushback-ms", "1000") in list(raised.value.trailing_metadata() or ())
        assert not backend.released.is_set()


async def test_a_stream_answers_overload_in_a_message_and_stays_open() -> None:
    """P-13: the next message on the same stream is answered."""
    async with full() as (system, backend, calls):
        stream = system.channel.stream_stream(f"/{SERVICE}/ModelStreamInfer")()
        await stream.write(message(priority=5))
        refused = pb.ModelStreamInferResponse.FromString(await stream.read())
        assert refused.infer_response.parameters["splitserve_reason"].string_param == "OVERLOADED"
        assert not backend.released.is_set()

        backend.released.set()
        await asyncio.wait(calls)  # the queue has room again
        await stream.write(message(priority=5))
        answer = pb.ModelStreamInferResponse.FromString(await stream.read())
        await stream.done_writing()

    assert answer.error_message == ""


async def test_a_request_of_higher_priority_replaces_one_that_waits() -> None:
    """`priority`: the default is the highest; the preempted request is answered with 429."""
    async with full() as (system, backend, calls):
        urgent = asyncio.create_task(over_rest(system))
        done, _ = await asyncio.wait(calls, return_when=asyncio.FIRST_COMPLETED)
        refused = done.pop().result()
        backend.released.set()

        assert (refused.status_code, json.loads(refused.content)["error"]) == (429, "preempted by a request of higher priority")
        assert (await urgent).status_code == 200


async def test_priority_is_not_forwarded_and_does_not_prevent_merging() -> None:
    """Requests of different priorities are one call."""
    backend = Held()
    async with served(service=ProxyService(backend), backend=backend) as system:
        calls = [asyncio.create_task(over_rest(system))]
        while not backend.requests:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        calls += [asyncio.create_task(over_rest(system, priority=n)) for n in range(4)]
        while system.service.batcher.occupancy("echo") != (4, 1):  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        backend.released.set()

        assert {answer.status_code for answer in await asyncio.gather(*calls)} == {200}
        assert [request.n_rows for request in backend.requests] == [1, 4]
        assert backend.requests[1].parameters == {}
