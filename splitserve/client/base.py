"""What `Client` and `AsyncClient` share: their arguments, how they are shown, copied, pickled and forked."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from splitserve.client import forks
from splitserve.client.answer import Text
from splitserve.client.connection import TLS, Compression, Headers, connection_options
from splitserve.client.inference import Core
from splitserve.errors import SplitserveError

MAX_CONCURRENCY = 64
"""Requests of one client in flight at once: a proxy merges that many into one call, and more would only wait there."""


class ClientClosed(RuntimeError):
    """The client was closed. Make another one, or call it inside of its ``with`` block."""


class ClientBase:
    """The arguments of a client, and what follows from them."""

    def __init__(self, arguments: dict[str, Any]) -> None:
        self._arguments = arguments
        tls: TLS | None = arguments["tls"]
        compression: Compression = arguments["compression"]
        headers: Headers = arguments["headers"]
        retry_on: Collection[type[SplitserveError]] = arguments["retry_on"]
        text: Text = arguments["text"]
        if (limit := arguments["max_concurrency"]) is not None and limit < 1:
            raise ValueError(f"max_concurrency: expected at least 1 or None, got {limit}")
        self._core = Core(arguments["timeout_s"], arguments["max_attempts"], retry_on, text)
        self._connection = connection_options(
            arguments["url"],
            tls=tls,
            compression=compression,
            max_message_bytes=arguments["max_message_bytes"],
            headers=headers,
            proxy=arguments["proxy"],
            http_client=arguments["http_client"],
            channel=arguments["channel"],
        )
        self._token = arguments["token"]
        self._is_closed = False
        forks.watch(self)

    def forked(self) -> None:
        """In a forked child: share nothing with the parent."""
        self._core.forked()

    @property
    def url(self) -> str:
        """The address that it was made with."""
        url: str = self._arguments["url"]
        return url

    def __repr__(self) -> str:
        state = ", closed" if self._is_closed else ""
        return f"<{type(self).__name__} {self._connection.url}{state}>"

    def __reduce__(self) -> tuple[Any, ...]:
        """Copied and pickled as its arguments: a copy has connections of its own."""
        for name in ("http_client", "channel"):
            if self._arguments[name] is not None:
                raise TypeError(f"a client with a {name} of the caller's cannot be pickled or copied; make one where it is used")
        return _made_again, (type(self), self._arguments)

    def _check_open(self) -> None:
        if self._is_closed:
            raise ClientClosed(f"{self!r} was closed; make another one, or call it inside of its with block")


def _made_again(kind: type[Any], arguments: dict[str, Any]) -> Any:
    return kind(**arguments)


def version_name(version: str | int | None) -> str:
    """A version as it is sent; "" for the server's choice."""
    return "" if version is None else str(version)
