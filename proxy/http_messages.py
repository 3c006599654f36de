"""An HTTP request as it arrives and the answer to it: what the connection and the REST face say to each other."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Hashable

import msgspec

from splitserve.errors import TooLarge

JSON = "application/json"  # exactly: KServe's client compares the whole header


class Response(msgspec.Struct):
    """An HTTP answer."""

    status: int
    body: bytes
    content_type: str = JSON
    headers: tuple[tuple[str, str], ...] = ()


class Incoming(msgspec.Struct, eq=False):
    """A request whose head is complete; its body may be on its way still.

    Names of headers are in lower case, those that come several times are joined. Source: RFC 9110, section 5.3.
    """

    caller: Hashable
    method: str = ""
    path: str = ""
    headers: dict[bytes, bytes] = {}
    max_body_bytes: int = 0
    size: int = 0
    is_complete: bool = False
    keep_alive: bool = False
    refusal: Response | None = None
    """Answers it whatever it asks for: it is not HTTP as it should be."""

    invite: Callable[[], None] | None = None
    """Tells a client that waits for that to send its body."""

    url: bytes = b""
    chunks: list[bytes] = []
    waiter: asyncio.Future[None] | None = None

    def header(self, name: bytes) -> str | None:
        """A header's value as text; None if there is none of that name."""
        value = self.headers.get(name)
        return None if value is None else value.decode("latin-1")

    async def body(self) -> bytes:
        """The whole body, once it is there.

        Raises:
            TooLarge: it has more bytes than are taken; what comes of them is not kept.
        """
        if not self.is_complete and self._declared_size <= self.max_body_bytes:
            if self.invite is not None:
                self.invite()
            if self.size <= self.max_body_bytes:
                self.waiter = asyncio.get_running_loop().create_future()
                await self.waiter
        if (size := max(self.size, self._declared_size)) > self.max_body_bytes:
            raise TooLarge(f"the body has {size} bytes or more, at most {self.max_body_bytes} are taken")
        return self.chunks[0] if len(self.chunks) == 1 else b"".join(self.chunks)

    @property
    def _declared_size(self) -> int:
        return int(self.headers.get(b"content-length", b"0"))

    def add(self, chunk: bytes) -> None:
        """More of the body came."""
        self.size += len(chunk)
        if self.size > self.max_body_bytes:
            self.chunks.clear()
            self._wake()
        else:
            self.chunks.append(chunk)

    def complete(self) -> None:
        """All of the body came."""
        self.is_complete = True
        self._wake()

    def _wake(self) -> None:
        if self.waiter is not None and not self.waiter.done():
            self.waiter.set_result(None)
