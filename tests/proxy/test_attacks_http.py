"""Bad input and abuse over REST, byte by byte over a real socket: the status of each, and that the proxy keeps serving.

After every row: the proxy answers, nothing is left in flight, and the attacker's answer contains no internals.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import msgspec
import pytest

from proxy.rest.app import RestApp
from proxy.rest.config import RestConfig
from proxy.rest.server import RestFace
from proxy.service import ProxyService
from splitserve.oip.limits import RequestLimits
from splitserve.oip.messages import InferResponse, ServerMetadata
from splitserve.signature import TensorSpec
from splitserve.testing import FakeInference, signature
from splitserve.wire.http1 import connection as http1
from splitserve.wire.http1 import listener
from splitserve.wire.http1.listener import HttpLimits

BODY_LIMIT = 1_000_000
INFER = "/v2/models/echo/infer"
ROW = {"name": "x", "datatype": "FP32", "shape": [1, 2], "data": [1.0, 2.5]}
GOOD = json.dumps({"inputs": [ROW]}).encode()
MODELS = (
    signature("echo", [TensorSpec("x", "FP32", ("batch", 2))], version="1.1"),
    signature("texts", [TensorSpec("t", "BYTES", ("batch",))], version="1.1"),
    signature("counts", [TensorSpec("n", "INT8", ("batch",))], version="1.1"),
    signature("flags", [TensorSpec("b", "BOOL", ("batch",))], version="1.1"),
)
INSIDE = re.compile(rb"Traceback|\.py|/work|/tmp|/usr|/home|msgspec|uvicorn|httptools|site-packages|0x[0-9a-f]{6}")


class Edge:
    """A REST face on a socket, with limits that a test can reach."""

    def __init__(self, face: RestFace, backend: FakeInference) -> None:
        self.face, self.backend = face, backend

    async def open(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await asyncio.open_connection("127.0.0.1", self.face.port)

    async def send(self, *parts: bytes) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and body of the first answer to these bytes; 0 if the connection is closed without one."""
        reader, writer = await self.open()
        sending = asyncio.create_task(_write(writer, parts))
        try:
            async with asyncio.timeout(30):
                return await read_answer(reader)
        finally:
            sending.cancel()
            await asyncio.gather(sending, return_exceptions=True)
            writer.transport.abort()
            await asyncio.gather(writer.wait_closed(), return_exceptions=True)

    async def post(self, body: bytes, path: str = INFER, *headers: str) -> tuple[int, dict[str, str], bytes]:
        return await self.send(request("POST", path, f"Content-Length: {len(body)}", *headers) + body)

    async def check_unharmed(self) -> None:
        status, _, body = await self.post(GOOD)
        assert (status, json.loads(body)["outputs"]) == (200, [ROW])


async def until(claim: Callable[[], Any]) -> None:
    """Poll for a condition of the server that has no notification."""
    async with asyncio.timeout(20):
        while not claim():  # noqa: ASYNC110
            await asyncio.sleep(0.01)


async def _write(writer: asyncio.StreamWriter, parts: tuple[bytes, ...]) -> None:
    try:
        for part in parts:
            writer.write(part)
            await writer.drain()
    except ConnectionError:
        pass  # the answer says why


async def read_answer(reader: asyncio.StreamReader) -> tuple[int, dict[str, str], bytes]:
    try:
        head = await reader.readuntil(b"\r\n\r\n")
    except (asyncio.IncompleteReadError, ConnectionError):
        return 0, {}, b""
    status, *lines = head.decode("latin-1").strip().split("\r\n")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    return int(status.split()[1]), headers, await reader.readexactly(int(headers["content-length"]))


def request(method: str, path: str, *headers: str, host: str = "Host: x") -> bytes:
    return "\r\n".join([f"{method} {path} HTTP/1.1", *([host] if host else []), *headers, "", ""]).encode("latin-1")


@asynccontextmanager
async def edge_with(**limits: Any) -> AsyncIterator[Edge]:
    backend = FakeInference(*MODELS)
    service = ProxyService(backend)
    await service.refresh()
    config = RestConfig(
        metadata=ServerMetadata("test", "0"),
        max_body_bytes=BODY_LIMIT,
        default_timeout_s=30,
        allow_control=True,
        request_limits=limits.pop("request", RequestLimits()),
        connection_limits=HttpLimits(**limits),
        grace_s=1,
    )
    async with RestFace(RestApp(service, config)) as face:
        yield Edge(face, backend)


@pytest.fixture
async def edge() -> AsyncIterator[Edge]:
    async with edge_with() as edge:
        yield edge


def inputs(**changes: Any) -> bytes:
    return json.dumps({"inputs": [{**ROW, **changes}]}).encode()


def named(model: str, name: str, datatype: str, data: str, n: int = 1) -> tuple[str, bytes]:
    tensor = f'{{"inputs": [{{"name": "{name}", "datatype": "{datatype}", "shape": [{n}], "data": [{data}]}}]}}'
    return f"/v2/models/{model}/infer", tensor.encode("utf-8", "surrogatepass")


BODIES: dict[str, tuple[str, bytes, set[int]]] = {
    "A01 lists": (INFER, b"[" * 50_000, {400}),
    "A01 objects": (INFER, b'{"a":' * 50_000, {400}),
    "A01 in data": (INFER, b'{"inputs":[{"name":"x","datatype":"FP32","shape":[1],"data":' + b"[" * 50_000, {400}),
    "A01 in parameters": (INFER, b'{"inputs":[],"parameters":' + b"[" * 50_000, {400}),
    "A01 in what is ignored": (INFER, b'{"inputs":[],"more":' + b"[" * 65 + b"]" * 65 + b"}", {400}),
    "A01 to the index": ("/v2/repository/index", b"[" * 50_000, {400}),
    "A01 over V1": ("/v1/models/echo:predict", b'{"instances":' + b"[" * 50_000, {400}),
    "A07 long integer": (*named("counts", "n", "INT8", "1" * 5000), {400}),
    "A07 long float": (INFER, b'{"inputs":[{"name":"x","datatype":"FP32","shape":[1,2],"data":[1e400,1]}]}', {400}),
    "A07 hexadecimal": (*named("counts", "n", "INT8", "0x10"), {400}),
    "A07 leading zeros": (*named("counts", "n", "INT8", "007"), {400}),
    "A08 NaN in integers": (*named("counts", "n", "INT8", "NaN"), {400}),
    "A08 NaN in flags": (*named("flags", "b", "BOOL", "NaN"), {400}),
    "A08 NaN in texts": (*named("texts", "t", "BYTES", "NaN"), {400}),
    "A08 NaN in shape": (INFER, b'{"inputs":[{"name":"x","datatype":"FP32","shape":[NaN],"data":[]}]}', {400}),
    "A08 text in integers": (*named("counts", "n", "INT8", '"NaN"'), {400}),
    "A09 lone surrogate, escaped": (*named("texts", "t", "BYTES", '"\\ud800"'), {400}),
    "A09 lone surrogate, raw": (*named("texts", "t", "BYTES", '"\ud800"'), {400}),
    "A09 overlong UTF-8": (INFER, b'{"inputs":[],"id":"\xc0\xaf"}', {400}),
    "A09 UTF-16": (INFER, GOOD.decode().encode("utf-16"), {400}),
    "A09 UTF-32": (INFER, GOOD.decode().encode("utf-32"), {400}),
    "A10 special keys": (INFER, b'{"__proto__":1,"__class__":2,"$ref":"/etc/passwd","$type":"x",' + GOOD[1:], {200}),
    "A10 many keys": (INFER, b"{" + b",".join(b'"k%d":1' % i for i in range(50_000)) + b"," + GOOD[1:], {200}),
    "A10 long key": (INFER, b'{"' + b"k" * 500_000 + b'":1,' + GOOD[1:], {200}),
    "A11 inputs": (INFER, json.dumps({"inputs": [{**ROW, "name": str(i)} for i in range(5000)]}).encode(), {400}),
    "A11 outputs": (INFER, json.dumps({"inputs": [ROW], "outputs": [{"name": "x"}] * 20_000}).encode(), {400}),
    "A11 parameters": (INFER, json.dumps({"inputs": [ROW], "parameters": {str(i): 1 for i in range(20_000)}}).encode(), {400}),
    "A11 rank": (INFER, inputs(shape=[1] * 65), {400}),
    "A11 long shape": (INFER, inputs(shape=[1] * 100_000), {400}),
    "A13 parameter of a wrong type": (INFER, b'{"parameters":{"a":[1]},' + GOOD[1:], {400}),
    "A13 parameter with a line break": (INFER, b'{"parameters":{"a\\r\\nb":"c\\r\\nd"},' + GOOD[1:], {200}),
    "A18 depths": ("/v1/models/echo:predict", b'{"instances":[[1,2],[[1],2]]}', {400}),
    "A18 texts": ("/v1/models/echo:predict", b'{"instances":[["1","2"]]}', {400}),
    "A18 record with more": ("/v1/models/echo:predict", b'{"instances":[{"x":[1,2],"y":3}]}', {400}),
    "A18 record with less": ("/v1/models/echo:predict", b'{"instances":[{}]}', {400}),
    "A18 wide": ("/v1/models/echo:predict", b'{"instances":[[' + b"1," * 100_000 + b"1]]}", {400}),
    "D01 product": (INFER, inputs(shape=[2**31] * 3), {400, 413}),
    "D01 product that wraps": (INFER, inputs(shape=[16, 2**60 + 2]), {400, 413}),
    "D01 2^62": (INFER, inputs(shape=[2**62]), {400, 413}),
    "D01 2^63-1": (INFER, inputs(shape=[2**63 - 1, 2]), {400, 413}),
    "D01 2^64": (INFER, inputs(shape=[2**64]), {400, 413}),
    "D02 negative": (INFER, inputs(shape=[-1, 2]), {400}),
    "D02 no rows": (INFER, inputs(shape=[0, 2], data=[]), {200, 400}),
    "D02 no columns": (INFER, inputs(shape=[1, 0], data=[]), {400}),
    "D02 rows of nothing": (INFER, inputs(shape=[2**31 - 1, 0], data=[]), {400, 413}),
    "D02 scalar": (INFER, inputs(shape=[], data=[1]), {400}),
    "D05 unknown datatype": (INFER, inputs(datatype="FP31"), {400}),
    "D05 lower case": (INFER, inputs(datatype="fp32"), {400}),
    "D05 long datatype": (INFER, inputs(datatype="F" * 500_000), {400}),
    "D05 another datatype": (INFER, inputs(datatype="INT32", data=[1, 2]), {400}),
    "D06 out of range": (*named("counts", "n", "INT8", "128"), {400}),
    "D06 fraction": (*named("counts", "n", "INT8", "1.5"), {400}),
    "D06 flag in floats": (INFER, b'{"inputs":[{"name":"x","datatype":"FP32","shape":[1,2],"data":[true,1]}]}', {400}),
    "D06 text in flags": (*named("flags", "b", "BOOL", '"false"'), {400}),
    "D06 number in flags": (*named("flags", "b", "BOOL", "2"), {400}),
    "D09 FP16 in JSON": (INFER, inputs(datatype="FP16"), {400}),
    "D10 number in texts": (*named("texts", "t", "BYTES", "5"), {400}),
    "E09 configuration": ("/v2/repository/models/echo/load", b'{"parameters":{"config":"{}"}}', {400}),
    "E09 file": ("/v2/repository/models/echo/load", b'{"parameters":{"file:1/model.onnx":"aGk="}}', {400}),
    "H01 template": (INFER, b'{"id":"${jndi:ldap://x}%s{}\\u001b[31m\\u0000",' + GOOD[1:], {200}),
    "no object": (INFER, b"5", {400}),
    "nothing": (INFER, b"", {400}),
}


@pytest.mark.parametrize("row", BODIES)
async def test_a_malicious_body_is_refused(edge: Edge, row: str) -> None:
    """A status that blames the caller, a message without internals that echoes little, and no effect on other calls."""
    path, body, expected = BODIES[row]

    status, _, answer = await edge.post(body, path)

    assert status in expected, answer
    if status != 200:
        assert len(answer) < 2_000
        assert not INSIDE.search(answer), answer
        assert json.loads(answer)["error"]
    await edge.check_unharmed()


FRAMES: dict[str, tuple[bytes, set[int]]] = {
    "B01 length and chunked": (request("POST", INFER, "Content-Length: 4", "Transfer-Encoding: chunked") + b"0\r\n\r\n", {400}),
    "B01 chunked and length": (request("POST", INFER, "Transfer-Encoding: chunked", "Content-Length: 4") + b"0\r\n\r\n", {400}),
    "B01 two equal lengths": (request("POST", INFER, "Content-Length: 2", "Content-Length: 2") + b"{}", {400}),
    "B01 two lengths": (request("POST", INFER, "Content-Length: 2", "Content-Length: 3") + b"{} ", {400}),
    "B01 +3": (request("POST", INFER, "Content-Length: +3") + b"{} ", {400}),
    "B01 1_0": (request("POST", INFER, "Content-Length: 1_0") + b"{}        ", {400}),
    "B01 -1": (request("POST", INFER, "Content-Length: -1"), {400}),
    "B01 2^64": (request("POST", INFER, f"Content-Length: {2**64}"), {400}),
    "B02 blank before the colon": (request("POST", INFER, "Transfer-Encoding : chunked") + b"0\r\n\r\n", {400}),
    "B02 xchunked": (request("POST", INFER, "Transfer-Encoding: xchunked") + b"0\r\n\r\n", {400}),
    "B02 gzip, chunked": (request("POST", INFER, "Transfer-Encoding: gzip, chunked") + b"0\r\n\r\n", {400}),
    "B02 chunked, chunked": (request("POST", INFER, "Transfer-Encoding: chunked, chunked") + b"0\r\n\r\n", {400}),
    "B02 chunked twice": (
        request("POST", INFER, "Transfer-Encoding: chunked", "Transfer-Encoding: chunked") + b"0\r\n\r\n",
        {400},
    ),
    "B02 HTTP/1.0": (f"POST {INFER} HTTP/1.0\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n".encode(), {400}),
    "B03 bare LF": (b"GET /v2 HTTP/1.1\nHost: x\n\n", {400}),
    "B03 bare CR": (b"GET /v2 HTTP/1.1\rHost: x\r\r", {400}),
    "B03 folded line": (request("GET", "/v2", "A: b", " c"), {400}),
    "B03 NUL": (request("GET", "/v2", "A: b\0c"), {400}),
    "B03 CR in a value": (request("GET", "/v2", "A: b\rc"), {400}),
    "B03 blank in a name": (request("GET", "/v2", "A b: c"), {400}),
    "B04 hexadecimal with a prefix": (request("POST", INFER, "Transfer-Encoding: chunked") + b"0x3\r\n{} \r\n0\r\n\r\n", {400}),
    "B04 negative": (request("POST", INFER, "Transfer-Encoding: chunked") + b"-3\r\n{} \r\n0\r\n\r\n", {400}),
    "B04 17 digits": (request("POST", INFER, "Transfer-Encoding: chunked") + b"F" * 17 + b"\r\n", {400}),
    "B04 long extension": (
        request("POST", INFER, "Transfer-Encoding: chunked") + b"3;" + b"x" * 500_000 + b"\r\n{} \r\n0\r\n\r\n",
        {400},
    ),
    "B04 bad end": (request("POST", INFER, "Transfer-Encoding: chunked") + b"3\r\n{} XX0\r\n\r\n", {400}),
    "B04 long trailer": (
        request("POST", INFER, "Transfer-Encoding: chunked") + b"3\r\n{} \r\n0\r\nA: " + b"x" * 500_000 + b"\r\n\r\n",
        {400, 431},
    ),
    "B05 no Host": (request("GET", "/v2", host=""), {400}),
    "B05 two Hosts": (request("GET", "/v2", "Host: y"), {400}),
    "B07 URL": (request("GET", "/v2?" + "x" * 100_000), {414}),
    "B07 header": (request("GET", "/v2", "A: " + "x" * 100_000), {431}),
    "B07 header without an end": (b"GET /v2 HTTP/1.1\r\nHost: x\r\nA: " + b"x" * 500_000, {431}),
    "B07 headers": (request("GET", "/v2", *(f"A{i}: b" for i in range(2000))), {431}),
    "A02 length above the limit": (request("POST", INFER, f"Content-Length: {BODY_LIMIT + 1}"), {413}),
    "A02 length of 10 GB": (request("POST", INFER, "Content-Length: 10000000000"), {413}),
    "A02 chunks without an end": (
        request("POST", INFER, "Transfer-Encoding: chunked") + b"8000\r\n" + b"x" * 32_768 + b"\r\n"
        + (b"8000\r\n" + b" " * 32_768 + b"\r\n") * 40,
        {413},
    ),
    "A03 tiny chunks": (request("POST", INFER, "Transfer-Encoding: chunked") + b"1\r\n \r\n" * 70_000, {413}),
    "A15 TRACE": (request("TRACE", "/v2"), {405}),
    "A15 CONNECT": (request("CONNECT", "x:1"), {400, 404, 405}),
    "A15 invented method": (request("BREW", "/v2"), {400}),
    "A15 PATCH": (request("PATCH", INFER), {405}),
    "A15 DELETE": (request("DELETE", INFER), {405}),
    "A17 WebSocket": (
        request("GET", "/v2", "Connection: Upgrade", "Upgrade: websocket", "Sec-WebSocket-Key: eA=="),
        {200, 400},
    ),
    "A17 h2c": (request("GET", "/v2", "Connection: Upgrade, HTTP2-Settings", "Upgrade: h2c", "HTTP2-Settings: AAMAAABk"), {200}),
    "A17 Range": (request("GET", "/v2", "Range: bytes=0-0,1-1"), {200}),
    "C11 HTTP/2": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", {400}),
    "C11 TLS": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(500), {400}),
}  # fmt: skip


@pytest.mark.parametrize("row", FRAMES)
async def test_malicious_http_framing_is_refused(edge: Edge, row: str) -> None:
    """Refused before any application sees it, with the connection closed where the following bytes could be read as a request."""
    data, expected = FRAMES[row]

    status, headers, answer = await edge.send(data)

    assert status in expected, answer
    assert not INSIDE.search(answer), answer
    if row[0] in "BC" or status in (413, 414, 431):
        assert headers["connection"] == "close"
    await edge.check_unharmed()


@pytest.mark.parametrize("value", ["-1", "0", "99999999999", "1e3", "0x10", "+5", "5 5", "٣", "x", "5", str(len(GOOD) + 1)])
async def test_a_wrong_header_length_is_refused(edge: Edge, value: str) -> None:
    """B08: not a number, not that of this body, or one that cuts the JSON in half."""
    head = request("POST", INFER, f"Content-Length: {len(GOOD)}").decode("latin-1")[:-2]
    raw = head.encode("latin-1") + f"Inference-Header-Content-Length: {value}\r\n\r\n".encode() + GOOD

    status, _, answer = await edge.send(raw)

    assert status == 400, answer
    await edge.check_unharmed()


PATHS = [
    "/v2/models/%2e%2e%2fetc/infer", "/v2/models/..;/infer", "/v2/models/%00/infer", "/v2//models/echo/infer",
    "/v2/models/%c0%ae%c0%ae/infer", "/v2/models/" + "x" * 6000 + "/infer", "/v2/models/a:b/infer", "/v2/models/a%5cb/infer",
    "/v2/models/%20echo/infer", "/v2/models/echo%20/infer", "/v2/models/ｅｃｈｏ/infer".encode().decode("latin-1"),
    "/v2/models/echo%3f/infer", "/v2/models/echo/versions/%2e%2e/infer", "/v2/models/echo/versions/99999999999999999999.1/infer",
    "/v2/systemsharedmemory/status", "/v2/cudasharedmemory/status", "/v2/trace/setting", "/v2/logging", "/ping", "/invocations",
    "/metrics", "/v2/repository/models/../load", "/v2/repository/models/echo/load/", "//evil/v2", "/v2/../etc/passwd",
]  # fmt: skip


@pytest.mark.parametrize("path", PATHS)
async def test_a_path_cannot_escape_its_route(edge: Edge, path: str) -> None:
    """A14, F01: not found or malformed, and never a file, an administrator's path or another spelling of a model."""
    status, _, answer = await edge.post(GOOD, path)

    assert status in (400, 404, 405)
    assert not INSIDE.search(answer.replace(b"/etc/passwd", b"")), answer
    assert edge.backend.requests == []
    assert edge.backend.controlled == []
    await edge.check_unharmed()


@pytest.mark.parametrize(
    ("encoding", "expected"), [("br", {415}), ("zstd", {415}), ("gzip, gzip", {415}), ("x" * 1000, {415}), ("gzip", {400, 415})]
)
async def test_an_unsupported_encoding_is_refused(edge: Edge, encoding: str, expected: set[int]) -> None:
    """A04, A05: refused, or malformed if the body is not in the stated encoding."""
    status, _, _ = await edge.post(GOOD, INFER, f"Content-Encoding: {encoding}")

    assert status in expected


async def test_forms_are_not_parsed(edge: Edge) -> None:
    """A16: a multipart body is refused, or parsed as JSON and found malformed."""
    body = b"--b\r\nContent-Disposition: form-data; name=a\r\n\r\n1\r\n" * 10_000

    status, _, _ = await edge.post(body, INFER, "Content-Type: multipart/form-data; boundary=b")

    assert status in (400, 415)


async def test_there_are_no_cors_headers(edge: Edge) -> None:
    """A15, F04: no CORS headers, for any origin or preflight request."""
    for data in (
        request("OPTIONS", INFER, "Origin: http://evil", "Access-Control-Request-Method: POST"),
        request("GET", "/v2", "Origin: http://evil"),
    ):
        _, headers, _ = await edge.send(data)
        assert not [name for name in headers if name.startswith("access-control")]


async def test_headers_are_not_forwarded(edge: Edge) -> None:
    """B09: client headers of any name are not sent to the next service."""
    headers = ["X-Forwarded-For: 1.1.1.1", "X_Request_Id: a", "grpc-timeout: 1n", "TE: trailers", "X-Request-Id: " + "a" * 10_000]

    status, answered, _ = await edge.post(GOOD, INFER, *headers)

    assert status == 200
    assert set(answered) <= {"content-type", "content-length", "date", "server", "x-request-id"}
    assert edge.backend.requests[0].parameters == {}


async def test_trailers_are_dropped(edge: Edge) -> None:
    """B04: fields after a body do not change the request."""
    start = request("POST", INFER, "Transfer-Encoding: chunked") + b"%x\r\n%s\r\n0\r\n" % (len(GOOD), GOOD)

    assert (await edge.send(start + b"Host: evil\r\nContent-Encoding: br\r\n\r\n"))[0] == 200
    assert (await edge.send(start + b"Content-Length: 5\r\n\r\n"))[0] in (200, 400)  # may come after the answer has begun
    await edge.check_unharmed()


# Limits: at the limit, and one past it.


@pytest.mark.parametrize(
    ("limit", "data_of", "refused"),
    [
        ({"max_url_bytes": 100}, lambda n: request("GET", "/v2?" + "x" * (96 + n)), 414),
        ({"max_headers": 10}, lambda n: request("GET", "/v2", *(f"a{i}: b" for i in range(9 + n))), 431),
        ({"max_header_bytes": 105}, lambda n: request("GET", "/v2", "a: " + "x" * (99 + n)), 431),
        (
            {"max_chunks": 5},
            lambda n: request("POST", "/v2/repository/index", "Transfer-Encoding: chunked")
            + b"1\r\n{\r\n1\r\n}\r\n" + b"1\r\n \r\n" * (2 + n) + b"0\r\n\r\n",
            413,
        ),
    ],
    ids=["URL", "headers", "header bytes", "chunks"],
)  # fmt: skip
async def test_a_request_at_a_limit_is_accepted_and_beyond_it_refused(limit: dict[str, int], data_of: Any, refused: int) -> None:
    """A request of exactly the limit is answered; one more is refused with HTTP's status for it."""
    async with edge_with(**limit) as edge:
        assert (await edge.send(data_of(0)))[0] == 200
        status, headers, _ = await edge.send(data_of(1))
        assert (status, headers["connection"]) == (refused, "close")


async def test_a_body_at_the_limit_is_accepted_and_beyond_it_refused(edge: Edge) -> None:
    """Announced or in chunks."""
    full = GOOD + b" " * (BODY_LIMIT - len(GOOD))

    def chunked(body: bytes) -> bytes:
        return request("POST", INFER, "Transfer-Encoding: chunked") + b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body)

    assert (await edge.post(full))[0] == 200
    assert (await edge.send(chunked(full)))[0] == 200
    assert (await edge.post(full + b" "))[0] == 413
    assert (await edge.send(chunked(full + b" ")))[0] == 413


@pytest.mark.parametrize(
    ("limit", "message_of", "refused"),
    [
        ("max_inputs", lambda n: {"inputs": [{**ROW, "name": f"x{i}"} for i in range(3 + n)]}, 400),
        ("max_outputs", lambda n: {"inputs": [ROW], "outputs": [{"name": "x"}] * (3 + n)}, 400),
        ("max_parameters", lambda n: {"inputs": [ROW], "parameters": {str(i): i for i in range(3 + n)}}, 400),
        ("max_rows", lambda n: {"inputs": [{**ROW, "shape": [3 + n, 2], "data": [1.0] * 2 * (3 + n)}]}, 413),
        (
            "max_element_bytes",
            lambda n: {"inputs": [{"name": "t", "datatype": "BYTES", "shape": [2], "data": ["a", "b" * (3 + n)]}]},
            413,
        ),
    ],
)
async def test_a_message_at_a_limit_is_accepted_and_beyond_it_refused(limit: str, message_of: Any, refused: int) -> None:
    """No limit refuses it; the model still may."""
    async with edge_with(request=RequestLimits(**{limit: 3})) as edge:
        path = "/v2/models/texts/infer" if "element" in limit else INFER
        _, _, allowed = await edge.post(json.dumps(message_of(0)).encode(), path)
        status, _, answer = await edge.post(json.dumps(message_of(1)).encode(), path)

    assert b"at most" not in allowed
    assert (status, b"the limit is 3" in answer) == (refused, True)


async def test_json_nesting_is_limited(edge: Edge) -> None:
    """64 levels are accepted and 65 refused, also in ignored fields; brackets in strings do not count."""

    def nested(depth: int) -> bytes:
        return b'{"more":' + b"[" * (depth - 1) + b"]" * (depth - 1) + b"," + GOOD[1:]

    assert (await edge.post(nested(64)))[0] == 200
    status, _, answer = await edge.post(nested(65))
    assert (status, json.loads(answer)["error"]) == (400, "the request body is nested deeper than 64 levels")
    texts = json.dumps({"id": '[{"\\' * 100, "more": ["[" * 100, "\\", '"'], "inputs": [ROW]}).encode()
    assert (await edge.post(texts))[0] == 200


async def test_model_names_are_limited_to_128_characters(edge: Edge) -> None:
    """E08: longer ones are malformed; others are not found."""
    assert (await edge.post(GOOD, f"/v2/models/{'m' * 128}/infer"))[0] == 404
    assert (await edge.post(GOOD, f"/v2/models/{'m' * 129}/infer"))[0] == 400


async def test_connections_are_limited() -> None:
    """G02: a connection beyond the limit gets 503 and is closed; when one has ended, another is accepted."""
    async with edge_with(max_connections=3) as edge:
        held = [await edge.open() for _ in range(3)]
        for reader, writer in held:
            writer.write(request("GET", "/v2"))
            assert (await read_answer(reader))[0] == 200

        status, headers, _ = await edge.send(b"")
        assert (status, headers["connection"]) == (503, "close")

        held[0][1].close()
        async with asyncio.timeout(20):
            while (await edge.send(request("GET", "/v2")))[0] != 200:
                pass
        for _, writer in held[1:]:
            writer.close()


# Slow clients.


@pytest.mark.parametrize("sent", [b"", b"GET /v2 HTTP/1.1\r\nHost: x\r\n", b"\r\n"])
async def test_headers_that_arrive_too_slowly_end_the_connection(sent: bytes) -> None:
    """G01: a client that sends nothing, or half of a head, gets 408 and is closed; others are served meanwhile."""
    async with edge_with(header_timeout_s=0.2) as edge:
        answers = await asyncio.gather(*(edge.send(sent) for _ in range(50)), edge.check_unharmed())

    assert {answer[0] for answer in answers[:-1] if answer} == {408}


async def test_headers_that_arrive_too_slowly_end_a_kept_alive_connection() -> None:
    """A blank line after an answer does not keep a connection open."""
    async with edge_with(header_timeout_s=0.2) as edge, asyncio.timeout(20):
        reader, writer = await edge.open()
        writer.write(request("GET", "/v2"))
        assert (await read_answer(reader))[0] == 200

        writer.write(b"\r\n")

        assert (await read_answer(reader))[0] == 408
        assert await reader.read() == b""
        writer.close()


async def test_a_body_below_the_minimum_rate_ends_the_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    """G01: a body below the minimum rate gets 408 and is closed, and its request never reaches the service."""
    monkeypatch.setattr(http1, "BODY_GRACE_S", 0.1)
    monkeypatch.setattr(listener, "BODY_GRACE_S", 0.1)  # sets how often it is checked
    async with edge_with() as edge:
        answer = await edge.send(request("POST", INFER, f"Content-Length: {len(GOOD)}") + GOOD[:-1])

        assert answer[0] == 408
        assert edge.backend.requests == []


async def test_idle_connections_are_closed() -> None:
    """P-31: a connection that is kept for a next request is closed when none comes."""
    async with edge_with(keep_alive_s=0.1) as edge, asyncio.timeout(20):
        reader, writer = await edge.open()
        writer.write(request("GET", "/v2"))
        assert (await read_answer(reader))[0] == 200

        assert await reader.read() == b""
        writer.close()


async def test_a_client_that_does_not_read_is_disconnected() -> None:
    """G01: a client that does not read a large answer is disconnected, and the buffer is freed."""
    large = bytes(50_000_000)
    async with edge_with(write_timeout_s=0.2) as edge, asyncio.timeout(30):
        edge.backend._answer = lambda asked: InferResponse(
            "echo", "1.1", (msgspec.structs.replace(asked.inputs[0], shape=(1, len(large) // 4), raw=large),)
        )
        _, writer = await edge.open()
        wish = json.dumps({"inputs": [ROW], "parameters": {"binary_data_output": True}}).encode()
        writer.transport.pause_reading()
        writer.write(request("POST", INFER, f"Content-Length: {len(wish)}") + wish)
        await until(lambda: edge.backend.requests)

        await until(lambda: not edge.face.n_connections)
        writer.transport.abort()


async def test_disconnecting_callers_leave_nothing_behind(edge: Edge) -> None:
    """P-33, G06: after half a body and a disconnect nothing is inferred, and no task or connection stays."""

    async def leave() -> None:
        _, writer = await edge.open()
        writer.write(request("POST", INFER, f"Content-Length: {len(GOOD)}") + GOOD[:10])
        await writer.drain()
        writer.close()
        await writer.wait_closed()

    before = asyncio.all_tasks()
    for _ in range(10):
        await asyncio.gather(*(leave() for _ in range(20)))
    await until(lambda: not edge.face.n_connections and asyncio.all_tasks() == before)

    assert edge.backend.requests == []


async def test_a_flood_of_bad_requests_is_not_logged(edge: Edge, capsys: pytest.CaptureFixture[str]) -> None:
    """G11: requests that the parser refuses are not logged."""
    for _ in range(50):
        await edge.send(b"\x00" * 10)

    out = capsys.readouterr()
    assert "Invalid" not in out.out + out.err


async def test_caller_input_cannot_inject_log_lines(edge: Edge, capsys: pytest.CaptureFixture[str]) -> None:
    """H01: line breaks and escapes in names are escaped in the log, and long ones cut."""
    capsys.readouterr()

    await edge.post(GOOD, "/v2/models/a%0d%0aINJECTED%1b%5b31m" + "x" * 5000 + "/infer")

    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1
    assert "\x1b" not in lines[0]
    assert len(lines[0]) < 1000
