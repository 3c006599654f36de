"""The gRPC server of a face, of the engine that is configured, bound to its port."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import msgspec

from splitserve.server.grpc_config import GrpcConfig
from splitserve.server.tls import following_ssl_context
from splitserve.wire.byte_budget import ByteBudget
from splitserve.wire.grpc.call import MethodHandler
from splitserve.wire.grpc.messages import CallError
from splitserve.wire.grpc.server import GrpcServer
from splitserve.wire.listening import listen, listen_unix

if TYPE_CHECKING:
    from splitserve.server.grpcio_server import GrpcioServer


def bound_server(
    methods: Mapping[str, MethodHandler],
    config: GrpcConfig,
    *,
    status_of: Callable[[Exception], CallError],
    budget: ByteBudget,
) -> tuple[GrpcServer | GrpcioServer, int]:
    """The server, and the port that it will listen on.

    Args:
        methods: what it serves, by path.
        config: how.
        status_of: the status of an exception that a handler raised.
        budget: of the bytes that calls hold.
    """
    if config.engine == "grpcio":
        from splitserve.server.grpcio_server import GrpcioServer  # imports grpcio, which our own server does not need

        grpcio_server = GrpcioServer(methods, config, status_of, budget.reservation)
        return grpcio_server, grpcio_server.port
    sockets = [listen(config.host, config.port, shares_port=config.shares_port)]
    if config.socket_path:
        sockets.append(listen_unix(config.socket_path))
    server = GrpcServer(
        methods,
        sockets,
        msgspec.structs.replace(config.connection_limits, max_message_bytes=config.max_message_bytes),
        context=following_ssl_context(config.tls, "h2") if config.tls else None,
        status_of=status_of,
        new_reservation=budget.reservation,
    )
    return server, sockets[0].getsockname()[1]
