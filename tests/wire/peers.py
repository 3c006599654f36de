"""The library h2, which keeps every rule, as the peer of our server connection."""

from __future__ import annotations

import asyncio
from typing import Any

import h2.config
import h2.connection
import h2.events
import h2.settings

from splitserve.wire.grpc.messages import PREFIX
from splitserve.wire.grpc.server import GrpcServerConnection
from tests.wire.fakes import FakeServer, FakeTransport, request_headers


class Client:
    """h2 as a client of one `GrpcServerConnection`."""

    def __init__(self, server: FakeServer, *, strict: bool = True, window: int | None = None) -> None:
        self.server = server
        self.transport = FakeTransport()
        self.connection = GrpcServerConnection(server)  # type: ignore[arg-type]
        self.connection.connection_made(self.transport)
        config = h2.config.H2Configuration(
            client_side=True, header_encoding="utf-8", validate_outbound_headers=strict, normalize_outbound_headers=strict
        )
        self.h2 = h2.connection.H2Connection(config)
        self.events: list[Any] = []
        self.h2.initiate_connection()
        if window is not None:
            self.h2.update_settings({h2.settings.SettingCodes.INITIAL_WINDOW_SIZE: window})

    async def pump(self) -> None:
        """Carry bytes both ways until neither side has more to send."""
        quiet = 0
        while quiet < 5:
            data = self.h2.data_to_send()
            if data and not self.transport.is_closed:
                self.connection.data_received(data)
            await asyncio.sleep(0)
            answer = self.transport.take()
            if answer:
                self.events += self.h2.receive_data(answer)
            quiet = 0 if data or answer else quiet + 1

    def call(self, path: str, body: bytes | None, *, is_end: bool = True, **headers: str) -> int:
        """Begin a call; gives its stream."""
        stream: int = self.h2.get_next_available_stream_id()
        self.h2.send_headers(stream, request_headers(path, **headers), end_stream=body is None and is_end)
        if body is not None:
            self.h2.send_data(stream, body, end_stream=is_end)
        return stream

    async def send_all(self, stream: int, body: bytes) -> None:
        """Send a long body as there is room for it."""
        while body:
            room = min(self.h2.local_flow_control_window(stream), self.h2.max_outbound_frame_size)
            self.h2.send_data(stream, body[:room], end_stream=room >= len(body))
            body = body[room:]
            await self.pump()

    def body(self, stream: int) -> bytes:
        """What came on a stream."""
        return b"".join(
            each.data for each in self.events if isinstance(each, h2.events.DataReceived) and each.stream_id == stream
        )

    def messages(self, stream: int) -> list[bytes]:
        """The messages in it."""
        data, found = self.body(stream), []
        while data:
            _, length = PREFIX.unpack_from(data)
            assert len(data) >= PREFIX.size + length
            found.append(data[PREFIX.size : PREFIX.size + length])
            data = data[PREFIX.size + length :]
        return found

    def headers(self, stream: int) -> dict[str, str]:
        """All headers and trailers of a stream."""
        kinds = (h2.events.ResponseReceived, h2.events.TrailersReceived)
        return {
            name: value
            for each in self.events
            if isinstance(each, kinds) and each.stream_id == stream
            for name, value in each.headers
        }

    def status(self, stream: int) -> str | None:
        """The status of a call; None if it has none yet."""
        return self.headers(stream).get("grpc-status")

    def resets(self) -> dict[int, int]:
        """Streams that were reset, and the codes."""
        return {each.stream_id: int(each.error_code) for each in self.events if isinstance(each, h2.events.StreamReset)}

    def goaways(self) -> list[tuple[int, int]]:
        """Of each GOAWAY the code and the last stream."""
        return [
            (int(each.error_code), each.last_stream_id)
            for each in self.events
            if isinstance(each, h2.events.ConnectionTerminated)
        ]
