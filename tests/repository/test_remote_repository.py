"""A model repository at a URL: what is fetched and when, and what is reported when that fails."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from splitserve.repository import sources
from splitserve.repository.bundle import BundleKey
from splitserve.repository.folder import Repository
from splitserve.repository.manifest import BundleError, NotFetched
from splitserve.repository.selection import Selection
from splitserve.repository.source import fetch_bundle
from splitserve.repository.sources import index, source_of
from splitserve.repository.sources.cache import Cache, WrongContent
from splitserve.repository.sources.local_folder import LocalFolder
from splitserve.repository.sources.remote_folder import CANCELLED, RemoteFolder
from splitserve.repository.sources.remote_repository import RemoteRepository
from tests.file_server import Fault, FileServer, cut, flip, nothing, stall, status
from tests.repository.bundles import KEY, write_bundle, write_route

PIECE_BYTES = 100
FILES = {"model.onnx": bytes(range(256)) * 4, "golden.npz": b"samples"}
MODEL = "m/predict/1/model.onnx"
MANIFEST = "m/predict/1/manifest.json"


def write_index(repository: Repository) -> None:
    index.write(repository.root, index.build(repository)[0])


def routed(source: RemoteRepository) -> list[str]:
    """The pairs of the model's route."""
    route = source.route("m")
    assert route is not None
    return [str(pair) for pair in route.named()]


@pytest.fixture
def published(tmp_path: Path) -> Repository:
    """A bundle and a route, and another model."""
    found = Repository(tmp_path / "models")
    write_bundle(found, files=FILES)
    write_bundle(found, BundleKey("other", "predict", 1), FILES)
    write_route(found)
    write_index(found)
    return found


@pytest.fixture
def server(published: Repository) -> Iterator[FileServer]:
    with FileServer(published.root).running() as running:
        yield running


@pytest.fixture
def open_source(tmp_path: Path) -> Iterator[Callable[..., RemoteRepository]]:
    """Creates sources like processes that share a cache, one after the other."""
    opened: list[RemoteRepository] = []

    def open_it(url: str, *, timeout_s: float = 60, selection: Selection | None = None) -> RemoteRepository:
        folder = RemoteFolder(url, timeout_s=timeout_s, piece_bytes=PIECE_BYTES)
        opened.append(RemoteRepository(folder, Cache(tmp_path / "cache"), serves=(selection or Selection()).serves))
        return opened[-1]

    yield open_it
    for source in opened:
        source.close()


@pytest.fixture
def source(server: FileServer, open_source: Callable[..., RemoteRepository]) -> RemoteRepository:
    return open_source(server.url)


def test_a_bundle_is_read_as_it_was_written(source: RemoteRepository) -> None:
    """Manifest, files, route; in pieces that are put together in order."""
    keys = list(source.bundles())
    pairs = routed(source)
    bundle = fetch_bundle(source, KEY)

    assert keys == [KEY, BundleKey("other", "predict", 1)]
    assert pairs == ["1.1"]
    assert bundle.manifest.name == "m"
    assert {name: bundle.read(name) for name in bundle.manifest.files} == FILES
    with pytest.raises(BundleError, match=r"^manifest\.json lists no model\.sig$"):
        bundle.read("model.sig")


def test_only_selected_bundles_are_fetched(server: FileServer, open_source: Callable[..., RemoteRepository]) -> None:
    """No models that are not served, and no files of bundles that are only listed."""
    source = open_source(server.url, selection=Selection(frozenset({"m"})))
    (server.folder / "other" / "route.json").write_bytes(b"broken")

    keys = list(source.bundles())
    source.route("m")
    source.open(KEY)

    assert keys == [KEY]
    assert list(dict(server.requests)) == ["index.json", "m/route.json", MANIFEST]


def test_a_restart_fetches_nothing(server: FileServer, open_source: Callable[..., RemoteRepository]) -> None:
    """But the index, which may have changed."""
    first = open_source(server.url)
    fetch_bundle(first, KEY)
    first.route("m")
    first.close()
    server.requests.clear()

    again = open_source(server.url)
    again.bundles()
    again.route("m")
    bundle = fetch_bundle(again, KEY)

    assert bundle.read("model.onnx") == FILES["model.onnx"]
    assert server.requests == [("index.json", 0)]


def test_an_interrupted_connection_is_resumed(server: FileServer, source: RemoteRepository) -> None:
    """From the last whole piece, without a word."""
    server.fail(MODEL, nothing, nothing, cut)

    bundle = fetch_bundle(source, KEY)

    assert bundle.read("model.onnx") == FILES["model.onnx"]
    asked = server.asked(MODEL)
    assert asked.count(0) == 1
    assert any(asked.count(start) == 2 for start in range(PIECE_BYTES, len(FILES["model.onnx"]), PIECE_BYTES))


def test_a_download_resumes_after_a_restart(server: FileServer, open_source: Callable[..., RemoteRepository]) -> None:
    """What a process fetched before it gave up is not fetched again."""
    server.fail(MODEL, nothing, *[status(503)] * 100)
    with pytest.raises(NotFetched, match="HTTP status 503"):
        fetch_bundle(open_source(server.url), KEY)
    server.faults.clear()
    server.requests.clear()

    fetch_bundle(open_source(server.url), KEY)

    assert 0 not in server.asked(MODEL)
    assert PIECE_BYTES in server.asked(MODEL)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (status(503), r"^m/predict/1: model\.onnx: HTTP status 503 Service Unavailable$"),
        (status(403), r"^m/predict/1: model\.onnx: access denied: HTTP status 403 Forbidden$"),
        (status(404), r"^m/predict/1: model\.onnx: not found$"),
        (cut, r"^m/predict/1: model\.onnx: ClientPayloadError: "),
    ],
    ids=["503", "403", "404", "cut"],
)
def test_a_failed_download_is_reported_and_retryable(
    server: FileServer, source: RemoteRepository, fault: Fault, message: str
) -> None:
    """The class says that a retry may help; the next one succeeds."""
    server.fail(MODEL, *[fault] * 10)
    with pytest.raises(NotFetched, match=message):
        fetch_bundle(source, KEY)
    server.faults.clear()

    assert fetch_bundle(source, KEY).read("model.onnx") == FILES["model.onnx"]


def test_a_stalled_connection_ends_with_the_timeout(server: FileServer, open_source: Callable[..., RemoteRepository]) -> None:
    """Half an answer and then silence."""
    source = open_source(server.url, timeout_s=0.2)
    server.fail(MODEL, *[stall] * 10)

    with pytest.raises(NotFetched, match=r"^m/predict/1: model\.onnx: no answer within 0\.2 s$"):
        fetch_bundle(source, KEY)


def test_stopping_ends_downloads_in_progress(server: FileServer, open_source: Callable[..., RemoteRepository]) -> None:
    """A stalled connection does not delay it."""
    source = open_source(server.url, timeout_s=3600)
    stalled, problems = threading.Event(), []

    def stall_and_say_so(handler: Any, body: bytes) -> bool:
        stalled.set()
        return stall(handler, body)

    server.fail(MODEL, stall_and_say_so)

    def fetch() -> None:
        try:
            fetch_bundle(source, KEY)
        except NotFetched as error:
            problems.append(str(error))

    thread = threading.Thread(target=fetch)
    thread.start()
    assert stalled.wait(60)
    source.close()
    thread.join(60)

    assert problems == [f"m/predict/1: model.onnx: {CANCELLED}"]
    with pytest.raises(NotFetched, match=CANCELLED):
        source.bundles()


def test_a_wrong_byte_is_detected_and_fetched_again(server: FileServer, source: RemoteRepository) -> None:
    """The second try is right."""
    server.fail("m/predict/1/golden.npz", flip)

    bundle = fetch_bundle(source, KEY)

    assert bundle.read("golden.npz") == FILES["golden.npz"]
    assert server.asked("m/predict/1/golden.npz") == [0, 0]


BAD = {
    "another byte": FILES["model.onnx"][:-1] + b"!",
    "truncated": FILES["model.onnx"][:-1],
    "truncated at a piece's end": FILES["model.onnx"][: 2 * PIECE_BYTES],
    "empty": b"",
    "another file": FILES["golden.npz"],
}


@pytest.mark.parametrize("case", BAD)
def test_a_file_with_a_wrong_digest_is_refused_by_name(server: FileServer, source: RemoteRepository, case: str) -> None:
    """After it was fetched twice; the class says that a retry cannot help."""
    (server.folder / MODEL).write_bytes(BAD[case])

    with pytest.raises(WrongContent) as caught:
        fetch_bundle(source, KEY)

    assert str(caught.value).startswith("m/predict/1: model.onnx: expected 1024 bytes, sha256 ")
    assert f"; got {len(BAD[case])} bytes, sha256 " in str(caught.value)
    assert str(caught.value).endswith(f", twice in a row from {server.url}")
    assert not isinstance(caught.value, NotFetched)
    assert server.asked(MODEL).count(0) == 2


def test_bytes_beyond_the_size_in_the_manifest_are_ignored(server: FileServer, source: RemoteRepository) -> None:
    """The published bytes are read; bytes after them are never requested."""
    (server.folder / MODEL).write_bytes(FILES["model.onnx"] + b"more")

    assert fetch_bundle(source, KEY).read("model.onnx") == FILES["model.onnx"]


def test_a_file_that_was_damaged_in_the_cache_is_fetched_again(
    server: FileServer, source: RemoteRepository, tmp_path: Path
) -> None:
    """While it is being read."""
    bundle = fetch_bundle(source, KEY)
    sha256 = bundle.expected("golden.npz").sha256
    (tmp_path / "cache" / "sha256" / sha256[:2] / sha256).write_bytes(b"damaged")

    assert bundle.read("golden.npz") == FILES["golden.npz"]
    assert server.asked("m/predict/1/golden.npz") == [0, 0]


def test_a_server_without_range_requests_is_supported(server: FileServer, source: RemoteRepository) -> None:
    """It sends the whole file, even if a part was fetched already."""
    server.fail(MODEL, nothing, *[status(503)] * 100)
    with pytest.raises(NotFetched):
        fetch_bundle(source, KEY)
    server.faults.clear()
    server.requests.clear()
    server.knows_ranges = False

    bundle = fetch_bundle(source, KEY)

    assert bundle.read("model.onnx") == FILES["model.onnx"]
    assert len(server.asked(MODEL)) == 1


def test_a_new_bundle_and_a_changed_route_are_seen_at_the_next_poll(
    server: FileServer, published: Repository, source: RemoteRepository
) -> None:
    """Once the index says so."""
    source.bundles()
    source.route("m")
    write_bundle(published, BundleKey("m", "predict", 2), FILES)
    write_route(published, pair="1.2")
    write_index(published)

    keys = list(source.bundles())

    assert BundleKey("m", "predict", 2) in keys
    assert routed(source) == ["1.2"]
    assert fetch_bundle(source, BundleKey("m", "predict", 2)).manifest.version == 2


def test_a_manifest_that_contradicts_the_index_is_refused(server: FileServer, source: RemoteRepository) -> None:
    """Write access to the files is not sufficient to change what is served, without the index."""
    manifest = server.folder / MANIFEST
    manifest.write_bytes(manifest.read_bytes().replace(b"2026-01-02", b"2026-01-03"))

    with pytest.raises(WrongContent, match=r"^m/predict/1: manifest\.json: expected "):
        fetch_bundle(source, KEY)


def test_an_unlisted_bundle_is_not_found(source: RemoteRepository, server: FileServer) -> None:
    """It may be listed later."""
    with pytest.raises(NotFetched) as caught:
        fetch_bundle(source, BundleKey("m", "predict", 7))

    assert str(caught.value) == f"m/predict/7: {server.url} does not list it"


def test_the_signature_is_in_the_folder_of_the_manifest(
    server: FileServer, published: Repository, open_source: Callable[..., RemoteRepository]
) -> None:
    """In the bundle's folder, as long as the repository has it."""
    signature = published.folder(KEY) / "model.sig"
    signature.write_bytes(b"{}")
    write_index(published)
    first = open_source(server.url).open(KEY)
    held = (first.folder / "model.sig").read_bytes(), (first.folder / "manifest.json").read_bytes()
    signature.unlink()
    write_index(published)

    second = open_source(server.url).open(KEY)

    assert held == (b"{}", (server.folder / MANIFEST).read_bytes())
    assert not (second.folder / "model.sig").exists()


def test_the_error_for_a_missing_index_says_how_to_make_one(server: FileServer, source: RemoteRepository) -> None:
    """It may be written later."""
    (server.folder / "index.json").unlink()

    with pytest.raises(NotFetched) as caught:
        source.bundles()

    assert str(caught.value) == f'{server.url}: index.json: not found; "splitserve index" writes it'


def test_an_invalid_index_is_named_by_its_url(server: FileServer, source: RemoteRepository) -> None:
    """A server may answer anything."""
    (server.folder / "index.json").write_bytes(b"<html>")

    with pytest.raises(BundleError, match=rf"^{server.url}/index\.json: index\.json: JSON is malformed"):
        source.bundles()


def test_a_broken_route_names_its_model(server: FileServer, published: Repository, source: RemoteRepository) -> None:
    """As in a folder."""
    (published.root / "m" / "route.json").write_bytes(b"?")

    with pytest.raises(BundleError, match=r"^m: route\.json: expected .* bytes"):
        source.route("m")


def test_an_unreachable_host_is_reported(open_source: Callable[..., RemoteRepository]) -> None:
    """With the package's own words."""
    with pytest.raises(NotFetched, match=r"^http://127\.0\.0\.1:9: index\.json: ClientConnectorError: Cannot connect to host"):
        open_source("http://127.0.0.1:9").bundles()


def test_passwords_appear_in_no_message(open_source: Callable[..., RemoteRepository]) -> None:
    """The server gets it, the log does not."""
    with pytest.raises(NotFetched) as caught:
        open_source("http://user:secret@127.0.0.1:9/models/").bundles()

    assert str(caught.value).startswith("http://127.0.0.1:9/models: ")
    assert "secret" not in str(caught.value)


@pytest.fixture
def bucket(published: Repository) -> Iterator[str]:
    """The repository in fsspec's memory, which can be listed like a bucket."""
    import fsspec

    memory = fsspec.filesystem("memory")
    memory.put(str(published.root), "/bucket/models", recursive=True)
    yield "memory://bucket/models"
    memory.rm("/bucket", recursive=True)


def test_a_bucket_is_listed(bucket: str, open_source: Callable[..., RemoteRepository]) -> None:
    """No index is needed. Objects that are not bundles are ignored."""
    source = open_source(bucket)

    assert list(source.bundles()) == [KEY, BundleKey("other", "predict", 1)]
    assert routed(source) == ["1.1"]
    assert fetch_bundle(source, KEY).read("model.onnx") == FILES["model.onnx"]
    assert list(open_source("memory://bucket/elsewhere").bundles()) == []


def test_an_oversized_manifest_is_refused(bucket: str, open_source: Callable[..., RemoteRepository]) -> None:
    """It is not read to its end."""
    import fsspec

    fsspec.filesystem("memory").pipe(f"/bucket/models/{MANIFEST}", b" " * (16 * 1024**2 + 1))

    with pytest.raises(BundleError, match=r"^m/predict/1: manifest\.json is too large; the limit is 16777216 bytes$"):
        fetch_bundle(open_source(bucket), KEY)


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("ftp://host/models", r"^expected a folder or a URL with s3://, gs://, az://, http://, https://; got ftp://$"),
        ("s3://", r"^s3://: expected a bucket after s3://, got none$"),
        ("https:///", r"^https:///: expected a host after https://, got none$"),
    ],
)
def test_an_unsupported_url_is_refused_at_once(where: str, message: str) -> None:
    """Before anything is started."""
    with pytest.raises(ValueError, match=message):
        source_of(where)


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the command that installs them."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)

    with pytest.raises(ValueError, match=r's3:// needs more packages \(s3fs\): pip install "splitserve\[s3\]".*EXTRAS=s3'):
        sources.check("s3://bucket/models")
    sources.check("./models")


def test_a_local_path_is_read_directly(tmp_path: Path) -> None:
    """With or without a scheme."""
    for where in (tmp_path, str(tmp_path), f"file://{tmp_path}"):
        source = source_of(where)
        assert isinstance(source, LocalFolder)
        assert source.root == tmp_path


@pytest.mark.heavy
def test_a_local_path_needs_no_url_packages() -> None:
    """A service with a folder starts as fast as before."""
    check = (
        "import sys; from splitserve.repository.sources import source_of; source_of('./models');"
        "print(sorted({'fsspec', 'aiohttp', 's3fs', 'botocore', 'splitserve.repository.sources.cache'} & set(sys.modules)))"
    )

    assert subprocess.run([sys.executable, "-c", check], check=True, capture_output=True, text=True).stdout.strip() == "[]"
