"""Where services get bundles from, and how a bundle gets from there into a process: open, fetch, load."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Protocol, TypeVar

from splitserve.repository.bundle import Bundle, BundleKey
from splitserve.repository.manifest import BundleError
from splitserve.repository.release import ReleaseKey
from splitserve.repository.releases import ReleaseSource
from splitserve.repository.routes import Route, StoredRoute

T = TypeVar("T")

FIRST_RETRY_S, LAST_RETRY_S = 1.0, 60.0
"""After how long what could not be fetched is tried again: twice as long each time."""


class BundleSource(ReleaseSource, Protocol):
    """A model repository that is read: a folder (`Repository`, `LocalFolder`), or a URL with a cache (`RemoteRepository`)."""

    def bundles(self) -> Iterable[BundleKey]:
        """List what is published now, ordered by model, kind and version.

        Raises:
            BundleError: the source cannot be listed; the message says why.
        """
        ...

    def route(self, model: str) -> Route | None:
        """The route of a model, if it has one.

        Raises:
            NotFetched: it cannot be read now; a retry may help.
            BundleError: it is invalid, or cannot be followed. The message names the model.
        """
        ...

    def read_route(self, model: str) -> StoredRoute | None:
        """The route of a model as it is stored, if it has one.

        Raises:
            NotFetched: it cannot be read now; a retry may help. The message names the model.
        """
        ...

    def open(self, key: BundleKey) -> Bundle:
        """A bundle with its manifest read.

        Raises:
            NotFetched: it cannot be read now, or is incomplete; a retry may help.
            BundleError: it is invalid.
        """
        ...

    def stamp(self, key: BundleKey | ReleaseKey, /) -> str:
        """A text that changes when the files of a bundle or release change, as far as that shows without reading them.

        "" if unknown, and with "manifest.json" in it if there is one.

        As of the last call of `bundles`, and cheap after it.
        """
        ...

    def close(self) -> None:
        """Cancel fetches in progress; their callers get a `NotFetched`."""
        ...


def fetch_bundle(source: BundleSource, key: BundleKey) -> Bundle:
    """Open a bundle and fetch its files.

    Raises:
        BundleError: as the source raises it, prefixed with the bundle's key.
    """
    with _naming(key):
        bundle = source.open(key)
        bundle.fetch()
    return bundle


def load_fetched(bundle: Bundle, load: Callable[[Bundle], T]) -> T:
    """Load a bundle whose files are fetched.

    Raises:
        BundleError: as ``load`` raises it, prefixed with the bundle's key.
    """
    with _naming(bundle.key):
        return load(bundle)


def load_bundle(source: BundleSource, key: BundleKey, load: Callable[[Bundle], T]) -> T:
    """Open, fetch and load a bundle.

    Raises:
        BundleError: as the source and ``load`` raise it, prefixed with the bundle's key.
    """
    return load_fetched(fetch_bundle(source, key), load)


@contextlib.contextmanager
def _naming(key: BundleKey) -> Iterator[None]:
    try:
        yield
    except BundleError as error:
        raise type(error)(f"{key}: {error}") from error


def backoff_s(n_failures: int) -> float:
    """How long to wait before the next try, after this many earlier failures, any number."""
    n_doublings = min(n_failures, 30)  # a power of 1,024 is no float
    return min(FIRST_RETRY_S * 2.0**n_doublings, LAST_RETRY_S)
