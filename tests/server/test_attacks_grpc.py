"""Bad input and abuse over gRPC: the status of each, and that the face keeps serving.

Any service has this face, so what holds here holds for proxy, preprocess and predict.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest

from splitserve.api.inference import inference_pb2 as pb
from splitserve.oip.limits import RequestLimits
from splitserve.oip.messages import remaining_s
from splitserve.oip.protobuf import SERVICE
from splitserve.server.infer_stream import MAX_UNANSWERED
from splitserve.signature import TensorSpec, check_inputs
from splitserve.testing import FakeInference, serving, signature
from splitserve.wire.grpc.server import ServerLimits

pytestmark = pytest.mark.usefixtures("engine")  # what one engine refuses, the other must too

ECHO = signature("echo", [TensorSpec("x", "FP32", ("batch", 2))])
MESSAGE_LIMIT = 100_000
CODES = grpc.StatusCode
INSIDE = re.compile(r"Traceback|\.py|/work|/tmp|/usr|/home|google\.|Error\b|site-packages|0x[0-9a-f]{6}")


class Checking(FakeInference):
    """Checks a request against its signature as every service does."""

    async def infer(self, request: Any) -> Any:
        check_inputs(ECHO.inputs, request.inputs, widen=True)
        return await super().infer(request)


@asynccontextmanager
async def face(**options: Any) -> AsyncIterator[tuple[grpc.aio.Channel, FakeInference]]:
    service = Checking(ECHO)
    async with serving(service, allow_control=True, **{"max_message_bytes": MESSAGE_LIMIT, **options}) as address:
        unlimited = [("grpc.max_send_message_length", -1), ("grpc.max_metadata_size", 1_000_000)]
        async with grpc.aio.insecure_channel(address, unlimited) as channel:
            yield channel, service


async def ask(channel: grpc.aio.Channel, data: bytes, method: str = "ModelInfer", **options: Any) -> tuple[grpc.StatusCode, str]:
    try:
        await channel.unary_unary(f"/{SERVICE}/{method}")(data, **{"timeout": 20, **options})
    except grpc.aio.AioRpcError as error:
        return error.code(), error.details() or ""
    return CODES.OK, ""


def message(**changes: Any) -> bytes:
    """A valid request, with changes to its tensor or its other fields."""
    of_tensor = {name: value for name, value in changes.items() if name in TENSOR_FIELDS}
    of_request = {name: value for name, value in changes.items() if name not in TENSOR_FIELDS}
    tensor = InputTensor(**{"name": "x", "datatype": "FP32", "shape": [1, 2], **of_tensor})
    request = pb.ModelInferRequest(**{"model_name": "echo", "inputs": [tensor], "raw_input_contents": [bytes(8)], **of_request})
    return bytes(request.SerializeToString())


TENSOR_FIELDS = ("name", "datatype", "shape", "contents")
Contents = pb.InferTensorContents
InputTensor = pb.ModelInferRequest.InferInputTensor
Wanted = pb.ModelInferRequest.InferRequestedOutputTensor


def varint(number: int) -> bytes:
    return bytes([number]) if number < 128 else bytes([number & 127 | 128]) + varint(number >> 7)


def delimited(field: int, content: bytes) -> bytes:
    return varint(field << 3 | 2) + varint(len(content)) + content


BAD = {CODES.INVALID_ARGUMENT}
TOO_MUCH = {CODES.INVALID_ARGUMENT, CODES.RESOURCE_EXHAUSTED}
ROWS: dict[str, tuple[bytes, set[grpc.StatusCode]]] = {
    "C01 garbage": (b"\xff" * 100, BAD),
    "C01 cut off": (message()[:-3], BAD),
    "C01 wrong wire type": (varint(1 << 3 | 0) + varint(5) + message(), {CODES.OK, CODES.INVALID_ARGUMENT}),
    "C01 group without an end": (varint(100 << 3 | 3), BAD),
    "C01 nested groups": (varint(100 << 3 | 3) * 50_000, BAD),
    "C01 packed field with a length that lies": (delimited(5, varint(3 << 3 | 2) + varint(2**31)), BAD),
    "C01 unknown fields": (message() + delimited(1000, bytes(50_000)), {CODES.OK}),
    "C01 empty entries": (message() + delimited(7, b"") * 40_000, BAD),
    "C01 a length beyond the end": (varint(1 << 3 | 2) + varint(2**31 - 1) + b"x", BAD),
    "C01 a name that is not UTF-8": (delimited(1, b"\xff\xfe"), BAD),
    "C09 raw and typed": (message(contents=Contents(fp32_contents=[1, 2])), BAD),
    "C09 fewer raws": (message(raw_input_contents=[]), BAD),
    "C09 more raws": (message(raw_input_contents=[bytes(8)] * 2), BAD),
    "C09 two typed fields": (
        message(raw_input_contents=[], contents=Contents(fp32_contents=[1, 2], int_contents=[1])),
        BAD,
    ),
    "C09 another type's field": (message(raw_input_contents=[], contents=Contents(int_contents=[1, 2])), BAD),
    "A11 inputs": (message(inputs=[InputTensor(name="x")] * 1000, raw_input_contents=[b""] * 1000), BAD),
    "A11 outputs": (message(outputs=[Wanted(name="x")] * 1000), BAD),
    "A11 parameters": (message(parameters={str(i): pb.InferParameter(bool_param=True) for i in range(1000)}), BAD),
    "A11 rank": (message(shape=[1] * 65), BAD),
    "D01 product": (message(shape=[2**31] * 3), TOO_MUCH),
    "D01 product that wraps": (message(shape=[16, 2**60 + 2]), TOO_MUCH),
    "D01 2^62": (message(shape=[2**62]), TOO_MUCH),
    "D01 2^63-1": (message(shape=[2**63 - 1, 2]), TOO_MUCH),
    "D02 negative": (message(shape=[-1, 2]), BAD),
    "D02 no columns": (message(shape=[1, 0], raw_input_contents=[b""]), BAD),
    "D02 rows of nothing": (message(shape=[2**31 - 1, 0], raw_input_contents=[b""]), TOO_MUCH),
    "D03 a byte less": (message(raw_input_contents=[bytes(7)]), BAD),
    "D03 a byte more": (message(raw_input_contents=[bytes(9)]), BAD),
    "D03 nothing": (message(raw_input_contents=[b""]), BAD),
    "D03 twice as much": (message(raw_input_contents=[bytes(16)]), BAD),
    "D04 length 2^32-1": (message(datatype="BYTES", raw_input_contents=[b"\xff" * 4]), BAD),
    "D04 many empty texts": (message(datatype="BYTES", shape=[20_000], raw_input_contents=[bytes(80_000)]), BAD),
    "D05 long datatype": (message(datatype="F" * 90_000), BAD),
    "D08 flags of 2": (message(datatype="BOOL", raw_input_contents=[b"\x02\x03"]), BAD),
    "A14 another name": (message(model_name="../../etc"), {CODES.OK, CODES.NOT_FOUND}),
    "E08 long name": (message(model_name="m" * 129), BAD),
}  # fmt: skip


@pytest.mark.parametrize("row", ROWS)
async def test_a_malicious_message_is_refused(row: str) -> None:
    """A status that blames the caller, a message without internals that echoes little, and no effect on other calls."""
    data, expected = ROWS[row]

    async with face() as (channel, _):
        code, details = await ask(channel, data)

        assert code in expected, details
        assert len(details) < 2_000
        assert not INSIDE.search(details), details
        assert await ask(channel, message()) == (CODES.OK, "")


async def test_a_message_at_the_size_limit_is_accepted_and_beyond_it_refused() -> None:
    """C03."""
    async with face() as (channel, service):
        bare = delimited(1000, bytes(MESSAGE_LIMIT - len(message()) - 10))
        room = MESSAGE_LIMIT - len(message() + bare)
        full = message() + delimited(1000, bytes(MESSAGE_LIMIT - len(message()) - 10 + room))
        assert len(full) == MESSAGE_LIMIT

        assert (await ask(channel, full))[0] is CODES.OK
        assert (await ask(channel, full + b"\0"))[0] is CODES.RESOURCE_EXHAUSTED
        assert len(service.requests) == 1


@pytest.mark.parametrize(
    ("limit", "message_of", "refused"),
    [
        ("max_inputs", lambda n: {"inputs": [InputTensor(name="x", datatype="FP32", shape=[0, 2])] * (3 + n),
                                  "raw_input_contents": [b""] * (3 + n)}, CODES.INVALID_ARGUMENT),
        ("max_outputs", lambda n: {"outputs": [Wanted(name="x")] * (3 + n)},
         CODES.INVALID_ARGUMENT),
        ("max_parameters", lambda n: {"parameters": {str(i): pb.InferParameter(bool_param=True) for i in range(3 + n)}},
         CODES.INVALID_ARGUMENT),
        ("max_rows", lambda n: {"shape": [3 + n, 2], "raw_input_contents": [bytes(8 * (3 + n))]}, CODES.RESOURCE_EXHAUSTED),
        ("max_element_bytes", lambda n: {"datatype": "BYTES", "shape": [2],
                                         "raw_input_contents": [b"\1\0\0\0a" + bytes([3 + n, 0, 0, 0]) + b"b" * (3 + n)]},
         CODES.RESOURCE_EXHAUSTED),
    ],
)  # fmt: skip
async def test_a_request_at_a_limit_is_accepted_and_beyond_it_refused(
    limit: str, message_of: Any, refused: grpc.StatusCode
) -> None:
    """No limit refuses it; the model still may."""
    async with face(request_limits=RequestLimits(**{limit: 3})) as (channel, _):
        _, allowed = await ask(channel, message(**message_of(0)))
        code, details = await ask(channel, message(**message_of(1)))

    assert "at most" not in allowed
    assert (code, "the limit is 3 (max_" in details) == (refused, True)


async def test_decompression_of_messages_is_bounded() -> None:
    """C02: a compression bomb is refused at the limit of the decompressed message."""
    bomb = delimited(1000, bytes(50_000_000))
    async with face() as (channel, _):
        code, _ = await ask(channel, bomb, compression=grpc.Compression.Gzip)

        assert code is CODES.RESOURCE_EXHAUSTED
        assert await ask(channel, message(), compression=grpc.Compression.Gzip) == (CODES.OK, "")


async def test_metadata_is_limited() -> None:
    """C04: too much metadata is refused, and the connection stays open."""
    async with face() as (channel, _):
        assert await ask(channel, message(), metadata=(("a", "x" * 15_000),)) == (CODES.OK, "")
        code, _ = await ask(channel, message(), metadata=(("a", "x" * 20_000),))

        assert code is CODES.RESOURCE_EXHAUSTED
        assert await ask(channel, message()) == (CODES.OK, "")


async def test_connections_are_limited() -> None:
    """G02: a connection beyond the limit is closed, the others are served."""
    async with serving(FakeInference(ECHO), connection_limits=ServerLimits(max_connections=2)) as address:
        own = [("grpc.use_local_subchannel_pool", 1)]
        channels = [grpc.aio.insecure_channel(address, own) for _ in range(3)]
        codes = [(await ask(channel, message()))[0] for channel in channels]
        again = await ask(channels[0], message())
        await asyncio.gather(*(channel.close() for channel in channels))

    assert codes == [CODES.OK, CODES.OK, CODES.UNAVAILABLE]
    assert again[0] is CODES.OK


@pytest.mark.parametrize(
    "name",
    ["/inference.GRPCInferenceService/SystemSharedMemoryRegister", "/inference.GRPCInferenceService/LogSettings",
     "/inference.GRPCInferenceService/TraceSetting", "/grpc.channelz.v1.Channelz/GetServers", "/nothing/Nothing", "/"],
)  # fmt: skip
async def test_unknown_methods_are_unimplemented(name: str) -> None:
    """C08: among them those that write files, map shared memory or list connections."""
    async with face() as (channel, _):
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await channel.unary_unary(name)(b"", timeout=20)

    assert raised.value.code() is CODES.UNIMPLEMENTED


@pytest.mark.parametrize(
    "data", [b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(500), bytes(1000)]
)
async def test_another_protocol_is_closed(data: bytes) -> None:
    """C11: bytes that are not HTTP/2 end only their own connection."""
    async with serving(FakeInference(ECHO)) as address, asyncio.timeout(30):
        host, _, port = address.partition(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(data)

        try:
            while await reader.read(1000):
                pass
        except ConnectionError:
            pass
        writer.transport.abort()

        async with grpc.aio.insecure_channel(address) as channel:
            assert await ask(channel, message()) == (CODES.OK, "")


PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"


def frame(kind: int, flags: int, stream: int, content: bytes = b"") -> bytes:
    return len(content).to_bytes(3, "big") + bytes([kind, flags]) + stream.to_bytes(4, "big") + content


HEADERS = b"\x83\x86\x41\x01x\x04\x01/"  # POST, http, :authority x, :path /
FLOODS = {
    "PING": frame(6, 0, 0, bytes(8)) * 10_000,
    "SETTINGS": frame(4, 0, 0) * 10_000,
    "rapid reset": b"".join(
        frame(1, 4, 2 * i + 1, HEADERS) + frame(3, 0, 2 * i + 1, (8).to_bytes(4, "big")) for i in range(10_000)
    ),
    "empty DATA": frame(1, 4, 1, HEADERS) + frame(0, 0, 1) * 10_000,
    "CONTINUATION": frame(1, 0, 1, HEADERS) + frame(9, 0, 1, b"\x00\x01a\x01b") * 10_000,
    "WINDOW_UPDATE of 0": frame(8, 0, 0, bytes(4)) * 10,
    "WINDOW_UPDATE that overflows": frame(8, 0, 0, b"\x7f\xff\xff\xff") * 2,
    "frame of 16 MiB": b"\xff\xff\xff\x00\x00\x00\x00\x00\x01",
}


@pytest.mark.parametrize("flood", FLOODS)
async def test_a_flood_of_frames_affects_no_other_connection(flood: str) -> None:
    """C05: while one connection is flooded, calls on another are answered, and the service sees none of it."""
    service = Checking(ECHO)
    async with serving(service) as address, grpc.aio.insecure_channel(address) as channel, asyncio.timeout(60):
        host, _, port = address.partition(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(PREFACE + frame(4, 0, 0) + FLOODS[flood])
        draining = asyncio.create_task(_drain(reader, writer))

        for _ in range(20):
            assert await ask(channel, message()) == (CODES.OK, "")

        draining.cancel()
        await asyncio.gather(draining, return_exceptions=True)
        writer.transport.abort()
        assert len(service.requests) == 20


async def _drain(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await writer.drain()
    while await reader.read(65_536):
        pass


async def test_control_requests_name_a_model_only() -> None:
    """A14, E09: names that could be paths are refused, and so are parameters that name something to fetch."""
    async with face() as (channel, service):
        for name in ("..", "../x", "a/b", "", "a\0b", "s3://169.254.169.254/x", "m" * 129, "con ", "naïve"):
            data = pb.RepositoryModelLoadRequest(model_name=name).SerializeToString()
            assert (await ask(channel, data, "RepositoryModelLoad"))[0] is CODES.NOT_FOUND, name

        assert service.controlled == []


@pytest.mark.parametrize("timeout", ["99999999H", "-1S", "0n", "x", "1", "", "1" * 20 + "S"])
async def test_an_invalid_timeout_affects_no_other_call(timeout: str) -> None:
    """C04: an invalid or excessive timeout results in a status; the deadline is clamped."""
    async with face(max_timeout_s=100) as (channel, service), asyncio.timeout(30):
        code, _ = await ask(channel, message(), metadata=(("grpc-timeout", timeout),), timeout=None)

        assert code in (CODES.OK, CODES.DEADLINE_EXCEEDED, CODES.INTERNAL, CODES.CANCELLED, CODES.UNAVAILABLE, CODES.UNKNOWN)
        assert all(remaining_s(request.deadline) <= 100 for request in service.requests)
        assert await ask(channel, message(), timeout=20) == (CODES.OK, "")


async def test_too_much_metadata_affects_no_other_call() -> None:
    """C04: a thousand keys exceed the limit; invalid base64 in unused keys is ignored."""
    async with face() as (channel, _):
        code, _ = await ask(channel, message(), metadata=tuple((f"k{i}", "v") for i in range(1000)))
        assert code is CODES.RESOURCE_EXHAUSTED
        assert await ask(channel, message(), metadata=(("x-bin", b"\xff\x00"),)) == (CODES.OK, "")
        assert await ask(channel, message()) == (CODES.OK, "")


# Streams.


async def test_an_idle_stream_delays_no_other_call() -> None:
    """C10: clients that open streams and never write do not affect one that is served."""
    async with face() as (channel, _):
        silent = [channel.stream_stream(f"/{SERVICE}/ModelStreamInfer")() for _ in range(50)]
        for stream in silent:
            await stream.initial_metadata()

        assert await ask(channel, message()) == (CODES.OK, "")
        for stream in silent:
            stream.cancel()


async def test_a_stream_is_read_no_faster_than_it_is_answered() -> None:
    """C10: a client that writes continuously and reads nothing is stopped by flow control, while another one is served."""
    held = asyncio.Event()

    class Holding(Checking):
        async def infer(self, request: Any) -> Any:
            if request.id == "held":
                self.requests.append(request)
                await held.wait()
            return await super().infer(request)

    service = Holding(ECHO)
    async with serving(service) as address, grpc.aio.insecure_channel(address) as channel:
        stream = channel.stream_stream(f"/{SERVICE}/ModelStreamInfer")()
        one = message(id="held") + delimited(1000, bytes(10_000))

        async def flood() -> None:
            for _ in range(100_000):
                await stream.write(one)

        flooding = asyncio.create_task(flood())
        async with asyncio.timeout(30):
            while len(service.requests) < MAX_UNANSWERED:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        for _ in range(20):
            assert await ask(channel, message()) == (CODES.OK, "")

        assert len([each for each in service.requests if each.id == "held"]) == MAX_UNANSWERED
        flooding.cancel()
        await asyncio.gather(flooding, return_exceptions=True)
        stream.cancel()
        held.set()


async def test_a_bad_message_on_a_stream_fails_alone() -> None:
    """C10: garbage, an unknown model, a valid request, in any order: each is answered, and the stream stays open."""
    async with face() as (channel, _), asyncio.timeout(30):
        stream = channel.stream_stream(f"/{SERVICE}/ModelStreamInfer")()
        told = []
        for data in (message(), b"\xff" * 10, message(shape=[3, 2]), message(model_name="m" * 200), message()):
            await stream.write(data)
            told.append(pb.ModelStreamInferResponse.FromString(await stream.read()).error_message)
        await stream.done_writing()

    assert [bool(text) for text in told] == [False, True, True, True, False]
    assert not any(INSIDE.search(text) for text in told)


async def test_a_bomb_on_a_stream_is_refused_at_the_limit() -> None:
    """A04, C02: a message that decompresses beyond the limit ends its stream, and no other call."""
    bomb = delimited(1000, bytes(50_000_000))
    async with face() as (channel, service), asyncio.timeout(30):
        stream = channel.stream_stream(f"/{SERVICE}/ModelStreamInfer")(compression=grpc.Compression.Gzip)
        with pytest.raises((grpc.aio.AioRpcError, asyncio.InvalidStateError)):
            await stream.write(bomb)
            await stream.read()

        assert await stream.code() is CODES.RESOURCE_EXHAUSTED
        assert service.requests == []
        assert await ask(channel, message()) == (CODES.OK, "")
