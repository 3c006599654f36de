"""One request over HTTP/2 by the library h2, which has no timers and no retries: it returns what the peer sent."""

from __future__ import annotations

import socket
import ssl
from typing import NamedTuple

import h2.config
import h2.connection
import h2.events

from tests.certificates import Files

TIMEOUT_S = 20.0


class Answer(NamedTuple):
    """``headers`` are those of headers and trailers; ``reset`` is the code of RST_STREAM, if one came."""

    headers: dict[str, str]
    body: bytes
    reset: int | None


def request(
    address: str, path: str, body: bytes = b"", *, method: str = "POST", tls: Files | None = None, **headers: str
) -> Answer:
    """Send it on a connection of its own, and wait for the end of the stream."""
    host, _, port = address.rpartition(":")
    with socket.create_connection((host, int(port)), timeout=TIMEOUT_S) as plain, _secured(plain, tls) as connection:
        peer = h2.connection.H2Connection(h2.config.H2Configuration(header_encoding="utf-8"))
        peer.initiate_connection()
        fields = [(":method", method), (":scheme", "https" if tls else "http"), (":authority", address), (":path", path)]
        fields += [(name.replace("_", "-"), value) for name, value in headers.items()]
        peer.send_headers(1, fields, end_stream=not body)
        if body:
            peer.send_data(1, body, end_stream=True)
        connection.sendall(peer.data_to_send())
        return _read(peer, connection)


def _secured(plain: socket.socket, tls: Files | None) -> socket.socket:
    if tls is None:
        return plain
    context = ssl.create_default_context(cafile=tls.ca)
    context.set_alpn_protocols(["h2"])
    return context.wrap_socket(plain, server_hostname="127.0.0.1")


def _read(peer: h2.connection.H2Connection, connection: socket.socket) -> Answer:
    found: dict[str, str] = {}
    body = b""
    while data := connection.recv(65536):
        for event in peer.receive_data(data):
            match event:
                case h2.events.ResponseReceived() | h2.events.TrailersReceived():
                    found |= {str(name): str(value) for name, value in event.headers}
                case h2.events.DataReceived():
                    body += event.data
                    peer.acknowledge_received_data(event.flow_controlled_length, 1)
                case h2.events.StreamEnded():
                    return Answer(found, body, None)
                case h2.events.StreamReset():
                    return Answer(found, body, int(event.error_code))
                case h2.events.ConnectionTerminated():
                    raise AssertionError(f"GOAWAY {event.error_code!r}, last stream {event.last_stream_id}")
        connection.sendall(peer.data_to_send())
    raise AssertionError("the connection was closed before the stream ended")
