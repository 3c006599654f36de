"""Calls to a service by its replicas: streams and unary calls, retries, replicas that come, go, drain and hang."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import grpc
import numpy as np
import pytest

from splitserve.api.inference import inference_pb2 as pb
from splitserve.arrays import from_array
from splitserve.errors import (
    TABLE,
    DeadlineExceeded,
    Internal,
    Overloaded,
    PairMismatch,
    SplitserveError,
    Unauthenticated,
    Unavailable,
)
from splitserve.oip import protobuf
from splitserve.oip.messages import InferRequest, InferResponse, ServerMetadata, deadline_after, remaining_s
from splitserve.remote.inference import RemoteInference
from splitserve.remote.retry_budget import MAX_TOKENS, RetryBudget
from splitserve.server.grpc_config import GrpcConfig
from splitserve.server.grpc_face import GrpcFace
from splitserve.signature import TensorSpec
from splitserve.testing import FakeInference, signature
from splitserve.wire.byte_budget import ByteBudget

X = from_array("x", np.array([[1.5, -2.0]], np.float32))
ECHO = signature("echo", [TensorSpec("x", "FP32", ("batch", 2))])
PATIENCE_S = 20.0


def request(**fields: Any) -> InferRequest:
    return InferRequest("echo", (X,), **{"deadline": deadline_after(PATIENCE_S), **fields})


async def until(claim: Callable[[], Any]) -> None:
    """Wait for a claim to hold."""
    async with asyncio.timeout(PATIENCE_S):
        while not claim():  # noqa: ASYNC110
            await asyncio.sleep(0.005)


class Gated(FakeInference):
    """Answers once the gate is open."""

    def __init__(self) -> None:
        super().__init__(ECHO)
        self.gate = asyncio.Event()

    async def infer(self, asked: InferRequest) -> InferResponse:
        answer = await super().infer(asked)
        await self.gate.wait()
        return answer


class Recording(Gated):
    """Records the parameter ``n`` of the calls that were cancelled."""

    def __init__(self) -> None:
        super().__init__()
        self.cancelled: list[Any] = []

    async def infer(self, asked: InferRequest) -> InferResponse:
        try:
            return await super().infer(asked)
        except asyncio.CancelledError:
            self.cancelled.append(asked.parameters["n"])
            raise


def face(service: FakeInference, **options: Any) -> GrpcFace:
    return GrpcFace(service, GrpcConfig(stage="predict", metadata=ServerMetadata("test", "0"), **options))


def face_of(service: FakeInference, **options: Any) -> GrpcFace:
    """With another budget, or an authenticator."""
    return GrpcFace(service, GrpcConfig(stage="predict", metadata=ServerMetadata("test", "0")), **options)


class Name:
    """A name that resolves to the given faces."""

    def __init__(self, *faces: GrpcFace) -> None:
        self.faces = list(faces)

    async def resolve(self, host: str, port: int) -> list[str]:
        return [f"ipv4:127.0.0.1:{each.port}" for each in self.faces]


@asynccontextmanager
async def connected(name: Name, *, over: str = "stream", **options: Any) -> AsyncIterator[RemoteInference]:
    """A client of the name; with a stream to each replica, or with none."""
    remote = RemoteInference("name:1", stage="predict", resolve=name.resolve, resolve_interval_s=0.05, **options)
    async with remote:
        n_streams = len(name.faces) if over == "stream" else 0
        await until(lambda: remote.n_replicas == len(name.faces) and remote.n_streams >= n_streams)
        if over == "unary":
            for replica in remote._replicas.usable():
                await replica.keeper.close()
                replica.keeper._stream = None
        yield remote


over_both = pytest.mark.parametrize("over", ["stream", "unary"])


@over_both
async def test_a_request_crosses_the_hop_unchanged(over: str) -> None:
    """Tensors, version, parameters, wanted outputs; what remains of the deadline; the caller's id on the answer."""
    service = FakeInference(ECHO)
    async with face(service) as server, connected(Name(server), over=over) as remote:
        asked = request(version="7", id="mine", parameters={"a": 1, "b": "two", "c": True, "d": 0.5})

        answer = await remote.infer(asked)

    (seen,) = service.requests
    assert (seen.model, seen.version, seen.inputs, seen.parameters) == ("echo", "7", (X,), asked.parameters)
    assert PATIENCE_S - 5 < remaining_s(seen.deadline) < PATIENCE_S + 1
    assert (answer.id, answer.version, answer.outputs) == ("mine", "7", (X,))


@over_both
@pytest.mark.parametrize("kind", TABLE)
async def test_every_error_keeps_its_class_over_the_hop(kind: type[SplitserveError], over: str) -> None:
    """Class, message, stage, model and pair are preserved; the stream stays open."""

    def fail(_: InferRequest) -> InferResponse:
        raise kind("what went wrong", stage="far", model="echo", pair="1.2")

    async with face(FakeInference(ECHO, answer=fail)) as server, connected(Name(server), over=over) as remote:
        for _ in range(2):
            with pytest.raises(kind) as raised:
                await remote.infer(request())

    assert type(raised.value) is kind
    assert raised.value.message == "what went wrong"
    assert raised.value.metadata == {"stage": "far", "model": "echo", "pair": "1.2"}


class Strangers:
    """Knows nobody: at once, or once it has awaited something."""

    def __init__(self, is_awaited: bool) -> None:
        self._is_awaited = is_awaited

    def recognise(self, credentials: Any) -> None:
        if not self._is_awaited:
            raise Unauthenticated("the credentials are not valid")

    async def identify(self, credentials: Any) -> Any:
        await asyncio.sleep(0)
        raise Unauthenticated("the credentials are not valid")


@over_both
@pytest.mark.parametrize(
    ("options", "kind"),
    [
        ({"authenticator": Strangers(is_awaited=False)}, Unauthenticated),
        ({"authenticator": Strangers(is_awaited=True)}, Unauthenticated),
        ({"budget": ByteBudget(1)}, Overloaded),
    ],
    ids=["unknown", "unknown later", "too many bytes"],
)
async def test_what_is_refused_before_it_is_decoded_is_refused_by_its_id(options: Any, kind: Any, over: str) -> None:
    """The caller of that message learns it, and does not wait until its deadline."""
    service = FakeInference(ECHO)
    async with face_of(service, **options) as server, connected(Name(server), over=over) as remote:
        with pytest.raises(kind):
            await remote.infer(request())

    assert service.requests == []


async def test_on_a_stream_an_unexpected_exception_is_internal_and_not_shown() -> None:
    """As over unary calls."""

    def fail(_: InferRequest) -> InferResponse:
        raise KeyError("secret")

    async with face(FakeInference(ECHO, answer=fail)) as server, connected(Name(server)) as remote:
        with pytest.raises(Internal) as raised:
            await remote.infer(request())

    assert (raised.value.message, raised.value.stage) == ("internal error", "predict")


async def test_many_calls_share_a_stream_and_are_answered_out_of_order() -> None:
    """A call that takes long does not keep others on the same stream waiting."""
    service = Gated()
    async with face(service) as server, connected(Name(server)) as remote:
        slow = asyncio.create_task(remote.infer(request(id="slow")))
        await until(lambda: service.requests)
        gate, service.gate = service.gate, asyncio.Event()
        service.gate.set()

        answers = await asyncio.gather(*(remote.infer(request(id=str(number))) for number in range(50)))
        assert not slow.done()
        gate.set()

        assert [answer.id for answer in answers] == [str(number) for number in range(50)]
        assert (await slow).id == "slow"
        assert remote.n_streams == 1


@over_both
async def test_a_cancelled_call_does_not_affect_the_others(over: str) -> None:
    """A deadline that passes ends one call and not the stream."""
    service = Gated()
    async with face(service) as server, connected(Name(server), over=over) as remote:
        with pytest.raises(DeadlineExceeded):
            await remote.infer(request(deadline=deadline_after(0.1)))
        service.gate.set()

        assert (await remote.infer(request(id="next"))).id == "next"


@over_both
async def test_a_cancelled_call_is_cancelled_at_the_next_service(over: str) -> None:
    """Nobody waits for it there either; the other calls are answered."""
    service = Recording()
    async with face(service) as server, connected(Name(server), over=over) as remote:
        calls = [asyncio.create_task(remote.infer(request(parameters={"n": n}))) for n in range(3)]
        await until(lambda: len(service.requests) == 3)

        calls[1].cancel()
        await until(lambda: service.cancelled)
        service.gate.set()
        answers = await asyncio.gather(*calls, return_exceptions=True)

    assert service.cancelled == [1]
    assert [type(answer) for answer in answers] == [InferResponse, asyncio.CancelledError, InferResponse]


async def test_a_cancellation_of_a_call_that_was_answered_changes_nothing() -> None:
    """It may cross the answer; the stream stays open, and has no answer to it."""
    service = FakeInference(ECHO)
    async with face(service) as server, connected(Name(server)) as remote:
        (replica,) = remote._replicas.usable()
        await remote.infer(request())
        for identity in ("1", "7", ""):
            replica.keeper.stream._cancel(identity)

        assert (await remote.infer(request(id="next"))).id == "next"
        assert remote.n_streams == 1


async def test_a_server_without_the_stream_gets_unary_calls() -> None:
    """A third-party server whose ModelStreamInfer has other semantics."""

    def answer(data: bytes, context: Any) -> bytes:
        asked = pb.ModelInferRequest.FromString(data)
        return protobuf.encode_response(InferResponse(asked.model_name, "1", (X,), asked.id)).SerializeToString()

    async def stream(requests: Any, context: Any) -> AsyncIterator[bytes]:
        async for data in requests:
            yield data

    server = grpc.aio.server()
    handlers = {
        "ModelInfer": grpc.unary_unary_rpc_method_handler(answer),
        "ModelStreamInfer": grpc.stream_stream_rpc_method_handler(stream),
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(protobuf.SERVICE, handlers),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        async with RemoteInference(f"127.0.0.1:{port}", stage="predict") as remote:
            answers = [await remote.infer(request(id=identity)) for identity in ("one", "two")]
            n_streams = remote.n_streams
    finally:
        await server.stop(None)

    assert [answer.id for answer in answers] == ["one", "two"]
    assert n_streams == 0


@over_both
async def test_a_malformed_answer_is_the_stages_fault(over: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Raw contents that are too few are a mismatch, never the caller's bad input."""
    envelope = protobuf._response_envelope

    def bad_envelope(response: InferResponse) -> Any:
        message = envelope(response)
        message.raw_output_contents.append(b"more")
        return message

    async with face(FakeInference(ECHO)) as server, connected(Name(server), over=over) as remote:
        monkeypatch.setattr(protobuf, "_response_envelope", bad_envelope)
        with pytest.raises(PairMismatch):
            await remote.infer(request())


@over_both
async def test_the_idle_replica_gets_the_next_call(over: str) -> None:
    """Busy replicas are not picked."""
    services = [Gated(), Gated()]
    async with face(services[0]) as one, face(services[1]) as two, connected(Name(one, two), over=over) as remote:
        calls = [asyncio.create_task(remote.infer(request())) for _ in range(6)]
        await until(lambda: sum(len(service.requests) for service in services) == 6)
        for service in services:
            service.gate.set()
        await asyncio.gather(*calls)

    assert [len(service.requests) for service in services] == [3, 3]


@over_both
async def test_calls_in_flight_when_a_replica_dies_are_retried_on_another(over: str) -> None:
    """No call fails."""
    services = [Gated(), Gated()]
    async with face(services[0]) as one, face(services[1]) as two, connected(Name(one, two), over=over) as remote:
        calls = [asyncio.create_task(remote.infer(request())) for _ in range(4)]
        await until(lambda: all(len(service.requests) == 2 for service in services))

        await one._server.stop()
        services[1].gate.set()

        assert len(await asyncio.gather(*calls)) == 4
    assert len(services[1].requests) == 4


@over_both
async def test_a_draining_replica_answers_calls_in_flight_and_gets_no_more(over: str) -> None:
    """In its grace the calls in flight end; the stream ends with them and does not hold the stop up."""
    services = [Gated(), FakeInference(ECHO)]
    draining_one = face(services[0], drain_delay_s=0.3, grace_s=PATIENCE_S)
    async with draining_one as one, face(services[1]) as two, connected(Name(one, two), over=over) as remote:
        held = [asyncio.create_task(remote.infer(request())) for _ in range(2)]
        await until(lambda: services[0].requests and services[1].requests)

        draining = asyncio.create_task(one.drain())
        await until(lambda: remote.n_replicas == 1)
        others = await asyncio.gather(*(remote.infer(request()) for _ in range(10)))
        services[0].gate.set()

        assert len(await asyncio.gather(*held)) == 2
        assert len(others) == 10
        async with asyncio.timeout(5):
            await draining
    assert len(services[0].requests) == 1


async def test_a_replica_that_hangs_is_hedged_on_another() -> None:
    """After a while the other one is asked as well, and its answer counts."""
    services = [Gated(), Gated()]
    async with (
        face(services[0]) as one,
        face(services[1]) as two,
        connected(Name(one, two), hedge_after_s=0.1) as remote,
    ):
        call = asyncio.create_task(remote.infer(request()))
        await until(lambda: sum(len(service.requests) for service in services) == 2)
        services[1].gate.set()
        services[0].gate.set()

        assert (await call).outputs == (X,)


async def test_added_and_removed_replicas_are_discovered() -> None:
    """A new address gets calls, one that is gone gets none."""
    services = [FakeInference(ECHO), FakeInference(ECHO)]
    async with face(services[0]) as one, face(services[1]) as two:
        name = Name(one)
        async with connected(name) as remote:
            name.faces = [one, two]
            await until(lambda: remote.n_replicas == 2)
            await asyncio.gather(*(remote.infer(request()) for _ in range(4)))
            assert services[1].requests

            name.faces = [two]
            await until(lambda: remote.n_replicas == 1)
            n_before = len(services[0].requests)
            await asyncio.gather(*(remote.infer(request()) for _ in range(4)))

            assert len(services[0].requests) == n_before


async def test_a_restarted_service_is_reconnected_with_its_stream() -> None:
    """A stream that its server has ended is opened again, on the same address."""
    async with face(FakeInference(ECHO)) as first:
        port = first.port
        name = Name(first)
        async with connected(name) as remote:
            await first._server.stop()
            await until(lambda: remote.n_streams == 0)
            async with face(FakeInference(ECHO), port=port):
                await until(lambda: remote.n_streams == 1)

                assert (await remote.infer(request())).outputs == (X,)


@over_both
async def test_connections_that_reach_their_maximum_age_fail_no_call(over: str) -> None:
    """Servers drain connections that reach their maximum age: calls in flight are answered, later ones use new connections."""
    service = Gated()
    async with face(service) as server, connected(Name(server), over=over) as remote:
        before = list(server._server.connections)
        held = [asyncio.create_task(remote.infer(request())) for _ in range(3)]
        await until(lambda: len(service.requests) == 3)

        for connection in before:
            connection.drain()
        later = [asyncio.create_task(remote.infer(request())) for _ in range(3)]
        await until(lambda: len(service.requests) == 6)
        service.gate.set()

        assert len(await asyncio.gather(*held, *later)) == 6
        await until(lambda: not set(before) & set(server._server.connections))
        assert (await remote.infer(request())).outputs == (X,)
        await until(lambda: remote.n_streams == (over == "stream"))


async def test_without_any_replica_a_call_fails_after_a_short_wait() -> None:
    """A restart is bridged; an outage is reported, without an address."""
    async with face(FakeInference(ECHO)) as server:
        name = Name()
        async with RemoteInference("name:1", stage="predict", resolve=name.resolve, wait_s=0.1) as remote:
            with pytest.raises(Unavailable, match="^the predict service cannot be reached$"):
                await remote.infer(request())

        async with RemoteInference("name:1", stage="predict", resolve=name.resolve, resolve_interval_s=0.05) as remote:
            waiting = asyncio.create_task(remote.infer(request()))
            name.faces = [server]

            assert (await waiting).outputs == (X,)


async def test_errors_of_a_later_stage_are_not_retried_here() -> None:
    """The stage that called it has done so already: attempts do not multiply along the hops."""

    def fail(_: InferRequest) -> InferResponse:
        raise Unavailable("the predict service cannot be reached", stage="far")

    service = FakeInference(ECHO, answer=fail)
    async with face(service) as server, connected(Name(server)) as remote:
        with pytest.raises(Unavailable):
            await remote.infer(request())

    assert len(service.requests) == 1


async def test_models_are_loaded_on_every_replica() -> None:
    """Control is for all of them."""
    services = [FakeInference(ECHO), FakeInference(ECHO)]
    async with (
        face(services[0], allow_control=True) as one,
        face(services[1], allow_control=True) as two,
        connected(Name(one, two)) as remote,
    ):
        await remote.load("echo")
        await remote.unload("echo")

    assert [service.controlled for service in services] == [[("load", "echo"), ("unload", "echo")]] * 2


@pytest.mark.parametrize("engine", ["own", "grpcio"])
async def test_every_replica_gets_the_versions_to_hold(engine: Any) -> None:
    """With the request for its index; nothing is said where nothing is needed."""
    services = [FakeInference(ECHO), FakeInference(ECHO)]
    one, two = (
        GrpcFace(
            service,
            GrpcConfig(stage="predict", metadata=ServerMetadata("test", "0"), engine=engine),
            on_needed=service.needed.extend,
        )
        for service in services
    )
    async with one, two, connected(Name(one, two)) as remote:
        await remote.indexes()
        before = [list(service.needed) for service in services]
        await remote.indexes([("echo", 1), ("other", 3)])

    assert before == [[], []]
    assert [service.needed for service in services] == [[("echo", 1), ("other", 3)]] * 2


def test_retries_are_limited_to_a_share_of_successes() -> None:
    """In an outage they stop; with successes they resume."""
    budget = RetryBudget()

    allowed = sum(budget.take() for _ in range(1000))
    for _ in range(24):
        budget.give()

    assert allowed == MAX_TOKENS / 2
    assert sum(budget.take() for _ in range(1000)) == 3
