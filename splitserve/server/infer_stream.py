"""Server side of ``ModelStreamInfer``: many requests in flight on one stream, each answered when it is done.

Answers carry the ids of their requests and are sent as they are ready, in any order. An error is a message too, and does not end
the stream. So is a cancellation: the request that it names is abandoned, and not answered.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from typing import Protocol

from splitserve.oip import protobuf
from splitserve.server.workers import own_place
from splitserve.telemetry.traces import TraceContext, received_in
from splitserve.wire.grpc.call import ServerCall
from splitserve.wire.grpc.messages import CallError

MAX_UNANSWERED = 256
"""Limit on the requests in flight on one stream; at the limit nothing is read from it."""


class StreamPending(Protocol):
    """A request in progress, by the id in its message."""

    identity: str

    def cancel(self) -> object:
        """Abandon the request: its callback is not called after this."""
        ...


Begin = Callable[[bytes, ServerCall, Callable[[bytes], None], TraceContext | None], StreamPending | None]
"""Takes a message, its stream, a callback for the response's bytes, which is called at once or later, and the context in the
headers of the stream. Raises nothing."""


class InferStreams:
    """The open streams of a server.

    Args:
        begin: begins to handle one message.
    """

    def __init__(self, begin: Begin) -> None:
        self._begin = begin
        self._readers: set[asyncio.Task[None]] = set()

    async def serve(self, call: ServerCall) -> None:
        """Handle a stream until the client half-closes it, or `stop`; then answer the requests in flight."""
        index, count = own_place()
        call.send_initial_metadata(((protobuf.STREAM_KEY, "1"), (protobuf.WORKER_KEY, f"{index}/{count}")))
        stream = _Stream(self._begin, call, received_in(call.metadata))
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
        """Stop reading: each stream ends when its requests in flight are answered."""
        for reader in self._readers:
            reader.cancel()


class _Stream:
    def __init__(self, begin: Begin, call: ServerCall, trace: TraceContext | None) -> None:
        self._begin = begin
        self._trace = trace
        self._call = call
        self._n_read = 0
        self._unanswered: dict[int, StreamPending | None] = {}
        self._changed = asyncio.Event()

    async def read(self) -> None:
        while True:
            while len(self._unanswered) >= MAX_UNANSWERED or self._call.send_queue:
                await self._until_fewer()
            data = await self._call.read()
            if data is None:
                return
            if (identity := protobuf.cancelled_id(data)) is not None:
                self._cancel(identity)
                continue
            self._n_read += 1
            number = self._n_read
            self._unanswered[number] = None
            pending = self._begin(data, self._call, partial(self._answer, number), self._trace)
            if number in self._unanswered:
                self._unanswered[number] = pending

    def _cancel(self, identity: str) -> None:
        """Abandon a request, unless it has been answered."""
        for number, pending in self._unanswered.items():
            if pending is not None and pending.identity == identity:
                del self._unanswered[number]
                pending.cancel()
                return

    async def _until_fewer(self) -> None:
        """Wait until a request is answered, or the send queue is empty."""
        if self._call.send_queue:
            await self._call.drain()
        else:
            self._changed.clear()
            await self._changed.wait()

    def _answer(self, number: int, answer: bytes) -> None:
        del self._unanswered[number]
        self._changed.set()
        try:
            self._call.write_nowait(answer)
        except CallError as error:  # the response is too large, so the stream ends with that status
            self._call.fail(error)

    async def finish(self) -> None:
        while self._unanswered or self._call.send_queue:
            await self._until_fewer()

    def cancel(self) -> None:
        for pending in self._unanswered.values():
            if pending is not None:
                pending.cancel()
