"""A scripted HTTP server that answers byte for byte and records requests."""

from __future__ import annotations

import asyncio
import gzip
import json
import ssl
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from typing import Any, NamedTuple

import numpy as np

RESET = b""
"""In place of an answer: the connection is closed without one."""


class Asked(NamedTuple):
    path: str
    headers: dict[str, str]
    body: bytes

    @property
    def decoded(self) -> bytes:
        return gzip.decompress(self.body) if self.headers.get("content-encoding") == "gzip" else self.body


def http(status: int, content: Any = None, *, body: bytes | None = None, **headers: str) -> bytes:
    """The bytes of an answer: ``content`` as JSON, or ``body``."""
    body = json.dumps(content).encode() if body is None else body
    lines = [f"HTTP/1.1 {status} x", f"content-length: {len(body)}"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return "\r\n".join((*lines, "", "")).encode() + body


METADATA = http(
    200,
    {
        "name": "echo",
        "platform": "test",
        "inputs": [{"name": "x", "datatype": "FP32", "shape": [-1, 2]}],
        "outputs": [{"name": "y", "datatype": "FP32", "shape": [-1, 1]}],
    },
)


def answer(*values: float, version: str | None = "1") -> bytes:
    """An inference's answer, its output as JSON."""
    output = {"name": "y", "datatype": "FP32", "shape": [len(values), 1], "data": values}
    return http(200, {"model_name": "echo", "model_version": version, "outputs": [output]})


X = {"x": np.zeros((1, 2), np.float32)}


class Scripted:
    """Sends its answers in turn, then repeats the last one; requests for a model's metadata have their own answer."""

    def __init__(self, answers: Iterable[bytes], metadata: bytes = METADATA) -> None:
        self.asked: list[Asked] = []
        self.url = ""
        self._answers = list(answers)
        self._metadata = metadata

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while request := await _read(reader):
                data = self._next(request)
                writer.write(data)
                await writer.drain()
                if data == RESET or b"content-length: 999" in data:
                    break
        except (ConnectionError, asyncio.CancelledError):
            pass
        finally:
            writer.close()

    def _next(self, request: Asked) -> bytes:
        if request.path == "/v2/models/echo":
            return self._metadata
        self.asked.append(request)
        return self._answers.pop(0) if len(self._answers) > 1 else self._answers[0]


async def _read(reader: asyncio.StreamReader) -> Asked | None:
    try:
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
    except asyncio.IncompleteReadError:
        return None
    headers = dict(line.lower().split(": ", 1) for line in head[1:] if line)
    originals = dict(line.split(": ", 1) for line in head[1:] if line)
    headers |= {name.lower(): value for name, value in originals.items()}
    return Asked(head[0].split()[1], headers, await reader.readexactly(int(headers.get("content-length", "0"))))


@asynccontextmanager
async def scripted(*answers: bytes, context: ssl.SSLContext | None = None, **options: Any) -> AsyncIterator[Scripted]:
    """The server, on a free port of loopback."""
    script = Scripted(answers, **options)
    server = await asyncio.start_server(script.serve, "127.0.0.1", 0, ssl=context)
    script.url = f"{'https' if context else 'http'}://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    try:
        yield script
    finally:
        server.close()
