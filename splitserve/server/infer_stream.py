"""The server's end of ``ModelStreamInfer``: many calls at once on one stream, each answered when it is done.

Answers carry the ids of their requests, and come as they are ready. A failure is an answer too: the stream goes on.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from splitserve.grpc_wire.server import Call
from splitserve.server.workers import own_place
from splitserve.streams import OFFER_KEY, WORKER_KEY

MAX_UNANSWERED = 256
"""Calls under way on one stream; with more, nothing is read from it until some are answered."""

Answer = Callable[[bytes, Call], Awaitable[bytes]]
"""A message's bytes and the stream that brought it -> the answer's bytes. Raises nothing."""


class InferStreams:
    """The streams of a server.

    Args:
        answer: answers one message.
    """

    def __init__(self, answer: Answer) -> None:
        self._answer = answer
        self._readers: set[asyncio.Task[None]] = set()

    async def serve(self, call: Call) -> None:
        """Handle one stream until its client has sent all, or `stop`; then answer what is under way."""
        index, count = own_place()
        call.begin(((OFFER_KEY, "1"), (WORKER_KEY, f"{index}/{count}")))
        stream = _Stream(self._answer, call)
        reader = asyncio.create_task(stream.read())
        self._readers.add(reader)
        try:
            await asyncio.wait([reader])
            if not reader.cancelled():
                reader.result()
            await stream.finish()
        except BaseException:
            reader.cancel()
            stream.cancel()
            raise
        finally:
            self._readers.discard(reader)

    def stop(self) -> None:
        """Read no more from any stream: each ends when what is under way on it is answered."""
        for reader in self._readers:
            reader.cancel()


class _Stream:
    def __init__(self, answer: Answer, call: Call) -> None:
        self._answer = answer
        self._call = call
        self._room = asyncio.Semaphore(MAX_UNANSWERED)
        self._answering: set[asyncio.Task[None]] = set()

    async def read(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await self._room.acquire()
            data = await self._call.read()
            if data is None:
                return
            task = loop.create_task(self._answer_one(data))
            self._answering.add(task)
            task.add_done_callback(self._answered)

    def _answered(self, task: asyncio.Task[None]) -> None:
        self._answering.discard(task)
        self._room.release()

    async def _answer_one(self, data: bytes) -> None:
        await self._call.write(await self._answer(data, self._call))

    async def finish(self) -> None:
        while self._answering:
            await asyncio.wait(self._answering)

    def cancel(self) -> None:
        for task in self._answering:
            task.cancel()
