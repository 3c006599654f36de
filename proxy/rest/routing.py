"""What the handlers of the REST face take and return."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any

import msgspec

from splitserve.wire.http1.messages import JSON, HttpRequest, HttpResponse


class RoutedRequest(msgspec.Struct):
    """An HTTP request for a handler. ``path`` has the named parts of its path; ``body`` is decompressed."""

    path: dict[str, str]
    incoming: HttpRequest
    body: bytes
    deadline: float


class Refused(Exception):
    """A request that is refused by the rules of HTTP: unknown path, wrong method, unsupported media type or encoding."""

    def __init__(self, status: int, message: str, headers: tuple[tuple[str, str], ...] = ()) -> None:
        super().__init__(message)
        self.status = status
        self.headers = headers


Handler = Callable[[RoutedRequest], Coroutine[Any, Any, HttpResponse]]


def json_response(status: int, content: Any, headers: tuple[tuple[str, str], ...] = ()) -> HttpResponse:
    """A response with a JSON body."""
    return HttpResponse(status, msgspec.json.encode(content), JSON, headers)
