"""The bundles of one kind, loaded as they appear in the model repository."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Generic, TypeVar

import structlog

from splitserve.catalogue import Catalogue, Entry
from splitserve.manifest import BundleError, Kind
from splitserve.oip import LOADING, READY, UNAVAILABLE
from splitserve.repository import Bundle, BundleKey, Repository

T = TypeVar("T")


class VersionStore(Generic[T]):
    """Loads bundles and keeps what came of each.

    A bundle that can not be loaded is kept with the reason and takes no other one down. A published version never changes, so
    none is loaded twice.

    Args:
        repository: where the bundles are.
        kind: which half.
        load: makes what is served of a bundle, or raises `BundleError`; called in a thread.
    """

    def __init__(self, repository: Repository, kind: Kind, load: Callable[[Bundle], T]) -> None:
        self._repository = repository
        self._kind = kind
        self._load = load
        self._log = structlog.get_logger()
        self.catalogue: Catalogue[int, T] = Catalogue()
        self.is_loaded = False
        """Whether everything that was in the repository at the first look has been tried."""
        self.problem = ""
        """Why the repository could not be looked at the last time."""

    async def refresh(self) -> None:
        """Load what is new in the repository."""
        try:
            new = await asyncio.to_thread(self._new_keys)
        except BundleError as error:
            if str(error) != self.problem:
                self._log.error("model repository can not be read", reason=str(error))
            self.problem = str(error)
            return
        self.problem = ""
        for key in new:
            self.catalogue.put(key.model, key.version, Entry(LOADING))
        for key in new:
            self.catalogue.put(key.model, key.version, await asyncio.to_thread(self._try_to_load, key))
        self.is_loaded = True

    def _new_keys(self) -> list[BundleKey]:
        return [
            key for key in self._repository.bundles() if key.kind == self._kind and (key.model, key.version) not in self.catalogue
        ]

    def _try_to_load(self, key: BundleKey) -> Entry[T]:
        try:
            loaded = self._repository.load(key, self._load)
        except BundleError as error:
            self._log.error("bundle refused", bundle=str(key), reason=str(error))
            return Entry(UNAVAILABLE, str(error))
        except Exception:  # one bundle's failure, whatever it is, must not end the others
            self._log.exception("bundle failed to load", bundle=str(key))
            return Entry(UNAVAILABLE, f"{key}: failed to load; the log has the cause")
        self._log.info("bundle loaded", bundle=str(key))
        return Entry(READY, value=loaded)
