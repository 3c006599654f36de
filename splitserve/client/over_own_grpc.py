"""The client's transport over gRPC without grpcio, for forked children: grpcio's threads stay in the parent.

One connection has one call at a time, on the thread that makes it; its frames are read while a call waits, so nothing runs in the
background. Source: RFC 9113; gRPC, doc/PROTOCOL-HTTP2.md.
"""

from __future__ import annotations

import asyncio
import math
import ssl
import time
from typing import Any

import grpc

from splitserve.client.connection import AsyncToken, ConnectionOptions, Token, request_headers, request_headers_async
from splitserve.client.over_grpc import METHODS, as_failed, decode, encode
from splitserve.client.retries import Failed
from splitserve.client.sockets import (
    MAX_IDLE_S,
    BlockingSocket,
    Endpoint,
    Pool,
    is_certificate_error,
    timed_out,
    tls_context,
    unreachable,
)
from splitserve.client.steps import Send
from splitserve.client.stop import Stop
from splitserve.errors import TooLarge, Unavailable
from splitserve.remote.inference import translate
from splitserve.wire.grpc.messages import (
    ACCEPT_ENCODING,
    CONTENT_TYPE,
    CallError,
    MessageReader,
    encode_metadata,
    message_prefix,
    percent_decode,
    status_name,
)
from splitserve.wire.grpc.response import ResponseHeaders, parse_response_headers
from splitserve.wire.http2 import frames
from splitserve.wire.http2.errors import Http2ConnectionError
from splitserve.wire.http2.headers import TABLE_SIZE_ZERO, HeaderDecoder, HeaderListTooLarge
from splitserve.wire.http2.headers import encode as encode_headers

_STAGE = "server"
_WINDOW = 16 * 1024 * 1024
_MAX_METADATA_BYTES = 64 * 1024
_MAX_IDLE = 16
_MAX_TIMEOUT_S = 99_999_999 / 1000


class _Broken(Exception):
    """The connection cannot be used any more. ``is_begun``: a response had begun."""

    def __init__(self, message: str, *, is_begun: bool) -> None:
        super().__init__(message)
        self.is_begun = is_begun


class _Status(grpc.RpcError):
    """A status, in the form that grpcio raises."""

    def __init__(self, code: str, details: str, trailing: tuple[tuple[str, str | bytes], ...]) -> None:
        super().__init__(details)
        self._code, self._details, self._trailing = code, details, trailing

    def code(self) -> grpc.StatusCode:
        return grpc.StatusCode[self._code]

    def details(self) -> str:
        return self._details

    def trailing_metadata(self) -> Any:
        return self._trailing


class _Connection:
    """An HTTP/2 connection for one call after another."""

    def __init__(self, endpoint: Endpoint, end: float, max_message_bytes: int) -> None:
        self._socket = BlockingSocket(endpoint, end)
        self._max_message_bytes = max_message_bytes
        self._headers: HeaderDecoder[ResponseHeaders] = HeaderDecoder(parse_response_headers, _MAX_METADATA_BYTES)
        self._buffer = bytearray()
        self._next_stream = 1
        self._window = self._initial_window = frames.DEFAULT_WINDOW
        self._stream_window = 0
        self._frame_size = frames.DEFAULT_FRAME_SIZE
        self._is_going_away = False
        self._end = end
        settings = frames.settings({frames.HEADER_TABLE_SIZE: 0, frames.ENABLE_PUSH: 0, frames.INITIAL_WINDOW_SIZE: _WINDOW})
        self._write(frames.PREFACE, settings, frames.window_update(0, _WINDOW))

    @property
    def is_usable(self) -> bool:
        """Whether another call can be made. Control frames that came while it was idle are read first."""
        if self._is_going_away or self._next_stream > frames.MAX_STREAM_ID - 2:
            return False
        if self._socket.is_usable:
            return True
        if time.monotonic() - self._socket.idle_since > MAX_IDLE_S:
            return False
        try:
            self._end = time.monotonic() + 0.1
            self._read_some()
            while self._take_frame() is not None:
                pass
        except (OSError, _Broken, Http2ConnectionError):
            return False
        return not self._is_going_away

    def call(self, path: str, host: str, scheme: str, metadata: dict[str, str], message: bytes, end: float) -> tuple[bytes, Any]:
        """Make a call: the response's message.

        Raises:
            _Status: the call failed.
            _Broken: the connection did.
            OSError: as `BlockingSocket`.
        """
        self._end = end
        stream, self._next_stream = self._next_stream, self._next_stream + 2
        prefix = message_prefix(message, self._max_message_bytes)
        fields = [
            (b":method", b"POST"),
            (b":scheme", scheme.encode()),
            (b":path", path.encode()),
            (b":authority", host.encode()),
            (b"te", b"trailers"),
            (b"content-type", CONTENT_TYPE),
            (b"grpc-accept-encoding", ACCEPT_ENCODING),
        ]
        if end < math.inf:
            left_ms = max(1, int(min(end - time.monotonic(), _MAX_TIMEOUT_S) * 1000))
            fields.append((b"grpc-timeout", f"{left_ms}m".encode()))
        block = encode_headers([*fields, *encode_metadata(metadata.items())])
        if stream == 1:
            block = TABLE_SIZE_ZERO + block
        answer = _Answer(self._max_message_bytes)
        self._stream_window = self._initial_window
        body = memoryview(prefix + message)
        parts = [frames.frame(frames.HEADERS, frames.END_HEADERS, stream, block)]
        while body and not answer.is_complete:
            size = min(len(body), self._frame_size, self._window, self._stream_window)
            if size <= 0:
                self._write(*parts)
                parts = []
                self._handle(stream, answer)
                continue
            flags = frames.END_STREAM if size == len(body) else 0
            parts.append(frames.frame(frames.DATA, flags, stream, bytes(body[:size])))
            body = body[size:]
            self._window -= size
            self._stream_window -= size
        if parts:
            self._write(*parts)
        while not answer.is_complete:
            self._handle(stream, answer)
        if body:
            self._write(frames.rst_stream(stream, frames.CANCEL))
        return answer.result()

    def close(self) -> None:
        """Close the socket."""
        self._socket.close()

    def released(self) -> None:
        """It is idle from now on."""
        self._socket.released()

    def _write(self, *parts: bytes) -> None:
        self._socket.send([b"".join(parts)], self._end)

    def _read_some(self) -> None:
        data = self._socket.receive(self._end)
        if not data:
            raise _Broken("it closed the connection", is_begun=False)
        self._buffer += data

    def _take_frame(self) -> tuple[int, int, int, bytes] | None:
        """The next frame if it is complete: type, flags, stream, payload. Frames of the connection are handled here."""
        if len(self._buffer) < frames.FRAME_HEADER_SIZE:
            return None
        high, low, kind, flags, stream = frames.FRAME_HEADER.unpack_from(self._buffer)
        size = (high << 8) | low
        end = frames.FRAME_HEADER_SIZE + size
        if self._next_stream <= 3 and self._buffer[:5] == b"HTTP/":
            raise _Broken("http1: it answers in HTTP/1.1", is_begun=False)
        if len(self._buffer) < end:
            return None
        payload = bytes(self._buffer[frames.FRAME_HEADER_SIZE : end])
        del self._buffer[:end]
        stream &= frames.MAX_STREAM_ID
        if kind == frames.SETTINGS:
            self._settings(flags, payload)
        elif kind == frames.PING and not flags & frames.ACK:
            self._write(frames.frame(frames.PING, frames.ACK, 0, payload))
        elif kind == frames.GOAWAY:
            self._is_going_away = True
        elif kind == frames.WINDOW_UPDATE:
            (increment,) = frames.UINT32.unpack(payload)
            if stream:
                self._stream_window += increment & frames.MAX_WINDOW
            else:
                self._window += increment & frames.MAX_WINDOW
        return kind, flags, stream, payload

    def _settings(self, flags: int, payload: bytes) -> None:
        if flags & frames.ACK:
            self._headers.disable_dynamic_table()
            return
        for name, value in frames.SETTING.iter_unpack(payload):
            if name == frames.INITIAL_WINDOW_SIZE:
                self._stream_window += value - self._initial_window
                self._initial_window = value
            elif name == frames.MAX_FRAME_SIZE:
                self._frame_size = value
        self._write(frames.frame(frames.SETTINGS, frames.ACK, 0))

    def _handle(self, stream: int, answer: _Answer) -> None:
        """Wait for a frame and handle it."""
        while (frame := self._take_frame()) is None:
            try:
                self._read_some()
            except _Broken as error:
                raise _Broken(str(error), is_begun=answer.is_begun) from None
        kind, flags, of, payload = frame
        if kind == frames.GOAWAY:
            last, _ = frames.GOAWAY_FIELDS.unpack_from(payload)
            if last & frames.MAX_STREAM_ID < stream:
                raise _Broken("it accepts no more calls", is_begun=False)
        if kind == frames.HEADERS:
            payload = _unpadded(flags, payload, frames.HAS_PRIORITY)
            while not flags & frames.END_HEADERS:
                following = self._take_frame()
                if following is None:
                    self._read_some()
                    continue
                payload += following[3]
                flags |= following[1] & frames.END_HEADERS
            headers = self._headers.decode(payload)
            if of == stream:
                answer.take_headers(headers, is_end=bool(flags & frames.END_STREAM))
        elif kind == frames.DATA:
            if payload:
                updates = [frames.window_update(0, len(payload))]
                if not flags & frames.END_STREAM and of == stream:
                    updates.append(frames.window_update(stream, len(payload)))
                self._write(*updates)
            if of == stream:
                answer.take_data(_unpadded(flags, payload, 0), is_end=bool(flags & frames.END_STREAM))
        elif kind == frames.RST_STREAM and of == stream:
            (code,) = frames.UINT32.unpack(payload)
            answer.take_reset(code)


def _unpadded(flags: int, payload: bytes, priority: int) -> bytes:
    if flags & frames.PADDED:
        payload = payload[1 : len(payload) - payload[0]]
    return payload[5:] if flags & priority else payload


class _Answer:
    """The response of one call."""

    def __init__(self, max_message_bytes: int) -> None:
        self.is_complete = self.is_begun = False
        self._max_message_bytes = max_message_bytes
        self._messages: MessageReader | None = None
        self._message: bytes | None = None
        self._status: _Status | None = None

    def take_headers(self, headers: ResponseHeaders, *, is_end: bool) -> None:
        if headers.is_informational:
            return
        self.is_begun = True
        if not is_end and headers.http_status == b"200":
            self._messages = MessageReader(
                self._max_message_bytes, headers.fields.get(b"grpc-encoding", b"").replace(b"identity", b"")
            )
            return
        self.is_complete = True
        if b"grpc-status" not in headers.fields:
            text = f"HTTP status {headers.http_status.decode(errors='replace')}"
            self._status = _Status("UNAVAILABLE", text, ())
            return
        code = status_name(headers.fields[b"grpc-status"])
        if code != "OK":
            details = percent_decode(headers.fields.get(b"grpc-message", b""))
            self._status = _Status(code, details, tuple(map(_decoded, headers.fields.items())))

    def take_data(self, data: bytes, *, is_end: bool) -> None:
        if self._messages is not None and self._message is None:
            self._messages.feed(data)
            self._message = self._messages.take()
        if is_end:
            self.is_complete = True

    def take_reset(self, code: int) -> None:
        self.is_complete = True
        name = "UNAVAILABLE" if code == frames.REFUSED_STREAM else "CANCELLED" if code == frames.CANCEL else "INTERNAL"
        self._status = self._status or _Status(name, f"the stream was reset with code {code}", ())

    def result(self) -> tuple[bytes, Any]:
        if self._status is not None:
            raise self._status
        if self._message is None:
            raise _Status("INTERNAL", "the response has no message", ())
        return self._message, None


def _decoded(field: tuple[bytes, bytes]) -> tuple[str, str | bytes]:
    from base64 import b64decode

    name, value = field[0].decode(), field[1]
    return (name, b64decode(value + b"==")) if name.endswith("-bin") else (name, value.decode(errors="replace"))


class OwnGrpcTransport:
    """Sends on connections of its own. Thread-safe: each call has one to itself."""

    def __init__(self, connection: ConnectionOptions, token: Token) -> None:
        if connection.channel is not None:
            raise ValueError("a channel cannot be used in a forked child; make another client there")
        self._connection = connection
        self._token = token
        self._endpoint = _endpoint(connection)
        self._pool: Pool[_Connection] = Pool(_MAX_IDLE)

    def send(self, step: Send, stop: Stop | None) -> Any:
        """Make one attempt.

        Raises:
            Failed: the error, and whether it can be retried.
        """
        return self.send_with(step, request_headers(self._connection.headers, self._token, step.ask.headers))

    def send_with(self, step: Send, headers: dict[str, str]) -> Any:
        """As `send`, with these headers."""
        end = time.monotonic() + step.timeout_s
        method = METHODS[step.ask.verb]
        headers = {"user-agent": self._connection.user_agent, **headers}
        message = encode(step.ask).SerializeToString()
        try:
            used = self._pool.take() or self._pool.add(_Connection(self._endpoint, end, self._connection.max_message_bytes))
        except TimeoutError as error:
            raise Failed(timed_out(self._endpoint, "the server did not accept a connection in time")) from error
        except OSError as error:
            raise Failed(unreachable(self._endpoint, error), can_retry=not is_certificate_error(error)) from error
        host = self._endpoint.host or "localhost"
        host = f"[{host}]:{self._endpoint.port}" if ":" in host else f"{host}:{self._endpoint.port}"
        try:
            data, _ = used.call(
                f"/{method.service}/{method.name}", host, "https" if self._endpoint.context else "http", headers, message, end
            )
        except _Status as error:
            self._pool.release(used)
            if step.ask.verb == "model_ready" and error.code() is grpc.StatusCode.NOT_FOUND:
                return False
            raise as_failed(
                step.ask, translate(error, _STAGE), error.details(), error.trailing_metadata(), self._connection
            ) from error
        except BaseException as error:
            self._pool.drop(used)
            if isinstance(error, TimeoutError):
                raise Failed(timed_out(self._endpoint)) from error
            if isinstance(error, OSError):
                raise Failed(unreachable(self._endpoint, error)) from error
            if isinstance(error, _Broken | Http2ConnectionError | HeaderListTooLarge):
                is_begun = not isinstance(error, _Broken) or error.is_begun
                status = _Status("UNAVAILABLE", str(error), ())
                failed = as_failed(step.ask, translate(status, _STAGE), str(error), (), self._connection)
                failed.can_retry = failed.can_retry and not is_begun
                raise failed from error
            if isinstance(error, CallError):
                raise Failed(TooLarge(error.message, stage=_STAGE)) from error
            raise
        self._pool.release(used)
        return decode(step.ask, method.response.FromString(data))

    def close(self) -> None:
        """Close idle connections now, those in use after their call."""
        self._pool.close()

    def abandon(self) -> None:
        """In a forked child: close its copies of the parent's connections."""
        self._pool.abandon()


class AsyncOwnGrpcTransport:
    """`OwnGrpcTransport`, its calls in threads."""

    def __init__(self, connection: ConnectionOptions, token: AsyncToken) -> None:
        self._connection = connection
        self._token = token
        self._blocking = OwnGrpcTransport(connection, None)

    async def send(self, step: Send) -> Any:
        """Make one attempt.

        Raises:
            Failed: the error, and whether it can be retried.
        """
        headers = await request_headers_async(self._connection.headers, self._token, step.ask.headers)
        return await asyncio.to_thread(self._blocking.send_with, step, headers)

    async def close(self) -> None:
        """Close idle connections."""
        self._blocking.close()

    def abandon(self) -> None:
        """Close all connections."""
        self._blocking.abandon()


def _endpoint(connection: ConnectionOptions) -> Endpoint:
    """The address in a gRPC target.

    Raises:
        Unavailable: a forked child cannot use it.
    """
    scheme, separator, rest = connection.target.partition(":")
    context: ssl.SSLContext | None = tls_context(connection.tls, "h2") if connection.tls else None
    if scheme in ("unix", "unix-abstract"):
        path = "/" + rest.lstrip("/") if rest.startswith("/") else rest
        return Endpoint(connection.url, path=path, context=context)
    target = rest.rpartition("/")[2] if separator and scheme in ("dns", "ipv4", "ipv6", "passthrough") else connection.target
    host, _, port = target.rpartition(":")
    if not port.isdecimal() or not host:
        raise Unavailable(f"{connection.target}: expected host:port: other gRPC names cannot be used in a forked child")
    return Endpoint(connection.url, host.strip("[]"), int(port), context=context)
