"""The bytes of REST bodies, counted as they arrive: an ASGI application around another one."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from splitserve.server.byte_budget import ByteBudget, Share

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Application = Callable[[Any, Receive, Any], Awaitable[None]]


class CountedBody:
    """`receive` of a request whose bytes are counted; raises `Overloaded` when they are too many.

    ``share`` is for what is made of them, e.g. by inflating.
    """

    __slots__ = ("_receive", "share")

    def __init__(self, receive: Receive, share: Share) -> None:
        self._receive = receive
        self.share = share

    async def __call__(self) -> Message:
        message = await self._receive()
        if body := message.get("body"):
            self.share.take(len(body))
        return message


class BoundedBodies:
    """Serves an application with bodies of so many bytes at a time."""

    def __init__(self, app: Application, budget: ByteBudget) -> None:
        self._app = app
        self._budget = budget

    async def __call__(self, scope: Any, receive: Receive, send: Any) -> None:
        with self._budget.share() as share:
            await self._app(scope, CountedBody(receive, share), send)
