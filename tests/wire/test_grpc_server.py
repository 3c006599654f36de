"""Our gRPC server with h2 as its peer: calls, statuses, limits, flow control, and how connections end."""

from __future__ import annotations

import asyncio
import base64
import gzip
import zlib
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from splitserve.wire.grpc.call import MethodHandler
from splitserve.wire.grpc.messages import percent_decode
from splitserve.wire.grpc.server import DRAIN_PING_TIMEOUT_S, ServerLimits
from splitserve.wire.http2 import connection as connection_module
from splitserve.wire.http2 import frames
from splitserve.wire.http2.headers import TABLE_SIZE_ZERO, encode
from splitserve.wire.listening import FIRST_REQUEST_GRACE_S, HANDSHAKE_TIMEOUT_S
from tests.wire.fakes import (
    ECHO,
    FAIL,
    HOLD,
    STREAM,
    FakeServer,
    RawClient,
    framed,
    goaways,
    raw_frames,
    request_headers,
    trailers_of,
    until,
)
from tests.wire.peers import Client


async def test_a_call_is_answered() -> None:
    """Headers, message, trailers, in this order, and the stream is closed."""
    client = Client(FakeServer())

    stream = client.call(ECHO, framed(b"hello"))
    await client.pump()

    assert client.messages(stream) == [b"hello"]
    assert client.headers(stream) == {
        ":status": "200",
        "content-type": "application/grpc",
        "grpc-accept-encoding": "identity,deflate,gzip",
        "grpc-status": "0",
    }
    assert client.resets() == {}


async def test_responses_that_are_ready_together_are_one_write() -> None:
    """Writes cost most."""
    client = Client(FakeServer())
    await client.pump()
    streams = [client.call(HOLD, framed(b"x")) for _ in range(20)]
    await client.pump()
    before = client.transport.n_writes

    client.server.gate.set()
    await client.pump()

    assert [client.status(stream) for stream in streams] == ["0"] * 20
    assert client.transport.n_writes == before + 1


@given(data=st.data())
def test_bytes_may_arrive_in_any_pieces(data: st.DataObject) -> None:
    """Any number of calls, cut anywhere: each gets its own response."""
    bodies = data.draw(st.lists(st.binary(max_size=40), min_size=1, max_size=4))
    padding = data.draw(st.integers(0, 20))

    async def run() -> None:
        client = Client(FakeServer())
        streams = []
        for body in bodies:
            stream = client.h2.get_next_available_stream_id()
            client.h2.send_headers(stream, request_headers(ECHO))
            client.h2.send_data(stream, framed(body), end_stream=True, pad_length=padding or None)
            streams.append(stream)
        stream = client.call(STREAM, None, is_end=False)
        for body in bodies:
            client.h2.send_data(stream, framed(body), pad_length=padding or None)
        client.h2.end_stream(stream)
        client.server.gate.set()
        sent = client.h2.data_to_send()
        cuts = sorted(data.draw(st.sets(st.integers(1, len(sent) - 1), max_size=12)))
        for start, end in zip([0, *cuts], [*cuts, len(sent)], strict=True):
            client.connection.data_received(sent[start:end])
            await asyncio.sleep(0)
        await client.pump()

        assert [client.messages(each) for each in streams] == [[body] for body in bodies]
        assert client.messages(stream) == bodies
        assert client.status(stream) == "0"

    asyncio.run(run())


async def test_header_blocks_may_use_the_dynamic_table_until_our_settings_are_acknowledged() -> None:
    """Clients may call before they have our SETTINGS, and insert fields; later blocks use no table."""
    client = Client(FakeServer())

    streams = [client.call(ECHO, framed(b"x"), x_name="same", x_number=str(number)) for number in range(3)]
    await client.pump()
    streams += [client.call(ECHO, framed(b"x"), x_name="same", x_number=str(number)) for number in range(3)]
    await client.pump()

    assert [client.status(stream) for stream in streams] == ["0"] * 6
    numbers = [dict(call.metadata)["x-number"] for call in client.server.calls]
    assert numbers == ["0", "1", "2"] * 2


# Statuses.


async def test_an_error_is_a_status_with_message_and_metadata() -> None:
    """Percent-encoded text, and bytes in base 64."""
    client = Client(FakeServer())

    stream = client.call(FAIL, framed(b""))
    await client.pump()

    headers = client.headers(stream)
    assert (headers["grpc-status"], percent_decode(headers["grpc-message"].encode())) == ("13", "50 % of nothing, naïvely")
    assert base64.b64decode(headers["x-bin"] + "==") == b"\x00\xff"


REFUSED: dict[str, tuple[dict[str, Any], bytes, str]] = {
    "no such method": ({"path": "/test.Test/Nothing"}, framed(b"x"), "12"),
    "no message": ({}, b"", "12"),
    "two messages": ({}, framed(b"x") * 2, "12"),
    "half a message": ({}, framed(b"hello")[:-1], "12"),
    "half a prefix": ({}, b"\0\0", "12"),
    "an unknown encoding": ({"grpc_encoding": "zstd"}, framed(b"x"), "12"),
    "compressed, and nobody knows how": ({}, framed(b"x", is_compressed=True), "13"),
    "compressed another way": ({"grpc_encoding": "gzip"}, framed(zlib.compress(b"x"), is_compressed=True), "13"),
    "compressed and cut off": ({"grpc_encoding": "gzip"}, framed(gzip.compress(b"x")[:-4], is_compressed=True), "13"),
    "a bomb": ({"grpc_encoding": "gzip"}, framed(gzip.compress(bytes(5_000)), is_compressed=True), "8"),
    "a flag that is none": ({}, b"\2\0\0\0\0", "13"),
    "too large": ({}, framed(bytes(1_001)), "8"),
    "too large by its own word": ({}, b"\0\xff\xff\xff\xff", "8"),
    "a timeout that is none": ({"grpc_timeout": "soon"}, framed(b"x"), "3"),
    "a timeout with too many digits": ({"grpc_timeout": "123456789S"}, framed(b"x"), "3"),
    "no time left": ({"grpc_timeout": "0n"}, framed(b"x"), "4"),
    "too much metadata": ({"x_long": "x" * 9_000, "x_longer": "y" * 9_000}, framed(b"x"), "8"),
}


@pytest.mark.parametrize("name", REFUSED)
async def test_a_call_that_cannot_be_served_gets_a_status(name: str) -> None:
    """And harms no other call."""
    headers, body, code = REFUSED[name]
    client = Client(FakeServer(ServerLimits(max_message_bytes=1_000)))
    await client.pump()

    stream = client.call(**{"path": ECHO, "body": body, **headers})
    await client.pump()
    good = client.call(ECHO, framed(bytes(1_000)))
    await client.pump()

    assert client.status(stream) == code
    assert client.headers(stream)[":status"] == "200"
    assert client.messages(good) == [bytes(1_000)]


NOT_GRPC = {
    "JSON": ([*request_headers(ECHO)[:-1], ("content-type", "application/json")], "415"),
    "no content type": (request_headers(ECHO)[:-1], "415"),
    "gRPC-Web": ([*request_headers(ECHO)[:-1], ("content-type", "application/grpc-web")], "415"),
    "gRPC-Web with a codec": ([*request_headers(ECHO)[:-1], ("content-type", "application/grpc-web+proto")], "415"),
    "another subtype": ([*request_headers(ECHO)[:-1], ("content-type", "application/grpcfoo")], "415"),
    "GET": ([(":method", "GET"), (":scheme", "http"), (":path", "/"), (":authority", "x")], "405"),
    "HEAD": ([(":method", "HEAD"), (":scheme", "http"), (":path", "/"), (":authority", "x")], "405"),
    "OPTIONS": ([(":method", "OPTIONS"), (":scheme", "http"), (":path", "*"), (":authority", "x")], "405"),
    "CONNECT": ([(":method", "CONNECT"), (":authority", "x:1")], "405"),
    "GET of a method": ([(":method", "GET"), *request_headers(ECHO)[1:]], "405"),
}


@pytest.mark.parametrize("name", NOT_GRPC)
async def test_http_that_is_not_grpc_gets_an_http_status(name: str) -> None:
    """415 for another content type, 405 for another method, as balancers' health checks send it.

    Source: gRPC, doc/PROTOCOL-HTTP2.md, Responses.
    """
    headers, http_status = NOT_GRPC[name]
    client = Client(FakeServer(), strict=False)
    stream = client.h2.get_next_available_stream_id()
    client.h2.send_headers(stream, headers, end_stream=True)
    await client.pump()

    assert client.headers(stream)[":status"] == http_status
    assert client.headers(stream)["grpc-status"] == {"415": "3", "405": "12"}[http_status]
    assert client.resets() == {}
    assert client.server.calls == []


@pytest.mark.parametrize("content_type", ["application/grpc", "application/grpc+proto", "application/grpc;charset=utf-8"])
async def test_content_types_of_grpc(content_type: str) -> None:
    """With or without a codec or parameters."""
    client = Client(FakeServer())
    stream = client.h2.get_next_available_stream_id()
    client.h2.send_headers(stream, [*request_headers(ECHO)[:-1], ("content-type", content_type)])
    client.h2.send_data(stream, framed(b"x"), end_stream=True)
    await client.pump()

    assert client.messages(stream) == [b"x"]


@pytest.mark.parametrize(("encoding", "compress"), [("gzip", gzip.compress), ("deflate", zlib.compress)])
async def test_compressed_messages_are_accepted(encoding: str, compress: Any) -> None:
    """Together with uncompressed ones in the same call."""
    client = Client(FakeServer())
    client.server.gate.set()

    stream = client.call(STREAM, framed(compress(b"small"), is_compressed=True) + framed(b"plain"), grpc_encoding=encoding)
    await client.pump()

    assert client.messages(stream) == [b"small", b"plain"]


async def test_a_response_over_the_message_limit_is_an_error() -> None:
    """It is not sent in part."""
    client = Client(FakeServer(ServerLimits(max_message_bytes=10)))

    async def large(data: bytes, call: object) -> bytes:
        return bytes(11)

    client.server.handlers[ECHO] = MethodHandler(unary=large)
    stream = client.call(ECHO, framed(b"x"))
    await client.pump()

    assert (client.status(stream), client.messages(stream)) == ("8", [])


async def test_metadata_arrives_as_it_was_sent() -> None:
    """Repeated names are joined by a comma."""
    client = Client(FakeServer())
    stream = client.h2.get_next_available_stream_id()
    client.h2.send_headers(stream, [*request_headers(ECHO), ("a", "1"), ("b", "ü"), ("a", "2")])
    client.h2.send_data(stream, framed(b""), end_stream=True)
    await client.pump()

    (call,) = client.server.calls
    assert {name: value for name, value in call.metadata if name in "ab"} == {"a": "1,2", "b": "ü"}


# Time.


async def test_a_call_ends_at_its_deadline() -> None:
    """Independent of its handler."""
    client = Client(FakeServer())
    stream = client.call(HOLD, framed(b"x"), grpc_timeout="10S")
    await client.pump()
    (call,) = client.server.calls
    assert 5 < (call.time_remaining() or 0) <= 10

    client.connection.tick(client.connection.now() + 5)
    await client.pump()
    assert client.status(stream) is None
    client.connection.tick(client.connection.now() + 11)
    await client.pump()

    assert (client.status(stream), client.server.n_cancelled) == ("4", 1)


async def test_a_call_that_its_client_resets_is_cancelled() -> None:
    """Its handler is cancelled, its bytes are released, and nothing more is sent on it."""
    client = Client(FakeServer())
    stream = client.call(HOLD, framed(bytes(100)))
    await client.pump()
    assert client.server.budget.used == 100

    client.h2.reset_stream(stream)
    await client.pump()

    assert (client.server.n_cancelled, client.server.budget.used) == (1, 0)
    assert client.status(stream) is None


async def test_calls_of_a_lost_connection_are_cancelled() -> None:
    """Unary and streaming ones."""
    client = Client(FakeServer())
    client.call(HOLD, framed(b"x"))
    client.call(STREAM, framed(b"x"), is_end=False)
    await client.pump()

    client.connection.connection_lost(None)
    await until(lambda: client.server.n_cancelled == 2, lambda: asyncio.sleep(0))

    assert client.server.budget.used == 0
    assert not client.server.connections


# Flow control.


async def test_a_response_waits_for_its_window_and_others_pass_it() -> None:
    """A window of 0 on one stream does not block the others; WINDOW_UPDATE releases it frame by frame."""
    client = Client(FakeServer(), window=0)
    await client.pump()
    blocked = client.call(ECHO, framed(b"0123456789" * 10_000))
    await client.pump()
    assert client.headers(blocked)[":status"] == "200"
    assert client.body(blocked) == b""

    other = client.call(ECHO, framed(b"small"))
    client.h2.increment_flow_control_window(100, stream_id=other)
    await client.pump()
    assert client.messages(other) == [b"small"]
    while client.status(blocked) is None:
        client.h2.increment_flow_control_window(5_000, stream_id=blocked)
        client.h2.increment_flow_control_window(5_000)
        await client.pump()

    assert client.messages(blocked) == [b"0123456789" * 10_000]


async def test_responses_wait_while_the_transport_is_paused() -> None:
    """Nothing is written until it resumes."""
    client = Client(FakeServer())
    await client.pump()
    client.connection.pause_writing()
    stream = client.call(ECHO, framed(bytes(1_000)))
    await client.pump()
    assert client.body(stream) == b""

    client.connection.resume_writing()
    await client.pump()

    assert client.messages(stream) == [bytes(1_000)]


async def test_blocked_streams_share_the_connection_window() -> None:
    """A frame of each in turn."""
    client = Client(FakeServer())
    await client.pump()
    streams = [client.call(ECHO, framed(bytes([number]) * 60_000)) for number in range(3)]
    sent = client.h2.data_to_send()
    client.connection.data_received(sent)
    await until(lambda: len(client.server.calls) == 3, lambda: asyncio.sleep(0))
    await client.pump()
    client.h2.increment_flow_control_window(60_000)
    await client.pump()

    sizes = [len(client.body(stream)) for stream in streams]
    assert sum(sizes) == 65_535 + 60_000
    assert max(sizes[1:]) - min(sizes[1:]) <= 16_384


async def test_windows_are_returned_for_a_long_message() -> None:
    """Unary and on a stream."""
    client = Client(FakeServer(), window=2**30)
    client.h2.increment_flow_control_window(2**30)
    client.server.gate.set()
    await client.pump()
    message = b"0123456789abcdef" * 300_000
    for path in (ECHO, STREAM):
        stream = client.call(path, None, is_end=False)
        await client.send_all(stream, framed(message))

        assert client.messages(stream) == [message]
        assert client.status(stream) == "0"


async def test_the_window_of_a_stream_that_is_not_read_is_not_returned() -> None:
    """At most a window is buffered; reading returns it."""
    client = Client(FakeServer(), window=2**30)
    client.h2.increment_flow_control_window(2**30)
    await client.pump()
    stream = client.call(STREAM, None, is_end=False)
    await client.pump()
    n_sent = 0
    while client.h2.local_flow_control_window(stream) >= 20_005:
        client.h2.send_data(stream, framed(bytes(20_000)))
        n_sent += 1
        await client.pump()
    assert connection_module.STREAM_WINDOW // 20_005 <= n_sent <= 2 * connection_module.STREAM_WINDOW // 20_005
    other = client.call(ECHO, framed(b"x"))
    await client.pump()
    assert client.status(other) == "0"

    client.server.gate.set()
    await client.pump()

    assert client.messages(stream) == [bytes(20_000)] * n_sent
    assert client.h2.local_flow_control_window(stream) > connection_module.STREAM_WINDOW // 2


async def test_a_writer_waits_for_its_reader() -> None:
    """A stream handler writes no further than the flow-control window."""
    client = Client(FakeServer(), window=100)
    client.server.gate.set()
    await client.pump()
    stream = client.call(STREAM, framed(bytes(60)) * 10)
    await client.pump()
    assert len(client.body(stream)) == 100
    (call,) = client.server.calls
    assert len(call.send_queue) == 1

    while client.status(stream) is None:
        client.h2.increment_flow_control_window(50, stream_id=stream)
        await client.pump()

    assert client.messages(stream) == [bytes(60)] * 10


# Limits.


async def test_bytes_are_reserved_as_they_arrive() -> None:
    """An incomplete message reserves what has arrived; a call over the limit is refused, and its bytes are released."""
    client = Client(FakeServer(max_held_bytes=10_000))
    first = client.call(ECHO, framed(bytes(9_000))[:8_000], is_end=False)
    await client.pump()
    assert client.server.budget.used == 7_995

    second = client.call(ECHO, framed(bytes(3_000)))
    await client.pump()
    assert client.status(second) == "13"
    assert client.server.budget.used == 7_995
    client.h2.send_data(first, framed(bytes(9_000))[8_000:], end_stream=True)
    await client.pump()

    assert client.status(first) == "0"
    assert client.server.budget.used == 0


async def test_concurrent_streams_are_limited() -> None:
    """One more is REFUSED_STREAM, which clients may retry; h2 itself would not send it."""
    client = Client(FakeServer(ServerLimits(max_streams=2)))
    streams = [client.call(HOLD, framed(b"x")) for _ in range(3)]  # before it has heard of the limit
    await client.pump()

    client.server.gate.set()
    await client.pump()

    assert [client.status(stream) for stream in streams] == ["0", "0", None]
    assert client.resets() == {streams[2]: frames.REFUSED_STREAM}


async def test_connections_are_limited() -> None:
    """One too many is closed at once."""
    server = FakeServer(ServerLimits(max_connections=1))
    first, second = Client(server), Client(server)

    assert (first.transport.is_aborted, second.transport.is_aborted) == (False, True)


START = frames.PREFACE + frames.frame(frames.SETTINGS, 0, 0)
BLOCK = b"\x83\x86\x41\x01x\x04\x01/"
"""POST, http, :authority x, :path /"""

OPEN = frames.frame(frames.HEADERS, frames.END_HEADERS, 1, BLOCK + b"\x40\x0ccontent-type\x10application/grpc")


def call_frames(stream: int, path: str, message: bytes | None = b"x") -> bytes:
    """A whole request."""
    block = encode([(name.encode(), value.encode()) for name, value in request_headers(path)])
    return frames.frame(frames.HEADERS, frames.END_HEADERS, stream, block) + frames.frame(
        frames.DATA, frames.END_STREAM, stream, framed(message or b"")
    )


HOLDING = OPEN[frames.FRAME_HEADER_SIZE :].replace(b"\x04\x01/", b"\x04\x0f" + HOLD.encode())

MORE = {
    "content": frames.frame(frames.DATA, frames.END_STREAM, 1, framed(b"again")),
    "trailers": frames.frame(frames.HEADERS, frames.END_HEADERS | frames.END_STREAM, 1, TABLE_SIZE_ZERO),
}


@pytest.mark.parametrize("name", MORE)
async def test_a_call_that_goes_on_after_end_stream_is_reset(name: str) -> None:
    """It is served once at most. Source: RFC 9113, 5.1."""
    client = Client(FakeServer())
    stream = client.call(HOLD, framed(b"x"))
    await client.pump()

    client.connection.data_received(MORE[name])
    await client.pump()

    assert client.resets() == {stream: frames.STREAM_CLOSED}
    assert (len(client.server.calls), client.server.n_cancelled) == (1, 1)


async def test_a_deadline_that_passes_while_the_response_is_queued_adds_no_second_headers() -> None:
    """The status is sent after the queued data."""
    client = Client(FakeServer(), window=10)
    await client.pump()
    stream = client.call(ECHO, framed(bytes(100)), grpc_timeout="1S")
    await client.pump()
    client.connection.tick(client.connection.now() + 2)
    client.h2.increment_flow_control_window(1_000, stream_id=stream)
    await client.pump()

    assert client.messages(stream) == [bytes(100)]
    assert client.status(stream) == "4"


async def test_control_frames_between_responses_are_no_flood() -> None:
    """Clients send PING and WINDOW_UPDATE with calls, and over time."""
    client = Client(FakeServer())
    for _ in range(5):
        for _ in range(connection_module.MAX_CONTROL_FRAMES // 2):
            client.h2.ping(bytes(8))
        await client.pump()
        stream = client.call(ECHO, framed(b"x"))
        await client.pump()
        assert client.status(stream) == "0"
    for _ in range(5):
        for _ in range(connection_module.MAX_CONTROL_FRAMES // 2):
            client.h2.ping(bytes(8))
        await client.pump()
        client.connection.tick(client.connection.now())

    assert client.goaways() == []


async def test_rapid_reset_is_limited() -> None:
    """Source: CVE-2023-44487."""
    client = Client(FakeServer())
    client.connection.data_received(START)
    n_sent = 0
    while not client.transport.is_closed:
        number = 2 * n_sent + 1
        client.connection.data_received(
            frames.frame(frames.HEADERS, 4, number, HOLDING) + frames.rst_stream(number, frames.CANCEL)
        )
        n_sent += 1

    assert n_sent <= connection_module.MAX_ABORTED_STREAMS + 1
    assert client.server.calls == []


# Life.


async def test_a_silent_client_is_pinged_and_then_aborted() -> None:
    """An acknowledgement in time keeps the connection."""
    client = Client(FakeServer(ServerLimits(keepalive_time_s=5, keepalive_timeout_s=5)))
    await client.pump()
    now = client.connection.now()
    client.connection.tick(now)
    client.connection.tick(now + 6)
    await client.pump()  # h2 acknowledges
    client.connection.tick(now + 12)
    client.connection.tick(now + 13)
    assert not client.transport.is_closed

    client.connection.tick(now + 18)
    client.connection.tick(now + 24)

    assert client.transport.is_aborted


async def test_a_connection_without_a_preface_is_aborted() -> None:
    """After the handshake timeout."""
    client = Client(FakeServer())

    client.connection.tick(client.connection.now() + HANDSHAKE_TIMEOUT_S + 1)

    assert client.transport.is_aborted


async def test_a_draining_connection_serves_calls_that_were_sent_before_the_client_knew() -> None:
    """Two GOAWAYs: the first names no last stream, the second does once the client has acknowledged the first."""
    client = Client(FakeServer())
    before = client.call(HOLD, framed(b"x"))
    await client.pump()
    client.connection.drain()
    on_its_way = frames.frame(frames.HEADERS, 4, before + 2, TABLE_SIZE_ZERO + HOLDING)
    client.connection.data_received(on_its_way + frames.frame(frames.DATA, frames.END_STREAM, before + 2, framed(b"y")))
    await until(lambda: len(client.server.calls) == 2, lambda: asyncio.sleep(0))
    written = raw_frames(client.transport.take())
    (ping,) = [content for kind, _, _, content in written if kind == frames.PING]
    assert [content[:8] for kind, _, _, content in written if kind == frames.GOAWAY] == [b"\x7f\xff\xff\xff\0\0\0\0"]

    client.connection.data_received(frames.frame(frames.PING, frames.ACK, 0, ping))
    late = frames.frame(frames.HEADERS, 4, before + 4, HOLDING)
    client.connection.data_received(late)
    await asyncio.sleep(0)
    assert not client.transport.is_closed
    client.server.gate.set()
    await until(
        lambda: frames.PING in [kind for kind, *_ in raw_frames(bytes(client.transport.written))], lambda: asyncio.sleep(0)
    )

    written = raw_frames(client.transport.take())
    assert next(int.from_bytes(content[:4], "big") for kind, _, _, content in written if kind == frames.GOAWAY) == before + 2
    assert [stream for kind, flags, stream, _ in written if kind == frames.HEADERS and flags & frames.END_STREAM] == [
        before,
        before + 2,
    ]


async def test_a_drained_connection_is_closed_once_the_client_has_received_the_last_answer() -> None:
    """Else what the client still sends, e.g. WINDOW_UPDATE, would be answered by a TCP reset, which may overtake the answer."""
    client = Client(FakeServer())
    stream = client.call(HOLD, framed(b"x"))
    await client.pump()
    client.connection.drain()
    client.connection.data_received(frames.frame(frames.PING, frames.ACK, 0, await _ping_of(client)))
    client.server.gate.set()
    await until(
        lambda: frames.PING in [kind for kind, *_ in raw_frames(bytes(client.transport.written))], lambda: asyncio.sleep(0)
    )

    written = raw_frames(bytes(client.transport.written))
    assert [kind for kind, flags, number, _ in written if number == stream and flags & frames.END_STREAM] == [frames.HEADERS]
    assert not client.transport.is_closed

    client.connection.data_received(frames.frame(frames.PING, frames.ACK, 0, await _ping_of(client)))

    assert client.transport.is_closed


async def test_a_client_that_does_not_acknowledge_the_last_answer_does_not_delay_closing() -> None:
    client = Client(FakeServer())
    client.connection.data_received(START)
    await asyncio.sleep(0)
    client.connection.drain()
    client.connection.data_received(frames.frame(frames.PING, frames.ACK, 0, await _ping_of(client)))
    now = client.connection.now()

    client.connection.tick(now + DRAIN_PING_TIMEOUT_S - 1)
    assert not client.transport.is_closed
    client.connection.tick(now + DRAIN_PING_TIMEOUT_S + 1)

    assert client.transport.is_closed


async def _ping_of(client: Client) -> bytes:
    """The content of the PING that was written last; what was written is taken."""
    await asyncio.sleep(0)
    return [content for kind, _, _, content in raw_frames(client.transport.take()) if kind == frames.PING][-1]


async def test_connections_live_as_long_as_their_clients_want() -> None:
    """By default no age, no idle time and no silence of less than two hours ends a connection or a stream on it."""
    client = Client(FakeServer())
    stream = client.call(STREAM, None, is_end=False)
    await client.pump()
    now = client.connection.now()

    for hour in range(1, 200):
        client.connection.tick(now + 3600 * hour)
        await client.pump()  # h2 acknowledges PING

    client.server.gate.set()
    client.h2.send_data(stream, framed(b"x"), end_stream=True)
    await client.pump()
    assert (client.messages(stream), client.status(stream), client.goaways()) == ([b"x"], "0", [])


async def test_a_connection_drains_at_its_maximum_age() -> None:
    """Its client is to connect anew; calls in flight go on as long as they want."""
    client = RawClient(FakeServer(ServerLimits(max_connection_age_s=60)))
    await client.send(START, call_frames(1, HOLD))

    assert await client.tick(60 * 0.8) == []
    drained = await client.tick(60 * 1.2)
    assert goaways(drained) == [(frames.MAX_STREAM_ID, frames.NO_ERROR), (1, frames.NO_ERROR)]
    assert await client.tick(7_000) == []
    assert not client.transport.is_closed
    client.server.gate.set()
    ended = await client.send()

    assert trailers_of(ended, 1)[b"grpc-status"] == b"0"
    assert client.transport.is_closed


async def test_calls_that_outlive_the_grace_of_an_age_get_a_status() -> None:
    """UNAVAILABLE, which clients retry, then GOAWAY; not a connection that breaks."""
    client = RawClient(FakeServer(ServerLimits(max_connection_age_s=60, max_connection_age_grace_s=30)))
    await client.send(START, call_frames(1, HOLD), call_frames(3, STREAM))

    await client.tick(70)
    ended = await client.tick(100)

    assert [trailers_of(ended, stream)[b"grpc-status"] for stream in (1, 3)] == [b"14", b"14"]
    assert b"connection age" in trailers_of(ended, 3)[b"grpc-message"]
    assert goaways(ended) == [(3, frames.NO_ERROR)]
    assert ended[-1][0] == frames.GOAWAY
    assert (client.transport.is_closed, client.transport.is_aborted) == (True, False)
    assert client.server.n_cancelled == 2


async def test_a_new_connection_that_drains_serves_its_first_calls() -> None:
    """They may be on their way with the preface: GOAWAY goes out, and the connection closes once they are answered."""
    client = RawClient(FakeServer())
    client.connection.drain()
    client.connection.data_received(START + call_frames(1, ECHO))
    received = await client.send()

    assert trailers_of(received, 1)[b"grpc-status"] == b"0"
    assert goaways(received)[-1] == (1, frames.NO_ERROR)
    assert client.transport.is_closed


async def test_a_new_connection_without_a_preface_does_not_delay_draining() -> None:
    """It is closed after a second."""
    client = RawClient(FakeServer())
    client.connection.drain()
    client.connection.tick(client.connection.now() + FIRST_REQUEST_GRACE_S + 0.1)

    assert client.transport.is_closed


async def test_a_client_that_is_gone_does_not_delay_draining() -> None:
    """Its connection is closed once its calls have ended, although it acknowledges nothing."""
    client = Client(FakeServer())
    client.connection.data_received(START)
    await asyncio.sleep(0)
    client.connection.drain()
    now = client.connection.now()

    client.connection.tick(now + DRAIN_PING_TIMEOUT_S - 1)
    assert not client.transport.is_closed
    client.connection.tick(now + DRAIN_PING_TIMEOUT_S + 1)

    assert client.transport.is_closed


async def test_an_idle_connection_drains() -> None:
    """If that is configured: without a call for so long, not merely without bytes."""
    client = RawClient(FakeServer(ServerLimits(max_connection_idle_s=300)))
    await client.send(START, call_frames(1, HOLD))
    for later in range(0, 3000, 100):
        assert goaways(await client.tick(later)) == []
    client.server.gate.set()
    await client.send()

    told = []
    for later in range(3000, 3500, 100):
        if not client.transport.is_closed:
            await client.send(frames.frame(frames.PING, 0, 0, bytes(8)))
            told += await client.tick(later)

    assert goaways(told)[-1] == (1, frames.NO_ERROR)
    assert client.transport.is_closed


@given(st.binary(max_size=300), st.booleans())
def test_arbitrary_bytes_raise_nothing(data: bytes, is_greeted: bool) -> None:
    """The connection is closed, or waits for more."""

    async def run() -> None:
        client = Client(FakeServer())
        client.connection.data_received((START if is_greeted else b"") + data)
        await asyncio.sleep(0)
        client.connection.connection_lost(None)

    asyncio.run(run())
