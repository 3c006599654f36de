"""HTTP/1.1 as bytes on a socket, for requests that no client library would send."""

from __future__ import annotations

import contextlib
import socket
from typing import NamedTuple

TIMEOUT_S = 10.0


class Response(NamedTuple):
    """Header names are in lower case."""

    status: int
    headers: dict[str, str]
    body: bytes


class RawConnection(contextlib.AbstractContextManager["RawConnection"]):
    """One connection, closed when left."""

    def __init__(self, address: str) -> None:
        host, _, port = address.rpartition(":")
        self.socket = socket.create_connection((host, int(port)), timeout=TIMEOUT_S)
        self._file = self.socket.makefile("rb")

    def __exit__(self, *_: object) -> None:
        self._file.close()
        self.socket.close()

    def send(self, data: bytes) -> None:
        self.socket.sendall(data)

    def response(self, *, is_head: bool = False) -> Response | None:
        """The next one; None: the peer has closed, or sends nothing more.

        Args:
            is_head: it answers a HEAD request, so no body follows whatever its headers say.
        """
        try:
            line = self._file.readline()
        except (TimeoutError, ConnectionError):
            return None
        if not line:
            return None
        status = int(line.split()[1])
        headers = {}
        while (line := self._file.readline().strip()) and b":" in line:
            name, _, value = line.decode("latin-1").partition(":")
            headers[name.lower()] = value.strip()
        return Response(status, headers, b"" if status < 200 or is_head else self._body(headers))

    def _body(self, headers: dict[str, str]) -> bytes:
        if headers.get("transfer-encoding") == "chunked":
            body = b""
            while size := int(self._file.readline().split(b";")[0], 16):
                body += self._file.read(size)
                self._file.readline()
            self._file.readline()
            return body
        if "content-length" in headers:
            return self._file.read(int(headers["content-length"]))
        return self._file.read()

    def final_response(self, *, is_head: bool = False) -> Response | None:
        """The next one that is not 100 Continue."""
        found = self.response(is_head=is_head)
        while found is not None and found.status < 200:
            found = self.response(is_head=is_head)
        return found

    def remaining(self, *, timeout_s: float, is_head: bool = False) -> list[Response]:
        """Every response until the peer closes or has been silent for so long; ``is_head`` is the first one's."""
        self.socket.settimeout(timeout_s)
        found = []
        while (each := self.final_response(is_head=is_head and not found)) is not None:
            found.append(each)
        return found
