"""An HTTP request as it arrives and the answer to it: what the connection and the REST face say to each other."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Hashable
from typing import Any

import msgspec

from splitserve.batching.pending import Pending
from splitserve.errors import Overloaded, SplitserveError, TooLarge
from splitserve.wire.byte_budget import Share

JSON = "application/json"  # exactly: KServe's client compares the whole header


class Response(msgspec.Struct):
    """An HTTP answer."""

    status: int
    body: bytes
    content_type: str = JSON
    headers: tuple[tuple[str, str], ...] = ()


Reply = Callable[[Response | Coroutine[Any, Any, Response]], None]
"""Takes an answer that was pending, or what becomes one in a task."""


Answer = Response | Pending | Coroutine[Any, Any, Response]
"""What there is of an answer when a request is given to whoever answers it: all of it; or the promise to call `Reply` later; or
what becomes it in a task."""


class Incoming(msgspec.Struct, eq=False):
    """A request whose head is complete; its body may be on its way still.

    Names of headers are in lower case, those that come several times are joined. Source: RFC 9110, section 5.3.
    """

    caller: Hashable
    max_body_bytes: int
    share: Share
    """What it holds of the bytes that all requests may."""

    method: str = ""
    path: str = ""
    headers: dict[bytes, bytes] = {}
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
    failure: SplitserveError | None = None
    """Why no more of the body is kept."""

    def header(self, name: bytes) -> str | None:
        """A header's value as text; None if there is none of that name."""
        value = self.headers.get(name)
        return None if value is None else value.decode("latin-1")

    async def body(self) -> bytes:
        """The whole body, once it is there.

        Raises:
            TooLarge, Overloaded: as `whole_body`; also as soon as it is known that it will be too large.
        """
        if not self.is_complete and self.failure is None:
            if self._declared_size > self.max_body_bytes:
                raise self._too_large()
            if self.invite is not None:
                self.invite()
            self.waiter = asyncio.get_running_loop().create_future()
            await self.waiter
        return self.whole_body()

    def whole_body(self) -> bytes:
        """The body, which is there.

        Raises:
            TooLarge: it has more bytes than are taken; what came of them was not kept.
            Overloaded: the bodies of all requests together had too many.
        """
        if self.failure is not None:
            raise self.failure
        return self.chunks[0] if len(self.chunks) == 1 else b"".join(self.chunks)

    @property
    def _declared_size(self) -> int:
        return int(self.headers.get(b"content-length", b"0"))

    def _too_large(self) -> TooLarge:
        size = max(self.size, self._declared_size)
        return TooLarge(f"the body has {size} bytes or more, at most {self.max_body_bytes} are taken")

    def add(self, chunk: bytes) -> None:
        """More of the body came."""
        self.size += len(chunk)
        if self.failure is not None:
            return
        try:
            if self.size > self.max_body_bytes:
                raise self._too_large()
            self.share.take(len(chunk))
            self.chunks.append(chunk)
        except (TooLarge, Overloaded) as failure:
            self.failure = failure
            self.chunks.clear()
            self._wake()

    def complete(self) -> None:
        """All of the body came."""
        self.is_complete = True
        if self.waiter is not None:
            self._wake()

    def _wake(self) -> None:
        if self.waiter is not None and not self.waiter.done():
            self.waiter.set_result(None)
