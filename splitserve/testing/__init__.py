"""For tests, of splitserve and of its users.

`fake` answers as a model would, over REST and gRPC, and needs no more than the client. `serve` publishes a pipeline and serves it
as in production. Both are fixtures of pytest, too: ``splitserve_fake`` and ``splitserve_serve``. `FakeInference`, `signature` and
`serving` are for tests of services; they need the extra server.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from splitserve.testing.fakes import FakeClient, fake
    from splitserve.testing.services import FakeInference, serving, signature
    from splitserve.testing.systems import serve

__all__ = ["FakeClient", "FakeInference", "fake", "serve", "serving", "signature"]

ENGINE: Literal["own", "grpcio"] = "own"
"""The gRPC server that `serving` uses by default."""

_HOMES = {"FakeClient": "fakes", "fake": "fakes", "serve": "systems"}


def __getattr__(name: str) -> Any:
    """Import a name on its first use."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"splitserve.testing.{_HOMES.get(name, 'services')}"), name)


def __dir__() -> list[str]:
    """For completion."""
    return sorted({*globals(), *__all__})
