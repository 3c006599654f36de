"""Web servers for tests that record requests and fail on demand: for a folder, and in front of another server."""

from __future__ import annotations

import http.client
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

Fault = Callable[["Handler", bytes], bool]
"""Gets the answer's bytes before they are sent; whether it has answered itself."""


class FileServer:
    """The files below a folder.

    ``requests`` are the paths that were asked for, with the first byte that was. ``faults`` are by path, each for one request.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._listen(Handler)

    def _listen(self, handler: type[Handler]) -> None:
        self.requests: list[tuple[str, int]] = []
        self.faults: dict[str, list[Fault]] = {}
        self.knows_ranges = True
        self.stopping = threading.Event()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("BoundHandler", (handler,), {"files": self}))
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def fail(self, path: str, *faults: Fault) -> None:
        """What happens to the next requests for a path, one after the other."""
        self.faults.setdefault(path, []).extend(faults)

    def asked(self, path: str) -> list[int]:
        """The first bytes of the requests for a path."""
        return [start for asked, start in self.requests if asked == path]

    @contextmanager
    def running(self) -> Iterator[FileServer]:
        thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield self
        finally:
            self.stopping.set()
            self._server.shutdown()
            thread.join()
            self._server.server_close()


class Gateway(FileServer):
    """What another server answers to GET, but for the faults."""

    def __init__(self, behind: str) -> None:
        self.behind = urlsplit(behind).netloc
        self._listen(Forwarding)


class Handler(BaseHTTPRequestHandler):
    """GET of whole files and of ranges."""

    protocol_version = "HTTP/1.1"
    files: FileServer

    def do_GET(self) -> None:
        path = self.path.lstrip("/")
        start, wanted = self.first_byte()
        fault = self.take_fault(path, start)
        file = self.files.folder / path
        if not file.is_file():
            self.answer(404)
            return
        data = file.read_bytes()
        if wanted and self.files.knows_ranges:
            end = int(wanted[2]) + 1
            status, body = (206, data[start:end]) if start < len(data) else (416, b"")
        else:
            status, body = 200, data
        if fault is None or not fault(self, body):
            self.answer(status, body)

    def answer(self, status: int, body: bytes = b"", *, size: int | None = None) -> None:
        """With a content length of ``size``, if that is not what comes."""
        self.send_response(status)
        self.send_header("Content-Length", str(len(body) if size is None else size))
        self.end_headers()
        self.wfile.write(body)

    def take_fault(self, path: str, start: int) -> Fault | None:
        """Count a request; what shall happen to it, if anything."""
        self.files.requests.append((path, start))
        faults = self.files.faults.get(path, [])
        return faults.pop(0) if faults else None

    def first_byte(self) -> tuple[int, re.Match[str] | None]:
        """The start of the requested range, and the range."""
        wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        return (int(wanted[1]) if wanted else 0), wanted

    def log_message(self, format: str, *args: object) -> None:
        """Not on the terminal."""


class Forwarding(Handler):
    """GET as the server behind answers it."""

    files: Gateway

    def do_GET(self) -> None:
        fault = self.take_fault(urlsplit(self.path).path.lstrip("/"), self.first_byte()[0])
        connection = http.client.HTTPConnection(self.files.behind)
        connection.request("GET", self.path, headers=dict(self.headers))
        answer = connection.getresponse()
        body = answer.read()
        connection.close()
        if fault is None or not fault(self, body):
            self.send_response(answer.status)
            for name, value in answer.getheaders():
                if name.lower() not in ("connection", "content-length", "transfer-encoding", "server", "date"):
                    self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)


def status(number: int) -> Fault:
    """Answer with this status."""

    def fault(handler: Handler, body: bytes) -> bool:
        handler.answer(number)
        return True

    return fault


def cut(handler: Handler, body: bytes) -> bool:
    """Close the connection in the middle of the answer."""
    handler.answer(206, body[: len(body) // 2], size=len(body))
    handler.close_connection = True
    return True


def stall(handler: Handler, body: bytes) -> bool:
    """Send the head of the answer and half of it, and then nothing more."""
    handler.answer(206, body[: len(body) // 2], size=len(body))
    handler.files.stopping.wait()
    handler.close_connection = True
    return True


def flip(handler: Handler, body: bytes) -> bool:
    """Send the right number of bytes, the last of which is wrong."""
    handler.answer(206, body[:-1] + bytes([body[-1] ^ 1]))
    return True


def nothing(handler: Handler, body: bytes) -> bool:
    """Answer without the fault, so that the next fault applies to the next request."""
    return False
