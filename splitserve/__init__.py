"""splitserve: preprocess/predict split serving over the Open Inference Protocol."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from splitserve.needed import needed

if TYPE_CHECKING:
    from splitserve.client import TLS, Answer, AsyncClient, Client
    from splitserve.publishing import (
        Published,
        PublishError,
        publish,
        publish_predictor,
        publish_preprocessor,
        release,
        rollback,
        withdraw,
    )
    from splitserve.scoring import score, score_batches

__version__ = "0.1.0"

__all__ = [
    "TLS",
    "Answer",
    "AsyncClient",
    "Client",
    "PublishError",
    "Published",
    "publish",
    "publish_predictor",
    "publish_preprocessor",
    "release",
    "rollback",
    "score",
    "score_batches",
    "withdraw",
]

_HOMES = {
    **dict.fromkeys(("TLS", "Answer", "AsyncClient", "Client"), "splitserve.client"),
    **dict.fromkeys(("score", "score_batches"), "splitserve.scoring"),
}

_EXTRAS = {"splitserve.client": "client", "splitserve.scoring": "batch", "splitserve.publishing": "publish"}


def __getattr__(name: str) -> Any:
    """Import a public name on its first use: the client does not need scikit-learn, nor publishing gRPC."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = _HOMES.get(name, "splitserve.publishing")
    with needed(f"splitserve.{name}", f'"splitserve[{_EXTRAS[home]}]"'):
        return getattr(import_module(home), name)


def __dir__() -> list[str]:
    """For completion: what is public, imported yet or not."""
    return sorted([*__all__, *(name for name in globals() if name.startswith("__"))])
