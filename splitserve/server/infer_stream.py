"""The server's end of ``ModelStreamInfer``: many calls at once on one stream, each answered when it is done.

Answers carry the ids of their requests, and come as they are ready. A failure is an answer too: the stream goes on.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from typing import Any

import grpc

from splitserve.server.workers import own_place
from splitserve.streams import OFFER_KEY, WORKER_KEY

MAX_UNANSWERED = 256
"""Calls under way on one stream; with more, nothing is read from it until some are answered."""

Context = grpc.aio.ServicerContext[bytes, bytes]
Answer = Callable[[bytes, Context], Awaitable[bytes]]
"""A message's bytes and the stream that brought it -> the answer's bytes. Raises nothing."""


class InferStreams:
    """The streams of a server.

    Args:
        answer: answers one message.
    """

    def __init__(self, answer: Answer) -> None:
        self._answer = answer
        self._readers: set[asyncio.Task[None]] = set()

    async def serve(self, _: Any, context: Context) -> None:
        """Handle one stream until its client has sent all, or `stop`; then answer what is under way."""
        index, count = own_place()
        await context.send_initial_metadata(((OFFER_KEY, "1"), (WORKER_KEY, f"{index}/{count}")))
        stream = _Stream(self._answer, context)
        reader = asyncio.create_task(stream.read())
        self._readers.add(reader)
        try:
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.shield(reader)
            if asyncio.current_task().cancelling():  # type: ignore[union-attr]
                reader.cancel()
                stream.cancel()
                raise asyncio.CancelledError
            await stream.finish()
        finally:
            self._readers.discard(reader)

    def stop(self) -> None:
        """Read no more from any stream: each ends when what is under way on it is answered."""
        for reader in self._readers:
            reader.cancel()


class _Stream:
    def __init__(self, answer: Answer, context: Context) -> None:
        self._answer = answer
        self._context = context
        self._writing = asyncio.Lock()
        self._room = asyncio.Semaphore(MAX_UNANSWERED)
        self._calls: set[asyncio.Task[None]] = set()

    async def read(self) -> None:
        while True:
            await self._room.acquire()
            data: Any = await self._context.read()
            if data is grpc.aio.EOF:
                return
            call = asyncio.create_task(self._answer_one(data))
            self._calls.add(call)
            call.add_done_callback(self._ended)

    def _ended(self, call: asyncio.Task[None]) -> None:
        self._calls.discard(call)
        self._room.release()

    async def _answer_one(self, data: bytes) -> None:
        answer = await self._answer(data, self._context)
        async with self._writing:
            with contextlib.suppress(grpc.aio.UsageError, asyncio.InvalidStateError):  # the client has left
                await self._context.write(answer)

    async def finish(self) -> None:
        while self._calls:
            await asyncio.wait(self._calls)

    def cancel(self) -> None:
        for call in self._calls:
            call.cancel()
