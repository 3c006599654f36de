"""The plugin of pytest: `fake` and `serve` as fixtures. What they start is stopped at the end of the test, or of the run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from splitserve.client import Client
    from splitserve.testing.fakes import FakeClient


@pytest.fixture
def splitserve_fake() -> Iterator[Callable[..., FakeClient]]:
    """`splitserve.testing.fake` as a function that returns the client."""
    from splitserve.testing import fake

    with ExitStack() as stack:
        yield lambda *arguments, **options: stack.enter_context(fake(*arguments, **options))


@pytest.fixture(scope="session")
def splitserve_serve() -> Iterator[Callable[..., Client]]:
    """`splitserve.testing.serve` as a function that returns the client; the system runs until the end of the run."""
    from splitserve.testing import serve

    with ExitStack() as stack:
        systems: dict[Any, Any] = {}

        def started(what: Any, *arguments: Any, **options: Any) -> Client:
            if id(what) not in systems:
                systems[id(what)] = (what, stack.enter_context(serve(what, *arguments, **options)))
            client: Client = systems[id(what)][1]
            return client

        yield started
