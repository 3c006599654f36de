"""The client side of ``ModelStreamInfer``: one long-lived stream to a replica carries all calls to it.

The stream has a connection of its own (`splitserve.wire.grpc.client`), on which a message costs a fifth of what it costs in
grpcio. Responses are matched to requests by id, in any order. Errors keep their class: splitserve's servers put what the
protocol's error text cannot hold into the parameters of the response (`splitserve.oip.protobuf`).
"""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections.abc import Callable, Sequence
from typing import Any

import grpc
from google.protobuf.message import DecodeError

from splitserve.errors import SplitserveError, TooLarge, Unavailable
from splitserve.oip import protobuf
from splitserve.oip.messages import InferRequest
from splitserve.wire.grpc.client import Address, StreamCall, open_stream
from splitserve.wire.grpc.messages import CallError

METHOD = f"/{protobuf.SERVICE}/ModelStreamInfer"
ALONE = (0, 1)
"""Index and count of a process that shares its port with no other."""

OPEN_TIMEOUT_S = 5.0

REOPEN_DELAY_S = 0.1
"""Pause before a stream that failed to open is opened again."""

UNSUPPORTED_RETRY_S = 60.0
"""Pause before a stream is opened again at a server that does not support it."""


class StreamTarget:
    """Where and how streams to one replica are opened.

    Args:
        target: its gRPC name.
        stage: of the peer, for errors.
        authority: ``:authority`` of the calls; "" for the address.
        metadata: sent when a stream is opened.
        max_message_bytes: the largest message sent or received.
        context: of TLS; None: plain text.
        server_name: expected in the certificate; "" for the host of the authority.
    """

    def __init__(
        self,
        target: str,
        *,
        stage: str,
        authority: str = "",
        metadata: Sequence[tuple[str, str]] = (),
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
        """Whether the target is a single address, so that a connection can be opened to it."""
        return self._address is not None

    async def open(self, on_message: Callable[[bytes], None]) -> StreamCall:
        """Open a stream.

        Args:
            on_message: called with each message received.

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
    """An open stream and its calls in flight."""

    def __init__(self, stage: str) -> None:
        self._call: StreamCall
        self._stage = stage
        self._pending: dict[str, asyncio.Future[Any]] = {}
        self._n_sent = 0
        self.is_open = False

    def carry(self, call: StreamCall) -> None:
        """Use this call from now on."""
        self._call = call
        self.is_open = True

    async def infer(self, request: InferRequest) -> tuple[Any, Sequence[bytes] | None]:
        """Send a request and await its ``ModelInferResponse``. If this is cancelled, so is the request at the peer.

        Returns:
            The message, and its raw contents if they are not in it: arguments of `protobuf.decode_response`.

        Raises:
            Unavailable: the stream ended before the response arrived.
            TooLarge: the request exceeds the limit of a message.
            SplitserveError: raised by the peer.
        """
        self._n_sent += 1
        identity = str(self._n_sent)
        answer: asyncio.Future[Any] = self._call.create_future()
        self._pending[identity] = answer
        try:
            self._call.write(protobuf.encode_stream_request(request, identity))
            message, raws = await answer
        except CallError as error:
            if error.code == "RESOURCE_EXHAUSTED":
                text = f"the message to {self._stage} is larger than its limit"
                raise TooLarge(text, stage=self._stage) from None
            raise self._unavailable() from None
        except asyncio.CancelledError:
            self._cancel(identity)
            raise
        finally:
            self._pending.pop(identity, None)
        protobuf.raise_stream_error(message)
        return message.infer_response, raws

    def _cancel(self, identity: str) -> None:
        if self.is_open:  # nothing can be written to one that is half-closed
            with contextlib.suppress(CallError):
                self._call.write(protobuf.encode_stream_cancel(identity))

    def on_message(self, data: bytes) -> None:
        """Pass a response to the call that awaits it."""
        try:
            parsed = message, _ = protobuf.parse_stream_response(data)
        except DecodeError:
            self.cancel()
            return
        answer = self._pending.get(message.infer_response.id)
        if answer is not None and not answer.done():
            answer.set_result(parsed)

    async def run(self) -> None:
        """Run until the stream has ended; calls that are still in flight then fail."""
        try:
            await self._call.keep_ticking()
        finally:
            self.is_open = False
            for answer in self._pending.values():
                if not answer.done():
                    answer.set_exception(self._unavailable())

    def half_close(self) -> None:
        """Half-close: send nothing more. Calls in flight are still answered."""
        self.is_open = False
        self._call.half_close()

    def cancel(self) -> None:
        self.is_open = False
        self._call.cancel()

    def _unavailable(self) -> SplitserveError:
        return Unavailable(f"the {self._stage} service cannot be reached", stage=self._stage)


class StreamKeeper:
    """Keeps a stream to a replica open, if the peer supports that.

    Args:
        channel: to the replica; its state says when the replica accepts calls.
        target: where to open it.
        on_open: called for each stream that is open.
    """

    def __init__(self, channel: grpc.aio.Channel, target: StreamTarget, on_open: Callable[[], None] = lambda: None) -> None:
        self._channel = channel
        self._target = target
        self._on_open = on_open
        self._streams: dict[asyncio.Task[None], InferStream] = {}
        self._stream: InferStream | None = None
        self.worker = ALONE
        """Index and count of the process that answers, among those that share the port, as far as known."""
        self._keeping = asyncio.create_task(self._keep())

    @property
    def stream(self) -> InferStream | None:
        """The open stream; None if there is none at present."""
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
            opened = await self._open()
            if opened is None:
                continue
            stream, call = opened
            self._on_open()
            previous, self._stream = self._stream, stream
            running = asyncio.create_task(stream.run())
            self._streams[running] = stream
            running.add_done_callback(self._streams.pop)
            if previous is not None and previous.is_open:
                previous.half_close()
            goaway = asyncio.create_task(call.goaway.wait())
            try:
                await asyncio.wait([running, goaway], return_when=asyncio.FIRST_COMPLETED)
            finally:
                goaway.cancel()

    async def _until_ready(self) -> None:
        """Wait until the replica is READY: one that loads or drains is not called."""
        while (state := self._channel.get_state(try_to_connect=True)) is not grpc.ChannelConnectivity.READY:
            await self._channel.wait_for_state_change(state)

    async def _open(self) -> tuple[InferStream, StreamCall] | None:
        stream = InferStream(self._target.stage)
        call: StreamCall | None = None
        delay_s = UNSUPPORTED_RETRY_S
        try:
            async with asyncio.timeout(OPEN_TIMEOUT_S):
                call = await self._target.open(stream.on_message)
                stream.carry(call)
                facts = await asyncio.shield(call.initial_metadata)
            if protobuf.STREAM_KEY.encode() in facts:
                index, _, count = facts.get(protobuf.WORKER_KEY.encode(), b"0/1").decode().partition("/")
                self.worker = (int(index), int(count))
                return stream, call
        except TimeoutError:
            pass
        except CallError as error:
            delay_s = UNSUPPORTED_RETRY_S if error.code == "UNIMPLEMENTED" else REOPEN_DELAY_S
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
