"""What the store loads for releases, keeps for their grace period, and refuses."""

from __future__ import annotations

from typing import Any

import pytest
from structlog.testing import capture_logs

from splitserve.errors import NotFound
from splitserve.oip.messages import READY
from splitserve.repository.bundle import BundleKey
from splitserve.repository.golden import GoldenDifference
from splitserve.repository.manifest import BundleError, Kind, NotFetched
from splitserve.repository.release import SCHEMA_VERSION, Release, ReleaseKey, ReleaseManifest
from splitserve.repository.routes import Route, RoutedPair
from splitserve.repository.selection import Selection, parse_policies
from splitserve.repository.source import FIRST_RETRY_S
from splitserve.server.repository_view import VANISHED
from splitserve.server.store import VersionStore
from splitserve.versions import Pair
from tests.server.test_store import Clock, FakeBundle, FakeSource, held

DIGEST = "a" * 64


class FakeRecord:
    """A record that consists of its release only."""

    def __init__(self, release: Release) -> None:
        self.release = release
        self.manifest_sha256 = release.sha256


class ReleasedSource(FakeSource):
    """Predictors 1, 2, … whose manifests have the digest `DIGEST` unless `digests` has another, and releases."""

    def __init__(self, *versions: int) -> None:
        super().__init__(*versions)
        self.digests: dict[int, str] = {}

    def open(self, key: BundleKey) -> Any:
        bundle: FakeBundle = super().open(key)
        bundle.manifest_sha256 = self.digests.get(key.version, DIGEST)
        return bundle

    def release(
        self, pair: str, *, predictor: str = DIGEST, withdraws: int = 0, rolls_back: int = 0, sha256: str = "", by: str = ""
    ) -> None:
        sequence = len(self.records) + 1
        manifest = ReleaseManifest(
            schema_version=SCHEMA_VERSION, model="m", sequence=sequence, pair=pair, created="",
            preprocessor=DIGEST, predictor=predictor, withdraws=withdraws, rolls_back=rolls_back, recorded_by=by,
        )  # fmt: skip
        record = FakeRecord(Release(manifest, sha256 or f"{sequence:064d}"))
        self.records[ReleaseKey("m", sequence, manifest.key.pair)] = record


def store_of(
    source: FakeSource,
    policy: str = "latest:2",
    *,
    kind: Kind = "predict",
    clock: Clock | None = None,
    delay_s: float = 0.0,
    grace_s: float = 0.0,
) -> VersionStore[Any]:
    return VersionStore(
        source,
        kind,
        str,
        selection=Selection(policies=parse_policies(policy)),
        unload_delay_s=delay_s,
        withdrawal_grace_s=grace_s,
        clock=clock or Clock(),
    )


async def test_only_halves_of_releases_are_loaded() -> None:
    """A publisher that was killed before the release leaves bundles that are not served."""
    source = ReleasedSource(1, 2)
    source.release("1.1")
    store = store_of(source)

    await store.refresh()

    assert held(store) == [1]
    with pytest.raises(NotFound):
        store.choose("m", 2)


async def test_a_model_without_a_release_says_how_to_get_one() -> None:
    """Its halves are published and not served."""
    store = store_of(ReleasedSource(1))

    await store.refresh()

    (state,) = store.index(lambda _: {})
    assert (state.version, state.reason) == ("", 'it has no release; "splitserve release m K.M" proves a pair and makes one')


async def test_the_policy_counts_releases_and_one_more_is_held() -> None:
    """By sequence, not by version number; the previous release serves if a restart finds the newest refused."""
    source = ReleasedSource(1, 2, 3, 4, 5)
    for pair in ("1.5", "1.4", "1.1", "1.2", "1.3"):
        source.release(pair)
    store = store_of(source, "latest:1")

    await store.refresh()

    assert held(store) == [2, 3]


async def test_a_pair_that_was_released_again_counts_once() -> None:
    """Its last release counts."""
    source = ReleasedSource(1, 2, 3)
    for pair in ("1.1", "1.2", "1.3", "1.2", "1.3"):
        source.release(pair)
    store = store_of(source, "latest:2")

    await store.refresh()

    assert held(store) == [1, 2, 3]


async def test_specific_names_pairs_that_have_a_release() -> None:
    """Not the cross product of their halves, and no pair that was never proven."""
    source = ReleasedSource(1, 2, 3)
    source.release("1.1")
    source.release("2.2")
    store = store_of(source, "2.2,1.3")

    await store.refresh()

    assert held(store) == [2]


async def test_what_the_route_names_is_held_however_old() -> None:
    """It serves by default."""
    source = ReleasedSource(1, 2, 3, 4)
    for pair in ("1.1", "1.2", "1.3", "1.4"):
        source.release(pair)
    source.found_routes = {"m": Route((RoutedPair("1.1"),))}
    store = store_of(source, "latest:1")

    await store.refresh()

    assert held(store) == [1, 3, 4]


async def test_a_route_to_a_pair_without_a_release_is_not_followed() -> None:
    """The last valid route is."""
    source = ReleasedSource(1, 2)
    source.release("1.1")
    source.found_routes = {"m": Route((RoutedPair("1.1"),))}
    store = store_of(source)
    await store.refresh()

    source.found_routes = {"m": Route((RoutedPair("1.2"),))}
    await store.refresh()
    view = store.models["m"]

    assert view.route_problem == 'm: route.json: 1.2 has no release; "splitserve release m 1.2" makes one'
    assert view.route is not None
    assert view.route.named() == [Pair(1, 1)]
    assert view.default_problem == ""


async def test_a_broken_route_without_a_good_one_before_leaves_no_default() -> None:
    """After a restart the previous route is unknown."""
    source = ReleasedSource(1)
    source.release("1.1")
    source.found_routes = {"m": BundleError("m: route.json: unknown field")}
    store = store_of(source)

    await store.refresh()

    assert store.models["m"].default_problem == "m: route.json: unknown field"
    assert held(store) == [1]


async def test_a_bundle_that_is_not_the_one_of_its_release_is_refused() -> None:
    """Any change to it changes the digest of its manifest."""
    source = ReleasedSource(1, 2)
    source.release("1.1")
    source.release("1.2")
    source.digests[2] = "b" * 64
    store = store_of(source)

    await store.refresh()

    assert held(store) == [1]
    reason = store.catalogue.entries("m")[2].reason
    assert f"manifest.json: expected sha256 {DIGEST} as its releases recorded, got {'b' * 64}" in reason


async def test_a_bundle_that_was_replaced_and_released_again_is_loaded_again() -> None:
    """After version 1 was published again under the same number, the bundle of the new release is loaded."""
    source = ReleasedSource(1)
    source.release("1.1")
    store = store_of(source)
    await store.refresh()

    source.digests[1] = "b" * 64
    source.release("1.1", predictor="b" * 64)
    await store.refresh()
    await store.refresh()

    assert source.opened == [1, 1]
    assert held(store) == [1]


async def test_a_release_that_comes_before_its_bundle_waits_for_it() -> None:
    """A copy of a repository may arrive in any order."""
    source = ReleasedSource(1)
    source.release("1.1")
    source.release("1.2")
    store = store_of(source)
    await store.refresh()
    before = held(store), store.catalogue.entries("m")[2].reason

    source.publish(2)
    await store.refresh()

    assert before == ([1], "m/predict/2: not published")
    assert held(store) == [1, 2]


async def test_a_withdrawn_release_is_held_for_its_grace_and_then_unloaded() -> None:
    """Independent of how many requests it gets meanwhile."""
    clock, source = Clock(), ReleasedSource(1, 2)
    source.release("1.1")
    source.release("1.2")
    store = store_of(source, clock=clock, delay_s=1000, grace_s=30)
    await store.refresh()

    source.release("1.2", withdraws=2)
    await store.refresh()
    clock.now = 29
    store.choose("m", 2)
    await store.refresh()
    within = held(store), list(store.models["m"].withdrawn)
    clock.now = 30
    store.choose("m", 2)
    await store.refresh()

    assert within == ([1, 2], [Pair(1, 2)])
    assert held(store) == [1]


async def test_a_release_that_is_withdrawn_and_released_again_stays() -> None:
    """Its grace ends with its withdrawal."""
    clock, source = Clock(), ReleasedSource(1)
    source.release("1.1")
    store = store_of(source, clock=clock, grace_s=30)
    await store.refresh()
    source.release("1.1", withdraws=1)
    await store.refresh()

    source.release("1.1")
    clock.now = 20
    await store.refresh()
    clock.now = 100
    await store.refresh()

    assert held(store) == [1]
    assert store.models["m"].withdrawn == {}


async def test_releases_that_vanish_together_are_not_withdrawn() -> None:
    """An unmounted volume is an empty folder; loaded versions keep serving and report the reason until it is mounted again."""
    clock, source = Clock(), ReleasedSource(1)
    source.release("1.1")
    store = store_of(source, clock=clock)
    await store.refresh()
    keys, records = source.keys, source.records

    source.keys, source.records = set(), {}
    clock.now = 3600
    await store.refresh()
    gone = held(store), store.index(lambda _: {})
    source.keys, source.records = keys, records
    await store.refresh()

    assert gone[0] == [1]
    assert [(state.state, state.reason) for state in gone[1]] == [(READY, VANISHED)]
    assert [state.reason for state in store.index(lambda _: {})] == [""]


async def test_a_record_that_cannot_be_fetched_changes_nothing() -> None:
    """The model waits for it; the others do not."""
    clock, source = Clock(), ReleasedSource(1, 2)
    source.release("1.1")
    store = store_of(source, clock=clock)
    await store.refresh()

    source.release("1.2")
    key = max(source.records)
    record, source.records[key] = source.records[key], NotFetched("connection refused")
    await store.refresh()
    before = held(store), store.problem_of("m")
    source.records[key] = record
    clock.now = FIRST_RETRY_S
    await store.refresh()

    assert before == ([1], "m/releases/0002-1.2: connection refused")
    assert held(store) == [1, 2]


async def test_versions_without_a_release_are_loaded_only_where_a_setting_allows_it() -> None:
    """In addition to those that have one."""
    source = ReleasedSource(1, 2, 3)
    source.release("1.1")
    store: VersionStore[Any] = VersionStore(
        source,
        "predict",
        str,
        selection=Selection(policies=parse_policies("latest:1")),
        allow_unreleased_pairs=True,
        clock=Clock(),
    )

    await store.refresh()

    assert held(store) == [1, 3]


async def test_what_is_recorded_while_a_service_runs_is_written_for_auditors() -> None:
    """Releases, rollbacks, withdrawals and routes, once, by one of the two halves; not what was there before it started."""
    source = ReleasedSource(1, 2)
    source.release("1.1", by="old@host")
    stores = [store_of(source, kind=kind) for kind in ("preprocess", "predict")]
    with capture_logs() as lines:
        for step in ("start", "release", "route", "withdraw", "nothing"):
            if step == "release":
                source.release("1.2", by="ann@host")
                source.release("1.1", rolls_back=2, by="bob@host")
            elif step == "route":
                source.found_routes = {"m": Route((RoutedPair("1.1"),))}
            elif step == "withdraw":
                source.found_routes = {}
                source.release("1.2", withdraws=2)
            for store in stores:
                await store.refresh()

    written = [line for line in lines if line["event"] == "audit"]
    assert [(line["verb"], line["release"], line["principal"]) for line in written] == [
        ("release", "1.2", "ann@host"), ("roll back", "1.1", "bob@host"), ("route", "1.1", ""), ("withdraw", "1.2", ""),
        ("route", "", ""),
    ]  # fmt: skip
    assert {(line["model"], line["source"], line["result"]) for line in written} == {("m", "model repository", "OK")}
    assert [line["sequence"] for line in written if "sequence" in line] == [2, 3, 4]
    assert [line.get("withdraws") or line.get("rolls_back") for line in written] == [None, 2, None, 2, None]


async def test_models_that_come_later_are_written_for_auditors_too() -> None:
    """Their first release as well."""
    source = ReleasedSource(1)
    store = store_of(source, kind="preprocess")
    await store.refresh()
    source.release("1.1", by="ann@host")
    with capture_logs() as lines:
        await store.refresh()

    assert [line["verb"] for line in lines if line["event"] == "audit"] == ["release"]


async def test_refusals_are_counted_by_what_was_wrong() -> None:
    """The files, the release, the load, or the golden samples; what was not fetched is not refused."""
    source = ReleasedSource(1, 2, 3, 4, 5)
    source.failures = {1: BundleError("its signature is wrong"), 5: NotFetched("away")}
    for version in (1, 2, 3, 4, 5):
        source.release(f"1.{version}")
    source.digests[2] = "b" * 64

    def load(bundle: Any) -> str:
        raise GoldenDifference("0.5") if bundle.key.version == 4 else BundleError("of another version of scikit-learn")

    store: VersionStore[str] = VersionStore(source, "predict", load, selection=Selection(policies=parse_policies("all")))
    await store.refresh()

    assert store.n_refused == {"files": 1, "release": 1, "load": 1, "golden": 1}
    assert store.n_tried == {"loaded": 0, "refused": 4, "not_fetched": 1, "failed": 0}
