"""A client of ModelStreamInfer that costs little: one stream, a number of messages under way, each answer matched by its id.

    python -m benchmarks.stream_client 127.0.0.1:8001 64 5 < pickled-workload

grpcio's own client takes as long for a message as the server does, and it would be the client that is measured. So this
speaks the little of HTTP/2 that one stream needs (RFC 9113), and is no example for clients.
"""

from __future__ import annotations

import asyncio
import pickle
import struct
import sys
import time
from typing import Any

import msgspec
import uvloop

from benchmarks.latencies import Load, of_latencies
from benchmarks.loads import STREAM_PATH
from benchmarks.workloads import Workload, grpc_frame
from splitserve.api.inference import inference_pb2 as pb

TIMEOUT_S = 15.0

_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_DATA, _HEADERS, _RST_STREAM, _SETTINGS, _PING, _GOAWAY, _WINDOW_UPDATE = 0, 1, 3, 4, 6, 7, 8
_END_STREAM, _END_HEADERS, _ACK = 1, 4, 1
_INITIAL_WINDOW_SIZE, _MAX_FRAME_SIZE = 4, 5
_WINDOW = 2**30
_STREAM = 1


class StreamError(Exception):
    """The stream has ended or carries an error."""


def frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    """Source: RFC 9113, 4.1."""
    return struct.pack(">I", len(payload))[1:] + struct.pack(">BBI", kind, flags, stream) + payload


def header_block(headers: list[tuple[str, str]]) -> bytes:
    """Literals without indexing, no Huffman code; each shorter than 127 bytes. Source: RFC 7541, 6.2.2."""
    return b"".join(b"\0" + bytes([len(name)]) + name.encode() + bytes([len(value)]) + value.encode() for name, value in headers)


class StreamClient(asyncio.Protocol):
    """Keeps a message for each slot under way until `stop`.

    Args:
        authority: the server's address.
        workload: what is asked; each slot has a row, and checks that its answers are that row's.
        n_slots: messages under way.
    """

    def __init__(self, authority: str, workload: Workload, n_slots: int) -> None:
        self.latencies_ms: list[float] = []
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.until = 0.0
        self._authority = authority
        self._workload = workload
        self._messages = [grpc_frame(workload.grpc(slot, request_id=str(slot))) for slot in range(n_slots)]
        self._sent = [0.0] * n_slots
        self._n_under_way = 0
        self._right: dict[int, list[bytes]] = {}
        self._input = bytearray()
        self._stream_input = bytearray()
        self._outgoing: list[bytes] = []
        self._waiting = b""
        self._frame_size = 16384
        self._initial_window = self._stream_window = self._connection_window = 65535
        self._unacknowledged = 0

    def connection_made(self, transport: Any) -> None:  # uvloop's are no asyncio.Transport
        self._transport = transport
        block = header_block(
            [
                (":method", "POST"), (":scheme", "http"), (":path", STREAM_PATH), (":authority", self._authority),
                ("content-type", "application/grpc"), ("te", "trailers"),
            ]
        )  # fmt: skip
        settings = struct.pack(">HIHI", _INITIAL_WINDOW_SIZE, _WINDOW, 1, 0)  # and no header table: blocks need no state
        transport.write(
            _PREFACE
            + frame(_SETTINGS, 0, 0, settings)
            + frame(_WINDOW_UPDATE, 0, 0, struct.pack(">I", _WINDOW))
            + frame(_HEADERS, _END_HEADERS, _STREAM, block)
        )

    def connection_lost(self, error: Exception | None) -> None:
        self._fail(f"the connection was lost: {error}")

    def start(self, seconds: float) -> None:
        """Send the first message of each slot."""
        self.until = time.perf_counter() + seconds
        for slot in range(len(self._messages)):
            self._send(slot)
        self._flush()

    def _send(self, slot: int) -> None:
        self._sent[slot] = time.perf_counter()
        self._n_under_way += 1
        self._outgoing.append(self._messages[slot])

    def _flush(self) -> None:
        """Write what the windows and the frame size allow."""
        self._waiting += b"".join(self._outgoing)
        self._outgoing.clear()
        frames = []
        while size := min(len(self._waiting), self._frame_size, self._stream_window, self._connection_window):
            frames.append(frame(_DATA, 0, _STREAM, self._waiting[:size]))
            self._waiting = self._waiting[size:]
            self._stream_window -= size
            self._connection_window -= size
        if frames:
            self._transport.write(b"".join(frames))

    def data_received(self, data: bytes) -> None:
        self._input += data
        at = 0
        try:
            while len(self._input) - at >= 9:
                length = int.from_bytes(self._input[at : at + 3], "big")
                if len(self._input) - at < 9 + length:
                    break
                kind, flags = self._input[at + 3], self._input[at + 4]
                stream = int.from_bytes(self._input[at + 5 : at + 9], "big")
                self._on_frame(kind, flags, stream, bytes(self._input[at + 9 : at + 9 + length]))
                at += 9 + length
            del self._input[:at]
            self._flush()
        except StreamError as error:
            self._fail(str(error))

    def _on_frame(self, kind: int, flags: int, stream: int, payload: bytes) -> None:
        if kind == _DATA:
            self._on_data(payload)
        elif kind == _SETTINGS and not flags & _ACK:
            self._on_settings(payload)
        elif kind == _WINDOW_UPDATE:
            increment = int.from_bytes(payload, "big")
            if stream:
                self._stream_window += increment
            else:
                self._connection_window += increment
        elif kind == _PING and not flags & _ACK:
            self._transport.write(frame(_PING, _ACK, 0, payload))
        elif kind in (_RST_STREAM, _GOAWAY) and (kind == _RST_STREAM or int.from_bytes(payload[:4], "big") < _STREAM):
            raise StreamError(f"the server ended the stream: frame {kind}, {payload!r}")
        if kind in (_DATA, _HEADERS) and flags & _END_STREAM:
            raise StreamError(f"the server ended the stream: {payload!r}")

    def _on_settings(self, payload: bytes) -> None:
        for identifier, value in struct.iter_unpack(">HI", payload):
            if identifier == _INITIAL_WINDOW_SIZE:
                self._stream_window += value - self._initial_window
                self._initial_window = value
            elif identifier == _MAX_FRAME_SIZE:
                self._frame_size = value
        self._transport.write(frame(_SETTINGS, _ACK, 0, b""))

    def _on_data(self, payload: bytes) -> None:
        self._stream_input += payload
        self._unacknowledged += len(payload)
        if self._unacknowledged > _WINDOW // 4:
            update = struct.pack(">I", self._unacknowledged)
            self._transport.write(frame(_WINDOW_UPDATE, 0, 0, update) + frame(_WINDOW_UPDATE, 0, _STREAM, update))
            self._unacknowledged = 0
        at = 0
        while len(self._stream_input) - at >= 5:
            end = at + 5 + int.from_bytes(self._stream_input[at + 1 : at + 5], "big")
            if len(self._stream_input) < end:
                break
            self._on_answer(bytes(self._stream_input[at + 5 : end]))
            at = end
        del self._stream_input[:at]

    def _on_answer(self, data: bytes) -> None:
        now = time.perf_counter()
        answer = pb.ModelStreamInferResponse.FromString(data)
        if answer.error_message:
            raise StreamError(f"an error instead of an answer: {answer.error_message}")
        slot = int(answer.infer_response.id)
        self._check(slot, answer.infer_response)
        self.latencies_ms.append((now - self._sent[slot]) * 1e3)
        self._n_under_way -= 1
        if now < self.until:
            self._send(slot)
        elif not self._n_under_way and not self.done.done():
            self.done.set_result(None)

    def _check(self, slot: int, answer: pb.ModelInferResponse) -> None:
        """Bytes that were right once need no second look."""
        raws = list(answer.raw_output_contents)
        if raws != self._right.get(slot):
            if not self._workload.is_right(slot, self._workload.from_grpc(answer.SerializeToString())):
                raise StreamError(f"slot {slot}: a wrong answer: {answer}")
            self._right[slot] = raws

    def _fail(self, why: str) -> None:
        if not self.done.done():
            self.done.set_exception(StreamError(why))


async def run(address: str, workload: Workload, n_slots: int, seconds: float) -> Load:
    host, _, port = address.partition(":")
    loop = asyncio.get_running_loop()
    transport, client = await loop.create_connection(lambda: StreamClient(address, workload, n_slots), host, int(port))
    started = time.perf_counter()
    client.start(seconds)
    await asyncio.wait_for(client.done, seconds + TIMEOUT_S)
    elapsed = time.perf_counter() - started
    transport.close()
    return of_latencies(client.latencies_ms, seconds=elapsed)


def main() -> None:
    address, n_slots, seconds = sys.argv[1:]
    workload = pickle.load(sys.stdin.buffer)  # noqa: S301 - from the process that started this one
    try:
        load = uvloop.run(run(address, workload, int(n_slots), float(seconds)))
    except (StreamError, OSError, TimeoutError) as error:
        sys.exit(f"{type(error).__name__}: {error}")
    print(msgspec.json.encode(load).decode())


if __name__ == "__main__":
    main()
