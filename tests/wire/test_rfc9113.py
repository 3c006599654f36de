"""RFC 9113, rule by rule: frame by frame what a client sends to our server connection, and the expected reaction.

The rules are those that an endpoint without server push must keep on receiving. What it sends is checked by the library h2 in the
other tests.
"""

from __future__ import annotations

import asyncio

import pytest

from splitserve.wire.grpc.server import ServerLimits
from splitserve.wire.http2 import frames
from splitserve.wire.http2.connection import CONNECTION_WINDOW, FRAME_SIZE, MAX_HEADER_BLOCK_BYTES, STREAM_WINDOW
from tests.wire.fakes import ECHO, FAIL, HOLD, STREAM, FakeServer, Frame, RawClient, framed, goaways, raw_frames, trailers_of
from tests.wire.rules import (
    IGNORED,
    Answered,
    Goaway,
    Replies,
    Reset,
    Rule,
    block,
    call,
    data,
    headers,
    raw_block,
)

P, F, S, C = frames.PROTOCOL_ERROR, frames.FRAME_SIZE_ERROR, frames.STREAM_CLOSED, frames.FLOW_CONTROL_ERROR
CALM, CANCEL = frames.ENHANCE_YOUR_CALM, frames.CANCEL
END_HEADERS, END_STREAM, PADDED, ACK = frames.END_HEADERS, frames.END_STREAM, frames.PADDED, frames.ACK
START = frames.PREFACE + frames.settings({})
ACKNOWLEDGED = frames.frame(frames.SETTINGS, ACK, 0)
RESERVED = 1 << 31
PING = frames.frame(frames.PING, 0, 0, b"12345678")
PING_ACK = frames.frame(frames.PING, ACK, 0, b"12345678")
HELD = headers(1, block(path=HOLD)) + data(1)
"""A call that is not answered: half-closed (remote)."""

OPEN = headers(1, block(path=STREAM))
"""A call on which more may come: open."""

RESET_BY_PEER = HELD + frames.rst_stream(1, CANCEL)
RESET_BY_US = headers(1, block(path="/no/method"))
"""A call that has its status before its END_STREAM, and RST_STREAM behind it."""

UNKNOWN = 0xFA
BIG = block(("x", "x" * 70_000))


def chunks(payload: bytes, size: int) -> list[bytes]:
    return [payload[at : at + size] for at in range(0, len(payload), size)]


def priority(stream: int, size: int = 5) -> bytes:
    return frames.frame(frames.PRIORITY, 0, stream, bytes(size))


def continuation(flags: int, stream: int, payload: bytes = b"") -> bytes:
    return frames.frame(frames.CONTINUATION, flags, stream, payload)


def missing(name: str) -> bytes:
    """A call's header block without a pseudo-header."""
    pseudo = {":method": "POST", ":scheme": "http", ":path": ECHO}
    return raw_block(*[each for each in pseudo.items() if each[0] != name], ("content-type", "application/grpc"))


RULES = [
    # 3.4 Connection preface.
    Rule("3.4", "a client's first bytes are its preface", [b"GET / HTTP/1.1\r\n\r\n"], Goaway(P), is_raw=True),
    Rule("3.4", "the preface may come in pieces", [START[:10], START[10:], call()], Answered(), is_raw=True),
    Rule("3.4", "SETTINGS is the first frame, not PING", [frames.PREFACE + PING], Goaway(P), is_raw=True),
    Rule("3.4", "SETTINGS is the first frame, not an ACK", [frames.PREFACE + ACKNOWLEDGED], Goaway(P), is_raw=True),
    Rule("3.4", "SETTINGS is the first frame, not HEADERS", [frames.PREFACE + call()], Goaway(P), is_raw=True),
    Rule("3.4", "SETTINGS is the first frame, not DATA", [frames.PREFACE + data()], Goaway(P), is_raw=True),
    Rule(
        "3.4", "SETTINGS is the first frame, not an extension",
        [frames.PREFACE + frames.frame(UNKNOWN, 0, 0)], Goaway(P), is_raw=True,
    ),
    Rule("3.4", "a client may send calls before it has our SETTINGS", [START + call()], Answered(), is_raw=True),
    # 4.1 Frame format.
    Rule("4.1", "frames of unknown types are ignored", [frames.frame(UNKNOWN, 0xFF, 0, b"x" * 100)], IGNORED),
    Rule("4.1", "frames of unknown types are ignored on streams", [headers(), frames.frame(UNKNOWN, 0, 1, b"x"), data()],
         Answered()),
    Rule("4.1", "frames of unknown types are ignored at any size", [frames.frame(UNKNOWN, 0, 1, bytes(FRAME_SIZE))], IGNORED),
    Rule("4.1", "flags without a meaning are ignored", [frames.frame(frames.PING, 0xFE, 0, b"12345678")], Replies(PING_ACK)),
    Rule("4.1", "the reserved bit of a stream id is ignored: HEADERS, DATA", [headers(RESERVED | 1), data(RESERVED | 1)],
         Answered()),
    Rule("4.1", "the reserved bit of a stream id is ignored: PING", [frames.frame(frames.PING, 0, RESERVED, b"12345678")],
         Replies(PING_ACK)),
    # 4.2 Frame size.
    Rule("4.2", "a frame may have 2^14 bytes", [headers(), data(1, framed(bytes(2**14 - 5)))], Answered()),
    Rule("4.2", "a frame may have SETTINGS_MAX_FRAME_SIZE bytes",
         [headers(1, block(path=FAIL)), data(1, framed(bytes(FRAME_SIZE - 5)))], Answered("13")),
    Rule("4.2", "and not more: DATA", [headers(), frames.frame_header(FRAME_SIZE + 1, frames.DATA, 0, 1)], Goaway(F, 1)),
    Rule("4.2", "and not more: HEADERS", [frames.frame_header(FRAME_SIZE + 1, frames.HEADERS, 4, 1)], Goaway(F)),
    Rule("4.2", "and not more: an extension", [frames.frame_header(FRAME_SIZE + 1, UNKNOWN, 0, 1)], Goaway(F)),
    # 4.3 Field compression.
    Rule("4.3", "a block that cannot be decoded is an error", [headers(1, b"\xff\xff\xff\xff\xff\xff")],
         Goaway(frames.COMPRESSION_ERROR)),
    Rule("4.3", "a truncated block is an error", [headers(1, b"\x00\x05ab")], Goaway(frames.COMPRESSION_ERROR)),
    Rule("4.3", "a block in several frames is one", [headers(1, block()[:5], 0), continuation(0, 1, block()[5:9]),
         continuation(4, 1, block()[9:]), data()], Answered()),
    Rule("4.3.1", "a block after the ACK of a smaller table begins with a size update", [headers(1, block()), data()], Answered(),
         "nginx never sends one; it inserts fields and refers to none, so the table is evicted as in grpc-core"),
    Rule("4.3.1", "an entry that is evicted is not referred to", [headers(1, b"\xbe")], Goaway(frames.COMPRESSION_ERROR)),
    # 5.1 Stream states: idle.
    Rule("5.1", "idle: DATA is an error", [data()], Goaway(P)),
    Rule("5.1", "idle: RST_STREAM is an error", [frames.rst_stream(1, CANCEL)], Goaway(P)),
    Rule("5.1", "idle: WINDOW_UPDATE is an error", [frames.window_update(1, 100)], Goaway(P)),
    Rule("5.1", "idle: CONTINUATION is an error", [continuation(4, 1, block())], Goaway(P)),
    Rule("5.1", "idle: PRIORITY is allowed", [priority(1)], IGNORED),
    # Half-closed (remote).
    Rule("5.1", "half-closed (remote): DATA is an error", [HELD, data()], Reset(S)),
    Rule("5.1", "half-closed (remote): HEADERS is an error", [HELD, headers(1, raw_block(("a", "b")), 5)], Reset(S)),
    Rule("5.1", "half-closed (remote): WINDOW_UPDATE and PRIORITY are allowed", [HELD, frames.window_update(1, 9), priority(1)],
         IGNORED),
    Rule("5.1", "half-closed (remote): RST_STREAM ends the call", [RESET_BY_PEER], IGNORED),
    # Closed.
    Rule("5.1", "closed by the peer's RST_STREAM: DATA is an error", [RESET_BY_PEER, data()], Reset(S)),
    Rule("5.1", "closed by the peer's RST_STREAM: HEADERS is an error", [RESET_BY_PEER, headers()], Reset(S)),
    Rule("5.1", "closed by the peer's RST_STREAM: CONTINUATION is an error",
         [RESET_BY_PEER, continuation(4, 1, b"")], Goaway(P, 1)),
    Rule("5.1", "closed by the peer's RST_STREAM: WINDOW_UPDATE may be an error", [RESET_BY_PEER, frames.window_update(1, 9)],
         IGNORED),
    Rule("5.1", "closed by our RST_STREAM: DATA is discarded", [RESET_BY_US, data()], Answered("12")),
    Rule("5.1", "closed by our RST_STREAM: trailers are decoded and discarded",
         [RESET_BY_US, headers(1, raw_block(("a", "b")), 5)], Answered("12")),
    Rule("5.1", "closed by our RST_STREAM: WINDOW_UPDATE and RST_STREAM are discarded",
         [RESET_BY_US, frames.window_update(1, 9), frames.rst_stream(1, CANCEL)], Answered("12")),
    Rule("5.1", "closed by END_STREAM: DATA is an error", [call(), data()], Goaway(S, 1)),
    Rule("5.1", "closed by END_STREAM: HEADERS is an error", [call(), headers()], Goaway(S, 1)),
    Rule("5.1", "closed by END_STREAM: WINDOW_UPDATE, RST_STREAM and PRIORITY are allowed",
         [call(), frames.window_update(1, 9), frames.rst_stream(1, CANCEL), priority(1)], Answered()),
    # 5.1.1 Stream identifiers.
    Rule("5.1.1", "a client's stream ids are odd", [headers(2)], Goaway(P)),
    Rule("5.1.1", "a new stream id is higher than all before", [call(5), headers(3)], Goaway(P, 5)),
    Rule("5.1.1", "stream ids may be skipped", [call(1001)], Answered(stream=1001)),
    Rule("5.1.1", "a skipped stream is closed", [call(5), data(3)], Goaway(S, 5)),
    Rule("5.1.1", "stream 0 is no stream: HEADERS", [headers(0)], Goaway(P)),
    # 5.1.2 Concurrency.
    Rule("5.1.2", "a stream beyond SETTINGS_MAX_CONCURRENT_STREAMS is refused",
         [headers(number, block(path=STREAM)) for number in range(1, 9, 2)], Reset(frames.REFUSED_STREAM, 7)),
    # 5.4 Error handling.
    Rule("5.4.1", "GOAWAY of an error names the last stream processed", [call(1), call(3), data(9)], Goaway(P, 3)),
    Rule("5.4.2", "RST_STREAM is not answered by RST_STREAM", [RESET_BY_PEER, frames.rst_stream(1, CANCEL)], IGNORED),
    # 5.5 Extensions.
    Rule("5.5", "an extension within a header block is an error", [headers(1, block()[:5], 0), frames.frame(UNKNOWN, 0, 1)],
         Goaway(P)),
    # 6.1 DATA.
    Rule("6.1", "DATA belongs to a stream", [data(0)], Goaway(P)),
    Rule("6.1", "DATA may be padded", [headers(), data(1, b"\x05" + framed(b"x") + bytes(5), PADDED | END_STREAM)], Answered()),
    Rule("6.1", "padding is shorter than the payload", [headers(), data(1, b"\x06" + bytes(5), PADDED)], Goaway(P, 1)),
    Rule("6.1", "padding has a length", [headers(), data(1, b"", PADDED)], Goaway(P, 1)),
    Rule("6.1", "DATA may be padding only", [headers(), data(1, b"\x02\x00\x00", PADDED), data()], Answered()),
    # 6.2 HEADERS.
    Rule("6.2", "HEADERS may be padded", [headers(1, b"\x05" + block() + bytes(5), PADDED | END_HEADERS), data()], Answered()),
    Rule("6.2", "padding is not longer than the payload", [headers(1, b"\xff" + block(), PADDED | END_HEADERS)], Goaway(P)),
    Rule("6.2", "padding has a length", [headers(1, b"", PADDED | END_HEADERS)], Goaway(F)),
    Rule("6.2", "HEADERS may carry a priority", [headers(1, bytes(5) + block(), frames.HAS_PRIORITY | END_HEADERS), data()],
         Answered()),
    Rule("6.2", "the priority has five bytes", [headers(1, bytes(4), frames.HAS_PRIORITY | END_HEADERS)], Goaway(F)),
    Rule("6.2", "nothing comes between HEADERS and CONTINUATION: HEADERS", [headers(1, block()[:5], 0), headers(3)], Goaway(P)),
    Rule("6.2", "nothing comes between HEADERS and CONTINUATION: DATA", [OPEN, headers(3, block()[:5], 0), data(1)],
         Goaway(P, 1)),
    Rule("6.2", "nothing comes between HEADERS and CONTINUATION: PING", [headers(1, block()[:5], 0), PING], Goaway(P)),
    # 6.3 PRIORITY.
    Rule("6.3", "PRIORITY belongs to a stream", [priority(0)], Goaway(P)),
    Rule("6.3", "PRIORITY has five bytes", [OPEN, priority(1, 4)], Reset(F)),
    Rule("6.3", "PRIORITY has five bytes: idle stream", [priority(1, 4)], Goaway(F)),
    Rule("6.3", "PRIORITY is allowed in every state, and has no effect",
         [priority(3), headers(), priority(1), data(), priority(1)], Answered()),
    # 6.4 RST_STREAM.
    Rule("6.4", "RST_STREAM belongs to a stream", [frames.rst_stream(0, CANCEL)], Goaway(P)),
    Rule("6.4", "RST_STREAM has four bytes", [OPEN, frames.frame(frames.RST_STREAM, 0, 1, bytes(3))], Goaway(F, 1)),
    # 6.5 SETTINGS.
    Rule("6.5", "SETTINGS belongs to the connection", [frames.frame(frames.SETTINGS, 0, 1)], Goaway(P)),
    Rule("6.5", "an ACK is empty", [frames.frame(frames.SETTINGS, ACK, 0, bytes(6))], Goaway(F)),
    Rule("6.5", "SETTINGS has a multiple of six bytes", [frames.frame(frames.SETTINGS, 0, 0, bytes(5))], Goaway(F)),
    Rule("6.5.2", "ENABLE_PUSH is 0 or 1", [frames.settings({frames.ENABLE_PUSH: 2})], Goaway(P)),
    Rule("6.5.2", "ENABLE_PUSH is 0 or 1: 1", [frames.settings({frames.ENABLE_PUSH: 1})], Replies(ACKNOWLEDGED)),
    Rule("6.5.2", "INITIAL_WINDOW_SIZE is at most 2^31-1", [frames.settings({frames.INITIAL_WINDOW_SIZE: 2**31})], Goaway(C)),
    Rule("6.5.2", "MAX_FRAME_SIZE is at least 2^14", [frames.settings({frames.MAX_FRAME_SIZE: 2**14 - 1})], Goaway(P)),
    Rule("6.5.2", "MAX_FRAME_SIZE is at most 2^24-1", [frames.settings({frames.MAX_FRAME_SIZE: 2**24})], Goaway(P)),
    Rule("6.5.2", "unknown settings are ignored", [frames.settings({0x99: 5, 0xFFFF: 2**32 - 1})], Replies(ACKNOWLEDGED)),
    Rule("6.5.3", "SETTINGS are acknowledged", [frames.settings({frames.MAX_FRAME_SIZE: 2**14})], Replies(ACKNOWLEDGED)),
    Rule("6.5.3", "an ACK is not acknowledged", [ACKNOWLEDGED], IGNORED),
    # 6.6 PUSH_PROMISE.
    Rule("6.6", "a client does not push", [OPEN, frames.frame(frames.PUSH_PROMISE, 4, 1, bytes(4) + block())], Goaway(P, 1)),
    # 6.7 PING.
    Rule("6.7", "PING is answered with its payload", [PING], Replies(PING_ACK)),
    Rule("6.7", "an ACK is not answered", [PING_ACK], IGNORED),
    Rule("6.7", "PING belongs to the connection", [frames.frame(frames.PING, 0, 1, bytes(8))], Goaway(P)),
    Rule("6.7", "PING has eight bytes", [frames.frame(frames.PING, 0, 0, bytes(7))], Goaway(F)),
    # 6.8 GOAWAY.
    Rule("6.8", "GOAWAY belongs to the connection", [frames.frame(frames.GOAWAY, 0, 1, bytes(8))], Goaway(P)),
    Rule("6.8", "GOAWAY has eight bytes or more", [frames.frame(frames.GOAWAY, 0, 0, bytes(7))], Goaway(F)),
    Rule("6.8", "calls in flight are answered after GOAWAY", [headers(), frames.goaway(0, frames.NO_ERROR, "bye"), data()],
         Answered()),
    # 6.9 WINDOW_UPDATE and flow control.
    Rule("6.9", "an increment of 0 on the connection is an error", [frames.window_update(0, 0)], Goaway(P)),
    Rule("6.9", "an increment of 0 on a stream is that stream's error", [HELD, frames.window_update(1, 0)], Reset(P)),
    Rule("6.9", "the reserved bit of an increment is ignored", [frames.window_update(0, RESERVED | 9)], IGNORED),
    Rule("6.9", "the reserved bit of an increment of 0 is ignored", [frames.window_update(0, RESERVED)], Goaway(P)),
    Rule("6.9", "WINDOW_UPDATE has four bytes", [frames.frame(frames.WINDOW_UPDATE, 0, 0, bytes(3))], Goaway(F)),
    Rule("6.9.1", "the connection's window is at most 2^31-1", [frames.window_update(0, 2**31 - 1)], Goaway(C)),
    Rule("6.9.1", "a stream's window is at most 2^31-1", [HELD, frames.window_update(1, 2**31 - 1)], Reset(C)),
    Rule("6.9.1", "a sender keeps to the stream's window",
         [OPEN, *[data(1, framed(bytes(FRAME_SIZE - 5)), 0)] * (STREAM_WINDOW // FRAME_SIZE), data(1, b"x", 0)], Reset(C)),
    Rule("6.9.2", "INITIAL_WINDOW_SIZE changes the windows of open streams, which must not overflow",
         [HELD, frames.window_update(1, 2**31 - 1 - 65_535), frames.settings({frames.INITIAL_WINDOW_SIZE: 65_536})],
         Goaway(C, 1)),
    # 6.10 CONTINUATION.
    Rule("6.10", "CONTINUATION follows HEADERS", [OPEN, continuation(4, 1, block())], Goaway(P, 1)),
    Rule("6.10", "CONTINUATION is of the same stream", [headers(1, block()[:5], 0), continuation(4, 3, block()[5:])],
         Goaway(P)),
    Rule("6.10", "CONTINUATION does not follow END_HEADERS", [headers(), continuation(4, 1, b"")],
         Goaway(P, 1)),
    # 7 Error codes.
    Rule("7", "unknown error codes have no special meaning", [OPEN, frames.rst_stream(1, 0xFFFF), frames.goaway(0, 0xFFFF)],
         Replies(frames.goaway(frames.MAX_STREAM_ID, 0))),
    # 8.1 Message framing.
    Rule("8.1", "trailers end the stream", [OPEN, headers(1, raw_block(("a", "b")), END_HEADERS)], Reset(P)),
    Rule("8.1", "a request may have trailers", [headers(), data(1, None, 0), headers(1, raw_block(("a", "b")), 5)], Answered()),
    Rule("8.1", "trailers have no pseudo-headers", [OPEN, headers(1, raw_block((":path", "/")), 5)], Reset(P)),
    Rule("8.1", "a request may be answered before its end", [RESET_BY_US], Answered("12")),
    Rule("8.1.1", "DATA is not more than content-length", [headers(1, block(("content-length", "5"))), data()], Reset(P)),
    Rule("8.1.1", "DATA is not less than content-length", [headers(1, block(("content-length", "7"))), data()], Reset(P)),
    Rule("8.1.1", "DATA matches content-length, over several frames",
         [headers(1, block(("content-length", "6"))), data(1, framed(b"x")[:2], 0), data(1, framed(b"x")[2:])], Answered()),
    Rule("8.1.1", "an empty body matches content-length", [headers(1, block(("content-length", "6")), 5)], Reset(P)),
    Rule("8.1.1", "a body that ends in trailers matches content-length",
         [headers(1, block(("content-length", "7"))), data(1, None, 0), headers(1, raw_block(("a", "b")), 5)], Reset(P)),
    Rule("8.1.1", "content-length is a number", [headers(1, block(("content-length", "six"))), data()], Reset(P)),
    Rule("8.1.1", "content-length is one number", [headers(1, block(("content-length", "6"), ("content-length", "7"))), data()],
         Reset(P)),
    # 8.2 Fields.
    Rule("8.2.1", "names are in lower case", [call(1, ("Name", "x"))], Reset(P)),
    Rule("8.2.1", "names have no spaces", [call(1, ("na me", "x"))], Reset(P)),
    Rule("8.2.1", "names have no control characters", [call(1, ("na\x7fme", "x"))], Reset(P)),
    Rule("8.2.1", "names have no colon behind the first character", [call(1, ("na:me", "x"))], Reset(P)),
    Rule("8.2.1", "names are not empty", [call(1, ("", "x"))], Reset(P)),
    Rule("8.2.1", "values have no NUL", [call(1, ("name", "x\0y"))], Reset(P)),
    Rule("8.2.1", "values have no line feed", [call(1, ("name", "x\ny"))], Reset(P)),
    Rule("8.2.1", "values have no carriage return", [call(1, ("name", "x\ry"))], Reset(P)),
    Rule("8.2.1", "values have no space around them", [call(1, ("name", " x "))], Answered(),
         "gRPC allows it and has it stripped (PROTOCOL-HTTP2, ASCII-Value)"),
    *[Rule("8.2.2", f"connection-specific fields are not sent: {name}", [call(1, (name, "x"))], Reset(P))
      for name in ("connection", "proxy-connection", "keep-alive", "transfer-encoding", "upgrade")],
    Rule("8.2.2", "te is nothing but trailers", [headers(1, raw_block((":method", "POST"), (":scheme", "http"), (":path", ECHO),
         ("te", "gzip"), ("content-type", "application/grpc"))), data()], Reset(P)),
    # 8.3 Pseudo-header fields.
    Rule("8.3", "pseudo-headers come first", [call(1, (":authority", "x"))], Reset(P)),
    Rule("8.3", "unknown pseudo-headers are an error", [headers(1, raw_block((":nothing", "x")) + block()), data()], Reset(P)),
    Rule("8.3", "pseudo-headers of responses are an error", [headers(1, raw_block((":status", "200")) + block()), data()],
         Reset(P)),
    Rule("8.3", "pseudo-headers come once", [headers(1, raw_block((":path", ECHO)) + block()), data()], Reset(P)),
    *[Rule("8.3.1", f"a request has {name}", [headers(1, missing(name)), data()], Reset(P))
      for name in (":method", ":scheme", ":path")],
    Rule("8.3.1", ":path is not empty", [headers(1, raw_block((":method", "POST"), (":scheme", "http"), (":path", ""))), data()],
         Reset(P)),
    Rule("8.3.1", "a request of another method than POST has a status",
         [headers(1, raw_block((":method", "GET"), (":scheme", "http"), (":path", "/")), 5)], Answered("12", http_status="405")),
    Rule("8.3.1", "a request with another content type has a status",
         [headers(1, raw_block((":method", "POST"), (":scheme", "http"), (":path", "/")), 5)], Answered("3", http_status="415")),
    Rule("8.5", "CONNECT has no :scheme and no :path",
         [headers(1, raw_block((":method", "CONNECT"), (":authority", "x:1"), (":path", "/"), (":scheme", "http")), 5)],
         Reset(P)),
    Rule("8.5", "CONNECT is not supported", [headers(1, raw_block((":method", "CONNECT"), (":authority", "x:1")), 5)],
         Answered("12", http_status="405")),
    # 10.5 Denial of service.
    Rule("10.5.1", "a header list over the limit is refused, and the connection lives",
         [call(1, ("x", "x" * 70_000))], Answered("8")),
    Rule("10.5.1", "a header list over the limit, in CONTINUATION frames",
         [headers(1, BIG[:16_000], 0), *[continuation(0, 1, piece) for piece in chunks(BIG[16_000:], 16_000)], continuation(4, 1),
          data()], Answered("8")),
    Rule("10.5.1", "header blocks have a hard limit",
         [headers(1, b"", 0), *[continuation(0, 1, bytes(2**14))] * (MAX_HEADER_BLOCK_BYTES // 2**14 + 1)],
         Goaway(CALM)),
    Rule("10.5.1", "header blocks have a hard limit, in one frame",
         [frames.frame_header(MAX_HEADER_BLOCK_BYTES + 1, frames.HEADERS, 4, 1)], Goaway(CALM)),
    Rule("10.5", "floods of PING end the connection", [PING * 5_000], Goaway(CALM)),
    Rule("10.5", "floods of SETTINGS end the connection", [frames.settings({}) * 5_000], Goaway(CALM)),
    Rule("10.5", "floods of settings in one frame end the connection", [frames.frame(frames.SETTINGS, 0, 0, bytes(6) * 43_000)],
         Goaway(CALM)),
    Rule("10.5", "floods of PRIORITY end the connection", [priority(1) * 5_000], Goaway(CALM)),
    Rule("10.5", "floods of empty DATA end the connection", [OPEN, data(1, b"", 0) * 5_000], Goaway(CALM, 1)),
    Rule("10.5", "floods of empty CONTINUATION end the connection",
         [headers(1, block(), 0), continuation(0, 1) * 100], Goaway(CALM)),
    Rule("10.5", "floods of WINDOW_UPDATE that nothing justifies end the connection", [frames.window_update(0, 1) * 5_000],
         Goaway(CALM)),
    Rule("10.5", "floods of extensions end the connection", [frames.frame(UNKNOWN, 0, 0) * 5_000],
         Goaway(CALM)),
]  # fmt: skip

LIVES = 2001
"""A stream on which a call shows that the connection lives."""


@pytest.mark.parametrize("rule", RULES, ids=[rule.name for rule in RULES])
async def test_a_rule_of_http_2(rule: Rule) -> None:
    """The reaction is that of the rule, and there is no other effect."""
    client = RawClient(FakeServer(ServerLimits(max_streams=3)))
    received: list[Frame] = []
    if not rule.is_raw:
        await client.send(START, ACKNOWLEDGED)
    for each in rule.sends:
        if not client.transport.is_closed:
            received += await client.send(each)

    if isinstance(rule.outcome, Goaway):
        assert goaways(received) == [(rule.outcome.last_stream, rule.outcome.code)]
        assert client.transport.is_closed
        return
    if isinstance(rule.outcome, Reset):
        resets = [(number, payload) for kind, _, number, payload in received if kind == frames.RST_STREAM]
        assert resets == [(rule.outcome.stream, frames.UINT32.pack(rule.outcome.code))]
    elif isinstance(rule.outcome, Answered):
        found = trailers_of(received, rule.outcome.stream)
        assert (found[b"grpc-status"].decode(), found[b":status"].decode()) == (rule.outcome.status, rule.outcome.http_status)
        assert {code for _, code in goaways(received)} <= {frames.NO_ERROR}
    else:
        kept = [
            each for each in received if each[0] != frames.WINDOW_UPDATE and not (each[0] == frames.HEADERS and not each[1] & 1)
        ]
        assert kept[: len(raw_frames(rule.outcome.data))] == raw_frames(rule.outcome.data)
        assert rule.outcome.data or kept == []
    if not goaways(received):
        await assert_that_it_lives(client)


async def assert_that_it_lives(client: RawClient) -> None:
    """Another call is answered; its stream may have to wait for others to end."""
    for number in range(1, 10, 2):
        if number in client.connection._streams:
            await client.send(frames.rst_stream(number, CANCEL))
    found = trailers_of(await client.send(call(LIVES)), LIVES)

    assert found.get(b"grpc-status") == b"0"


async def test_settings_are_the_first_frame_that_we_send() -> None:
    """3.4: at once, with no PING or GOAWAY before it, independent of the peer."""
    client = RawClient(FakeServer(ServerLimits(keepalive_time_s=1)))
    client.connection.tick(client.connection.now() + 5)
    await asyncio.sleep(0)
    sent = raw_frames(client.transport.take())

    assert sent[0][0] == frames.SETTINGS
    assert [kind for kind, *_ in sent[1:]] == [frames.WINDOW_UPDATE, frames.PING]


async def test_the_connection_window_bounds_all_streams() -> None:
    """6.9.1: it is returned as bytes arrive, so only a frame that is larger than all of it could exceed it."""
    assert FRAME_SIZE <= CONNECTION_WINDOW // 2


async def test_windows_that_became_negative_are_waited_for() -> None:
    """6.9.2: after INITIAL_WINDOW_SIZE shrinks, nothing is sent until the window is positive again."""
    client = RawClient(FakeServer())
    await client.send(START, ACKNOWLEDGED, headers(1) + data(1, framed(bytes(70_000))))
    assert await client.send(frames.settings({frames.INITIAL_WINDOW_SIZE: 0}), frames.window_update(0, 100_000)) == raw_frames(
        ACKNOWLEDGED
    )

    assert await client.send(frames.window_update(1, 65_535)) == []
    more = await client.send(frames.window_update(1, 10))

    assert [(kind, len(payload)) for kind, _, _, payload in more] == [(frames.DATA, 10)]


async def test_frames_are_no_larger_than_the_peer_takes() -> None:
    """4.2, 6.5.2: 2^14 bytes until it says otherwise."""
    client = RawClient(FakeServer())
    large = headers(1) + data(1, framed(bytes(40_000)))
    sent = await client.send(START, ACKNOWLEDGED, large)
    assert max(len(payload) for kind, _, _, payload in sent if kind == frames.DATA) == 2**14

    sent = await client.send(frames.settings({frames.MAX_FRAME_SIZE: 20_000}), frames.window_update(0, 100_000), large.replace(
        b"\0\0\0\1", b"\0\0\0\3"
    ))  # fmt: skip

    assert max(len(payload) for kind, _, _, payload in sent if kind == frames.DATA) == 20_000


async def test_blocks_on_closed_streams_keep_the_table_in_step() -> None:
    """5.1, closed: a field that came with discarded headers is known to those that refer to it."""
    client = RawClient(FakeServer())
    await client.send(START)  # our SETTINGS are not acknowledged yet: there is a table
    await client.send(RESET_BY_US, headers(1, b"\x40\x01a\x01b", 5))
    await client.send(headers(3, block() + b"\xbe"), data(3))

    assert dict(client.server.calls[0].metadata)["a"] == "b"


async def test_a_peer_that_inserts_fields_and_never_updates_the_table_size_is_served() -> None:
    """4.3.1: as nginx does with upstream keepalive; a field that it would refer to is still an error."""
    client = RawClient(FakeServer())
    inserted = block() + b"\x40\x01a\x01b"
    await client.send(START, headers(1, inserted), data(1))

    received = await client.send(ACKNOWLEDGED, *[headers(number, inserted) + data(number) for number in range(3, 13, 2)])

    assert [trailers_of(received, number)[b"grpc-status"] for number in range(3, 13, 2)] == [b"0"] * 5
    assert goaways(await client.send(headers(13, block() + b"\xbe"))) == [(11, frames.COMPRESSION_ERROR)]


async def test_cookies_are_joined_as_one_header() -> None:
    """8.2.3: crumbs of a cookie, by a semicolon."""
    client = RawClient(FakeServer())
    await client.send(START, call(1, ("cookie", "a=1"), ("cookie", "b=2")))

    assert dict(client.server.calls[0].metadata)["cookie"] == "a=1; b=2"


async def test_streams_after_the_final_goaway_are_ignored() -> None:
    """6.8: their frames too; the connection is not in error."""
    client = RawClient(FakeServer())
    await client.send(START, ACKNOWLEDGED, HELD)
    client.connection.drain()
    assert goaways(await client.send()) == [(frames.MAX_STREAM_ID, 0), (1, 0)]

    assert await client.send(call(3), data(3), frames.rst_stream(3, CANCEL)) == []
    client.server.gate.set()
    ended = await client.send()

    assert trailers_of(ended, 1)[b"grpc-status"] == b"0"
    assert client.transport.is_closed


@pytest.mark.heavy
async def test_window_updates_that_answer_what_we_sent_are_no_flood() -> None:
    """10.5: a peer that acknowledges each DATA frame of 16 KiB on the stream and on the connection, at any speed."""
    client = RawClient(FakeServer())
    await client.send(START, ACKNOWLEDGED, frames.window_update(0, 2**30), frames.settings({frames.INITIAL_WINDOW_SIZE: 2**30}))
    opened = headers(1) + b"".join(data(1, piece, 0) for piece in chunks(framed(bytes(40_000_000)), 2**14))
    sent = await client.send(opened, data(1, b""))
    n_frames = len([kind for kind, *_ in sent if kind == frames.DATA])
    assert n_frames > 2_400

    for _ in range(2 * n_frames):
        await asyncio.sleep(0)
        client.connection.data_received(frames.window_update(0, 8_000) + frames.window_update(1, 8_000))

    assert not client.transport.is_closed


MADE_YOU_RESET = {
    "WINDOW_UPDATE of 0": lambda n: frames.window_update(n, 0),
    "WINDOW_UPDATE that overflows": lambda n: frames.window_update(n, 2**31 - 1),
    "DATA after END_STREAM": data,
    "HEADERS after END_STREAM": headers,
    "PRIORITY of another size": lambda n: priority(n, 4),
    "RST_STREAM": lambda n: frames.rst_stream(n, CANCEL),
}


@pytest.mark.parametrize("way", MADE_YOU_RESET)
async def test_streams_that_clients_make_us_reset_are_bounded(way: str) -> None:
    """10.5, CVE-2023-44487, CVE-2025-8671: however a stream is ended without an answer."""
    client = RawClient(FakeServer())
    await client.send(START, ACKNOWLEDGED)
    n_sent = 0
    while not client.transport.is_closed:
        number = 2 * n_sent + 1
        client.connection.data_received(headers(number, block(path=HOLD)) + data(number) + MADE_YOU_RESET[way](number))
        n_sent += 1
        assert n_sent <= 2_001

    assert goaways(raw_frames(client.transport.take()))[-1][1] == CALM
