"""gRPC calls through reverse proxies of other makers end as they do without one."""

from __future__ import annotations

import asyncio
import os

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2
from grpc_health.v1 import health_pb2

from splitserve.api.inference import inference_pb2 as pb
from splitserve.oip.protobuf import SERVICE
from tests.intermediaries import h2_call
from tests.intermediaries.backends import Pool
from tests.intermediaries.balancers import Balancer
from tests.intermediaries.calls import calling, echo_request, hold_request, long_ms, new_id
from tests.system.processes import wait_until
from tests.wire.fakes import framed

pytestmark = [pytest.mark.intermediaries, pytest.mark.timeout(180)]

MIB = 1024 * 1024
INFER = f"/{SERVICE}/ModelInfer"


@pytest.mark.parametrize("n_at_once", [1, 64])
async def test_no_call_is_lost(balancer: Balancer, n_at_once: int) -> None:
    """3,000 calls, each answered with what it sent."""
    async with calling(balancer.grpc, balancer.tls) as caller:
        await caller.echo_many(3_000, n_at_once)


@pytest.mark.parametrize("n_mib", [4, 30, 60])
async def test_large_messages(balancer: Balancer, n_mib: int) -> None:
    """In both directions, with small calls on the same connection."""
    async with calling(balancer.grpc, balancer.tls) as caller, asyncio.TaskGroup() as group:
        group.create_task(caller.echo(os.urandom(n_mib * MIB)))
        group.create_task(caller.echo_many(50, 1))


async def test_a_message_over_the_limit_is_refused_with_a_status(balancer: Balancer) -> None:
    """RESOURCE_EXHAUSTED for that call; the next one on the channel is answered.

    haproxy 2.6 ends a stream that is answered before its request has ended by RST_STREAM, with any server.
    """
    async with calling(balancer.grpc, balancer.tls) as caller:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await caller.echo(bytes(65 * MIB))
        await caller.echo(b"next")

    is_haproxy = balancer.name == "haproxy"
    assert caught.value.code() == (grpc.StatusCode.CANCELLED if is_haproxy else grpc.StatusCode.RESOURCE_EXHAUSTED)


async def test_a_stream_carries_messages_both_ways(balancer: Balancer) -> None:
    """Each message is answered before the next one is sent, then many are under way at once, then one is large."""
    async with calling(balancer.grpc, balancer.tls) as caller:
        stream = caller.stream()
        for number in range(100):
            content = number.to_bytes(4, "little") * 16
            await stream.write(echo_request(content))
            assert (await stream.read()).infer_response.raw_output_contents[0] == content

        sent = {new_id(): os.urandom(1000) for _ in range(200)} | {new_id(): os.urandom(8 * MIB)}
        writing = asyncio.ensure_future(_write_all(stream, sent))
        answers = [(await stream.read()).infer_response for _ in sent]
        await writing

        assert {answer.id: answer.raw_output_contents[0] for answer in answers} == sent
        assert await stream.read() is grpc.aio.EOF
        assert await stream.code() == grpc.StatusCode.OK


async def _write_all(stream: grpc.aio.StreamStreamCall, sent: dict[str, bytes]) -> None:
    for id, content in sent.items():
        await stream.write(echo_request(content, id))
    await stream.done_writing()


async def test_an_error_on_a_stream_leaves_the_stream_open(balancer: Balancer) -> None:
    async with calling(balancer.grpc, balancer.tls) as caller:
        stream = caller.stream()
        await stream.write(pb.ModelInferRequest(model_name="missing"))
        assert "missing" in (await stream.read()).error_message

        await stream.write(echo_request(b"next"))
        assert (await stream.read()).infer_response.raw_output_contents[0] == b"next"


def test_the_deadline_reaches_the_server(balancer: Balancer, pool: Pool) -> None:
    """The status comes from there: this client has no timer."""
    n_before = pool.n_ended("DEADLINE_EXCEEDED")

    answer = infer(balancer, hold_request(60_000), grpc_timeout="300m")

    assert answer.headers["grpc-status"] == str(grpc.StatusCode.DEADLINE_EXCEEDED.value[0])
    wait_until(lambda: pool.n_ended("DEADLINE_EXCEEDED") > n_before, "the proxy gives the call up")


def infer(balancer: Balancer, message: pb.ModelInferRequest, **headers: str) -> h2_call.Answer:
    body = framed(message.SerializeToString())
    return h2_call.request(
        balancer.grpc, INFER, body, tls=balancer.tls, te="trailers", content_type="application/grpc", **headers
    )  # fmt: skip


def wait_for_cancelled(pool: Pool, n_before: int) -> None:
    wait_until(lambda: pool.n_ended("CANCELLED") > n_before, "the proxy is told of the cancellation")


async def test_a_cancellation_reaches_the_proxy(balancer: Balancer, pool: Pool) -> None:
    """A call without a caller is cancelled; the next call on the channel is answered."""
    ms, n_before = long_ms(), pool.n_ended("CANCELLED")
    async with calling(balancer.grpc, balancer.tls) as caller:
        call = caller.infer(hold_request(ms))
        await asyncio.to_thread(pool.stage.wait_for, ms)

        call.cancel()

        await asyncio.to_thread(wait_for_cancelled, pool, n_before)
        await caller.echo(b"next")


async def test_a_caller_that_goes_away_is_noticed(balancer: Balancer, pool: Pool) -> None:
    """Its connection is closed in the middle of a call."""
    ms, n_before = long_ms(), pool.n_ended("CANCELLED")
    async with calling(balancer.grpc, balancer.tls) as caller:
        call = caller.infer(hold_request(ms))
        await asyncio.to_thread(pool.stage.wait_for, ms)

    await asyncio.to_thread(wait_for_cancelled, pool, n_before)
    assert call.done()


async def test_error_details_come_in_trailers(balancer: Balancer) -> None:
    """google.rpc.Status with ErrorInfo, binary metadata that an intermediary has to leave alone."""
    async with calling(balancer.grpc, balancer.tls) as caller:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await caller.infer(pb.ModelInferRequest(model_name="no such model, naïve and 100 %"))

    error = caught.value
    assert error.code() == grpc.StatusCode.NOT_FOUND
    assert "naïve and 100 %" in (error.details() or "")
    status = status_pb2.Status.FromString(dict(error.trailing_metadata())["grpc-status-details-bin"])
    info = error_details_pb2.ErrorInfo()
    assert status.details[0].Unpack(info)
    assert (info.domain, info.metadata["stage"]) == ("splitserve", "proxy")


async def test_metadata_of_any_kind_passes(balancer: Balancer) -> None:
    """Text, bytes, a name given twice, and 8 kB of it, call after call on one connection."""
    metadata = [
        ("x-request-id", "0123456789abcdef"),
        ("traceparent", "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"),
        ("x-bytes-bin", bytes(range(256))),
        ("x-twice", "first"),
        ("x-twice", "second"),
        ("x-long", "x" * 8000),
    ]
    async with calling(balancer.grpc, balancer.tls) as caller:
        for number in range(50):
            answer = await caller.infer(echo_request(b"x"), metadata=[*metadata, ("x-number", str(number))])
            assert answer.raw_output_contents[0] == b"x"


async def test_the_health_service_answers_and_watches(balancer: Balancer) -> None:
    async with calling(balancer.grpc, balancer.tls) as caller:
        check = caller.channel.unary_unary(
            "/grpc.health.v1.Health/Check",
            request_serializer=health_pb2.HealthCheckRequest.SerializeToString,
            response_deserializer=health_pb2.HealthCheckResponse.FromString,
        )
        watch = caller.channel.unary_stream(
            "/grpc.health.v1.Health/Watch",
            request_serializer=health_pb2.HealthCheckRequest.SerializeToString,
            response_deserializer=health_pb2.HealthCheckResponse.FromString,
        )
        assert (await check(health_pb2.HealthCheckRequest())).status == health_pb2.HealthCheckResponse.SERVING
        watching = watch(health_pb2.HealthCheckRequest())
        assert (await watching.read()).status == health_pb2.HealthCheckResponse.SERVING


def test_requests_that_are_not_grpc_get_a_status(balancer: Balancer) -> None:
    """A GET and a HEAD of the gRPC port, and a POST of JSON: each is answered, none resets."""
    for method, headers, body in (("GET", {}, b""), ("HEAD", {}, b""), ("POST", {"content_type": "application/json"}, b"{}")):
        answer = h2_call.request(balancer.grpc, INFER, body, method=method, tls=balancer.tls, **headers)
        assert answer.reset is None, method
        assert answer.headers[":status"] in ("404", "405", "415"), method
