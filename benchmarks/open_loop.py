"""Open-loop load: requests arrive on a schedule, whether or not earlier ones have been answered.

    python -m benchmarks.open_loop 127.0.0.1:8000 /v2/models/NAME/infer BODY_FILE '[["content-type", "application/json"]]' 1000 5

Arrivals are random (a Poisson process with a fixed seed). A request's latency counts from the moment when it was due, so one
that had to wait for a free connection, or for this program, is not counted as a fast one ("coordinated omission"). The waiting is
by select(2), whose time-out is in microseconds; poll and epoll round to milliseconds.
"""

from __future__ import annotations

import json
import random
import select
import socket
import sys
import time
from collections import deque
from pathlib import Path

import httptools
import msgspec

from benchmarks.latencies import LoadResult, of_latencies

N_CONNECTIONS = 128
SEED = 0
DRAIN_S = 5.0
"""How long to wait for answers after the last arrival; requests that are open then have failed."""


class LoadConnection:
    """One connection with at most one request in flight; the callbacks are httptools'."""

    def __init__(self, host: str, port: int) -> None:
        self.socket = socket.create_connection((host, port))
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.due = 0.0
        self.is_complete = False
        self._parser = httptools.HttpResponseParser(self)

    def send(self, request: bytes, due: float) -> None:
        self.due = due
        self.is_complete = False
        self.socket.sendall(request)

    def on_message_complete(self) -> None:
        self.is_complete = True

    def receive(self) -> int | None:
        """The status, when the answer is complete.

        Raises:
            ConnectionError: the server has closed the connection.
        """
        data = self.socket.recv(1 << 18)
        if not data:
            raise ConnectionError("closed by the server")
        self._parser.feed_data(data)
        return self._parser.get_status_code() if self.is_complete else None


class OpenLoop:
    """Sends `request` at times that were drawn before and collects latencies in ms."""

    def __init__(self, host: str, port: int, request: bytes) -> None:
        self.latencies_ms: list[float] = []
        self.n_failed = 0
        self._address = (host, port)
        self._request = request
        self._idle = deque(LoadConnection(host, port) for _ in range(N_CONNECTIONS))
        self._busy: dict[int, LoadConnection] = {}
        self._epoll = select.epoll()
        for connection in self._idle:
            self._epoll.register(connection.socket, select.EPOLLIN)

    def run(self, arrivals: deque[float]) -> None:
        """Args:
        arrivals: when requests are due, in seconds from now, ascending.
        """
        start = time.perf_counter()
        end = (arrivals[-1] if arrivals else 0.0) + DRAIN_S
        while arrivals or self._busy:
            now = time.perf_counter() - start
            while arrivals and arrivals[0] <= now and self._idle:
                self._send(start + arrivals.popleft())
            if now > end:
                break
            # With no connection free, the next answer is what to wait for.
            wait_s = max(0.0, arrivals[0] - (time.perf_counter() - start)) if arrivals and self._idle else 0.1
            if select.select([self._epoll], [], [], wait_s)[0]:
                for descriptor, _ in self._epoll.poll(0):
                    self._receive(descriptor)
        self.n_failed += len(self._busy) + len(arrivals)

    def close(self) -> None:
        """Close all connections."""
        for connection in (*self._idle, *self._busy.values()):
            connection.socket.close()
        self._epoll.close()

    def _send(self, due: float) -> None:
        connection = self._idle.popleft()
        self._busy[connection.socket.fileno()] = connection
        connection.send(self._request, due)

    def _receive(self, descriptor: int) -> None:
        connection = self._busy.get(descriptor)
        if connection is None:
            return
        try:
            status = connection.receive()
        except (OSError, httptools.HttpParserError):
            self._replace(descriptor)
            return
        if status is not None:
            self._idle.append(self._busy.pop(descriptor))
            if status < 300:  # a job that is accepted has 202
                self.latencies_ms.append((time.perf_counter() - connection.due) * 1e3)
            else:
                self.n_failed += 1

    def _replace(self, descriptor: int) -> None:
        self.n_failed += 1
        self._epoll.unregister(descriptor)
        self._busy.pop(descriptor).socket.close()
        fresh = LoadConnection(*self._address)
        self._epoll.register(fresh.socket, select.EPOLLIN)
        self._idle.append(fresh)


def poisson(per_s: float, seconds: float, seed: int = SEED) -> deque[float]:
    """Times at which requests are due: on average ``per_s`` in a second, independent of each other."""
    chance = random.Random(seed)  # noqa: S311 - no secret
    times: deque[float] = deque()
    at = chance.expovariate(per_s)
    while at < seconds:
        times.append(at)
        at += chance.expovariate(per_s)
    return times


def request_bytes(address: str, path: str, body: bytes, headers: list[tuple[str, str]]) -> bytes:
    lines = [f"POST {path} HTTP/1.1", f"host: {address}", f"content-length: {len(body)}"]
    lines += [f"{name}: {value}" for name, value in headers]
    return "\r\n".join([*lines, "", ""]).encode() + body


def main() -> None:
    address, path, file, headers, per_s, seconds = sys.argv[1:]
    host, _, port = address.partition(":")
    request = request_bytes(address, path, Path(file).read_bytes(), json.loads(headers))
    loop = OpenLoop(host, int(port), request)
    start = time.perf_counter()
    loop.run(poisson(float(per_s), float(seconds)))
    loop.close()
    # Until the last answer: longer than requested if the server cannot keep up.
    load: LoadResult = of_latencies(loop.latencies_ms, seconds=time.perf_counter() - start, n_failed=loop.n_failed)
    print(msgspec.json.encode(load).decode())


if __name__ == "__main__":
    main()
