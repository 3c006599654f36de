"""A model repository in a bucket, against a real S3 API: which requests are sent, and how failures are reported."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from splitserve.repository.bundle import BundleKey
from splitserve.repository.folder import Repository
from splitserve.repository.manifest import BundleError, NotFetched
from splitserve.repository.releases import ReleaseReader
from splitserve.repository.source import fetch_bundle
from splitserve.repository.sources import source_of
from splitserve.repository.sources.remote_repository import RemoteRepository
from tests.file_server import Fault, Gateway, cut, flip, stall, status
from tests.object_store import ObjectStore, object_store
from tests.repository.bundles import KEY, write_bundle, write_route
from tests.repository.test_release_sources import GOLDEN, record

pytestmark = pytest.mark.heavy

CONTENT = b"graph" * 1000
FILES = {"model.onnx": CONTENT}
URL = "s3://models/prod"
MODEL = "prod/m/predict/1/model.onnx"


@pytest.fixture(scope="module")
def server() -> Iterator[ObjectStore]:
    with object_store() as running:
        yield running


@pytest.fixture
def store(server: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> Iterator[ObjectStore]:
    """An empty store that the environment points to."""
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    server.requests.clear()
    yield server
    server.reset()


@pytest.fixture
def repository(tmp_path: Path) -> Repository:
    """One bundle and its model's route."""
    found = Repository(tmp_path / "models")
    write_bundle(found, files=FILES)
    write_route(found)
    return found


def routed(source: RemoteRepository) -> list[str]:
    """The pairs of the model's route."""
    route = source.route("m")
    assert route is not None
    return [str(pair) for pair in route.named()]


@pytest.fixture
def filled(store: ObjectStore, repository: Repository) -> ObjectStore:
    """With the repository in it, below a prefix."""
    store.client.create_bucket(Bucket="models")
    store.upload(repository.root, "models", "prod/")
    store.requests.clear()
    return store


@pytest.fixture
def open_source(tmp_path: Path) -> Iterator[Callable[[], RemoteRepository]]:
    """Creates sources like processes that share a cache, one after the other."""
    opened: list[RemoteRepository] = []

    def open_it(url: str = URL, timeout_s: float = 60) -> RemoteRepository:
        source = source_of(url, cache=str(tmp_path / "cache"), timeout_s=timeout_s)
        assert isinstance(source, RemoteRepository)
        opened.append(source)
        return source

    yield open_it
    for source in opened:
        source.close()


def test_a_bucket_is_a_model_repository(filled: ObjectStore, open_source: Callable[..., RemoteRepository]) -> None:
    """It is listed in one request; a bundle is read as it was written."""
    source = open_source()

    keys = list(source.bundles())

    assert keys == [KEY]
    assert len(filled.requests) == 1
    assert routed(source) == ["1.1"]
    assert fetch_bundle(source, KEY).read("model.onnx") == CONTENT


def test_releases_are_read_from_a_bucket_and_fetched_once(
    store: ObjectStore, repository: Repository, open_source: Callable[..., RemoteRepository]
) -> None:
    """The listing has them in order; records never change, so that a restart fetches none."""
    record(repository.root)
    record(repository.root, "1.2")
    store.client.create_bucket(Bucket="models")
    store.upload(repository.root, "models", "prod/")
    first = open_source()
    first.bundles()
    history = ReleaseReader(first).history("m")
    opened = first.open_release(first.releases("m")[1])
    opened.fetch()
    store.requests.clear()

    again = open_source()
    again.bundles()
    reader = ReleaseReader(again)

    assert [str(release.key) for release in history.records] == ["m/releases/0001-1.1", "m/releases/0002-1.2"]
    assert opened.read("golden.npz") == GOLDEN
    assert reader.history("m").current() == history.current()
    assert store.fetched() == []


def test_a_restart_fetches_nothing(filled: ObjectStore, open_source: Callable[..., RemoteRepository]) -> None:
    """The listing shows that manifests and routes are unchanged."""
    first = open_source()
    first.bundles()
    first.route("m")
    fetch_bundle(first, KEY)
    fetched = filled.fetched()
    filled.requests.clear()

    again = open_source()
    again.bundles()
    again.route("m")
    bundle = fetch_bundle(again, KEY)

    assert len(fetched) == 3
    assert bundle.read("model.onnx") == CONTENT
    assert filled.fetched() == []


def test_new_bundles_are_seen_at_the_next_poll(
    filled: ObjectStore, repository: Repository, open_source: Callable[..., RemoteRepository]
) -> None:
    """A bundle, and a route that changed; nothing else is fetched again."""
    source = open_source()
    source.bundles()
    source.route("m")
    filled.requests.clear()
    write_bundle(repository, BundleKey("m", "predict", 2), FILES)
    write_route(repository, pair="1.2")
    filled.upload(repository.root, "models", "prod/")

    keys = list(source.bundles())
    pairs = routed(source)

    assert keys == [KEY, BundleKey("m", "predict", 2)]
    assert pairs == ["1.2"]
    assert filled.fetched() == ["/models/prod/m/route.json"]


def test_a_missing_bucket_is_reported_until_it_exists(store: ObjectStore, open_source: Callable[..., RemoteRepository]) -> None:
    """The same source finds it then; an empty one is a repository without models."""
    source = open_source()

    with pytest.raises(NotFetched) as caught:
        source.bundles()
    store.client.create_bucket(Bucket="models")

    assert str(caught.value) == "s3://models/prod: not found: The specified bucket does not exist"
    assert list(source.bundles()) == []


def test_denied_access_is_reported(
    filled: ObjectStore, open_source: Callable[..., RemoteRepository], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the server's own words."""
    monkeypatch.setattr("moto.settings.INITIAL_NO_AUTH_ACTION_COUNT", 0)

    with pytest.raises(NotFetched, match=r"^s3://models/prod: access denied: .*AWS Access Key Id you provided does not exist"):
        open_source().bundles()


def test_without_credentials_no_request_is_sent(
    filled: ObjectStore, open_source: Callable[..., RemoteRepository], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The package names the places that it searched."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))

    with pytest.raises(NotFetched, match=r"^s3://models/prod: NoCredentialsError: Unable to locate credentials$"):
        open_source().bundles()


def test_an_unreachable_server_times_out(
    open_source: Callable[..., RemoteRepository], store: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The package tries again and again on its own account: the timeout is for all of it."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")

    with pytest.raises(NotFetched, match=r"^s3://models/prod: no answer within 0\.3 s$"):
        open_source(timeout_s=0.3).bundles()


@pytest.mark.parametrize(
    "content",
    [CONTENT[:-1] + b"!", CONTENT[:-1], b"", b"another"],
    ids=["another byte", "truncated", "empty", "swapped"],
)
def test_an_object_with_a_wrong_digest_is_refused_by_name(
    filled: ObjectStore, open_source: Callable[..., RemoteRepository], content: bytes
) -> None:
    """After it was fetched once more."""
    filled.client.put_object(Bucket="models", Key=MODEL, Body=content)

    with pytest.raises(BundleError) as caught:
        fetch_bundle(open_source(), KEY)

    assert not isinstance(caught.value, NotFetched)
    assert str(caught.value).startswith(f"m/predict/1: model.onnx: expected {len(CONTENT)} bytes, sha256 ")
    assert f"; got {len(content)} bytes, " in str(caught.value)
    assert str(caught.value).endswith(", twice in a row from s3://models/prod")


@pytest.fixture
def gateway(filled: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> Iterator[Gateway]:
    """A gateway in front of the store that the environment points to; the fsspec package does not retry."""
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    with Gateway(filled.environment["AWS_ENDPOINT_URL"]).running() as running:
        monkeypatch.setenv("AWS_ENDPOINT_URL", running.url)
        assert isinstance(running, Gateway)
        yield running


@pytest.mark.parametrize("faults", [[cut], [flip], [status(500)], [cut, flip]], ids=["cut", "wrong byte", "500", "both"])
def test_an_unreliable_object_store_is_tolerated(
    gateway: Gateway, open_source: Callable[..., RemoteRepository], faults: list[Fault]
) -> None:
    """Cut off in the middle, a wrong byte: the object is fetched again, and only correct bytes are loaded."""
    source = open_source()
    gateway.fail(f"models/{MODEL}", *faults)

    with contextlib.suppress(NotFetched):
        fetch_bundle(source, KEY)

    assert fetch_bundle(source, KEY).read("model.onnx") == CONTENT
    assert not any(gateway.faults.values())


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (status(503), r"^m/predict/1: model\.onnx: .*503.*Service Unavailable"),
        (status(403), r"^m/predict/1: model\.onnx: access denied: Forbidden$"),
        (cut, r"^m/predict/1: model\.onnx: "),
        (stall, r"^m/predict/1: model\.onnx: no answer within 5 s$"),
    ],
    ids=["503", "403", "cut", "stall"],
)
def test_a_failing_store_is_reported_and_retryable(
    gateway: Gateway, open_source: Callable[..., RemoteRepository], fault: Fault, message: str
) -> None:
    """The next try succeeds."""
    source = open_source(timeout_s=5 if fault is stall else 60)
    gateway.fail(f"models/{MODEL}", *[fault] * 100)
    with pytest.raises(NotFetched, match=message):
        fetch_bundle(source, KEY)
    gateway.faults.clear()

    assert fetch_bundle(open_source(), KEY).read("model.onnx") == CONTENT


def test_a_missing_object_is_retryable(filled: ObjectStore, open_source: Callable[..., RemoteRepository]) -> None:
    """Copies to a bucket are made file by file."""
    source = open_source()
    filled.client.delete_object(Bucket="models", Key=MODEL)
    with pytest.raises(NotFetched, match=r"^m/predict/1: model\.onnx: not found: The specified key does not exist"):
        fetch_bundle(source, KEY)
    filled.client.put_object(Bucket="models", Key=MODEL, Body=CONTENT)

    assert fetch_bundle(source, KEY).read("model.onnx") == CONTENT
