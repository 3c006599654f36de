"""A client of ModelStreamInfer that costs little: one stream, a number of messages in flight, each answer matched by its id.

    python -m benchmarks.stream_client 127.0.0.1:8001 64 5 < pickled-workload

grpcio's own client takes as long for a message as the server does, and it would be the client that is measured. So this
speaks the little of HTTP/2 that one stream needs (RFC 9113), and is no example for clients.
"""

from __future__ import annotations

import asyncio
import pickle
import sys
import time
from typing import Any

import msgspec
import uvloop

from benchmarks.latencies import LoadResult, of_latencies
from benchmarks.loads import STREAM_PATH
from benchmarks.workloads import Workload, grpc_frame
from splitserve.api.inference import inference_pb2 as pb
from splitserve.wire.http2 import frames
from splitserve.wire.http2.headers import encode

TIMEOUT_S = 15.0

_WINDOW = 2**30
_STREAM = 1


class StreamError(Exception):
    """The stream has ended or carries an error."""


class StreamClient(asyncio.Protocol):
    """Keeps a message per slot in flight until `stop`.

    Args:
        authority: the server's address.
        workload: what is asked; each slot has a row, and checks that its answers are that row's.
        n_slots: messages in flight.
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
        block = encode(
            [
                (b":method", b"POST"), (b":scheme", b"http"), (b":path", STREAM_PATH.encode()),
                (b":authority", self._authority.encode()), (b"content-type", b"application/grpc"), (b"te", b"trailers"),
            ]
        )  # fmt: skip
        settings = {frames.INITIAL_WINDOW_SIZE: _WINDOW, frames.HEADER_TABLE_SIZE: 0}  # no header table: blocks need no state
        transport.write(
            frames.PREFACE
            + frames.settings(settings)
            + frames.window_update(0, _WINDOW)
            + frames.frame(frames.HEADERS, frames.END_HEADERS, _STREAM, block)
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
        pieces = []
        while size := min(len(self._waiting), self._frame_size, self._stream_window, self._connection_window):
            pieces.append(frames.frame(frames.DATA, 0, _STREAM, self._waiting[:size]))
            self._waiting = self._waiting[size:]
            self._stream_window -= size
            self._connection_window -= size
        if pieces:
            self._transport.write(b"".join(pieces))

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
        if kind == frames.DATA:
            self._on_data(payload)
        elif kind == frames.SETTINGS and not flags & frames.ACK:
            self._on_settings(payload)
        elif kind == frames.WINDOW_UPDATE:
            increment = int.from_bytes(payload, "big")
            if stream:
                self._stream_window += increment
            else:
                self._connection_window += increment
        elif kind == frames.PING and not flags & frames.ACK:
            self._transport.write(frames.frame(frames.PING, frames.ACK, 0, payload))
        elif kind in (frames.RST_STREAM, frames.GOAWAY) and (
            kind == frames.RST_STREAM or int.from_bytes(payload[:4], "big") < _STREAM
        ):
            raise StreamError(f"the server ended the stream: frame {kind}, {payload!r}")
        if kind in (frames.DATA, frames.HEADERS) and flags & frames.END_STREAM:
            raise StreamError(f"the server ended the stream: {payload!r}")

    def _on_settings(self, payload: bytes) -> None:
        for identifier, value in frames.SETTING.iter_unpack(payload):
            if identifier == frames.INITIAL_WINDOW_SIZE:
                self._stream_window += value - self._initial_window
                self._initial_window = value
            elif identifier == frames.MAX_FRAME_SIZE:
                self._frame_size = value
        self._transport.write(frames.frame(frames.SETTINGS, frames.ACK, 0, b""))

    def _on_data(self, payload: bytes) -> None:
        self._stream_input += payload
        self._unacknowledged += len(payload)
        if self._unacknowledged > _WINDOW // 4:
            more = self._unacknowledged
            self._transport.write(frames.window_update(0, more) + frames.window_update(_STREAM, more))
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
        """Bytes that were right once are not decoded again."""
        raws = list(answer.raw_output_contents)
        if raws != self._right.get(slot):
            if not self._workload.is_right(slot, self._workload.from_grpc(answer.SerializeToString())):
                raise StreamError(f"slot {slot}: a wrong answer: {answer}")
            self._right[slot] = raws

    def _fail(self, why: str) -> None:
        if not self.done.done():
            self.done.set_exception(StreamError(why))


async def run(address: str, workload: Workload, n_slots: int, seconds: float) -> LoadResult:
    host, _, port = address.partition(":")
    loop = asyncio.get_running_loop()
    transport, client = await loop.create_connection(lambda: StreamClient(address, workload, n_slots), host, int(port))
    try:
        started = time.perf_counter()
        client.start(seconds)
        await asyncio.wait_for(client.done, seconds + TIMEOUT_S)
        elapsed = time.perf_counter() - started
    finally:
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
