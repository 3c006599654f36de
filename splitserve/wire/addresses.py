"""Addresses of peers, as they are shown."""

from __future__ import annotations

from typing import Any


def peer_address(transport: Any) -> str:
    """The address of a connection's peer, ``host:port``; "" if it has none, as on a unix socket."""
    name = transport.get_extra_info("peername")
    if not isinstance(name, tuple):
        return ""
    host, port = name[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
