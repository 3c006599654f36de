"""The store of loaded versions: which it loads, keeps, unloads and retries."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from typing import Any

import pytest
from structlog.testing import capture_logs

from splitserve.errors import NotFound, Unavailable
from splitserve.oip.messages import READY, UNAVAILABLE
from splitserve.repository.bundle import BundleKey
from splitserve.repository.manifest import BundleError, NotFetched
from splitserve.repository.release import ReleaseKey
from splitserve.repository.routes import Route, RoutedPair
from splitserve.repository.selection import Selection, parse_policies
from splitserve.repository.source import FIRST_RETRY_S, backoff_s
from splitserve.server.store import VersionStore


class Clock:
    """A clock that a test advances."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class FakeBundle:
    """A bundle that consists of its key only."""

    def __init__(self, key: BundleKey) -> None:
        self.key = key
        self.manifest_sha256 = ""

    def __str__(self) -> str:
        return str(self.key)

    def fetch(self) -> None:
        pass


class FakeSource:
    """A source of fake bundles; opening those in `failures` raises."""

    def __init__(self, *versions: int, model: str = "m") -> None:
        self.keys = {BundleKey(model, "predict", version) for version in versions}
        self.failures: dict[int, Exception] = {}
        self.found_routes: dict[str, Route | Exception] = {}
        self.stamps: dict[int, str] = {}
        self.records: dict[ReleaseKey, Any] = {}
        self.opened: list[int] = []
        self.n_looks = 0
        self.problem: Exception | None = None

    def bundles(self) -> Iterable[BundleKey]:
        self.n_looks += 1
        if self.problem:
            raise self.problem
        return sorted(self.keys)

    def route(self, model: str) -> Route | None:
        found = self.found_routes.get(model)
        if isinstance(found, Exception):
            raise found
        return found

    def released_models(self) -> list[str]:
        return sorted({key.model for key in self.records})

    def releases(self, model: str) -> list[ReleaseKey]:
        return sorted(key for key in self.records if key.model == model)

    def open_release(self, key: ReleaseKey) -> Any:
        found = self.records[key]
        if isinstance(found, Exception):
            raise found
        return found

    def stamp(self, key: BundleKey | ReleaseKey) -> str:
        if isinstance(key, ReleaseKey):
            return "manifest.json"
        return self.stamps.get(key.version, "")

    def open(self, key: BundleKey) -> Any:
        self.opened.append(key.version)
        if key.version in self.failures:
            raise self.failures[key.version]
        return FakeBundle(key)

    def close(self) -> None:
        self.is_closed = True

    def publish(self, version: int) -> None:
        self.keys.add(BundleKey("m", "predict", version))


def store_of(
    source: FakeSource, policy: str = "latest:2", *, clock: Clock | None = None, delay_s: float = 0.0
) -> VersionStore[Any]:
    selection = Selection(policies=parse_policies(policy))
    return VersionStore(
        source,
        "predict",
        str,
        selection=selection,
        unload_delay_s=delay_s,
        allow_unreleased_pairs=True,
        clock=clock or Clock(),
    )


def route_problems(store: VersionStore[Any]) -> dict[str, str]:
    return {model: view.route_problem for model, view in store.models.items() if view.route_problem}


def held(store: VersionStore[Any], state: str = READY) -> list[int]:
    return [version for version, entry in store.catalogue.entries("m").items() if entry.state == state]


async def test_the_newest_versions_are_loaded_once() -> None:
    """A second poll of the same source opens nothing."""
    source = FakeSource(1, 2, 3)
    store = store_of(source)

    await store.refresh()
    await store.refresh()

    assert held(store) == [2, 3]
    assert source.opened == [3, 2]
    assert store.choose("m", None) == (3, "m/predict/3")


async def test_a_broken_version_affects_no_other() -> None:
    """It replaces no other version, is not retried, and gives the reason."""
    source = FakeSource(1, 2)
    store = store_of(source)
    await store.refresh()

    source.failures[3] = BundleError("damaged")
    source.publish(3)
    await store.refresh()
    await store.refresh()

    assert held(store) == [1, 2]
    assert held(store, UNAVAILABLE) == [3]
    assert source.opened.count(3) == 1
    assert store.choose("m", None)[0] == 2
    with pytest.raises(Unavailable, match="m/predict/3: damaged"):
        store.choose("m", 3)


async def test_a_refused_bundle_is_retried_on_request() -> None:
    """After a repair outside of the bundle, `load` requests the retry."""
    source = FakeSource(1, 2)
    source.failures[2] = BundleError("damaged")
    store = store_of(source)
    await store.refresh()

    source.failures.clear()
    await store.refresh()
    before = held(store)
    await store.load("m")

    assert before == [1]
    assert held(store) == [1, 2]
    assert source.opened.count(1) == 1


async def test_a_refused_bundle_is_retried_once_its_changed_files_are_stable() -> None:
    """A bundle that is copied file by file may be incomplete at the first poll."""
    source = FakeSource(1, 2)
    source.failures[2] = BundleError("model.onnx has 10 bytes, manifest.json says 20")
    source.stamps[2] = "10 bytes"
    store = store_of(source)
    await store.refresh()
    await store.refresh()
    while_unchanged = source.opened.count(2)

    source.stamps[2] = "15 bytes"
    await store.refresh()
    source.stamps[2] = "20 bytes"
    await store.refresh()
    while_changing = source.opened.count(2)
    source.failures.clear()
    await store.refresh()

    assert (while_unchanged, while_changing) == (1, 1)
    assert held(store) == [1, 2]


async def test_a_change_that_fixes_nothing_is_tried_once() -> None:
    """Its files are compared with those of the last attempt."""
    source = FakeSource(1)
    source.failures[1] = BundleError("damaged")
    store = store_of(source)
    await store.refresh()

    source.stamps[1] = "touched"
    for _ in range(5):
        await store.refresh()

    assert source.opened == [1, 1]


async def test_a_bundle_that_arrives_late_and_is_refused_is_not_retried_endlessly() -> None:
    """It was fetched completely and is invalid."""
    clock, source = Clock(), FakeSource(1)
    source.failures[1] = NotFetched("not there yet")
    store = store_of(source, clock=clock)
    await store.refresh()
    source.failures[1] = BundleError("damaged")
    clock.now = FIRST_RETRY_S

    for _ in range(5):
        await store.refresh()

    assert source.opened == [1, 1]
    assert store.catalogue.entries("m")[1].reason == "m/predict/1: damaged"


async def test_an_unexpected_error_is_reported_as_a_refusal() -> None:
    """The other bundles load."""
    source = FakeSource(1, 2)
    source.failures[2] = MemoryError("no more")
    store = store_of(source)

    await store.refresh()

    assert held(store) == [1]
    assert "failed to load; the log has the cause" in store.catalogue.entries("m")[2].reason


async def test_at_start_older_versions_replace_broken_ones() -> None:
    """The service tries older versions until it holds as many as configured."""
    source = FakeSource(1, 2, 3, 4)
    source.failures = {4: BundleError("damaged"), 3: BundleError("damaged")}
    store = store_of(source, "latest:1")

    await store.refresh()

    assert held(store) == [2]
    assert source.opened == [4, 3, 2]


async def test_an_old_version_is_unloaded_once_it_is_unused() -> None:
    """The new version is loaded first; the old one is unloaded when no call uses it."""
    clock, source = Clock(), FakeSource(1)
    store = store_of(source, "latest:1", clock=clock, delay_s=10)
    await store.refresh()
    source.publish(2)
    await store.refresh()
    assert held(store) == [1, 2]

    clock.now = 9
    store.choose("m", 1)
    clock.now = 18
    await store.refresh()
    still_held = held(store)
    clock.now = 19
    await store.refresh()

    assert still_held == [1, 2]
    assert held(store) == [2]
    with pytest.raises(NotFound):
        store.choose("m", 1)


async def test_versions_named_by_a_route_are_kept() -> None:
    """Independent of their age."""
    source = FakeSource(1, 2, 3, 4)
    source.found_routes = {"m": Route((RoutedPair("7.1"),))}
    store = store_of(source, "latest:1")

    await store.refresh()

    assert held(store) == [1, 4]


async def test_a_broken_route_is_reported_once_and_the_previous_one_applies() -> None:
    """Neither its model nor other models wait for a valid route."""
    source = FakeSource(1, 2)
    source.keys.add(BundleKey("other", "predict", 1))
    source.found_routes = {"m": Route((RoutedPair("7.1"),))}
    store = store_of(source, "latest:1")
    await store.refresh()

    source.found_routes = {"m": BundleError("m: route.json: Input data was truncated")}
    source.publish(3)
    source.keys.add(BundleKey("other", "predict", 2))
    with capture_logs() as logs:
        await store.refresh()
        await store.refresh()
    problems, while_broken = route_problems(store), held(store)
    source.found_routes = {}
    await store.refresh()

    assert [entry for entry in logs if entry["event"] == "route refused"] == [
        {"event": "route refused", "log_level": "error", "model": "m", "reason": "m: route.json: Input data was truncated"}
    ]
    assert problems == {"m": "m: route.json: Input data was truncated"}
    assert while_broken == [1, 3]
    assert route_problems(store) == {}
    assert store.catalogue.ready_versions("other") == (2,)
    assert held(store) == [3]


async def test_a_missing_requested_version_is_reported_until_it_exists() -> None:
    """Whether a route or a setting names it: requests for it get the reason, and the log has it once."""
    source = FakeSource(1)
    source.found_routes = {"m": Route((RoutedPair("1.7"),))}
    store = store_of(source, "m=1.8; latest:1")
    with capture_logs() as logs:
        await store.refresh()
        await store.refresh()
    with pytest.raises(Unavailable, match=r"m/predict/7: not published"):
        store.choose("m", 7)
    missing = held(store, UNAVAILABLE)

    source.publish(7)
    await store.refresh()
    source.found_routes = {}
    source.keys -= {BundleKey("m", "predict", 7)}
    await store.refresh()

    told = [entry["bundle"] for entry in logs if entry["event"] == "requested bundle not in repository"]
    assert told == ["m/predict/7", "m/predict/8"]
    assert missing == [7, 8]
    assert source.opened == [7]
    assert held(store, UNAVAILABLE) == [8]


async def test_a_removed_model_leaves_no_awaited_version() -> None:
    """Its route is removed with it."""
    source = FakeSource(1)
    source.found_routes = {"m": Route((RoutedPair("1.7"),))}
    store = store_of(source)
    await store.refresh()

    source.keys.clear()
    await store.refresh()

    assert store.catalogue.models() == []


async def test_a_predictor_without_a_number_is_not_awaited() -> None:
    """A third-party server holds it."""
    source = FakeSource(1)
    source.found_routes = {"m": Route((RoutedPair("1.0"),))}
    store = store_of(source)

    await store.refresh()

    assert held(store, UNAVAILABLE) == []


async def test_bundles_removed_from_the_source_are_unloaded() -> None:
    """After the same delay; a refused one at once."""
    clock, source = Clock(), FakeSource(1, 2)
    source.failures[2] = BundleError("damaged")
    store = store_of(source, clock=clock, delay_s=10)
    await store.refresh()

    source.keys.clear()
    await store.refresh()
    at_once = held(store), held(store, UNAVAILABLE)
    clock.now = 10
    await store.refresh()

    assert at_once == ([1], [])
    assert store.catalogue.models() == []


async def test_a_failed_download_is_retried_with_backoff() -> None:
    """The service runs meanwhile, and reports what it waits for."""
    clock, source = Clock(), FakeSource(1, 2)
    source.failures[2] = NotFetched("connection refused")
    store = store_of(source, "latest:1", clock=clock)

    await store.refresh()
    first = held(store), store.catalogue.entries("m")[2].reason
    await store.refresh()
    clock.now = FIRST_RETRY_S
    await store.refresh()
    tries_so_far = source.opened.count(2)
    clock.now = FIRST_RETRY_S * 2
    await store.refresh()
    still = source.opened.count(2)
    del source.failures[2]
    clock.now = FIRST_RETRY_S * 3
    await store.refresh()

    assert first == ([1], "waiting to fetch it again: m/predict/2: connection refused")
    assert (tries_so_far, still) == (2, 2)
    assert 2 in held(store)


async def test_an_unreadable_source_is_reported_and_unloads_nothing() -> None:
    """Loaded versions keep serving; the first poll ends when it succeeds."""
    clock, source = Clock(), FakeSource(1)
    store = store_of(source, clock=clock)
    source.problem = BundleError("no such bucket")
    await store.refresh()
    before = store.is_loaded, store.problem
    source.problem = None
    clock.now = FIRST_RETRY_S
    await store.refresh()
    source.problem = BundleError("no such bucket")

    await store.refresh()

    assert before == (False, "waiting for the model repository: no such bucket")
    assert (store.is_loaded, held(store)) == (True, [1])


@pytest.mark.parametrize(("n_failures", "delay_s"), [(0, 1), (1, 2), (5, 32), (6, 60), (10_000, 60)])
def test_a_backoff_has_a_limit_however_many_tries_failed(n_failures: int, delay_s: float) -> None:
    """A repository may be away for days."""
    assert backoff_s(n_failures) == delay_s


async def test_an_unreadable_source_is_polled_with_backoff() -> None:
    """After 1, 2, 4 … seconds, and at once on request."""
    clock, source = Clock(), FakeSource(1)
    store = store_of(source, clock=clock)
    source.problem = NotFetched("no such bucket")
    looks = []
    for second in range(8):
        clock.now = float(second)
        await store.refresh()
        looks.append(source.n_looks)
    with pytest.raises(Unavailable, match="no such bucket"):
        await store.load("m")
    source.problem = None
    await store.load("m")

    assert looks == [1, 2, 2, 3, 3, 3, 3, 4]
    assert held(store) == [1]


async def test_a_source_with_its_own_interval_is_not_polled_earlier() -> None:
    """A listing may cost money. Retries that are due still happen."""
    clock, source = Clock(), FakeSource(1, 2)
    source.failures[2] = NotFetched("connection refused")
    store: VersionStore[Any] = VersionStore(source, "predict", str, allow_unreleased_pairs=True, poll_interval_s=10, clock=clock)
    await store.refresh()
    source.publish(3)
    del source.failures[2]
    clock.now = 9.9
    await store.refresh()
    before = source.n_looks, held(store)
    clock.now = 10
    await store.refresh()

    assert before == (1, [1, 2])
    assert held(store) == [1, 2, 3]


async def test_models_are_fetched_at_the_same_time() -> None:
    """A model that takes long to fetch does not delay the others."""
    source = FakeSource(1)
    source.keys.add(BundleKey("slow", "predict", 1))
    fetching, others_loaded = threading.Event(), threading.Event()

    class SlowBundle(FakeBundle):
        def fetch(self) -> None:
            if self.key.model == "slow":
                fetching.set()
                assert others_loaded.wait(60)
            else:
                assert fetching.wait(60)

    def load(bundle: Any) -> str:
        if bundle.key.model == "m":
            others_loaded.set()
        return str(bundle)

    source.open = SlowBundle  # type: ignore[method-assign]
    store: VersionStore[Any] = VersionStore(source, "predict", load, allow_unreleased_pairs=True)

    await store.refresh()

    assert store.catalogue.ready_versions("m") == store.catalogue.ready_versions("slow") == (1,)


async def test_an_unloaded_model_is_not_served_until_load() -> None:
    """Polls of the source do not load it again."""
    source = FakeSource(1)
    store = store_of(source)
    await store.refresh()

    await store.unload("m")
    await store.refresh()
    with pytest.raises(Unavailable, match="it was unloaded"):
        store.choose("m", None)
    await store.load("m")

    assert held(store) == [1]
    for control in (store.load, store.unload):
        with pytest.raises(NotFound):
            await control("nope")


async def test_load_polls_the_source_at_once() -> None:
    """Without waiting for the next poll."""
    source = FakeSource(1)
    store = store_of(source)
    await store.refresh()
    source.publish(2)

    await store.load("m")

    assert held(store) == [1, 2]


async def test_a_missing_requested_model_is_reported_once() -> None:
    """Otherwise a misspelt name would look like an empty repository; other models are served."""
    source = FakeSource(1)
    store = VersionStore(
        source, "predict", str, selection=Selection(models=frozenset({"m", "other"})), allow_unreleased_pairs=True
    )

    with capture_logs() as logs:
        await store.refresh()
        await store.refresh()

    told = [line for line in logs if line["event"] == "requested models not in repository"]
    assert [line["models"] for line in told] == [["other"]]
    assert held(store) == [1]
