"""The client's end of ``ModelStreamInfer``: one long-lived stream to a replica carries all calls to it.

A message on a stream costs about half of what a unary call costs in grpcio. Answers are matched by id, in any order. Errors keep
their class: our own servers say more of one than the protocol's text, in the parameters of the answer (`oip_grpc`).
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import grpc
from google.protobuf.message import DecodeError

from splitserve import oip_grpc
from splitserve.api.inference import inference_pb2 as pb
from splitserve.errors import SplitserveError, Unavailable
from splitserve.oip import InferRequest

METHOD = f"/{oip_grpc.SERVICE}/ModelStreamInfer"
OFFER_KEY = "splitserve-stream"
"""Initial metadata of a server whose streams carry whole errors and many calls at once; other servers get unary calls."""

WORKER_KEY = "splitserve-worker"
"""Beside it: which of how many processes that share the port the far end is, e.g. ``0/4``."""

Metadata = Sequence[tuple[str, str]]

ALONE = (0, 1)
OPEN_TIMEOUT_S = 5.0
MAX_AGE_S = 60.0
"""A stream is replaced after this, before the server ends the connection for its age."""

REOPEN_DELAY_S = 0.1
"""After how long a stream that ended as it began is tried again."""

NOT_OFFERED_S = 60.0
"""After how long a server that offered no stream is asked again."""


class InferStream:
    """One stream, from being open until it ends."""

    def __init__(self, call: grpc.aio.StreamStreamCall[bytes, bytes], stage: str) -> None:
        self._call = call
        self._stage = stage
        self._writing = asyncio.Lock()
        self._pending: dict[str, asyncio.Future[Any]] = {}
        self._n_sent = 0
        self.is_open = True

    async def infer(self, request: InferRequest) -> Any:
        """Send a request and wait for its answer, a ``ModelInferResponse``.

        Raises:
            Unavailable: the stream ended before the answer came.
            SplitserveError: what the far end raised.
        """
        self._n_sent += 1
        identity = str(self._n_sent)
        answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._pending[identity] = answer
        try:
            message = oip_grpc.encode_stream_request(request, identity)
            async with self._writing:
                await self._call.write(message)
            message = await answer
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
            raise self._lost() from None
        finally:
            self._pending.pop(identity, None)
        oip_grpc.raise_stream_error(message)
        return message.infer_response

    async def read(self) -> None:
        """Hand out answers until the stream ends."""
        try:
            while True:
                data: Any = await self._call.read()
                if data is grpc.aio.EOF:
                    break
                message = pb.ModelStreamInferResponse.FromString(data)
                answer = self._pending.get(message.infer_response.id)
                if answer is not None and not answer.done():
                    answer.set_result(message)
        except (grpc.aio.AioRpcError, DecodeError):
            self._call.cancel()
        finally:
            self.is_open = False
            for answer in self._pending.values():
                if not answer.done():
                    answer.set_exception(self._lost())

    async def finish(self) -> None:
        """Send nothing more; what is under way is still answered."""
        self.is_open = False
        async with self._writing:
            await self._call.done_writing()

    def cancel(self) -> None:
        self._call.cancel()

    def _lost(self) -> SplitserveError:
        return Unavailable(f"the {self._stage} service can not be reached", stage=self._stage)


class StreamKeeper:
    """Keeps a stream open on a channel, as long as the far end offers one.

    Args:
        channel: to one replica.
        stage: what the far end is.
        metadata: sent as a stream is opened.
    """

    def __init__(self, channel: grpc.aio.Channel, stage: str, metadata: Metadata = ()) -> None:
        self._metadata = metadata
        self._open: Any = channel.stream_stream(METHOD)
        self._channel = channel
        self._stage = stage
        self._readers: set[asyncio.Task[None]] = set()
        self._stream: InferStream | None = None
        self.worker = ALONE
        """Which of how many processes is at the far end of the channel, as far as is known."""
        self._keeping = asyncio.create_task(self._keep())

    @property
    def stream(self) -> InferStream | None:
        """The one to send on; None when there is none now."""
        return self._stream if self._stream is not None and self._stream.is_open else None

    async def close(self) -> None:
        self._keeping.cancel()
        await asyncio.gather(self._keeping, return_exceptions=True)
        if self._stream is not None:
            self._stream.cancel()
        await asyncio.gather(*self._readers, return_exceptions=True)

    async def _keep(self) -> None:
        while True:
            await self._until_ready()
            opened = await self._try_to_open()
            if opened is None:
                continue
            before, self._stream = self._stream, opened
            reader = asyncio.create_task(opened.read())
            self._readers.add(reader)
            reader.add_done_callback(self._readers.discard)
            if before is not None and before.is_open:
                await before.finish()
            await asyncio.wait([reader], timeout=MAX_AGE_S)

    async def _until_ready(self) -> None:
        """A stream that is opened before its peer is up ends without a word."""
        while (state := self._channel.get_state(try_to_connect=True)) is not grpc.ChannelConnectivity.READY:
            await self._channel.wait_for_state_change(state)

    async def _try_to_open(self) -> InferStream | None:
        call = self._open(metadata=self._metadata)
        try:
            async with asyncio.timeout(OPEN_TIMEOUT_S):
                metadata = await call.initial_metadata()
            facts = {str(key): str(value) for key, value in metadata or ()}
            if OFFER_KEY in facts:
                index, _, count = facts.get(WORKER_KEY, "0/1").partition("/")
                self.worker = (int(index), int(count))
                return InferStream(call, self._stage)
            is_refusal = not call.done() or await call.code() is grpc.StatusCode.UNIMPLEMENTED
        except TimeoutError:
            is_refusal = True
        except BaseException:
            call.cancel()
            raise
        call.cancel()
        await asyncio.sleep(NOT_OFFERED_S if is_refusal else REOPEN_DELAY_S)
        return None
