"""A method table served by grpc.aio in place of our own connections: ``GRPC_ENGINE=grpcio``.

For a peer that is not compatible with our own server, and as the reference for its behaviour. It costs several times the CPU per
call, and grpcio's own limits on connections apply.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any
from urllib.parse import unquote

import grpc

from splitserve.oip.pending import awaited
from splitserve.server.grpc_config import GrpcConfig
from splitserve.server.tls import following_credentials
from splitserve.wire.grpc.call import CallReservation, MethodHandler
from splitserve.wire.grpc.messages import CallError, Metadata, message_prefix
from splitserve.wire.listening import listen_unix


@dataclass(eq=False)
class GrpcioServer(grpc.GenericRpcHandler):
    """As `splitserve.wire.grpc.server.GrpcServer`, whose arguments mean the same. Binds at once, see ``port``."""

    methods: Mapping[str, MethodHandler]
    config: GrpcConfig
    status_of: Callable[[Exception], CallError]
    new_reservation: Callable[[], CallReservation]

    def __post_init__(self) -> None:
        host, port, tls = self.config.host, self.config.port, self.config.tls
        address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        self._server = grpc.aio.server(handlers=[self], options=self.config.grpcio_options)
        if tls is None:
            self.port: int = self._server.add_insecure_port(address)
        else:
            self.port = self._server.add_secure_port(address, following_credentials(tls))
        if self.config.socket_path:
            listen_unix(self.config.socket_path).close()  # replaces what a process has left
            self._server.add_insecure_port(f"unix:{self.config.socket_path}")
        self.start = self._server.start

    async def stop(self, grace_s: float = 0.0) -> None:
        await self._server.stop(grace_s)

    def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler[Any, Any] | None:
        method = self.methods.get(details.method)
        return grpc.stream_stream_rpc_method_handler(partial(self._serve, method)) if method else None

    async def _serve(self, method: MethodHandler, _: object, context: Any) -> None:
        call: Any = _GrpcioCall(context, self.config.max_message_bytes)
        sending = asyncio.create_task(call.send_all())
        try:
            await (method.streaming(call) if method.streaming else self._answer_one(method, call))
            await call.drain()
            context.set_trailing_metadata(tuple(call.trailing_metadata))
        except (Exception, asyncio.CancelledError) as error:
            failure = call.failure or error
            if isinstance(failure, asyncio.CancelledError):
                raise
            status = failure if isinstance(failure, CallError) else self.status_of(failure)
            await context.abort(grpc.StatusCode[status.code], status.message, (*status.trailing, *call.trailing_metadata))
        finally:
            sending.cancel()

    async def _answer_one(self, method: Any, call: Any) -> None:
        """A unary call: on the wire it is a stream of one message each way."""
        message = await call.read()
        if message is None or await call.read() is not None:
            raise CallError("UNIMPLEMENTED", "expected one message")
        reservation = self.new_reservation()
        try:
            reservation.reserve(len(message))
            answer = awaited(partial(method.begin, message, call)) if method.begin else method.unary(message, call)
            call.write_nowait(await answer)
        finally:
            reservation.release()


class _GrpcioCall:
    """What handlers use of a `ServerCall`."""

    def __init__(self, context: Any, max_message_bytes: int) -> None:
        self._context, self._max_message_bytes = context, max_message_bytes
        self._unsent: asyncio.Queue[tuple[Callable[[Any], Any], object]] = asyncio.Queue()
        self._task: Any = asyncio.current_task()
        self.metadata = tuple((name, value) for name, value in context.invocation_metadata() if isinstance(value, str))
        self.peer, self.time_remaining, self.drain = context.peer(), context.time_remaining, self._unsent.join
        self.address = unquote(self.peer.partition(":")[2])  # "ipv4:127.0.0.1:1", "ipv6:%5B::1%5D:1"
        self.trailing_metadata: Metadata = ()
        self.failure: CallError | None = None

    @property
    def send_queue(self) -> int:
        return self._unsent.qsize()

    async def read(self) -> bytes | None:
        message = await self._context.read()
        return None if message is grpc.aio.EOF else message

    def send_initial_metadata(self, metadata: Metadata = ()) -> None:
        self._unsent.put_nowait((self._context.send_initial_metadata, tuple(metadata)))

    def write_nowait(self, message: bytes) -> None:
        message_prefix(message, self._max_message_bytes)  # raises if it is too large
        self._unsent.put_nowait((self._context.write, message))

    async def write(self, message: bytes) -> None:
        self.write_nowait(message)
        await self.drain()

    def fail(self, error: CallError) -> None:
        self.failure = error
        self._task.cancel()

    async def send_all(self) -> None:
        while True:
            send, what = await self._unsent.get()
            await send(what)
            self._unsent.task_done()
