"""RFC 9113, rule by rule, at our client connection: frame by frame what a server sends to it, and the expected reaction."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from splitserve.wire.grpc.client import StreamCall
from splitserve.wire.http2 import frames
from splitserve.wire.http2.connection import FRAME_SIZE
from tests.wire.fakes import FakeTransport, Frame, framed, goaways, raw_frames
from tests.wire.rules import IGNORED, Ended, Goaway, Replies, Reset, Rule, data, headers, raw_block

P, F, C = frames.PROTOCOL_ERROR, frames.FRAME_SIZE_ERROR, frames.FLOW_CONTROL_ERROR
CALM = frames.ENHANCE_YOUR_CALM
ACK, END = frames.ACK, frames.END_HEADERS | frames.END_STREAM
START = frames.settings({}) + frames.frame(frames.SETTINGS, ACK, 0)
OPENED = headers(1, raw_block((":status", "200"), ("content-type", "application/grpc")))
PING = frames.frame(frames.PING, 0, 0, b"12345678")


def opened(*more: tuple[str, str]) -> bytes:
    return headers(1, raw_block((":status", "200"), ("content-type", "application/grpc"), *more))


RULES = [
    Rule("3.4", "a server's first frame is SETTINGS", [PING], Goaway(P), is_raw=True),
    Rule("3.4", "a server's first frame is SETTINGS, not HEADERS", [OPENED], Goaway(P), is_raw=True),
    Rule("4.1", "frames of unknown types are ignored", [frames.frame(0xFA, 0, 1, bytes(100_000))], IGNORED),
    Rule("4.2", "a frame has SETTINGS_MAX_FRAME_SIZE bytes at most",
         [OPENED, frames.frame_header(FRAME_SIZE + 1, frames.DATA, 0, 1)], Goaway(F)),
    Rule("4.3", "a block that cannot be decoded is an error", [headers(1, b"\xff\xff\xff\xff\xff")],
         Goaway(frames.COMPRESSION_ERROR)),
    Rule("5.1", "a server opens no streams: HEADERS", [headers(2, raw_block((":status", "200")))], Goaway(P)),
    Rule("5.1", "DATA on a stream that was not opened", [data(3)], Goaway(P)),
    Rule("5.1", "WINDOW_UPDATE on a stream that was not opened", [frames.window_update(3, 1)], Goaway(P)),
    Rule("5.1", "RST_STREAM on a stream that was not opened", [frames.rst_stream(3, 1)], Goaway(P)),
    Rule("6.4", "RST_STREAM ends the call", [frames.rst_stream(1, frames.CANCEL)], Ended("UNAVAILABLE")),
    Rule("6.5", "SETTINGS are acknowledged", [frames.settings({})], Replies(frames.frame(frames.SETTINGS, ACK, 0))),
    Rule("6.5.2", "a server does not enable push", [frames.settings({frames.ENABLE_PUSH: 1})], Goaway(P)),
    Rule("6.5.2", "INITIAL_WINDOW_SIZE is at most 2^31-1", [frames.settings({frames.INITIAL_WINDOW_SIZE: 2**31})], Goaway(C)),
    Rule("6.6", "push is disabled", [frames.frame(frames.PUSH_PROMISE, 4, 1, bytes(4))], Goaway(P)),
    Rule("6.7", "PING is answered with its payload", [PING], Replies(frames.frame(frames.PING, ACK, 0, b"12345678"))),
    Rule("6.8", "calls up to the last stream of GOAWAY go on", [frames.goaway(1, 0), OPENED], IGNORED),
    Rule("6.8", "calls above it do not", [frames.goaway(0, 0)], Ended("UNAVAILABLE")),
    Rule("6.9", "an increment of 0 is an error", [frames.window_update(0, 0)], Goaway(P)),
    Rule("6.9", "an increment of 0 on a stream is that stream's error", [frames.window_update(1, 0)], Reset(P)),
    Rule("6.9.1", "a window is at most 2^31-1", [frames.window_update(1, 2**31 - 1)], Reset(C)),
    Rule("8.1", "a response may have interim headers", [headers(1, raw_block((":status", "103"))), OPENED], IGNORED),
    Rule("8.1", "interim headers do not end the stream", [headers(1, raw_block((":status", "103")), END)], Ended("UNAVAILABLE")),
    Rule("8.1", "DATA comes behind headers", [data(1, framed(b"x"), 0)], Reset(P)),
    Rule("8.1", "trailers end the stream", [OPENED, headers(1, raw_block(("grpc-status", "0")))], Reset(P)),
    Rule("8.1", "trailers have no pseudo-headers",
         [OPENED, headers(1, raw_block((":status", "200"), ("grpc-status", "0")), END)], Reset(P)),
    Rule("8.1", "trailers carry the status", [OPENED, headers(1, raw_block(("grpc-status", "5")), END)], Ended("NOT_FOUND")),
    Rule("8.1.1", "DATA is not more than content-length", [opened(("content-length", "5")), data(1, framed(b"x"), 0)], Reset(P)),
    Rule("8.2.1", "names are in lower case", [opened(("Name", "x"))], Reset(P)),
    Rule("8.2.1", "values have no line feed", [opened(("name", "x\ny"))], Reset(P)),
    Rule("8.2.2", "connection-specific fields are not sent", [opened(("connection", "close"))], Reset(P)),
    Rule("8.3.2", "a response has :status", [headers(1, raw_block(("content-type", "application/grpc")))], Reset(P)),
    Rule("8.3.2", ":status is a number of three digits", [headers(1, raw_block((":status", "20x")))], Reset(P)),
    Rule("8.3.2", ":status comes once", [headers(1, raw_block((":status", "200"), (":status", "200")))], Reset(P)),
    Rule("8.3", "pseudo-headers come first", [headers(1, raw_block(("a", "b"), (":status", "200")))], Reset(P)),
    Rule("8.3", "pseudo-headers of requests are an error", [headers(1, raw_block((":status", "200"), (":path", "/")))], Reset(P)),
    Rule("10.5.1", "headers over the limit end the call", [opened(("x", "x" * 20_000))], Ended("RESOURCE_EXHAUSTED")),
    Rule("10.5", "floods of PING end the connection", [PING * 5_000], Goaway(CALM)),
    Rule("10.5", "floods of empty DATA end the connection", [OPENED, data(1, b"", 0) * 5_000], Goaway(CALM)),
]  # fmt: skip


class RawServer:
    """Frames, as a test writes them, to one `StreamCall`, and the frames that it sends."""

    def __init__(self) -> None:
        self.transport = FakeTransport()
        self.messages: list[bytes] = []
        self.call = StreamCall(self.messages.append, 1_000_000)
        self.call.connection_made(self.transport)
        self.call.start("/test.Test/Stream", "test", "http", ())

    async def send(self, *parts: bytes) -> list[Frame]:
        """What the connection answers."""
        for each in parts:
            if not self.transport.is_closed:
                self.call.data_received(each)
        await asyncio.sleep(0)
        written: Any = self.transport.take()
        return raw_frames(written.removeprefix(frames.PREFACE))


@pytest.mark.parametrize("rule", RULES, ids=[rule.name for rule in RULES])
async def test_a_rule_of_http_2(rule: Rule) -> None:
    """The reaction is that of the rule. A stream error ends the call, the only one of its connection."""
    server = RawServer()
    await server.send(b"" if rule.is_raw else START)
    received = await server.send(*rule.sends)

    if isinstance(rule.outcome, Goaway):
        assert goaways(received) == [(0, rule.outcome.code)]
    elif isinstance(rule.outcome, Reset):
        resets = [payload for kind, _, _, payload in received if kind == frames.RST_STREAM]
        assert resets == [frames.UINT32.pack(rule.outcome.code)]
        assert (await server.call.status).code == "UNAVAILABLE"
    elif isinstance(rule.outcome, Ended):
        assert rule.outcome.status in ((await server.call.status).code, "any")
        assert {code for _, code in goaways(received)} <= {frames.NO_ERROR}
    else:
        assert received == raw_frames(rule.outcome.data if isinstance(rule.outcome, Replies) else b"")
        assert not server.call.status.done()
        await server.send(OPENED if not server.call.initial_metadata.done() else b"", data(1, framed(b"lives"), 0))
        assert server.messages == [b"lives"]
