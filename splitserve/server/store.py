"""The bundles of one kind, loaded as they appear at the source and let go when nobody needs them any more."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Generic, TypeVar

import msgspec
import structlog

from splitserve.catalogue import Catalogue, Entry
from splitserve.errors import NotFound, Unavailable
from splitserve.oip.messages import LOADING, READY, UNAVAILABLE
from splitserve.repository.bundle import Bundle, BundleKey
from splitserve.repository.manifest import BundleError, Kind, NotFetched
from splitserve.repository.routes import Route
from splitserve.repository.selection import Selection, pinned, wanted
from splitserve.repository.source import BundleSource, fetch_bundle, load_fetched
from splitserve.versions import unknown_model

T = TypeVar("T")

FIRST_RETRY_S, LAST_RETRY_S = 1.0, 60.0
"""After how long what could not be fetched is tried again: twice as long each time."""

MODELS_AT_A_TIME = 4
"""So many models are fetched at the same time. Loading is one after the other: it takes CPU and memory."""

_Place = tuple[str, int]
"""Model and version."""


class _Found(msgspec.Struct, frozen=True):
    """What a look at the source showed: versions of this half and routes by model, why routes are broken, and the stamps of what
    could not be loaded.
    """

    published: dict[str, set[int]] = {}
    routes: dict[str, Route] = {}
    route_problems: dict[str, str] = {}
    stamps: dict[_Place, str] = {}


class VersionStore(Generic[T]):
    """Loads bundles and keeps what came of each.

    A bundle that is broken is kept with the reason and takes no other one down; it is tried again when its files have changed,
    and one that cannot be fetched after a while. A published version never changes, so none is loaded twice while it is held.
    The route of a model that is broken is passed over for the one before it. New versions are loaded beside those that serve;
    a version that is no longer wanted is let go once nobody has asked for it for a while, and is freed when its last call ends.

    Args:
        source: where the bundles are.
        kind: which half.
        load: makes what is served of a bundle, or raises `BundleError`; called in a thread.
        selection: which models and versions are wanted.
        unload_delay_s: how long a version that is no longer wanted is kept after it was last asked for.
        look_interval_s: time between two looks at the source, however often `refresh` is called.
        clock: seconds that never go back.
    """

    def __init__(
        self,
        source: BundleSource,
        kind: Kind,
        load: Callable[[Bundle], T],
        *,
        selection: Selection | None = None,
        unload_delay_s: float = 0.0,
        look_interval_s: float = 0.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._source = source
        self._kind = kind
        self._load = load
        self._selection = selection or Selection()
        self._unload_delay_s = unload_delay_s
        self._look_interval_s = look_interval_s
        self._clock = clock
        self._log = structlog.get_logger()
        self._lock = asyncio.Lock()
        self._fetchers = ThreadPoolExecutor(MODELS_AT_A_TIME, thread_name_prefix=f"fetch-{kind}")
        self._turn_to_load = asyncio.Lock()
        self._look_at = -math.inf
        self._n_looks_failed = 0
        self._found = _Found()
        self._last_asked: dict[_Place, float] = {}
        self._retry_at: dict[_Place, float] = {}
        self._n_tries: dict[_Place, int] = {}
        self._stamps: dict[_Place, str] = {}
        """Of what could not be loaded, as it was when that was tried."""
        self._unpublished: dict[str, set[int]] = {}
        self._held_back: set[str] = set()
        self._missing: list[str] = []
        self.catalogue: Catalogue[int, T] = Catalogue()
        self.is_loaded = False
        """Whether everything that was wanted at the first look has been tried."""
        self.problem = ""
        """Why the source could not be looked at the last time."""

    @property
    def route_problems(self) -> Mapping[str, str]:
        """By model, why its route is not followed."""
        return self._found.route_problems

    def choose(self, model: str, version: int | None) -> tuple[int, T]:
        """As `Catalogue.choose`; who asks for a version keeps it from being let go."""
        number, value = self.catalogue.choose(model, version)
        self.touch(model, number)
        return number, value

    def touch(self, model: str, version: int) -> None:
        """Somebody needs this version."""
        self._last_asked[(model, version)] = self._clock()

    async def refresh(self) -> None:
        """Look at the source if it is time.

        Load what is wanted and not held, newest first; let go what is held and not wanted.
        """
        async with self._lock:
            if self._clock() >= self._look_at:
                await self._look_now()
            if not self.problem:
                await self._follow(self._found.published, self._found.routes)

    async def _look_now(self) -> None:
        before = self._found
        try:
            self._found = await asyncio.to_thread(self._look)
        except BundleError as error:
            delay_s = _backoff_s(self._n_looks_failed)
            self._n_looks_failed += 1
            problem = f"waiting for the model repository: {error}"
            if problem != self.problem:
                # The folder, listing or index cannot be read; it is tried again after a backoff.
                self._log.error("model repository unreadable", reason=str(error), retry_in_s=delay_s)
            self.problem = problem
        else:
            if self.problem:
                # It can be read again.
                self._log.info("model repository readable")
            self._report_missing()
            self._report_routes(before.route_problems)
            self._notice_changes(before.stamps)
            delay_s, self._n_looks_failed, self.problem = self._look_interval_s, 0, ""
        self._look_at = self._clock() + delay_s

    def _report_missing(self) -> None:
        """A line when models that are asked for by name are not there, or others than before are not."""
        missing = sorted(self._selection.models - self._found.published.keys())
        if missing and missing != self._missing:
            # `MODELS` names models that the repository does not have.
            self._log.warning("requested models not in repository", kind=self._kind, models=missing)
        self._missing = missing

    def _report_routes(self, before: Mapping[str, str]) -> None:
        """A line for each route that has been found to be broken."""
        for model, reason in self._found.route_problems.items():
            if before.get(model) != reason:
                # The route cannot be read; the previous one stays in force.
                self._log.error("route refused", model=model, reason=reason)

    def _notice_changes(self, before: Mapping[_Place, str]) -> None:
        """Try again what has changed since it was tried, once it is as the look before saw it: a copy takes a while."""
        for place, stamp in self._found.stamps.items():
            if stamp != self._stamps.get(place) and stamp == before.get(place):
                self._retry_at[place] = self._clock()

    async def _follow(self, published: dict[str, set[int]], routes: Mapping[str, Route]) -> None:
        self._unpublished = {model: versions for model, versions in self._unpublished.items() if model in published}
        models = sorted(published.keys() - self._held_back)
        await asyncio.gather(*(self._hold(model, published[model], routes.get(model)) for model in models))
        for model in self.catalogue.models():
            self._let_go(model, published.get(model, set()), routes.get(model))
        self.is_loaded = True

    def _look(self) -> _Found:
        found = _Found()
        for key in self._source.bundles():
            if key.kind == self._kind and self._selection.serves(key.model):
                found.published.setdefault(key.model, set()).add(key.version)
        for model in found.published:
            try:
                route = self._source.route(model)
            except BundleError as error:
                found.route_problems[model] = str(error)
                route = self._found.routes.get(model)
            if route is not None:
                found.routes[model] = route
        for place in list(self._stamps):
            found.stamps[place] = self._source.stamp(self._key(place))
        return found

    def _key(self, place: _Place) -> BundleKey:
        return BundleKey(place[0], self._kind, place[1])

    async def _hold(self, model: str, published: set[int], route: Route | None) -> None:
        """Load versions of a model until those that are wanted are held, going further down for each that is refused."""
        self._tell_of_unpublished(model, pinned(self._kind, self._selection.policy(model), route) - published)
        due = {version for version in published if self._retry_at.get((model, version), math.inf) <= self._clock()}
        while missing := due | (self._wanted(model, published, route) - self.catalogue.entries(model).keys()):
            due = set()
            for version in missing:
                if (model, version) not in self.catalogue:
                    self.catalogue.put(model, version, Entry(LOADING))
            for version in sorted(missing, reverse=True):
                self.catalogue.put(model, version, await self._try_to_load(BundleKey(model, self._kind, version)))

    def _tell_of_unpublished(self, model: str, asked: set[int]) -> None:
        """Versions that a route or a setting names and that are not there: whoever asks for one is told so."""
        for version in self._unpublished.get(model, set()) - asked:
            self._forget(model, version)
        for version in sorted(asked):
            if (model, version) not in self.catalogue:
                key = self._key((model, version))
                # A route or `MODEL_VERSIONS` names a version that is not published.
                self._log.warning("requested bundle not in repository", bundle=str(key))
                self.catalogue.put(model, version, Entry(UNAVAILABLE, f"{key}: not published"))
        self._unpublished[model] = {version for version in asked if self.catalogue.entries(model)[version].value is None}

    def _wanted(self, model: str, published: set[int], route: Route | None) -> set[int]:
        policy = self._selection.policy(model)
        refused = {version for version, entry in self.catalogue.entries(model).items() if entry.state == UNAVAILABLE}
        return wanted(published, refused, pinned(self._kind, policy, route), policy.n_latest)

    async def _try_to_load(self, key: BundleKey) -> Entry[T]:
        place = (key.model, key.version)
        self._retry_at.pop(place, None)
        try:
            bundle = await asyncio.get_running_loop().run_in_executor(self._fetchers, self._fetch, key)
            async with self._turn_to_load:
                loaded = await asyncio.to_thread(load_fetched, bundle, self._load)
        except NotFetched as error:
            delay_s = _backoff_s(self._n_tries.get(place, 0))
            self._n_tries[place] = self._n_tries.get(place, 0) + 1
            self._retry_at[place] = self._clock() + delay_s
            # A file is missing or cannot be downloaded; it is tried again after a backoff.
            self._log.warning("bundle not fetched", bundle=str(key), reason=str(error), retry_in_s=delay_s)
            return Entry(UNAVAILABLE, f"waiting to fetch it again: {error}")
        except BundleError as error:
            # A check failed. Other versions keep serving; it is retried when its files have changed.
            self._log.error("bundle refused", bundle=str(key), reason=str(error))
            return Entry(UNAVAILABLE, str(error))
        except Exception:  # one bundle's failure, whatever it is, must not end the others
            # An unexpected error, with its traceback.
            self._log.exception("bundle failed to load", bundle=str(key))
            return Entry(UNAVAILABLE, f"{key}: failed to load; the log has the cause")
        finally:
            self.touch(*place)
        self._n_tries.pop(place, None)
        self._stamps.pop(place, None)
        # It has passed all checks and can serve.
        self._log.info("bundle loaded", bundle=str(key))
        return Entry(READY, value=loaded)

    def _fetch(self, key: BundleKey) -> Bundle:
        self._stamps[(key.model, key.version)] = self._source.stamp(key)
        return fetch_bundle(self._source, key)

    def _let_go(self, model: str, published: set[int], route: Route | None) -> None:
        """Drop what is gone from the source and could not be served anyway, and what is not wanted and not asked for."""
        kept = self._wanted(model, published, route)
        for version, entry in self.catalogue.entries(model).items():
            idle_s = self._clock() - self._last_asked.get((model, version), 0.0)
            if entry.state == UNAVAILABLE and version not in published | self._unpublished.get(model, set()):
                self._forget(model, version)
            elif entry.state == READY and version not in kept and idle_s >= self._unload_delay_s:
                self._forget(model, version)
                # It is no longer selected, and has not been used for the unload delay.
                self._log.info("bundle unloaded", bundle=str(BundleKey(model, self._kind, version)))

    def _forget(self, model: str, version: int) -> None:
        self.catalogue.remove(model, version)
        for memory in (self._last_asked, self._retry_at, self._n_tries, self._stamps):
            memory.pop((model, version), None)

    async def unload(self, model: str) -> None:
        """Hold no version of a model until `load`.

        Raises:
            NotFound: there is no such model.
        """
        async with self._lock:
            if model not in self.catalogue.models():
                raise NotFound(unknown_model(model), model=model[:128])
            self._held_back.add(model)
            for version in self.catalogue.entries(model):
                self._forget(model, version)
            self.catalogue.put_incomplete(model, "it was unloaded")

    async def load(self, model: str) -> None:
        """Look at the source now, serve the model again if it was unloaded, and try again what of it was refused.

        Raises:
            NotFound: there is no such model.
            Unavailable: the source cannot be looked at, so nobody can tell.
        """
        async with self._lock:
            self._held_back.discard(model)
            self.catalogue.remove_incomplete(model)
            for version, entry in self.catalogue.entries(model).items():
                if entry.state == UNAVAILABLE:
                    self._forget(model, version)
            self._look_at = -math.inf
        await self.refresh()
        if model not in self.catalogue.models():
            if self.problem:
                raise Unavailable(self.problem, model=model[:128])
            raise NotFound(unknown_model(model), model=model[:128])

    def close(self) -> None:
        """End what is being fetched, so that the process can stop."""
        self._source.close()
        self._fetchers.shutdown(cancel_futures=True)


def _backoff_s(n_failures: int) -> float:
    return float(min(FIRST_RETRY_S * 2**n_failures, LAST_RETRY_S))
