"""Inferences over REST that no task waits for, over a real socket: begun, answered by a callback, or given up."""

from __future__ import annotations

import asyncio
import gzip
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from proxy.rest.app import RestApp
from proxy.rest.config import RestConfig
from proxy.rest.server import RestFace
from proxy.service import ProxyService
from splitserve.oip.messages import InferRequest, InferResponse, ServerMetadata
from splitserve.signature import TensorSpec
from splitserve.tensors import Tensor
from splitserve.testing import FakeInference, signature
from tests.proxy.test_attacks_http import read_answer, request, until

INFER = "/v2/models/echo/infer"
ECHO = signature("echo", [TensorSpec("x", "FP32", ("batch", 2))], version="1.1")


class Held(FakeInference):
    """Answers once it is released."""

    def __init__(self) -> None:
        super().__init__(ECHO)
        self.released = asyncio.Event()

    async def infer(self, request: InferRequest) -> InferResponse:
        self.requests.append(request)
        await self.released.wait()
        return self._answer(request)


class Front:
    """The REST face on a socket, and what is behind it."""

    def __init__(self, face: RestFace, backend: Held, service: ProxyService) -> None:
        self.face, self.backend, self.service = face, backend, service

    async def open(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await asyncio.open_connection("127.0.0.1", self.face.port)

    async def waiting(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """A connection whose request is in flight."""
        reader, writer = await self.open()
        writer.write(infer(1))
        await until(lambda: self.backend.requests)
        return reader, writer


@pytest.fixture
async def front(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Front]:
    monkeypatch.setattr(
        "splitserve.batching.batcher.OVERDUE_S", 60.0
    )  # a call that is held starts no other, however busy the machine
    async with serving_held() as front:
        yield front


@asynccontextmanager
async def serving_held() -> AsyncIterator[Front]:
    backend = Held()
    service = ProxyService(backend)
    await service.refresh()
    app = RestApp(
        service, RestConfig(metadata=ServerMetadata("test", "0"), max_body_bytes=1_000_000, default_timeout_s=30, grace_s=20)
    )
    async with RestFace(app) as face, asyncio.timeout(30):
        yield Front(face, backend, service)


def infer(*values: float, identity: str = "", headers: tuple[str, ...] = ()) -> bytes:
    """A request of one row for each value."""
    data = [number for value in values for number in (value, value)]
    tensor = {"name": "x", "datatype": "FP32", "shape": [len(values), 2], "data": data}
    body = json.dumps({"id": identity, "inputs": [tensor]}).encode()
    return request("POST", INFER, f"Content-Length: {len(body)}", *headers) + body


def first_value(body: bytes) -> float:
    value: float = json.loads(body)["outputs"][0]["data"][0]
    return value


async def test_waiting_requests_have_no_tasks(front: Front) -> None:
    """However many wait for their call, there is a task for the call only."""
    before = len(asyncio.all_tasks())
    first, writer = await front.waiting()
    others = [await front.open() for _ in range(20)]
    for number, (_, other) in enumerate(others):
        other.write(infer(number))
    await until(lambda: front.service.batcher.occupancy("echo")[0] == 20)

    n_tasks = len(asyncio.all_tasks()) - before
    front.backend.released.set()
    answers = [await read_answer(reader) for reader, _ in others]

    assert n_tasks == 1
    assert (await read_answer(first))[0] == 200
    assert [(status, first_value(body)) for status, _, body in answers] == [(200, number) for number in range(20)]
    for each in (writer, *(other for _, other in others)):
        each.close()


async def test_a_disconnected_caller_is_not_waited_for(front: Front, capsys: pytest.CaptureFixture[str]) -> None:
    """P-33: the rows of a caller who left are not sent, the call that only he waited for is given up, and a line says so."""
    _, first = await front.waiting()
    _, second = await front.open()
    second.write(infer(2))
    await until(lambda: front.service.batcher.occupancy("echo") == (1, 1))

    for writer in (second, first):
        writer.close()
        await writer.wait_closed()
    await until(lambda: front.service.batcher.occupancy("echo") == (0, 0))

    assert [asked.n_rows for asked in front.backend.requests] == [1]
    assert capsys.readouterr().out.count("CANCELLED") == 2
    counts = front.service.statistics.of("echo", "1.1").inference_stats
    assert (counts.success.count, counts.fail.count) == (0, 2)


async def test_pipelined_requests_are_answered_in_order(front: Front) -> None:
    """One connection's requests are answered one after the other, whichever way each is answered."""
    front.backend.released.set()
    reader, writer = await front.open()
    parts = [
        infer(1),
        request("GET", "/v2/health/live"),
        infer(2, identity="two"),
        request("POST", INFER, "Content-Length: 2") + b"{}",
        request("GET", "/nowhere"),
        infer(3)[:-10],
    ]

    writer.write(b"".join(parts))
    early = [await read_answer(reader) for _ in range(5)]
    writer.write(infer(3)[-10:])
    late = await read_answer(reader)

    assert [status for status, _, _ in (*early, late)] == [200, 200, 200, 400, 404, 200]
    assert [first_value(early[0][2]), json.loads(early[2][2])["id"], first_value(late[2])] == [1, "two", 3]
    writer.close()


async def test_a_thousand_pipelined_requests_are_answered(front: Front) -> None:
    """What is answered at once is answered one by one, however much of it there is."""
    reader, writer = await front.open()

    writer.write((request("POST", INFER, "Content-Length: 2") + b"{}") * 1500 + request("GET", "/v2/health/live"))
    statuses = [(await read_answer(reader))[0] for _ in range(1501)]

    assert statuses == [400] * 1500 + [200]
    writer.close()


async def test_an_error_while_encoding_an_answer_is_a_logged_500(front: Front, capsys: pytest.CaptureFixture[str]) -> None:
    """An error without a waiting task is answered as any other, and the other requests of the call are answered."""
    no_shape = Tensor("y", "FP32", (1, 1), b"123")  # not a whole number
    front.backend._answer = lambda asked: InferResponse("echo", "1.1", (no_shape,))
    reader, writer = await front.waiting()

    front.backend.released.set()
    status, _, body = await read_answer(reader)

    assert (status, json.loads(body)["reason"]) == (500, "INTERNAL")
    assert "123" not in body.decode()
    assert "internal error" in capsys.readouterr().out
    writer.write(request("GET", "/v2/health/live"))
    assert (await read_answer(reader))[0] == 200
    writer.close()


async def test_an_error_names_stage_model_and_pair(front: Front) -> None:
    """Stage, model and pair, as of an inference that is awaited."""

    def fail(_: InferRequest) -> InferResponse:
        raise RuntimeError("a bug")

    front.backend._answer = fail
    reader, writer = await front.waiting()

    front.backend.released.set()
    status, _, body = await read_answer(reader)

    assert status == 500
    expected = {"error": "internal error", "reason": "INTERNAL", "stage": "proxy", "model": "echo", "pair": "1.1"}
    assert json.loads(body) == expected
    writer.close()


async def test_a_request_whose_deadline_passes_is_answered_504(front: Front) -> None:
    """P-15: while its call is in flight, and while it is queued; the others are still answered."""
    first = await front.open()
    first[1].write(infer(1, headers=("Request-Timeout: 0.05",)))
    second = await front.open()
    second[1].write(infer(2, headers=("Request-Timeout: 0.05",)))
    third = await front.open()
    third[1].write(infer(3))

    statuses = [(await read_answer(reader))[0] for reader, _ in (first, second)]
    front.backend.released.set()

    assert statuses == [504, 504]
    assert (await read_answer(third[0]))[0] == 200
    for _, writer in (first, second, third):
        writer.close()


async def test_draining_waits_for_requests_in_flight(front: Front) -> None:
    """The answer is given, and the connection closed behind it."""
    reader, writer = await front.waiting()
    draining = asyncio.create_task(front.face.drain())
    await until(lambda: front.face._listener.is_draining)

    assert not draining.done()
    front.backend.released.set()
    status, headers, _ = await read_answer(reader)

    assert (status, headers["connection"]) == (200, "close")
    assert await reader.read() == b""
    await draining
    writer.close()


@pytest.mark.parametrize("rows", [1, 5000])
async def test_a_long_answer_is_compressed_if_accepted(front: Front, rows: int) -> None:
    """As any other answer; a short one is not worth it."""
    front.backend.released.set()
    reader, writer = await front.open()

    writer.write(infer(*range(rows), headers=("Accept-Encoding: gzip, deflate",)))
    status, headers, body = await read_answer(reader)

    assert (status, headers.get("content-encoding")) == (200, "gzip" if rows > 1 else None)
    assert len(json.loads(gzip.decompress(body) if rows > 1 else body)["outputs"][0]["data"]) == 2 * rows
    writer.close()


async def test_answered_requests_release_their_bytes() -> None:
    """However a request ends, what it held of the bytes that all may is free again."""
    async with serving_held() as front:
        budget = front.face._listener.budget
        reader, writer = await front.waiting()
        _, leaving = await front.open()
        leaving.write(infer(2))
        await until(lambda: front.service.batcher.occupancy("echo") == (1, 1))
        held: Any = budget.used

        leaving.close()
        await until(lambda: budget.used < held)
        front.backend.released.set()
        await read_answer(reader)

        assert budget.used == 0
        writer.close()
