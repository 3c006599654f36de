"""Publishing to a bucket: bundles, then the release, each file by a conditional put."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.datasets import load_iris
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import MinMaxScaler, StandardScaler

from splitserve import PublishError, publish, publish_preprocessor, release, rollback, withdraw
from splitserve.publishing import from_pipeline
from splitserve.repository.bundle import BundleKey
from splitserve.repository.manifest import BundleError, NotFetched
from splitserve.repository.release import History
from splitserve.repository.releases import ReleaseReader
from splitserve.repository.signing import signed_by
from splitserve.repository.sources import source_of
from splitserve.repository.sources.bucket import Bucket
from splitserve.repository.sources.remote_folder import RemoteFolder
from splitserve.repository.writable import writable
from tests.command_line import run_command
from tests.object_store import ObjectStore, object_store
from tests.signing_keys import make_keys

pytestmark = pytest.mark.heavy

IRIS, SPECIES = load_iris(return_X_y=True)
PIPELINE = make_pipeline(StandardScaler(), LogisticRegression()).fit(IRIS, SPECIES)
URL = "s3://models/prod"


@pytest.fixture(scope="module")
def server() -> Iterator[ObjectStore]:
    with object_store() as running:
        yield running


@pytest.fixture
def store(server: ObjectStore, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[ObjectStore]:
    """An empty bucket, and what the environment leads to."""
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MODEL_CACHE", str(tmp_path / "cache"))
    server.client.create_bucket(Bucket="models")
    server.requests.clear()
    yield server
    server.reset()


PROVEN: dict[str, Any] = {}


@pytest.fixture(autouse=True)
def proven_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The halves of `PIPELINE` are made and proven once; what is examined here is how they are written."""
    prove = from_pipeline._proven

    def proven(original: Any, options: Any, *others: Any) -> Any:
        if original.pipeline is not PIPELINE:
            return prove(original, options, *others)
        if options.name not in PROVEN:
            PROVEN[options.name] = prove(original, options, *others)
        return PROVEN[options.name]

    monkeypatch.setattr(from_pipeline, "_proven", proven)


def history(url: str = URL) -> History:
    """As a service reads it."""
    source = source_of(url)
    list(source.bundles())
    reader = ReleaseReader(source)
    found = reader.history("iris")
    assert reader.problems == {}
    return found


def active() -> list[str]:
    return [str(each.pair) for each in history().active()]


def keys(store: ObjectStore) -> set[str]:
    found = store.client.list_objects_v2(Bucket="models").get("Contents", [])
    return {entry["Key"] for entry in found}


def test_bundles_then_the_release_are_there(store: ObjectStore) -> None:
    """The manifest of each last, that of the release last of all; no marker stays."""
    published = publish(PIPELINE, IRIS, name="iris", repository=URL)

    written = [path.partition("/prod/")[2].partition("?")[0] for method, path in store.requests if method == "PUT"]
    assert active() == ["1.1"]
    assert str(published.preprocessor) == f"{URL}/iris/preprocess/1"
    assert written[-1] == "iris/releases/0001-1.1/manifest.json"
    for folder in ("iris/preprocess/1", "iris/predict/1", "iris/releases/0001-1.1"):
        assert [path for path in written if path.startswith(folder)][-1] == f"{folder}/manifest.json"
    assert not [key for key in keys(store) if "/." in key]


def test_everything_that_is_written_can_be_written_to_a_bucket(store: ObjectStore) -> None:
    """Halves, a release of them, a rollback, a withdrawal."""
    publish(PIPELINE, IRIS, name="iris", repository=URL)
    publish_preprocessor(StandardScaler().fit(IRIS), IRIS, name="iris", repository=URL)
    assert active() == ["1.1"]

    release("iris", "2.1", repository=URL)
    assert active() == ["1.1", "2.1"]
    rollback("iris", repository=URL)
    assert active() == ["1.1", "2.1", "1.1"]
    withdraw("iris", 2, repository=URL)

    assert active() == ["1.1", "1.1"]


def test_a_route_in_the_bucket_pins(store: ObjectStore) -> None:
    publish(PIPELINE, IRIS, name="iris", repository=URL)
    publish(PIPELINE, IRIS, name="iris", repository=URL)
    store.client.put_object(Bucket="models", Key="prod/iris/route.json", Body=b'{"pairs": [{"pair": "2.2"}]}')

    with pytest.raises(PublishError, match=rf"{URL}/iris/route.json pins 2.2"):
        rollback("iris", repository=URL)


def test_the_commands_take_a_bucket(store: ObjectStore, tmp_path: Path) -> None:
    publish(PIPELINE, IRIS, name="iris", repository=URL)
    np.save(tmp_path / "rows.npy", IRIS)
    from splitserve.runtimes import sklearn_pipeline

    (tmp_path / "scaler.skops").write_bytes(sklearn_pipeline.dump(StandardScaler().fit(IRIS)))

    def run(*arguments: Any) -> str:
        result = run_command(*arguments, "--repository", URL)
        assert result.exit_code == 0, result.output
        return result.output

    written = run("publish", "iris", "--transformer", tmp_path / "scaler.skops", "--data", tmp_path / "rows.npy")
    run("release", "iris", "2.1", "--yes")
    back = run("rollback", "iris")

    assert written.splitlines()[0] == f"iris/preprocess/2: {URL}/iris/preprocess/2"
    assert back == "rolled iris back from release 2 to 1.1, as release 3\n"
    assert "current" in run("releases", "iris").splitlines()[-1]


def test_publishers_at_the_same_time_share_no_number(store: ObjectStore) -> None:
    """None overwrites what another has written, and all are released."""
    pipelines = [make_pipeline(StandardScaler(), LogisticRegression(C=10.0**power)).fit(IRIS, SPECIES) for power in range(4)]
    failures: list[Exception] = []

    def publish_one(pipeline: Any) -> None:
        try:
            publish(pipeline, IRIS, name="iris", repository=URL)
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=publish_one, args=[pipeline]) for pipeline in pipelines]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert failures == []
    assert len({each.sequence for each in history().active()}) == 4
    assert len({each.pair.preprocessor for each in history().active()}) == 4
    source = source_of(URL)
    for each in history().active():
        for key in source.bundles():
            if (key.kind, key.version) == ("predict", each.pair.predictor):
                bundle = source.open(key)
                bundle.fetch()
                assert bundle.manifest_sha256 == each.manifest.predictor


class Dying(RemoteFolder):
    """A publisher that is killed before its n-th write."""

    left = 0

    def create(self, path: str, data: bytes) -> None:
        self.left -= 1
        if self.left < 0:
            raise SystemExit
        super().create(path, data)

    def delete(self, path: str) -> None:
        if self.left < 0:
            raise SystemExit
        super().delete(path)


def test_a_publisher_killed_at_any_point_leaves_the_old_or_the_new_state(
    store: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the next publication works: what is left has no manifest, or no release."""
    publish(PIPELINE, IRIS, name="iris", repository=URL)
    n_records = 1
    for number in range(100):
        folder = Dying(URL)
        folder.left = number
        bucket = Bucket(folder, Bucket.at(URL, cache=str(tmp_path / "cache"))._cache)
        monkeypatch.setattr(
            "splitserve.publishing.halves.writable", lambda where, bucket=bucket: bucket if where == URL else writable(where)
        )
        try:
            publish(PIPELINE, IRIS, name="iris", repository=URL)
            is_done = True
        except SystemExit:
            is_done = False
        found = history()
        assert len(found.active()) in (n_records, n_records + 1)
        n_records = len(found.active())
        current = found.current()
        assert current is not None
        source = source_of(URL)
        digests = {str(key): source.open(key).manifest_sha256 for key in source.bundles()}
        assert digests[f"iris/predict/{current.pair.predictor}"] == current.manifest.predictor
        assert digests[f"iris/preprocess/{current.pair.preprocessor}"] == current.manifest.preprocessor
        if is_done:
            break
    monkeypatch.undo()

    assert number > 7, "the places where it can be killed"
    for name, value in store.environment.items():
        monkeypatch.setenv(name, value)
    before = history().next_sequence()
    assert publish(PIPELINE, IRIS, name="iris", repository=URL).sequence >= before
    assert not [key for key in keys(store) if "/." in key], "markers of the killed are removed"


def test_a_version_that_is_there_is_not_overwritten(store: ObjectStore) -> None:
    publish(PIPELINE, IRIS, name="iris", repository=URL)
    before = keys(store)

    with pytest.raises(PublishError, match="iris/preprocess/1: already published"):
        publish(
            make_pipeline(MinMaxScaler(), LogisticRegression()).fit(IRIS, SPECIES), IRIS, name="iris", repository=URL, version=1
        )

    assert keys(store) == before


def test_a_file_is_created_once(store: ObjectStore) -> None:
    """By the store itself, not by looking first."""
    folder = RemoteFolder(URL)
    folder.create("m/file", b"one")

    with pytest.raises(FileExistsError):
        folder.create("m/file", b"two")

    assert folder.read("m/file") == b"one"


@pytest.mark.parametrize("url", ["s3://nowhere/models"])
def test_a_bucket_that_is_not_there_is_named(store: ObjectStore, url: str) -> None:
    with pytest.raises(PublishError, match="not found"):
        publish(PIPELINE, IRIS, name="iris", repository=url)


def test_a_listing_that_fails_writes_nothing(store: ObjectStore) -> None:
    """A number that is chosen without a listing may be taken."""
    bucket = writable(URL)
    assert isinstance(bucket, Bucket)
    bucket._folder.close()

    with pytest.raises((BundleError, NotFetched)):
        bucket.next_version("iris", "predict")


def test_a_bucket_is_signed_in_place(store: ObjectStore, tmp_path: Path) -> None:
    """Bundles, releases and the route; signing again with another key replaces the signatures."""
    publish(PIPELINE, IRIS, name="iris", repository=URL)
    store.client.put_object(Bucket="models", Key="prod/iris/route.json", Body=b'{"pairs": [{"pair": "1.1"}]}')
    ours, others = make_keys(tmp_path), make_keys(tmp_path, "others")

    def signed_with(public: Path) -> list[str]:
        source = signed_by(str(public), source_of(URL))
        list(source.bundles())
        reader = ReleaseReader(source)
        found = [str(each.pair) for each in reader.history("iris").active()]
        if found:
            assert source.route("iris") is not None
            source.open(BundleKey("iris", "predict", 1))
        return found

    unsigned = signed_with(ours.public)
    by_others = run_command("sign", "-r", URL, "--key", others.private)
    foreign = signed_with(ours.public)
    by_us = run_command("sign", "-r", URL, "--key", ours.private, "iris")

    assert (by_others.exit_code, by_us.exit_code) == (0, 0), by_others.output + by_us.output
    assert f"iris/releases/0001-1.1: {URL}/iris/releases/0001-1.1/model.sig" in by_us.stdout
    assert (unsigned, foreign, signed_with(ours.public)) == ([], [], ["1.1"])


@pytest.mark.parametrize(
    ("command", "url", "message"),
    [
        (
            ("sign", "--key", "key.pem"),
            "https://127.0.0.1:1/models",
            'publish to a folder, run "splitserve index", and upload it',
        ),
        (("index",), URL, "services list buckets themselves and need no index there"),
        (("index",), "https://127.0.0.1:1/models", "index the folder that is uploaded to it"),
    ],
)
def test_what_cannot_be_done_at_a_url_says_what_to_do(command: tuple[str, ...], url: str, message: str) -> None:
    result = run_command(*command, "-r", url)

    assert result.exit_code != 0
    assert message in " ".join(re.sub("[│╭╰─╮╯]", " ", result.output).split())
