"""Servers for the clients, and both clients called in one way."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any, NamedTuple

import pytest

from proxy.rest.app import RestApp
from proxy.rest.config import RestConfig
from proxy.rest.server import RestFace
from splitserve import AsyncClient, Client
from splitserve.client import over_own_grpc
from splitserve.errors import NotFound
from splitserve.oip.messages import ModelMetadata, ServerMetadata
from splitserve.testing import FakeInference, serving

EXTENSIONS = ("binary_tensor_data",)


class _Edge:
    """What the REST face asks of a service: an `InferenceService` that chooses versions."""

    def __init__(self, service: FakeInference) -> None:
        self._service = service

    def __getattr__(self, name: str) -> Any:
        return getattr(self._service, name)

    def choose(self, model: str, version: str) -> tuple[str, ModelMetadata]:
        for (name, number), signature in self._service.signatures.items():
            if name == model and version in ("", number):
                return number, signature
        raise NotFound(f"Request for unknown model {model}")


@asynccontextmanager
async def serving_rest(service: FakeInference, **options: Any) -> AsyncIterator[str]:
    """Serve over REST on a free port of loopback, as the proxy does. ``options``: fields of `RestConfig`.

    Yields:
        The URL.
    """
    app = RestApp(
        _Edge(service),
        RestConfig(
            metadata=ServerMetadata("test", "0", EXTENSIONS), max_body_bytes=2**26, default_timeout_s=30, grace_s=1, **options
        ),
    )
    async with RestFace(app) as face:
        yield f"http://127.0.0.1:{face.port}"


class Way(NamedTuple):
    """One of the two clients over one of the transports.

    ``is_other``: over gRPC by grpcio, which the client uses in special cases only.
    """

    is_rest: bool
    is_async: bool
    is_other: bool = False

    @asynccontextmanager
    async def to(self, service: FakeInference, **options: Any) -> AsyncIterator[Caller]:
        """A client of the service."""
        async with self.serving(service) as address, self.at(address, **options) as caller:
            yield caller

    def serving(self, service: FakeInference) -> AbstractAsyncContextManager[str]:
        """Serve on a free port of loopback; the address."""
        return serving_rest(service) if self.is_rest else serving(service)

    @asynccontextmanager
    async def at(self, address: str, **options: Any) -> AsyncIterator[Caller]:
        """A client of what is at an address."""
        with pytest.MonkeyPatch.context() as patch:
            if self.is_other:
                patch.setattr(over_own_grpc, "has_endpoint", lambda _: False)
            if self.is_async:
                async with AsyncClient(address, **options) as client:
                    yield Caller(client)
            else:
                with Client(address, **options) as client:
                    yield Caller(client)


class Caller:
    """Either client: what blocks is called in a thread, so that the server's loop runs on."""

    def __init__(self, client: Client | AsyncClient) -> None:
        self._client = client

    def __getattr__(self, name: str) -> Callable[..., Awaitable[Any]]:
        method = getattr(self._client, name)
        if isinstance(self._client, AsyncClient):
            return method

        async def call(*arguments: Any, **options: Any) -> Any:
            return await asyncio.to_thread(method, *arguments, **options)

        return call


WAYS = [Way(is_rest, is_async) for is_rest in (False, True) for is_async in (False, True)]
WAYS += [Way(is_rest=False, is_async=is_async, is_other=True) for is_async in (False, True)]


def way_name(way: Way) -> str:
    name = f"{'rest' if way.is_rest else 'grpc'}-{'async' if way.is_async else 'sync'}"
    return f"{name}-grpcio" if way.is_other else name
