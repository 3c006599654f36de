"""Sockets that services listen on."""

from __future__ import annotations

import socket

BACKLOG = 2048


def listen(host: str, port: int, *, shares_port: bool) -> socket.socket:
    """A socket that listens; of all addresses of both families for ``::``.

    Args:
        host: an address or a name.
        port: 0 takes a free one.
        shares_port: with other processes of the service.

    Raises:
        SystemExit: that can not be, for the reason that it gives.
    """
    is_v6 = ":" in host
    try:
        return socket.create_server(
            (host, port),
            family=socket.AF_INET6 if is_v6 else socket.AF_INET,
            backlog=BACKLOG,
            reuse_port=shares_port,
            dualstack_ipv6=host == "::",
        )
    except OSError as error:
        raise SystemExit(f"can not listen on {host}:{port}: {error.strerror}") from None
