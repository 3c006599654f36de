"""What the handlers of the REST face take and return."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Coroutine
from typing import Any

import msgspec

from splitserve.wire.http1.messages import JSON, Handled, HttpRequest, HttpResponse, Respond

REQUEST_ID = b"x-request-id"

_REQUEST_ID = re.compile(r"[!-~]{1,128}")
"""What is taken as an id: it goes into logs and headers."""


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


def request_id_of(incoming: HttpRequest) -> str | None:
    """The id in a request's header ``X-Request-Id``; None without one that can be taken."""
    value = incoming.header(REQUEST_ID)
    return value if value is not None and _REQUEST_ID.fullmatch(value) else None


def with_headers(extra: tuple[tuple[str, str], ...], begin: Callable[[Respond], Handled], respond: Respond) -> Handled:
    """What ``begin`` handles, its response with more headers."""

    def added(response: HttpResponse) -> HttpResponse:
        present = {name for name, _ in response.headers}
        merged = tuple(
            (name, f"{value}, {dict(extra)[name]}") if name == "vary" and name in dict(extra) else (name, value)
            for name, value in response.headers
        )
        more = tuple(header for header in extra if header[0] not in present)
        return HttpResponse(response.status, response.body, response.content_type, (*merged, *more))

    async def added_later(response: Coroutine[Any, Any, HttpResponse]) -> HttpResponse:
        return added(await response)

    def responding(response: HttpResponse | Coroutine[Any, Any, HttpResponse]) -> None:
        respond(added(response) if isinstance(response, HttpResponse) else added_later(response))

    handled = begin(responding)
    if isinstance(handled, HttpResponse):
        return added(handled)
    return added_later(handled) if inspect.iscoroutine(handled) else handled
