"""A method table served by grpc.aio in place of our own connections: ``GRPC_ENGINE=grpcio``.

For a peer that is not compatible with our own server, and as the reference for its behaviour. It costs several times the CPU per
call, and grpcio's own limits on connections apply.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, cast

import grpc

from splitserve.oip.pending import awaited
from splitserve.server.grpc_config import GrpcConfig
from splitserve.server.tls import following_credentials
from splitserve.wire.grpc.call import CallReservation, MethodHandler, ServerCall
from splitserve.wire.grpc.messages import CallError, Metadata, too_large

_INT_MAX = 2**31 - 1

_STREAMED = grpc.stream_stream_rpc_method_handler
_ANSWERED = grpc.unary_unary_rpc_method_handler


class GrpcioServer(grpc.GenericRpcHandler):
    """As `splitserve.wire.grpc.server.GrpcServer`, whose arguments mean the same. Binds at once, see ``port``."""

    def __init__(
        self,
        methods: Mapping[str, MethodHandler],
        config: GrpcConfig,
        *,
        status_of: Callable[[Exception], CallError],
        new_reservation: Callable[[], CallReservation],
    ) -> None:
        self._methods, self._status_of, self._new_reservation = methods, status_of, new_reservation
        self._max_message_bytes = config.max_message_bytes
        limits = config.connection_limits
        options = {
            "grpc.max_receive_message_length": config.max_message_bytes,
            "grpc.max_send_message_length": config.max_message_bytes,
            "grpc.max_metadata_size": limits.max_metadata_bytes,
            "grpc.absolute_max_metadata_size": limits.max_metadata_bytes,
            "grpc.max_concurrent_streams": limits.max_streams,
            "grpc.max_allowed_incoming_connections": limits.max_connections,
            "grpc.keepalive_time_ms": _ms(limits.keepalive_time_s),
            "grpc.keepalive_timeout_ms": _ms(limits.keepalive_timeout_s),
            "grpc.keepalive_permit_without_calls": 1,
            "grpc.max_connection_age_ms": _ms(limits.max_connection_age_s),
            "grpc.max_connection_age_grace_ms": _ms(limits.max_connection_age_grace_s),
            "grpc.max_connection_idle_ms": _ms(limits.max_connection_idle_s),
            "grpc.so_reuseport": int(config.shares_port),
        }
        self._server = grpc.aio.server(handlers=[self], options=list(options.items()))
        address = f"{f'[{config.host}]' if ':' in config.host else config.host}:{config.port}"
        add_port = self._server.add_insecure_port
        if config.tls is not None:
            add_port = partial(self._server.add_secure_port, server_credentials=following_credentials(config.tls))
        self.port: int = add_port(address)

    async def start(self) -> None:
        await self._server.start()

    async def stop(self, grace_s: float = 0.0) -> None:
        await self._server.stop(grace_s)

    def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler[Any, Any] | None:
        method = self._methods.get(details.method)
        if method is None:
            return None
        handle = _STREAMED if method.streaming is not None else _ANSWERED
        return handle(partial(self._stream if method.streaming is not None else self._unary, method))

    async def _unary(self, method: Any, message: bytes, context: Any) -> bytes:
        call = cast(ServerCall, _GrpcioCall(context, self._max_message_bytes))
        reservation = self._new_reservation()
        try:
            reservation.reserve(len(message))
            answering = awaited(partial(method.begin, message, call)) if method.begin else method.unary(message, call)
            answer: bytes = await answering
            context.set_trailing_metadata(tuple(call.trailing_metadata))
            return answer
        except Exception as error:
            await self._abort(context, error)
            raise  # never reached: abort raises
        finally:
            reservation.release()

    async def _stream(self, method: Any, _: object, context: Any) -> None:
        call = _GrpcioCall(context, self._max_message_bytes)
        sending = asyncio.create_task(call.send_all())
        try:
            await method.streaming(call)
            await call.drain()
            context.set_trailing_metadata(tuple(call.trailing_metadata))
        except (Exception, asyncio.CancelledError) as error:
            failure = call.failure or error
            if isinstance(failure, asyncio.CancelledError):
                raise
            await self._abort(context, failure)
        finally:
            sending.cancel()

    async def _abort(self, context: Any, error: Exception) -> Any:
        status = error if isinstance(error, CallError) else self._status_of(error)
        await context.abort(grpc.StatusCode[status.code], status.message, tuple(status.trailing))


class _GrpcioCall:
    """What handlers use of a `ServerCall`."""

    def __init__(self, context: Any, max_message_bytes: int) -> None:
        self._context, self._max_message_bytes = context, max_message_bytes
        self._unsent: asyncio.Queue[tuple[Callable[[Any], Any], object]] = asyncio.Queue()
        self._task = asyncio.current_task()
        self.metadata = tuple((name, value) for name, value in context.invocation_metadata() if isinstance(value, str))
        self.peer, self.time_remaining, self.drain = context.peer(), context.time_remaining, self._unsent.join
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
        if len(message) > self._max_message_bytes:
            raise too_large("Sent", len(message), self._max_message_bytes)
        self._unsent.put_nowait((self._context.write, message))

    async def write(self, message: bytes) -> None:
        self.write_nowait(message)
        await self.drain()

    def fail(self, error: CallError) -> None:
        self.failure = error
        if self._task is not None:
            self._task.cancel()

    async def send_all(self) -> None:
        while True:
            send, what = await self._unsent.get()
            await send(what)
            self._unsent.task_done()


def _ms(seconds: float) -> int:
    return round(min(seconds * 1000, _INT_MAX))
