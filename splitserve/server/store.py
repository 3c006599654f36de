"""The bundles of one kind: loaded when a release names them, unloaded when they are no longer needed."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Set
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Generic, Literal, TypeVar, get_args

import msgspec
import structlog

from splitserve.catalogue import Catalogue, Entry
from splitserve.errors import NotFound, Unavailable
from splitserve.oip.messages import LOADING, READY, UNAVAILABLE, ModelState
from splitserve.repository.bundle import Bundle, BundleKey
from splitserve.repository.golden import GoldenDifference
from splitserve.repository.manifest import GOLDEN_FILE, MANIFEST_FILE, BundleError, Kind, NotFetched
from splitserve.repository.release import History, Release
from splitserve.repository.routes import Route
from splitserve.repository.selection import Selection, half, pinned, selected, wanted
from splitserve.repository.source import BundleSource, backoff_s, fetch_bundle, load_fetched
from splitserve.server import audit
from splitserve.server.repository_view import ModelView, RepositoryView
from splitserve.versions import UNNAMED, Pair, unknown_model

T = TypeVar("T")

MODELS_AT_A_TIME = 4
"""Models that are fetched concurrently. They are loaded one after the other, since that takes CPU and memory."""

NEEDED_FOR_S = 120.0
"""How long a version is held after another stage has last reported that it needs it."""

RefusalReason = Literal["files", "release", "load", "golden"]
"""What was wrong with a bundle: its files, or that its releases recorded another one, or that it cannot be loaded here, or that
its golden samples differ."""

_Place = tuple[str, int]
"""Model and version."""


class _Loaded(msgspec.Struct, frozen=True):
    """The manifest's digest of a bundle that was loaded, or tried, and the digests that releases expected of it then."""

    manifest_sha256: str
    expected: frozenset[str]


class VersionStore(Generic[T]):
    """Loads the halves of releases and keeps the state of each.

    A bundle that is broken, or is not the one that its releases recorded, is kept with the reason and affects no other; it
    is tried again when its files have changed, and one that cannot be fetched after a while. A version is loaded again only if a
    release expects another bundle under its number. New versions are loaded while the old ones serve; a version that is no longer
    selected is unloaded once it is unused for a while, one whose release was withdrawn after the release's grace.
    It is freed when its last call ends.

    Args:
        source: where bundles, releases and routes are.
        kind: which half.
        load: makes what is served of a bundle, or raises `BundleError`; called in a thread.
        selection: which models and releases are wanted.
        unload_delay_s: how long a version that is no longer selected is kept after its last use.
        withdrawal_grace_s: how long a withdrawn release stays callable.
        allow_unreleased_pairs: versions that no release names are loaded too, the newest of each half.
        poll_interval_s: time between two polls of the source, however often `refresh` is called.
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
        withdrawal_grace_s: float = 0.0,
        allow_unreleased_pairs: bool = False,
        poll_interval_s: float = 0.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._source = source
        self._kind = kind
        self._load = load
        self._selection = selection or Selection()
        self._unload_delay_s = unload_delay_s
        self._allow_unreleased_pairs = allow_unreleased_pairs
        self._poll_interval_s = poll_interval_s
        self._clock = clock
        self._log = structlog.get_logger()
        self._lock = asyncio.Lock()
        self._fetchers = ThreadPoolExecutor(MODELS_AT_A_TIME, thread_name_prefix=f"fetch-{kind}")
        self._turn_to_load = asyncio.Lock()
        self._poll_at = -math.inf
        self._has_polled = False
        self._n_polls_failed = 0
        self._view = RepositoryView(
            source,
            kind,
            selection=self._selection,
            allow_unreleased_pairs=allow_unreleased_pairs,
            withdrawal_grace_s=withdrawal_grace_s,
            clock=clock,
        )
        self._last_asked: dict[_Place, float] = {}
        self._retry_at: dict[_Place, float] = {}
        self._n_tries: dict[_Place, int] = {}
        self._stamps: dict[_Place, str] = {}
        """Of what could not be loaded, as it was when that was tried."""
        self._seen_stamps: dict[_Place, str] = {}
        """Of the same, as it was at the last poll."""
        self._loaded: dict[_Place, _Loaded] = {}
        self._unpublished: dict[str, set[int]] = {}
        self._held_back: set[str] = set()
        self._needed_until: dict[_Place, float] = {}
        self.refused_pairs: Mapping[str, Collection[Pair]] = {}
        """By model, pairs that cannot serve for another reason than their half here: they do not count towards the policy."""
        self._missing: list[str] = []
        self._incomplete: set[str] = set()
        self.catalogue: Catalogue[int, T] = Catalogue()
        self.n_tried = dict.fromkeys(("loaded", "refused", "not_fetched", "failed"), 0)
        """Bundles that were tried, by the outcome."""
        self.n_refused: dict[RefusalReason, int] = dict.fromkeys(get_args(RefusalReason), 0)
        """Those that were refused, by what was wrong."""
        self.is_loaded = False
        """Whether everything that was wanted at the first poll has been tried."""
        self.problem = ""
        """Why the source could not be read the last time."""

    @property
    def models(self) -> Mapping[str, ModelView]:
        """What the last poll has shown of each model: releases, route, and why they are not known."""
        return self._view.models

    def index(self, properties: Callable[[T], Mapping[str, str]]) -> list[ModelState]:
        """All versions. One that is ready has a reason too, if it serves although the repository cannot be read.

        Args:
            properties: facts about a version that is loaded.
        """
        states = []
        for state in self.catalogue.index():
            entry = self.catalogue.entries(state.name).get(int(state.version)) if state.version else None
            if entry is not None and entry.value is not None:
                reason = state.reason or self.problem_of(state.name)
                state = msgspec.structs.replace(state, reason=reason, properties=properties(entry.value))
            states.append(state)
        return states

    def problem_of(self, model: str) -> str:
        """Why the repository, or the releases of a model, cannot be read, although loaded versions still serve."""
        view = self.models.get(model)
        return self.problem or (view.problem if view is not None else "")

    def selected_pairs(self, model: str) -> set[Pair]:
        """Pairs with a release whose halves are wanted, withdrawn ones within their grace included."""
        view = self.models.get(model)
        return set(self._selected(model, view)) if view is not None else set()

    def beyond_policy(self) -> list[tuple[str, Pair]]:
        """Models and pairs that are held because newer ones are refused. Another stage does not hold them by itself."""
        found = []
        for model, view in self.models.items():
            usual = {*selected(view.history, self._selection.policy(model), view.route, lambda _: False), *view.withdrawn}
            entries = self.catalogue.entries(model)
            refused = {version for version, entry in entries.items() if entry.state == UNAVAILABLE}
            pairs = [pair for pair in self._selected(model, view) if pair not in usual]
            found += [(model, pair) for pair in pairs if half(self._kind, pair) not in refused]
        return found

    def need(self, versions: Iterable[tuple[str, int]]) -> None:
        """Hold these versions, by model, for a while besides those of the policy, if releases name them.

        Another stage needs them: it refuses newer ones, which this one cannot know.
        """
        until = self._clock() + NEEDED_FOR_S
        for model, version in versions:
            view = self.models.get(model)
            if view is not None and version in self._released(view):
                self._needed_until[(model, version)] = until

    def _released(self, view: ModelView) -> Set[int]:
        """Versions that a release names."""
        return view.history.recorded(self._kind).keys()

    async def read_golden(self, release: Release) -> bytes:
        """The golden samples of a release.

        Raises:
            NotFetched: they cannot be read now; a retry may help.
            BundleError: they are not those that the release recorded.
        """
        return await asyncio.get_running_loop().run_in_executor(self._fetchers, self._read_golden, release)

    def _read_golden(self, release: Release) -> bytes:
        record = self._source.open_release(release.key)
        if record.manifest_sha256 != release.sha256:
            raise NotFetched(f"{release.key}: the record was replaced since it was read")
        record.fetch()
        return record.read(GOLDEN_FILE)

    def choose(self, model: str, version: int | None) -> tuple[int, T]:
        """As `Catalogue.choose`; a version that is used is not unloaded."""
        number, value = self.catalogue.choose(model, version)
        self.touch(model, number)
        return number, value

    def touch(self, model: str, version: int) -> None:
        """Record a use of this version, which keeps it loaded."""
        self._last_asked[(model, version)] = self._clock()

    async def refresh(self) -> None:
        """Poll the source if it is time.

        Load what is wanted and not held, newest first; unload what is held and not wanted.
        """
        async with self._lock:
            if self._clock() >= self._poll_at:
                await self._poll()
            if not self.problem:
                await self._follow()

    async def _poll(self) -> None:
        before = self._view.models
        try:
            await asyncio.to_thread(self._view.poll)
            stamps = await asyncio.to_thread(self._read_stamps, list(self._stamps))
        except BundleError as error:
            delay_s = backoff_s(self._n_polls_failed)
            self._n_polls_failed += 1
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
            self._report_problems(before)
            self._audit(before)
            self._notice_changes(stamps)
            delay_s, self._n_polls_failed, self.problem = self._poll_interval_s, 0, ""
        self._poll_at = self._clock() + delay_s

    def _read_stamps(self, places: Iterable[_Place]) -> dict[_Place, str]:
        return {place: self._source.stamp(self._key(place)) for place in places}

    def _report_missing(self) -> None:
        """Log the requested models that do not exist, when that set changes."""
        missing = sorted(self._selection.models - self.models.keys())
        if missing and missing != self._missing:
            # `MODELS` names models that the repository does not have.
            self._log.warning("requested models not in repository", kind=self._kind, models=missing)
        self._missing = missing

    def _report_problems(self, before: Mapping[str, ModelView]) -> None:
        """A line for each route that cannot be followed, and for releases that cannot be read, when that is new."""
        for model, view in self.models.items():
            was = before.get(model, ModelView())
            if view.route_problem and view.route_problem != was.route_problem:
                # The route cannot be read or followed; the previous one stays in force.
                self._log.error("route refused", model=model, reason=view.route_problem)
            if view.problem and view.problem != was.problem:
                # A record is damaged, not signed, or cannot be fetched, or all of a model have vanished.
                self._log.error("releases unreadable", model=model, reason=view.problem)

    def _audit(self, before: Mapping[str, ModelView]) -> None:
        """Lines for auditors of what was recorded since the last poll, at one half only. The first poll finds what is older."""
        if self._kind != "preprocess" or not self._has_polled:
            self._has_polled = True
            return
        for model, view in self.models.items():
            was = before.get(model, ModelView())
            if view.history is not was.history:
                known = {record.sha256 for record in was.history.records}
                for record in view.history.records:
                    if record.sha256 not in known:
                        audit.record_release(record)
            if view.route != was.route:
                audit.record(
                    "route",
                    result="OK",
                    principal="",
                    source=audit.REPOSITORY,
                    model=model,
                    release=_routed(view.route),
                    before=_routed(was.route),
                )

    def _notice_changes(self, stamps: dict[_Place, str]) -> None:
        """Try again what has changed since it was tried, once two polls have seen the same: a copy takes a while."""
        for place, stamp in stamps.items():
            if stamp != self._stamps.get(place) and stamp == self._seen_stamps.get(place):
                self._retry_at[place] = self._clock()
        self._seen_stamps = stamps

    async def _follow(self) -> None:
        self._needed_until = {place: until for place, until in self._needed_until.items() if until > self._clock()}
        self._unpublished = {model: versions for model, versions in self._unpublished.items() if model in self.models}
        models = sorted(self.models.keys() - self._held_back)
        await asyncio.gather(*(self._hold(model, self.models[model]) for model in models))
        for model in self.catalogue.models():
            self._unload_unneeded(model, self.models.get(model, ModelView()))
        for model in self._incomplete - self._held_back:
            self.catalogue.remove_incomplete(model)
        self._incomplete = {model for model in models if self._put_incomplete(model, self.models[model])}
        self.is_loaded = True

    def _key(self, place: _Place) -> BundleKey:
        return BundleKey(place[0], self._kind, place[1])

    async def _hold(self, model: str, view: ModelView) -> None:
        """Load versions of a model until those that are wanted are held, going on with older ones for each that is refused."""
        self._report_unpublished(model, self._named(model, view) - view.published)
        expected = self._expected(view)
        due = {version for version in view.published if self._retry_at.get((model, version), math.inf) <= self._clock()}
        due |= {version for version in view.published if self._is_replaced(model, version, expected)}
        while missing := due | ((self._wanted(model, view) & view.published) - self.catalogue.entries(model).keys()):
            due = set()
            for version in missing:
                if (model, version) not in self.catalogue:
                    self.catalogue.put(model, version, Entry(LOADING))
            for version in sorted(missing, reverse=True):
                entry = await self._try_to_load(self._key((model, version)), expected.get(version, frozenset()))
                held = self.catalogue.entries(model).get(version)
                if entry.value is not None or held is None or held.value is None:
                    self.catalogue.put(model, version, entry)

    def _is_replaced(self, model: str, version: int, expected: Mapping[int, frozenset[str]]) -> bool:
        """Whether releases expect another bundle under this number than the one that was loaded, or tried, and did not before."""
        loaded, digests = self._loaded.get((model, version)), expected.get(version)
        return bool(loaded and digests and loaded.manifest_sha256 not in digests and loaded.expected != digests)

    def _named(self, model: str, view: ModelView) -> set[int]:
        """Versions that must be published: those of the selected releases, and of pairs in settings and in the route."""
        pairs = self._selected(model, view)
        if self._allow_unreleased_pairs:
            return {half(self._kind, pair) for pair in pairs} - {UNNAMED} | pinned(
                self._kind, self._selection.policy(model), view.route
            )
        return {half(self._kind, pair) for pair in pairs} - {UNNAMED}

    def _report_unpublished(self, model: str, asked: set[int]) -> None:
        """Add an entry with the reason for each version that a release, a route or a setting names and that does not exist."""
        for version in self._unpublished.get(model, set()) - asked:
            self._forget(model, version)
        for version in sorted(asked):
            if (model, version) not in self.catalogue:
                key = self._key((model, version))
                # A release, a route or `MODEL_VERSIONS` names a version that is not published.
                self._log.warning("requested bundle not in repository", bundle=str(key))
                self.catalogue.put(model, version, Entry(UNAVAILABLE, f"{key}: not published"))
        self._unpublished[model] = {version for version in asked if self.catalogue.entries(model)[version].value is None}

    def _put_incomplete(self, model: str, view: ModelView) -> bool:
        """Whether no version of a model is selected; its entry has the reason."""
        if self.catalogue.entries(model) or not (
            view.problem or ((view.published or view.history.records) and not view.history.active())
        ):
            return False
        self.catalogue.put_incomplete(model, view.problem or no_release(model))
        return True

    def _selected(self, model: str, view: ModelView) -> list[Pair]:
        """Pairs with a release whose halves are held: the selected ones, and those that were withdrawn a short while ago."""
        entries = self.catalogue.entries(model)

        def is_refused(pair: Pair) -> bool:
            if pair in self.refused_pairs.get(model, ()):
                return True
            version = half(self._kind, pair)
            entry = entries.get(version)
            return version != UNNAMED and (entry.state == UNAVAILABLE if entry else version not in view.published)

        return [*selected(view.history, self._selection.policy(model), view.route, is_refused), *view.withdrawn]

    def _wanted(self, model: str, view: ModelView) -> set[int]:
        found = {half(self._kind, pair) for pair in self._selected(model, view)} - {UNNAMED}
        found |= {version for name, version in self._needed_until if name == model} & self._released(view)
        if self._allow_unreleased_pairs:
            policy = self._selection.policy(model)
            refused = {version for version, entry in self.catalogue.entries(model).items() if entry.state == UNAVAILABLE}
            found |= wanted(view.published, refused, pinned(self._kind, policy, view.route), policy.n_latest)
        return found

    def _expected(self, view: ModelView) -> dict[int, frozenset[str]]:
        """By version, the digests that releases recorded of its manifest. Of a pair that was released again, the last counts."""
        found = dict(view.history.recorded(self._kind))
        for version, digests in History(view.withdrawn.values()).recorded(self._kind).items():
            found[version] = found.get(version, frozenset()) | digests
        return found

    async def _try_to_load(self, key: BundleKey, expected: frozenset[str]) -> Entry[T]:
        """Load a bundle, if it is one of those that releases expect under its number."""
        place = (key.model, key.version)
        self._retry_at.pop(place, None)
        step: RefusalReason = "files"
        try:
            bundle = await asyncio.get_running_loop().run_in_executor(self._fetchers, self._fetch, key)
            step = "release"
            _check_expected(bundle, expected)
            step = "load"
            async with self._turn_to_load:
                loaded = await asyncio.to_thread(load_fetched, bundle, self._load)
        except NotFetched as error:
            delay_s = backoff_s(self._n_tries.get(place, 0))
            self._n_tries[place] = self._n_tries.get(place, 0) + 1
            self.n_tried["not_fetched"] += 1
            self._retry_at[place] = self._clock() + delay_s
            # A file is missing or cannot be downloaded; it is tried again after a backoff.
            self._log.warning("bundle not fetched", bundle=str(key), reason=str(error), retry_in_s=delay_s)
            return Entry(UNAVAILABLE, f"waiting to fetch it again: {error}")
        except BundleError as error:
            self._loaded[place] = _Loaded("", expected)
            self.n_tried["refused"] += 1
            self.n_refused["golden" if isinstance(error, GoldenDifference) else step] += 1
            # A check failed. Other versions keep serving; it is retried when its files have changed.
            self._log.error("bundle refused", bundle=str(key), reason=str(error))
            return Entry(UNAVAILABLE, str(error))
        except Exception:  # any failure of one bundle must not end the others
            self.n_tried["failed"] += 1
            # An unexpected error, with its traceback.
            self._log.exception("bundle failed to load", bundle=str(key))
            return Entry(UNAVAILABLE, f"{key}: failed to load; the log has the cause")
        finally:
            self.touch(*place)
        self._n_tries.pop(place, None)
        self._stamps.pop(place, None)
        self._loaded[place] = _Loaded(bundle.manifest_sha256, expected)
        self.n_tried["loaded"] += 1
        # It has passed all checks and can serve.
        self._log.info("bundle loaded", bundle=str(key))
        return Entry(READY, value=loaded)

    def _fetch(self, key: BundleKey) -> Bundle:
        self._stamps[(key.model, key.version)] = self._source.stamp(key)
        return fetch_bundle(self._source, key)

    def _unload_unneeded(self, model: str, view: ModelView) -> None:
        """Drop versions that were removed from the source and never loaded, and those that are neither selected nor used."""
        kept = self._wanted(model, view)
        released = self._released(view)
        for version, entry in self.catalogue.entries(model).items():
            idle_s = self._clock() - self._last_asked.get((model, version), 0.0)
            # A withdrawn release is unloaded at the end of its grace, however often it is still used.
            is_withdrawn = not self._allow_unreleased_pairs and version not in released
            is_gone = version not in view.published | self._unpublished.get(model, set())
            if entry.state == UNAVAILABLE and (is_gone or (is_withdrawn and version not in kept)):
                self._forget(model, version)
            elif entry.state == READY and version not in kept and (is_withdrawn or idle_s >= self._unload_delay_s):
                self._forget(model, version)
                # It is no longer selected, and has not been used for the unload delay, or its release was withdrawn.
                self._log.info("bundle unloaded", bundle=str(self._key((model, version))))

    def _forget(self, model: str, version: int) -> None:
        self.catalogue.remove(model, version)
        memories: tuple[dict[_Place, Any], ...] = (
            self._last_asked,
            self._retry_at,
            self._n_tries,
            self._stamps,
            self._seen_stamps,
            self._loaded,
        )
        for memory in memories:
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
        """Poll the source now, serve the model again if it was unloaded, and try again what of it was refused.

        Raises:
            NotFound: there is no such model.
            Unavailable: the source cannot be read.
        """
        async with self._lock:
            self._held_back.discard(model)
            self.catalogue.remove_incomplete(model)
            for version, entry in self.catalogue.entries(model).items():
                if entry.state == UNAVAILABLE:
                    self._forget(model, version)
            self._poll_at = -math.inf
        await self.refresh()
        if model not in self.catalogue.models():
            if self.problem:
                raise Unavailable(self.problem, model=model[:128])
            raise NotFound(unknown_model(model), model=model[:128])

    def close(self) -> None:
        """End what is being fetched, so that the process can stop."""
        self._source.close()
        self._fetchers.shutdown(cancel_futures=True)


def _routed(route: Route | None) -> str:
    """The pairs that a route names; "" without one."""
    return ", ".join(map(str, route.named())) if route is not None else ""


def no_release(model: str) -> str:
    """Why a model whose halves are published does not serve."""
    return f'it has no release; "splitserve release {model} K.M" proves a pair and makes one'


def _check_expected(bundle: Bundle, expected: frozenset[str]) -> None:
    """Raises:
    BundleError: releases name the version, and none of them recorded this bundle.
    """
    if expected and bundle.manifest_sha256 not in expected:
        raise BundleError(
            f"{bundle.key}: {MANIFEST_FILE}: expected sha256 {' or '.join(sorted(expected))} as its releases recorded, got "
            f"{bundle.manifest_sha256}: the bundle was changed after it was released; publish it as a new version"
        )
