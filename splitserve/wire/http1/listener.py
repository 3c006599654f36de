"""What the HTTP/1.1 connections of one port share: the handler, limits, cached response heads, ticks, draining."""

from __future__ import annotations

import asyncio
import http.client
import math
import sys
from collections.abc import Callable
from email.utils import formatdate
from typing import Protocol

import msgspec

from splitserve.wire.byte_budget import ByteBudget
from splitserve.wire.http1.messages import Handled, HttpRequest, HttpResponse, Respond
from splitserve.wire.listening import Connections, OpenConnection

BODY_GRACE_S = 5.0
"""A body younger than this may arrive at any rate."""

TICK_INTERVAL_S = 1.0
"""How often timeouts are checked; more often if one is shorter."""


class HttpLimits(msgspec.Struct, frozen=True):
    """Limits on one connection. Sizes are in bytes.

    ``drops_waiting``: at ``max_connections`` the one that has waited longest for its client is closed rather than the new one.
    """

    max_url_bytes: int = 8 * 1024
    max_header_bytes: int = 64 * 1024
    max_headers: int = 100
    max_chunks: int = 65_536
    max_connections: int = 2_000
    header_timeout_s: float = 10.0
    min_body_bytes_per_s: int = 1_000
    keep_alive_s: float = 75.0
    write_timeout_s: float = 30.0
    drops_waiting: bool = False

    @property
    def tick_interval_s(self) -> float:
        """At most half of the shortest timeout."""
        shortest_s = min(self.header_timeout_s, self.keep_alive_s, self.write_timeout_s, BODY_GRACE_S)
        return min(TICK_INTERVAL_S, shortest_s / 2)


def json_error(status: int, message: str) -> HttpResponse:
    """A response with the message as ``{"error": "…"}``."""
    return HttpResponse(status, msgspec.json.encode({"error": message}))


class OpenHttpConnection(OpenConnection, Protocol):
    """A connection, as its listener sees it."""

    def waits_since(self) -> float:
        """Since when it waits for its client, on the loop's clock; infinity while a request is being answered."""
        ...


class HttpListener:
    """What the connections to one port share.

    Args:
        handler: answers a request, see `Handled`; an exception that it raises is logged and becomes a 500.
        limits: of each connection.
        max_body_bytes: of a request.
        budget: of the bytes of all request bodies together; None: unlimited.
        error: renders a request that is rejected here, and a 500, from status and message.
    """

    def __init__(
        self,
        handler: Callable[[HttpRequest, Respond], Handled],
        limits: HttpLimits,
        *,
        max_body_bytes: int,
        budget: ByteBudget | None = None,
        error: Callable[[int, str], HttpResponse] = json_error,
    ) -> None:
        self.handler = handler
        self.limits = limits
        self.max_body_bytes = max_body_bytes
        self.budget = budget or ByteBudget(sys.maxsize)
        self.error = error
        self.connections: Connections[OpenHttpConnection] = Connections()
        self.is_draining = False
        """Whether each response is its connection's last."""
        self._heads: dict[tuple[int, str], bytes] = {}

    def head(self, status: int, content_type: str) -> bytes:
        """Status line and headers of a response, up to the value of Content-Length."""
        head = self._heads.get((status, content_type))
        if head is None:
            phrase = http.client.responses.get(status, "Client Closed Request")
            lines = (f"HTTP/1.1 {status} {phrase}", f"date: {formatdate(usegmt=True)}", f"content-type: {content_type}")
            head = self._heads[status, content_type] = "\r\n".join((*lines, "content-length: ")).encode()
        return head

    def make_room(self) -> bool:
        """Close the connection that has waited longest for its client. False if each is being answered, or none may be closed."""
        waiting = [each for each in self.connections if each.waits_since() < math.inf] if self.limits.drops_waiting else []
        if waiting:
            min(waiting, key=lambda each: each.waits_since()).abort()
        return bool(waiting)

    async def keep_ticking(self) -> None:
        """Check timeouts and renew the Date header, until cancelled."""
        while True:
            await asyncio.sleep(self.limits.tick_interval_s)
            self._heads.clear()
            self.connections.tick()

    def drain(self) -> None:
        """Answer the requests in flight, then close each connection."""
        self.is_draining = True
        self.connections.drain()
