"""The client's end of ``ModelStreamInfer``: one long-lived stream to a replica carries all calls to it.

It has a connection of its own (`splitserve.wire.grpc.client`), where a message costs a fifth of what it costs in grpcio. Answers
are matched by id, in any order. Errors keep their class: our own servers say more of one than the protocol's text, in the
parameters of the answer (`oip_grpc`).
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Callable, Sequence
from typing import Any

import grpc
from google.protobuf.message import DecodeError

from splitserve.api.inference import inference_pb2 as pb
from splitserve.errors import SplitserveError, TooLarge, Unavailable
from splitserve.oip import protobuf
from splitserve.oip.messages import InferRequest
from splitserve.wire.grpc.client import Address, StreamCall, open_stream
from splitserve.wire.grpc.messages import CallError

METHOD = f"/{protobuf.SERVICE}/ModelStreamInfer"
Metadata = Sequence[tuple[str, str]]

ALONE = (0, 1)
OPEN_TIMEOUT_S = 5.0

REOPEN_DELAY_S = 0.1
"""After how long a stream that ended as it began is tried again."""

NOT_OFFERED_S = 60.0
"""After how long a server that offered no stream is asked again."""


class StreamTarget:
    """The way to one replica, as a stream takes it.

    Args:
        target: its gRPC name.
        stage: what the peer is.
        authority: the name that it is called by; "" for its address.
        metadata: sent as a stream is opened.
        max_message_bytes: the largest message sent or taken.
        context: of TLS; None: plain text.
        server_name: that the certificate must have; "" for the authority's.
    """

    def __init__(
        self,
        target: str,
        *,
        stage: str,
        authority: str = "",
        metadata: Metadata = (),
        max_message_bytes: int,
        context: ssl.SSLContext | None = None,
        server_name: str = "",
    ) -> None:
        self.stage = stage
        self._address = _address_of(target)
        self._metadata = metadata
        self._max_message_bytes = max_message_bytes
        self._context = context
        self._authority = authority or (f"{self._address.host}:{self._address.port}" if self._address else "")
        self._server_name = server_name or self._authority.rpartition(":")[0].strip("[]")

    @property
    def is_direct(self) -> bool:
        """Whether the name is that of one address, to which a connection can be made."""
        return self._address is not None

    async def open(self, on_message: Callable[[bytes], None]) -> StreamCall:
        """Begin a stream.

        Raises:
            OSError: the replica cannot be reached.
        """
        assert self._address is not None
        return await open_stream(
            self._address,
            METHOD,
            on_message,
            authority=self._authority,
            max_message_bytes=self._max_message_bytes,
            metadata=self._metadata,
            context=self._context,
            server_name=self._server_name,
        )


def _address_of(target: str) -> Address | None:
    try:
        return Address(target)
    except ValueError:
        return None


class InferStream:
    """One stream, from being open until it ends."""

    def __init__(self, stage: str) -> None:
        self._call: StreamCall
        self._stage = stage
        self._pending: dict[str, asyncio.Future[Any]] = {}
        self._n_sent = 0
        self.is_open = False

    def carry(self, call: StreamCall) -> None:
        """Send on this call from now on."""
        self._call = call
        self.is_open = True

    async def infer(self, request: InferRequest) -> Any:
        """Send a request and wait for its answer, a ``ModelInferResponse``.

        Raises:
            Unavailable: the stream ended before the answer came.
            TooLarge: the request is larger than the peer takes.
            SplitserveError: what the peer raised.
        """
        self._n_sent += 1
        identity = str(self._n_sent)
        answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._pending[identity] = answer
        try:
            self._call.write(protobuf.encode_stream_request(request, identity))
            message = await answer
        except CallError as error:
            if error.code == "RESOURCE_EXHAUSTED":
                text = f"the message to {self._stage} is larger than its limit"
                raise TooLarge(text, stage=self._stage) from None
            raise self._lost() from None
        finally:
            self._pending.pop(identity, None)
        protobuf.raise_stream_error(message)
        return message.infer_response

    def take(self, data: bytes) -> None:
        """Hand out an answer."""
        try:
            message = pb.ModelStreamInferResponse.FromString(data)
        except DecodeError:
            self.cancel()
            return
        answer = self._pending.get(message.infer_response.id)
        if answer is not None and not answer.done():
            answer.set_result(message)

    async def live(self) -> None:
        """Until it has ended; what is not answered by then is lost."""
        try:
            await self._call.keep_ticking()
        finally:
            self.is_open = False
            for answer in self._pending.values():
                if not answer.done():
                    answer.set_exception(self._lost())

    def finish(self) -> None:
        """Send nothing more; what is under way is still answered."""
        self.is_open = False
        self._call.half_close()

    def cancel(self) -> None:
        self.is_open = False
        self._call.cancel()

    def _lost(self) -> SplitserveError:
        return Unavailable(f"the {self._stage} service cannot be reached", stage=self._stage)


class StreamKeeper:
    """Keeps a stream to a replica open, as long as the peer offers one.

    Args:
        channel: to the replica, which tells when it can be called.
        target: where to open it.
    """

    def __init__(self, channel: grpc.aio.Channel, target: StreamTarget) -> None:
        self._channel = channel
        self._target = target
        self._streams: dict[asyncio.Task[None], InferStream] = {}
        self._stream: InferStream | None = None
        self.worker = ALONE
        """Which of how many processes is at the peer, as far as is known."""
        self._keeping = asyncio.create_task(self._keep())

    @property
    def stream(self) -> InferStream | None:
        """The one to send on; None when there is none now."""
        return self._stream if self._stream is not None and self._stream.is_open else None

    async def close(self) -> None:
        self._keeping.cancel()
        await asyncio.gather(self._keeping, return_exceptions=True)
        for stream in self._streams.values():
            stream.cancel()
        await asyncio.gather(*self._streams, return_exceptions=True)

    async def _keep(self) -> None:
        while self._target.is_direct:
            await self._until_ready()
            opened = await self._try_to_open()
            if opened is None:
                continue
            stream, call = opened
            before, self._stream = self._stream, stream
            living = asyncio.create_task(stream.live())
            self._streams[living] = stream
            living.add_done_callback(self._streams.pop)
            if before is not None and before.is_open:
                before.finish()
            leaving = asyncio.create_task(call.goaway.wait())
            try:
                await asyncio.wait([living, leaving], return_when=asyncio.FIRST_COMPLETED)
            finally:
                leaving.cancel()

    async def _until_ready(self) -> None:
        """A replica that loads or drains is not called."""
        while (state := self._channel.get_state(try_to_connect=True)) is not grpc.ChannelConnectivity.READY:
            await self._channel.wait_for_state_change(state)

    async def _try_to_open(self) -> tuple[InferStream, StreamCall] | None:
        stream = InferStream(self._target.stage)
        call: StreamCall | None = None
        delay_s = NOT_OFFERED_S
        try:
            async with asyncio.timeout(OPEN_TIMEOUT_S):
                call = await self._target.open(stream.take)
                stream.carry(call)
                facts = await asyncio.shield(call.initial_metadata)
            if protobuf.STREAM_KEY.encode() in facts:
                index, _, count = facts.get(protobuf.WORKER_KEY.encode(), b"0/1").decode().partition("/")
                self.worker = (int(index), int(count))
                return stream, call
        except TimeoutError:
            pass
        except CallError as error:
            delay_s = NOT_OFFERED_S if error.code == "UNIMPLEMENTED" else REOPEN_DELAY_S
        except OSError:
            delay_s = REOPEN_DELAY_S
        except BaseException:
            stream.is_open = False
            if call is not None:
                call.cancel()
            raise
        if call is not None:
            call.cancel()
        await asyncio.sleep(delay_s)
        return None
