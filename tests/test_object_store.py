"""A model repository in a bucket, against a real S3 API: what is asked for, and what is told when it fails."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from splitserve.manifest import BundleError, Manifest, NotFetched
from splitserve.repository import BundleKey, Repository, fetch_bundle
from splitserve.sources import source_of
from splitserve.sources.remote_repository import RemoteRepository
from tests.object_store import ObjectStore, object_store

KEY = BundleKey("m", "predict", 1)
CONTENT = b"graph" * 1000
URL = "s3://models/prod"
MODEL = "prod/m/predict/1/model.onnx"


@pytest.fixture(scope="module")
def server() -> Iterator[ObjectStore]:
    with object_store() as running:
        yield running


@pytest.fixture
def store(server: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> Iterator[ObjectStore]:
    """Empty, and what the environment leads to."""
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    server.requests.clear()
    yield server
    server.reset()


@pytest.fixture
def repository(tmp_path: Path) -> Repository:
    """One bundle and its model's route."""
    found = Repository(tmp_path / "models")
    write(found, 1)
    (found.root / "m" / "route.json").write_bytes(b'{"pairs": [{"pair": "1.1"}]}')
    return found


def write(repository: Repository, version: int) -> None:
    manifest = Manifest(
        schema_version=1,
        name="m",
        kind="predict",
        version=version,
        created="",
        files={},
        inputs=(),
        outputs=(),
        environment={},
    )
    repository.write(manifest, {"model.onnx": CONTENT})


@pytest.fixture
def filled(store: ObjectStore, repository: Repository) -> ObjectStore:
    """With the repository in it, below a prefix."""
    store.client.create_bucket(Bucket="models")
    store.upload(repository.root, "models", "prod/")
    store.requests.clear()
    return store


@pytest.fixture
def open_source(tmp_path: Path) -> Iterator[Callable[[], RemoteRepository]]:
    """Makes sources as processes would that share a cache, one after the other."""
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
    assert [str(pair) for pair in source.routes()["m"].named()] == ["1.1"]
    assert fetch_bundle(source, KEY).read("model.onnx") == CONTENT


def test_a_restart_fetches_nothing(filled: ObjectStore, open_source: Callable[..., RemoteRepository]) -> None:
    """The listing says that manifests and routes are as they were."""
    first = open_source()
    first.bundles()
    first.routes()
    fetch_bundle(first, KEY)
    fetched = filled.fetched()
    filled.requests.clear()

    again = open_source()
    again.bundles()
    again.routes()
    bundle = fetch_bundle(again, KEY)

    assert len(fetched) == 3
    assert bundle.read("model.onnx") == CONTENT
    assert filled.fetched() == []


def test_what_is_new_is_seen_at_the_next_look(
    filled: ObjectStore, repository: Repository, open_source: Callable[..., RemoteRepository]
) -> None:
    """A bundle, and a route that changed; nothing else is fetched again."""
    source = open_source()
    source.bundles()
    source.routes()
    filled.requests.clear()
    write(repository, 2)
    (repository.root / "m" / "route.json").write_bytes(b'{"pairs": [{"pair": "1.2"}]}')
    filled.upload(repository.root, "models", "prod/")

    keys = list(source.bundles())
    routes = source.routes()

    assert keys == [KEY, BundleKey("m", "predict", 2)]
    assert [str(pair) for pair in routes["m"].named()] == ["1.2"]
    assert filled.fetched() == ["/models/prod/m/route.json"]


def test_a_bucket_that_is_not_there_says_so_until_it_is(store: ObjectStore, open_source: Callable[..., RemoteRepository]) -> None:
    """The same source finds it then; an empty one is a repository without models."""
    source = open_source()

    with pytest.raises(NotFetched) as caught:
        source.bundles()
    store.client.create_bucket(Bucket="models")

    assert str(caught.value) == "s3://models/prod: not found: The specified bucket does not exist"
    assert list(source.bundles()) == []


def test_who_is_not_let_in_is_told(
    filled: ObjectStore, open_source: Callable[..., RemoteRepository], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the server's own words."""
    monkeypatch.setattr("moto.settings.INITIAL_NO_AUTH_ACTION_COUNT", 0)

    with pytest.raises(NotFetched, match=r"^s3://models/prod: access denied: .*AWS Access Key Id you provided does not exist"):
        open_source().bundles()


def test_without_credentials_nothing_is_tried(
    filled: ObjectStore, open_source: Callable[..., RemoteRepository], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The package says where it looked in vain."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))

    with pytest.raises(NotFetched, match=r"^s3://models/prod: NoCredentialsError: Unable to locate credentials$"):
        open_source().bundles()


def test_a_server_that_is_gone_is_waited_for_so_long(
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
def test_an_object_that_is_not_what_was_published_is_refused_by_name(
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


def test_an_object_that_is_missing_may_come_later(filled: ObjectStore, open_source: Callable[..., RemoteRepository]) -> None:
    """Copies to a bucket are made file by file."""
    source = open_source()
    filled.client.delete_object(Bucket="models", Key=MODEL)
    with pytest.raises(NotFetched, match=r"^m/predict/1: model\.onnx: not found: The specified key does not exist"):
        fetch_bundle(source, KEY)
    filled.client.put_object(Bucket="models", Key=MODEL, Body=CONTENT)

    assert fetch_bundle(source, KEY).read("model.onnx") == CONTENT
