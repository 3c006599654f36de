"""What the HTTP connections to one port share: what answers their requests, limits, the time, and their end."""

from __future__ import annotations

import asyncio
import http.client
import sys
from collections.abc import Callable
from email.utils import formatdate
from typing import TYPE_CHECKING

import msgspec

from splitserve.wire.byte_budget import ByteBudget
from splitserve.wire.http1.messages import Answer, Incoming, Reply
from splitserve.wire.listening import Connections

if TYPE_CHECKING:
    from splitserve.wire.http1.connection import HttpConnection

BODY_GRACE_S = 5.0
"""How long a body may take before its rate is looked at."""

LOOK_INTERVAL_S = 1.0
"""How often connections are looked at for what takes too long; more often if a limit is shorter."""


class HttpLimits(msgspec.Struct, frozen=True):
    """What a connection may cost. Sizes are in bytes."""

    max_url_bytes: int = 8 * 1024
    max_header_bytes: int = 64 * 1024
    max_headers: int = 100
    max_chunks: int = 65_536
    max_connections: int = 2_000
    header_timeout_s: float = 10.0
    min_body_bytes_per_s: int = 1_000
    keep_alive_s: float = 60.0
    write_timeout_s: float = 30.0

    @property
    def look_interval_s(self) -> float:
        """Often enough for the shortest of the limits."""
        shortest_s = min(self.header_timeout_s, self.keep_alive_s, self.write_timeout_s, BODY_GRACE_S)
        return min(LOOK_INTERVAL_S, shortest_s / 2)


class Listener:
    """What the connections to one port share.

    Args:
        answer: answers a request, see `Answer`; what it raises is logged, and is a 500.
        limits: of each connection.
        max_body_bytes: of a request.
        budget: of the bytes of all bodies together; None: each is bounded by itself only.
    """

    def __init__(
        self,
        answer: Callable[[Incoming, Reply], Answer],
        limits: HttpLimits,
        *,
        max_body_bytes: int,
        budget: ByteBudget | None = None,
    ) -> None:
        self.answer = answer
        self.limits = limits
        self.max_body_bytes = max_body_bytes
        self.budget = budget or ByteBudget(sys.maxsize)
        self.connections: Connections[HttpConnection] = Connections()
        self.is_closing = False
        self._heads: dict[tuple[int, str], bytes] = {}

    def head(self, status: int, content_type: str) -> bytes:
        """The first lines of an answer, up to the length of its body."""
        head = self._heads.get((status, content_type))
        if head is None:
            phrase = http.client.responses.get(status, "Client Closed Request")
            lines = (f"HTTP/1.1 {status} {phrase}", f"date: {formatdate(usegmt=True)}", f"content-type: {content_type}")
            head = self._heads[status, content_type] = "\r\n".join((*lines, "content-length: ")).encode()
        return head

    async def keep_looking(self) -> None:
        """Close what takes too long, and tell the time, until cancelled."""
        while True:
            await asyncio.sleep(self.limits.look_interval_s)
            self._heads.clear()
            self.connections.look()

    def close(self) -> None:
        """Answer what is under way, then close each connection."""
        self.is_closing = True
        for connection in self.connections:
            connection.finish()
