"""The gRPC face and the stub at the other end of the channel, over a real socket."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from splitserve.api.inference import inference_pb2 as pb
from splitserve.errors import (
    TABLE,
    DeadlineExceeded,
    Internal,
    InvalidInput,
    NotFound,
    PairMismatch,
    SplitserveError,
    TooLarge,
    Unavailable,
)
from splitserve.oip.messages import LOADING, UNAVAILABLE, InferRequest, InferResponse, ModelState, deadline_after, remaining_s
from splitserve.oip.protobuf import REASON_KEY, SERVICE
from splitserve.remote.inference import RemoteInference
from splitserve.signature import TensorSpec
from splitserve.tensors import Tensor
from splitserve.testing import FakeInference, serving, signature
from splitserve.wire.grpc.server import ServerLimits

pytestmark = pytest.mark.usefixtures("engine")  # grpcio's server is the reference for ours

X = Tensor("x", "FP32", (1, 2), b"\x00\x00\x80?\x00\x00\x00@")
REQUEST = InferRequest("echo", (X,), id="7")
ECHO = signature("echo", [TensorSpec("x", "FP32", ("batch", 2))])


def raising(error: BaseException) -> Any:
    def answer(request: InferRequest) -> InferResponse:
        raise error

    return answer


@pytest.fixture
def service() -> FakeInference:
    return FakeInference(ECHO)


@pytest.fixture
async def channel(service: FakeInference) -> AsyncIterator[grpc.aio.Channel]:
    async with serving(service) as address, grpc.aio.insecure_channel(address) as channel:
        yield channel


async def ask(channel: grpc.aio.Channel, method: str, request: bytes = b"") -> bytes:
    answer: bytes = await channel.unary_unary(f"/{SERVICE}/{method}")(request)
    return answer


async def test_a_request_crosses_the_hop_unchanged(service: FakeInference) -> None:
    """The service receives what the caller sent, and the caller receives what the service answered."""
    async with serving(service) as address, RemoteInference(address, stage="predict") as remote:
        response = await remote.infer(REQUEST)

    assert response == InferResponse("echo", "1", (X,), "7")
    assert service.requests[0].inputs == (X,)


async def test_the_remaining_time_is_sent_as_the_timeout(service: FakeInference) -> None:
    """The next service never has more time than the caller."""
    async with serving(service) as address, RemoteInference(address, stage="predict") as remote:
        await remote.infer(InferRequest("echo", (X,), deadline=deadline_after(20)))

    assert 0 < remaining_s(service.requests[0].deadline) <= 20


async def test_a_request_past_its_deadline_is_not_sent(service: FakeInference) -> None:
    """A request past its deadline is not begun."""
    async with serving(service) as address, RemoteInference(address, stage="predict") as remote:
        with pytest.raises(DeadlineExceeded):
            await remote.infer(InferRequest("echo", (X,), deadline=deadline_after(-1)))

    assert service.requests == []


async def test_callers_without_a_deadline_get_the_default(service: FakeInference) -> None:
    """At the proxy every request has a deadline."""
    async with serving(service, default_timeout_s=9) as address, RemoteInference(address, stage="predict") as remote:
        await remote.infer(REQUEST)

    assert 0 < remaining_s(service.requests[0].deadline) <= 9


@pytest.mark.parametrize("kind", TABLE)
async def test_every_error_keeps_its_class_over_the_hop(kind: type[SplitserveError]) -> None:
    """Class, message, stage, model and pair are preserved; the stream stays open."""
    error = kind("what went wrong", stage="far", model="echo", pair="1.2")
    service = FakeInference(ECHO, answer=raising(error))

    async with serving(service) as address, RemoteInference(address, stage="predict") as remote:
        with pytest.raises(kind) as raised:
            await remote.infer(REQUEST)

    assert type(raised.value) is kind
    assert raised.value.message == "what went wrong"
    assert raised.value.metadata == {"stage": "far", "model": "echo", "pair": "1.2"}


async def test_an_unexpected_exception_is_internal_and_not_shown() -> None:
    """No class names, no texts: "internal error", with the stage."""
    service = FakeInference(ECHO, answer=raising(KeyError("secret")))

    async with serving(service, stage="preprocess") as address, RemoteInference(address, stage="preprocess") as remote:
        with pytest.raises(Internal) as raised:
            await remote.infer(REQUEST)

    assert (raised.value.message, raised.value.stage) == ("internal error", "preprocess")


async def test_an_unreachable_peer_is_unavailable_without_its_address() -> None:
    """The stage is named, the address is not."""
    async with RemoteInference("127.0.0.1:1", stage="predict", wait_s=0.1) as remote:
        with pytest.raises(Unavailable) as raised:
            await remote.infer(InferRequest("echo", (X,), deadline=deadline_after(5)))

    assert raised.value.message == "the predict service cannot be reached"
    assert raised.value.stage == "predict"


async def test_an_answer_after_the_timeout_is_deadline_exceeded() -> None:
    """The caller does not wait beyond its deadline, even if the peer does not answer."""
    forever = asyncio.Event()

    class Stuck(FakeInference):
        async def infer(self, request: InferRequest) -> InferResponse:
            await forever.wait()
            raise AssertionError

    async with serving(Stuck(ECHO)) as address, RemoteInference(address, stage="predict") as remote:
        with pytest.raises(DeadlineExceeded):
            await remote.infer(InferRequest("echo", (X,), deadline=deadline_after(0.2)))


async def test_a_malformed_answer_is_the_stages_fault() -> None:
    """Outputs without their contents are a mismatch, never the caller's bad input."""

    def answer(data: bytes, context: Any) -> bytes:
        output = pb.ModelInferResponse.InferOutputTensor(name="x", datatype="FP32", shape=[1, 2])
        return pb.ModelInferResponse(outputs=[output], raw_output_contents=[b"", b""]).SerializeToString()

    server = grpc.aio.server()
    handler = grpc.unary_unary_rpc_method_handler(answer)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, {"ModelInfer": handler}),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        async with RemoteInference(f"127.0.0.1:{port}", stage="predict") as remote:
            with pytest.raises(PairMismatch):
                await remote.infer(InferRequest("echo", (X,), deadline=deadline_after(10)))
    finally:
        await server.stop(None)


async def test_bytes_that_are_not_a_message_are_invalid_input(channel: grpc.aio.Channel) -> None:
    """INVALID_ARGUMENT with the message's name, not UNKNOWN with the name of a Python class."""
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await ask(channel, "ModelInfer", b"\xff\xff\xff")

    assert raised.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert raised.value.details() == "the request is not a inference.ModelInferRequest"


async def test_metadata_methods_of_the_protocol_are_answered(channel: grpc.aio.Channel, service: FakeInference) -> None:
    """Live, ready, metadata of server and model, index."""
    service.states.append(ModelState("other", "3", UNAVAILABLE, "damaged"))

    live = pb.ServerLiveResponse.FromString(await ask(channel, "ServerLive"))
    ready = pb.ServerReadyResponse.FromString(await ask(channel, "ServerReady"))
    server = pb.ServerMetadataResponse.FromString(await ask(channel, "ServerMetadata"))
    model = pb.ModelMetadataResponse.FromString(
        await ask(channel, "ModelMetadata", pb.ModelMetadataRequest(name="echo").SerializeToString())
    )
    index = pb.RepositoryIndexResponse.FromString(await ask(channel, "RepositoryIndex"))
    only_ready = pb.RepositoryIndexResponse.FromString(
        await ask(channel, "RepositoryIndex", pb.RepositoryIndexRequest(ready=True).SerializeToString())
    )

    assert (live.live, ready.ready, server.name) == (True, True, "test")
    assert (model.name, list(model.versions), list(model.inputs[0].shape)) == ("echo", ["1"], [-1, 2])
    assert [(entry.name, entry.state, entry.reason) for entry in index.models] == [
        ("echo", "READY", ""),
        ("other", "UNAVAILABLE", "damaged"),
    ]
    assert [entry.name for entry in only_ready.models] == ["echo"]


@pytest.mark.parametrize(
    ("name", "version", "is_ready"), [("echo", "", True), ("echo", "1", True), ("echo", "2", False), ("nope", "", False)]
)
async def test_model_ready_of_an_unknown_model_is_not_an_error(
    channel: grpc.aio.Channel, name: str, version: str, is_ready: bool
) -> None:
    """An unknown model is not ready, which clients take as "no"."""
    request = pb.ModelReadyRequest(name=name, version=version)

    answer = pb.ModelReadyResponse.FromString(await ask(channel, "ModelReady", request.SerializeToString()))

    assert answer.ready is is_ready


@pytest.mark.parametrize(
    ("name", "version", "reason"),
    [
        ("echo", "", None),
        ("other", "", "other 3: damaged; other 4: loading"),
        ("other", "3", "other 3: damaged"),
        ("other", "5", "Request for unknown model: 'other' is not found, version 5"),
        ("nope", "", "Request for unknown model: 'nope' is not found"),
    ],
)
async def test_model_ready_gives_the_reason(
    channel: grpc.aio.Channel, service: FakeInference, name: str, version: str, reason: str | None
) -> None:
    """In the trailing metadata, since the message has only a boolean."""
    service.states += [ModelState("other", "3", UNAVAILABLE, "damaged"), ModelState("other", "4", LOADING)]
    call = channel.unary_unary(f"/{SERVICE}/ModelReady")(pb.ModelReadyRequest(name=name, version=version).SerializeToString())

    answer = pb.ModelReadyResponse.FromString(await call)
    said = dict(await call.trailing_metadata()).get(REASON_KEY)

    assert answer.ready is (reason is None)
    assert (said and said.decode()) == reason


async def test_metadata_of_an_unknown_model_is_not_found(service: FakeInference) -> None:
    """NOT_FOUND, with the words that clients match."""
    async with serving(service) as address, RemoteInference(address, stage="predict") as remote:
        with pytest.raises(NotFound, match="^Request for unknown model: 'nope' is not found"):
            await remote.metadata("nope")


async def until_health_is(channel: grpc.aio.Channel, name: str, status: int) -> None:
    """Follow the health of a name until it has that status."""
    request = health_pb2.HealthCheckRequest(service=name)
    async with asyncio.timeout(10):
        async for update in health_pb2_grpc.HealthStub(channel).Watch(request):
            if update.status == status:
                return


async def test_health_distinguishes_ready_from_accepting_calls(channel: grpc.aio.Channel, service: FakeInference) -> None:
    """``""`` follows readiness; the service's name means that calls are accepted, ready or not."""
    serving_status, not_serving = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING
    await until_health_is(channel, "", serving_status)

    service.not_ready = "no model"

    await until_health_is(channel, "", not_serving)
    await until_health_is(channel, SERVICE, serving_status)


async def test_watchers_are_notified_after_another_has_disconnected(channel: grpc.aio.Channel, service: FakeInference) -> None:
    """A client that disconnects ends its own watch only. (grpcio's own servicer then notified no other.)"""
    stub = health_pb2_grpc.HealthStub(channel)
    status = health_pb2.HealthCheckResponse
    async with asyncio.timeout(20):
        leaving, staying = (stub.Watch(health_pb2.HealthCheckRequest(service="")) for _ in range(2))
        while (await leaving.read()).status != status.SERVING:
            pass
        while (await staying.read()).status != status.SERVING:
            pass

        leaving.cancel()
        service.not_ready = "away"

        assert (await staying.read()).status == status.NOT_SERVING
        staying.cancel()


async def test_reflection_lists_the_protocol_and_health(channel: grpc.aio.Channel) -> None:
    """Tools without .proto files find the service and its messages."""
    requests = [
        reflection_pb2.ServerReflectionRequest(list_services=""),
        reflection_pb2.ServerReflectionRequest(file_containing_symbol=SERVICE),
    ]

    stream = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(iter(requests))
    answers = [answer async for answer in stream]

    names = {service.name for service in answers[0].list_services_response.service}
    assert {SERVICE, "grpc.health.v1.Health"} <= names
    assert b"ModelInferRequest" in answers[1].file_descriptor_response.file_descriptor_proto[0]


async def test_models_are_loaded_and_unloaded_only_where_allowed(service: FakeInference) -> None:
    """The model may be in the field that KServe's clients use; parameters are refused."""
    named = pb.RepositoryModelLoadRequest(model_name="echo").SerializeToString()
    kserve = pb.RepositoryModelUnloadRequest(repository_name="echo").SerializeToString()
    request = pb.RepositoryModelLoadRequest(model_name="echo")
    request.parameters["config"].string_param = "{}"

    async with serving(service) as address, grpc.aio.insecure_channel(address) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await ask(channel, "RepositoryModelLoad", named)
    async with serving(service, allow_control=True) as address, grpc.aio.insecure_channel(address) as channel:
        await ask(channel, "RepositoryModelLoad", named)
        await ask(channel, "RepositoryModelUnload", kserve)
        with pytest.raises(grpc.aio.AioRpcError) as bad:
            await ask(channel, "RepositoryModelLoad", request.SerializeToString())

    assert refused.value.code() is grpc.StatusCode.PERMISSION_DENIED
    assert service.controlled == [("load", "echo"), ("unload", "echo")]
    assert bad.value.code() is grpc.StatusCode.INVALID_ARGUMENT


@pytest.mark.parametrize(
    ("stage_of_error", "retry_after_s", "pushback"),
    [("predict", 0.0, None), ("further", 0.0, "-1"), ("predict", 1.5, "1500"), ("further", 1.5, "1500")],
)
async def test_push_back_is_sent_only_if_a_retry_can_help(
    stage_of_error: str, retry_after_s: float, pushback: str | None
) -> None:
    """Between stages another replica may be tried at once, but not for failures of later stages; at the edge after a delay."""
    service = FakeInference(ECHO, answer=raising(Unavailable("gone", stage=stage_of_error)))
    message = pb.ModelInferRequest(model_name="echo").SerializeToString()

    async with serving(service, retry_after_s=retry_after_s) as address, grpc.aio.insecure_channel(address) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await ask(channel, "ModelInfer", message)

    assert dict(raised.value.trailing_metadata()).get("grpc-retry-pushback-ms") == pushback


async def test_an_error_has_details_that_any_client_can_read() -> None:
    """``google.rpc.Status`` with an ``ErrorInfo`` in the trailing metadata."""
    service = FakeInference(ECHO, answer=raising(InvalidInput("bad", model="echo")))
    message = pb.ModelInferRequest(model_name="echo").SerializeToString()

    async with serving(service) as address, grpc.aio.insecure_channel(address) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await ask(channel, "ModelInfer", message)

    details = dict(raised.value.trailing_metadata())["grpc-status-details-bin"]
    status, info = status_pb2.Status.FromString(details), error_details_pb2.ErrorInfo()
    assert (status.code, status.message) == (3, "bad")
    assert status.details[0].Unpack(info)
    assert (info.reason, info.domain, info.metadata["stage"]) == ("INVALID_INPUT", "splitserve", "predict")


async def test_a_message_above_the_limit_is_refused(service: FakeInference) -> None:
    """RESOURCE_EXHAUSTED, before anything is decoded."""
    large = Tensor("x", "FP32", (125, 2), b"\x00" * 1000)

    async with serving(service, max_message_bytes=1000) as address, RemoteInference(address, stage="predict") as remote:
        with pytest.raises(TooLarge, match="larger than its limit"):
            await remote.infer(InferRequest("echo", (large,)))

    assert service.requests == []


HTTP2_HELLO = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes.fromhex("000000040000000000")
"""The preface and empty SETTINGS. Source: RFC 9113, section 3.4."""


@pytest.mark.parametrize("engine", ["own"], indirect=True)  # grpcio decides by rules of its own when it pings
async def test_a_client_that_does_not_acknowledge_keepalive_is_disconnected(service: FakeInference) -> None:
    """Its machine may have failed: the connection is closed, so that it does not delay draining."""
    async with serving(service, connection_limits=ServerLimits(keepalive_time_s=0.2, keepalive_timeout_s=0.2)) as address:
        reader, writer = await asyncio.open_connection(*address.rsplit(":", 1))
        writer.write(HTTP2_HELLO)

        async with asyncio.timeout(20):
            while await reader.read(4096):
                pass  # pings among it, which are not answered

        writer.close()
        await writer.wait_closed()
