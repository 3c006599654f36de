"""Releases from each kind of source, with the same result."""

from __future__ import annotations

import contextlib
import hashlib
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from splitserve.cli.sign import run as sign
from splitserve.repository import release_log
from splitserve.repository.bundle import BundleKey
from splitserve.repository.folder import Repository
from splitserve.repository.manifest import GOLDEN_FILE, BundleError, NotFetched, NotSigned
from splitserve.repository.release import SCHEMA_VERSION, ReleaseKey, ReleaseManifest
from splitserve.repository.releases import N_COMPARED, ReleaseReader
from splitserve.repository.signing import signed_by
from splitserve.repository.source import BundleSource
from splitserve.repository.sources import index, source_of
from splitserve.repository.sources.local_folder import LocalFolder
from splitserve.versions import MAX_VERSION, Pair
from tests.file_server import FileServer
from tests.repository.bundles import write_bundle, write_route
from tests.signing_keys import make_keys

GOLDEN = b"rows and answers"
KEY = ReleaseKey("m", 1, Pair(1, 1))


def record(root: Path, pair: str = "1.1", model: str = "m", **fields: object) -> ReleaseKey:
    """Append a record to the releases of a model."""
    files = {} if "withdraws" in fields else {GOLDEN_FILE: GOLDEN}

    def make(sequence: int) -> tuple[ReleaseManifest, dict[str, bytes]]:
        manifest = ReleaseManifest(
            schema_version=SCHEMA_VERSION, model=model, sequence=sequence, pair=pair, created="",
            preprocessor="a" * 64, predictor="b" * 64, files=release_log.digests(files), **fields,
        )  # fmt: skip
        return manifest, files

    return release_log.append(root, model, make).key


@pytest.fixture
def published(tmp_path: Path) -> Repository:
    """A model with both halves, two releases, the second of which is withdrawn, and a route."""
    found = Repository(tmp_path / "models")
    for kind in ("preprocess", "predict"):
        write_bundle(found, BundleKey("m", kind, 1))
        write_bundle(found, BundleKey("m", kind, 2))
    record(found.root)
    record(found.root, "2.2")
    record(found.root, "2.2", withdraws=2)
    write_route(found)
    return found


def as_folder(root: Path, tmp_path: Path) -> Iterator[BundleSource]:
    yield source_of(root)


def as_file_url(root: Path, tmp_path: Path) -> Iterator[BundleSource]:
    yield source_of(f"file://{root}")


def as_one_model(root: Path, tmp_path: Path) -> Iterator[BundleSource]:
    yield source_of(root / "m")


def as_mounted_volume(root: Path, tmp_path: Path) -> Iterator[BundleSource]:
    """As Kubernetes mounts a ConfigMap: the data in a folder with a date, a link to that, links through that; read-only."""
    volume = tmp_path / "volume"
    shutil.copytree(root, volume / "..2026_11_30")
    (volume / "..data").symlink_to("..2026_11_30")
    (volume / "m").symlink_to("..data/m")
    volume.chmod(0o555)
    yield source_of(volume)
    volume.chmod(0o755)


def as_volume_of_one_model(root: Path, tmp_path: Path) -> Iterator[BundleSource]:
    """The same, with the model's folders and its route at the top."""
    volume = tmp_path / "volume"
    shutil.copytree(root / "m", volume / "..2026_11_30")
    (volume / "..data").symlink_to("..2026_11_30")
    for name in ("preprocess", "predict", "releases", "route.json"):
        (volume / name).symlink_to(f"..data/{name}")
    yield source_of(volume)


def as_web_server(root: Path, tmp_path: Path) -> Iterator[BundleSource]:
    index.write(root, index.build(Repository(root))[0])
    with FileServer(root).running() as server:
        source = source_of(server.url, cache=str(tmp_path / "cache"))
        yield source
        source.close()


KINDS = [as_folder, as_file_url, as_one_model, as_mounted_volume, as_volume_of_one_model, as_web_server]


@pytest.fixture(params=KINDS, ids=lambda kind: kind.__name__)
def source(request: pytest.FixtureRequest, published: Repository, tmp_path: Path) -> Iterator[BundleSource]:
    opened: Callable[[Path, Path], Iterator[BundleSource]] = request.param
    yield from opened(published.root, tmp_path)


def test_every_source_lists_the_same_releases(source: BundleSource) -> None:
    """Records by sequence, their manifests, their golden samples by digest, and the route."""
    bundles = list(source.bundles())
    keys = source.releases("m")
    history = ReleaseReader(source).history("m")
    opened = source.open_release(keys[0])
    opened.fetch()
    route = source.route("m")

    assert len(bundles) == 4
    assert list(map(str, keys)) == ["m/releases/0001-1.1", "m/releases/0002-2.2", "m/releases/0003-2.2"]
    assert opened.read(GOLDEN_FILE) == GOLDEN
    assert len(opened.manifest_sha256) == 64
    assert history.current() == opened.release
    assert list(history.withdrawn) == [2]
    assert route is not None
    assert route.named() == [Pair(1, 1)]
    assert source.releases("other") == []


def test_golden_samples_that_were_changed_are_refused(source: BundleSource, published: Repository, tmp_path: Path) -> None:
    """By the digest in the release's manifest, from every source."""
    source.bundles()
    record = source.open_release(KEY)
    for path in tmp_path.rglob(f"0001-1.1/{GOLDEN_FILE}"):
        path.write_bytes(GOLDEN.replace(b"answers", b"Answers"))

    with pytest.raises(BundleError, match="sha256"):
        record.fetch()
        record.read(GOLDEN_FILE)


def test_a_release_is_read_once_until_its_files_change(published: Repository) -> None:
    """Records never change, and there may be many."""

    class Counting(LocalFolder):
        opened = 0

        def open_release(self, key: ReleaseKey):
            self.opened += 1
            return super().open_release(key)

    source = Counting(published.root)
    reader = ReleaseReader(source)
    reader.history("m")
    reader.history("m")
    after_two_reads = source.opened
    record(published.root, "1.2")

    assert after_two_reads == 3
    assert reader.history("m").current().pair == Pair(1, 2)
    assert source.opened == 4


class CountingStamps(LocalFolder):
    """Counts the records that are read, and those whose files are looked at."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.read: list[int] = []
        self.compared: list[int] = []

    def open_release(self, key: ReleaseKey):
        self.read.append(key.sequence)
        return super().open_release(key)

    def stamp(self, key):
        self.compared.append(key.sequence)
        return super().stamp(key)


@pytest.fixture
def many(tmp_path: Path) -> CountingStamps:
    """A repository with four times as many releases as are compared at a time, all read."""
    source = CountingStamps(tmp_path / "many")
    for number in range(1, 4 * N_COMPARED + 1):
        record(source.root, f"1.{number}")
    return source


def test_a_poll_costs_the_same_however_many_releases_there_are(many: CountingStamps) -> None:
    """Without changes nothing is read, and of most records nothing is looked at but the name."""
    reader = ReleaseReader(many)
    first = reader.history("m")
    assert len(many.read) == len(first.records) == 4 * N_COMPARED
    many.read, many.compared = [], []

    again = reader.history("m")

    assert again is first
    assert many.read == []
    assert len(many.compared) == 2 * N_COMPARED

    record(many.root, "2.1")
    assert reader.history("m").current().pair == Pair(2, 1)
    assert many.read == [4 * N_COMPARED + 1]


def test_an_old_record_that_is_changed_is_noticed_in_its_turn(many: CountingStamps) -> None:
    """And at once by who reads it first, after a restart."""
    reader = ReleaseReader(many)
    reader.history("m")
    changed = many.releases("m")[2 * N_COMPARED]
    (many.root / str(changed) / "manifest.json").write_bytes(b"?")

    n_polls = next(n for n in range(1, 4) if reader.history("m") and reader.problems)

    assert 1 < n_polls <= 3
    assert reader.problems["m"][0].startswith(f"{changed}: manifest.json: ")
    assert len(reader.history("m").records) == 4 * N_COMPARED
    after_restart = ReleaseReader(many)
    assert len(after_restart.history("m").records) == 4 * N_COMPARED - 1
    assert after_restart.problems["m"][0].startswith(f"{changed}: ")


def test_records_before_one_that_cannot_be_fetched_are_read_once(published: Repository) -> None:
    """The next poll goes on with the one that failed."""

    class Cut(CountingStamps):
        is_cut = True

        def open_release(self, key: ReleaseKey):
            if key.sequence == 3 and self.is_cut:
                raise NotFetched("connection refused")
            return super().open_release(key)

    source = Cut(published.root)
    reader = ReleaseReader(source)
    for _ in range(3):
        with pytest.raises(NotFetched):
            reader.history("m")
    source.is_cut = False

    assert len(reader.history("m").records) == 3
    assert source.read == [1, 2, 3]


def test_every_source_lists_models_by_their_releases(published: Repository, tmp_path: Path) -> None:
    """Also those whose bundles are not copied yet."""
    for kind in ("preprocess", "predict"):
        shutil.rmtree(published.root / "m" / kind)

    for opened in (as_folder, as_mounted_volume, as_web_server):
        with contextlib.contextmanager(opened)(published.root, tmp_path) as source:
            assert list(source.bundles()) == []
            assert source.released_models() == ["m"]


def test_a_broken_record_is_named_and_does_not_count(published: Repository) -> None:
    """The others do."""
    manifest = published.folder(ReleaseKey("m", 1, Pair(1, 1))) / "manifest.json"
    manifest.write_bytes(manifest.read_bytes().replace(b'"pair": "1.1"', b'"pair": "9.1"'))
    reader = ReleaseReader(published)

    history = reader.history("m")

    assert [release.sequence for release in history.records] == [2, 3]
    assert len(reader.problems["m"]) == 1
    assert reader.problems["m"][0].startswith("m/releases/0001-1.1: manifest.json: its bytes are not those of its digest")


def test_a_record_that_becomes_unreadable_still_counts(published: Repository) -> None:
    """A record that was valid still counts: damage to its file withdraws nothing, and restores nothing that it withdrew."""
    reader = ReleaseReader(published)
    reader.history("m")

    for record_key in published.releases("m"):
        (published.folder(record_key) / "manifest.json").write_bytes(b"?")
    history = reader.history("m")

    assert history.current().sequence == 1
    assert list(history.withdrawn) == [2]
    assert len(reader.problems["m"]) == 3


def test_a_folder_without_a_manifest_is_not_a_record(published: Repository) -> None:
    """A copy in progress has the folder before the file."""
    (published.root / "m" / "releases" / "0009-1.1").mkdir()

    assert ReleaseReader(published).history("m").current().sequence == 1


def test_a_record_that_cannot_be_fetched_makes_the_history_unknown(published: Repository) -> None:
    """It may withdraw a release that would serve otherwise."""

    class Cut(LocalFolder):
        def open_release(self, key: ReleaseKey):
            if key.sequence == 3:
                raise NotFetched("connection refused")
            return super().open_release(key)

    with pytest.raises(NotFetched, match=r"^m/releases/0003-2\.2: connection refused$"):
        ReleaseReader(Cut(published.root)).history("m")


def test_a_folder_that_does_not_exist_cannot_be_listed(tmp_path: Path) -> None:
    """It was unmounted, or is not mounted yet: that is not the same as a repository without models."""
    with pytest.raises(NotFetched, match="no such folder"):
        list(LocalFolder(tmp_path / "nowhere").bundles())


def test_releases_and_routes_are_signed(published: Repository, tmp_path: Path) -> None:
    """Unsigned ones do not count; a signature changes no digest; a route's signature is valid for its model only."""
    keys = make_keys(tmp_path)
    source = signed_by(str(keys.public), published)
    with pytest.raises(NotSigned, match=r'not signed; "splitserve sign" adds model\.sig'):
        source.open_release(KEY)
    with pytest.raises(NotSigned, match=r'^m: route\.json: not signed; "splitserve sign" adds route\.sig$'):
        source.route("m")
    reader = ReleaseReader(source)
    unsigned = reader.history("m")

    assert sign(published.root, keys.private, []) == 0

    assert unsigned.records == ()
    assert reader.history("m").current().sequence == 1
    assert source.route("m").named() == [Pair(1, 1)]
    shutil.copytree(published.root / "m" / "predict", published.root / "other" / "predict")
    for name in ("route.json", "route.sig"):
        shutil.copy(published.root / "m" / name, published.root / "other" / name)
    with pytest.raises(BundleError, match=r"^other: route\.json: route\.sig: "):
        source.route("other")


@pytest.mark.parametrize("part", ["manifest.json", "model.sig"])
def test_a_signed_release_that_was_changed_is_refused(published: Repository, tmp_path: Path, part: str) -> None:
    """Even if the digest was recomputed."""
    keys = make_keys(tmp_path)
    sign(published.root, keys.private, [])
    folder = published.folder(KEY)
    if part == "model.sig":
        sign(published.root, make_keys(tmp_path, "others").private, [])
    else:
        signature = (folder / "model.sig").read_bytes()
        shutil.rmtree(folder)
        (published.root / "m" / "releases" / "0002-2.2").rename(tmp_path / "away")
        (published.root / "m" / "releases" / "0003-2.2").rename(tmp_path / "away too")
        record(published.root, golden="synthetic")
        (folder / "model.sig").write_bytes(signature)

    with pytest.raises(BundleError, match=r"model\.sig: "):
        signed_by(str(keys.public), published).open_release(KEY)


def test_signed_releases_are_read_from_a_web_server(published: Repository, tmp_path: Path) -> None:
    """Signatures are in the index."""
    keys = make_keys(tmp_path)
    sign(published.root, keys.private, [])
    with contextlib.contextmanager(as_web_server)(published.root, tmp_path) as plain:
        source = signed_by(str(keys.public), plain)
        source.bundles()

        assert ReleaseReader(source).history("m").current().sequence == 1
        assert source.route("m").named() == [Pair(1, 1)]


def test_an_index_lists_releases_by_the_digests_of_their_manifests(published: Repository) -> None:
    """So what is fetched is checked from the index down."""
    found, problems = index.build(published)

    manifest = (published.folder(KEY) / "manifest.json").read_bytes()
    assert problems == []
    assert found.releases["m/releases/0001-1.1"].sha256 == hashlib.sha256(manifest).hexdigest()
    assert len(found.releases) == 3


def test_a_broken_release_is_left_out_of_the_index_and_named(published: Repository) -> None:
    """The others are listed."""
    (published.folder(KEY) / "manifest.json").write_bytes(b"?")

    found, (problem,) = index.build(published)

    assert sorted(found.releases) == ["m/releases/0002-2.2", "m/releases/0003-2.2"]
    assert problem.startswith("m/releases/0001-1.1: manifest.json: ")


@pytest.mark.parametrize("name", ["99999999999", "1000000000", "0", "01"])
def test_a_version_has_one_limit_everywhere(published: Repository, name: str) -> None:
    """A folder with a larger number is no version, and the next publish does not count on from it."""
    shutil.copytree(published.root / "m" / "predict" / "2", published.root / "m" / "predict" / name)

    assert published.versions("m", "predict") == [1, 2]
    assert published.next_version("m", "predict") == 3


def test_versions_end_at_the_limit(published: Repository) -> None:
    """Nothing is published that no service would find."""
    shutil.copytree(published.root / "m" / "predict" / "2", published.root / "m" / "predict" / str(MAX_VERSION))

    with pytest.raises(BundleError, match="version 1000000000: expected a number from 1 to 999999999"):
        published.next_version("m", "predict")
    with pytest.raises(BundleError, match="version 1000000000: expected"):
        write_bundle(published, BundleKey("m", "predict", MAX_VERSION + 1))
    assert BundleKey("m", "predict", MAX_VERSION) in list(published.bundles())
