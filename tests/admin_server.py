"""An admin listener that answers what a test says, in a thread."""

from __future__ import annotations

import asyncio
import ssl
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from splitserve.telemetry import families
from splitserve.telemetry.families import FAMILIES
from splitserve.telemetry.recorders import LATENCY_BOUNDS, SIZE_BOUNDS, Histogram
from splitserve.telemetry.registry import Snapshot
from splitserve.telemetry.rendering import render


def text_of(snapshot: Snapshot) -> str:
    """As `/metrics` answers it."""
    return asyncio.run(render(snapshot, {family.name: family for family in FAMILIES}, ""))[0].decode()


def of_a_proxy(*, n_answered: int, n_failed: int = 0, duration_s: float = 0.0015, generation: float = 0.0) -> Snapshot:
    """What a proxy shows that has answered requests of one release, two rows each."""
    durations, rows = Histogram(LATENCY_BOUNDS), Histogram(SIZE_BOUNDS)
    if n_answered:
        durations.observe(duration_s, n_answered)
        rows.observe(2.0, n_answered)
    place = ("proxy", "m", "1.1")
    return {
        families.BUILD.name: {("0.1.0", "3.11.0"): 1},
        families.READY.name: {("proxy",): 1},
        families.REQUESTS.name: {(*place, "rest", "OK"): n_answered, (*place, "rest", "UNAVAILABLE"): n_failed},
        families.REQUEST_SECONDS.name: {("proxy", "rest"): durations.read()},
        families.PHASE_SECONDS.name: {("proxy", "hop"): durations.read()},
        families.INFERENCES.name: {(*place, "succeeded"): n_answered, (*place, "failed"): n_failed},
        families.INFERENCE_SECONDS.name: {place: n_answered * duration_s},
        families.ROWS.name: {place: 2 * n_answered},
        families.CALL_ROWS.name: {("proxy",): rows.read()},
        families.QUEUED.name: {place: 3},
        families.LOADED_AT.name: {place: 1000.0 + generation},
        families.REPLICAS.name: {("proxy", "preprocess", "ready"): 1, ("proxy", "preprocess", "not_ready"): 1},
    }


class AdminServer:
    """What it answers. The last text is repeated."""

    def __init__(self, texts: Sequence[str], token: str, reason: str) -> None:
        self.texts = list(texts)
        self.token = token
        self.reason = reason
        self.url = ""

    def answer(self, path: str, authorization: str) -> tuple[int, bytes]:
        if path == "/readyz":
            return (503, f'{{"reason": "{self.reason}"}}'.encode()) if self.reason else (200, b'{"ready": true}')
        if path != "/metrics":
            return 404, b"{}"
        if self.token and authorization != f"Bearer {self.token}":
            return 401, b"{}"
        return 200, (self.texts.pop(0) if len(self.texts) > 1 else self.texts[0]).encode()


@contextmanager
def admin_server(
    *texts: str, token: str = "", reason: str = "", tls: ssl.SSLContext | None = None, port: int = 0
) -> Iterator[AdminServer]:
    """Listens on loopback."""
    server = AdminServer(texts, token, reason)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status, body = server.answer(self.path, self.headers.get("authorization", ""))
            self.send_response(status)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            pass

    class Listener(ThreadingHTTPServer):
        daemon_threads = False

        def handle_error(self, *_: Any) -> None:  # a client that does not trust the certificate
            pass

    with Listener(("127.0.0.1", port), Handler) as listener:
        if tls is not None:
            listener.socket = tls.wrap_socket(listener.socket, server_side=True)
        server.url = f"http{'s' if tls else ''}://127.0.0.1:{listener.server_port}"
        thread = threading.Thread(target=listener.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server
        finally:
            listener.shutdown()
            thread.join()
