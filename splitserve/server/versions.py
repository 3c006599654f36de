"""The versions of one half of the models: which there are, which are loaded, and why the others are not."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Generic, Protocol, TypeVar

import msgspec
import structlog

from splitserve.errors import NotFound, Unavailable
from splitserve.manifest import BundleError, Kind
from splitserve.oip import LOADING, READY, UNAVAILABLE, ModelState
from splitserve.repository import Bundle, BundleKey, Repository

T = TypeVar("T")


class _Entry(msgspec.Struct, Generic[T]):
    state: str
    reason: str = ""
    loaded: T | None = None


class Refreshing(Protocol):
    """Something that follows the outside world by looking again and again."""

    async def refresh(self) -> None: ...


class VersionStore(Generic[T]):
    """Bundles of one kind, loaded as they appear in the repository.

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
        self._entries: dict[BundleKey, _Entry[T]] = {}
        self._log = structlog.get_logger()
        self.is_loaded = False
        """Whether everything that was in the repository at the first look has been tried."""

    async def refresh(self) -> None:
        """Load what is new in the repository, oldest version first."""
        for key in await asyncio.to_thread(self._new_keys):
            self._entries[key] = _Entry(LOADING)
            self._entries[key] = await asyncio.to_thread(self._try_to_load, key)
        self.is_loaded = True

    def _new_keys(self) -> list[BundleKey]:
        return [key for key in self._repository.keys() if key.kind == self._kind and key not in self._entries]

    def _try_to_load(self, key: BundleKey) -> _Entry[T]:
        try:
            loaded = self._repository.load(key, self._load)
        except BundleError as error:
            self._log.error("bundle refused", bundle=str(key), reason=str(error))
            return _Entry(UNAVAILABLE, str(error))
        except Exception:  # one bundle's failure, whatever it is, must not end the others
            self._log.exception("bundle failed to load", bundle=str(key))
            return _Entry(UNAVAILABLE, f"{key}: failed to load; the log has the cause")
        self._log.info("bundle loaded", bundle=str(key))
        return _Entry(READY, loaded=loaded)

    def get(self, model: str, version: int | None = None) -> tuple[int, T]:
        """A loaded version, and its number.

        Args:
            model: its name.
            version: the latest that is ready, if None.

        Raises:
            NotFound: no such model, or no such version of it.
            Unavailable: it is known, and not ready.
        """
        known = {key.version: entry for key, entry in self._entries.items() if key.model == model}
        if not known:
            raise NotFound(unknown_model(model), model=model[:128])
        ready = {number: entry.loaded for number, entry in known.items() if entry.loaded is not None}
        if version is None:
            if not ready:
                raise Unavailable(f'model "{model}" has no version that is ready: {_reasons(known)}', retry_after_s=1)
            version = max(ready)
        elif version not in known:
            raise NotFound(f"{unknown_model(model)}, version {version}", model=model)
        found = ready.get(version)
        if found is None:
            raise Unavailable(f'model "{model}" version {version} is not ready: {_reasons({version: known[version]})}')
        return version, found

    def loaded(self) -> dict[tuple[str, int], T]:
        """Everything that is ready, by model and version."""
        return {(key.model, key.version): entry.loaded for key, entry in self._entries.items() if entry.loaded is not None}

    def index(self) -> list[ModelState]:
        """All versions, ready or not."""
        return [
            ModelState(key.model, str(key.version), entry.state, entry.reason)
            for key, entry in sorted(self._entries.items(), key=lambda item: item[0])
        ]


def unknown_model(name: str) -> str:
    """The message that clients of the protocol know. Source: the error that Triton gives, which its client programs match."""
    return f"Request for unknown model: '{name[:128]}' is not found"


def parse_version(model: str, version: str) -> int | None:
    """The number in a request's ``version``; None for "", which leaves the choice to the service.

    Raises:
        NotFound: it is no number, so no version is called that.
    """
    if not version:
        return None
    if version.isascii() and version.isdecimal() and len(version) < 10:
        return int(version)
    raise NotFound(f"{unknown_model(model)}, version {version[:32]}", model=model[:128])


def why_not_ready(states: list[ModelState], is_loaded: bool) -> str:
    """Why a service with this index can infer nothing; "" when it can."""
    if not is_loaded:
        return "models are still being loaded"
    if not states:
        return "the model repository holds no models"
    if not any(state.state == READY for state in states):
        return "; ".join(f"{state.name} {state.version}: {state.reason}" for state in states[:5])
    return ""


def _reasons(entries: dict[int, _Entry[T]]) -> str:
    return "; ".join(entry.reason or entry.state.lower() for _, entry in sorted(entries.items()))


async def keep_refreshing(what: Refreshing, *, interval_s: float) -> None:
    """Refresh now and then every ``interval_s`` seconds, until cancelled. A failure is logged and the next round tries again."""
    log = structlog.get_logger()
    while True:
        try:
            await what.refresh()
        except Exception:
            log.exception("refresh failed", of=type(what).__name__)
        await asyncio.sleep(interval_s)
