"""The cache of fetched files: each is fetched once, resumed after an interruption, and complete or absent."""

from __future__ import annotations

import fcntl
import hashlib
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pytest

from splitserve.repository.manifest import BundleError, FileDigest, NotFetched
from splitserve.repository.sources.cache import LEFTOVER_S, MAX_RESUMES, Cache, WrongContent, default_folder

CONTENT = bytes(range(256)) * 4
NAME = "model.onnx"


def digest_of(data: bytes) -> FileDigest:
    return FileDigest(hashlib.sha256(data).hexdigest(), len(data))


DIGEST = digest_of(CONTENT)


class Source:
    """A source of downloads: returns a given number of bytes at a time, then fails, as often as configured."""

    def __init__(self, content: bytes = CONTENT, *, breaks_after: Iterable[int] = ()) -> None:
        self.content = content
        self.offsets: list[int] = []
        self._breaks_after = list(breaks_after)

    def __call__(self, offset: int) -> Iterator[bytes]:
        self.offsets.append(offset)
        if not self._breaks_after:
            yield self.content[offset:]
            return
        yield self.content[offset : offset + self._breaks_after.pop(0)]
        raise NotFetched("the connection broke")


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return Cache(tmp_path / "cache")


def files_below(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def blob(cache: Cache, digest: FileDigest = DIGEST) -> Path:
    return cache.folder / "sha256" / digest.sha256[:2] / digest.sha256


def partial(cache: Cache, data: bytes) -> Path:
    """The partial file of a process that died."""
    path = cache.folder / "partial" / DIGEST.sha256
    path.parent.mkdir(parents=True)
    path.write_bytes(data)
    return path


def test_a_file_is_fetched_once(cache: Cache) -> None:
    """Later requests find it, from other processes too."""
    source = Source()

    cache.fetch(NAME, DIGEST, source)
    cache.fetch(NAME, DIGEST, source)
    Cache(cache.folder).fetch(NAME, DIGEST, source)

    assert cache.read(NAME, DIGEST) == CONTENT
    assert source.offsets == [0]
    assert files_below(cache.folder) == [f"sha256/{DIGEST.sha256[:2]}/{DIGEST.sha256}"]


def test_an_empty_file_is_a_file(cache: Cache) -> None:
    """Nothing is fetched for it."""
    cache.fetch(NAME, digest_of(b""), Source(b""))

    assert cache.read(NAME, digest_of(b"")) == b""


def test_an_interrupted_download_resumes_at_once(cache: Cache) -> None:
    """From the byte where it was interrupted, as long as each attempt makes progress."""
    source = Source(breaks_after=[100, 200])

    cache.fetch(NAME, DIGEST, source)

    assert source.offsets == [0, 100, 300]
    assert cache.read(NAME, DIGEST) == CONTENT


def test_a_download_without_progress_is_not_retried_at_once(cache: Cache) -> None:
    """The next attempt follows after a pause; the partial file is kept, and other processes can resume it."""
    source = Source(breaks_after=[100, 0])

    with pytest.raises(NotFetched, match="the connection broke"):
        cache.fetch(NAME, DIGEST, source)
    Cache(cache.folder).fetch(NAME, DIGEST, source)

    assert source.offsets == [0, 100, 100]
    assert cache.read(NAME, DIGEST) == CONTENT


def test_a_download_that_is_interrupted_repeatedly_fails(cache: Cache) -> None:
    """It is retried a number of times, then at the next request."""
    source = Source(breaks_after=[1] * 100)

    with pytest.raises(NotFetched, match="the connection broke"):
        cache.fetch(NAME, DIGEST, source)

    assert len(source.offsets) == MAX_RESUMES + 1


@pytest.mark.parametrize(
    "content",
    [CONTENT[:-1] + b"!", CONTENT[:-1], b""],
    ids=["another byte", "truncated", "empty"],
)
def test_wrong_content_is_refused_by_name_and_deleted(cache: Cache, content: bytes) -> None:
    """The next fetch starts from the beginning."""
    with pytest.raises(WrongContent) as caught:
        cache.fetch(NAME, DIGEST, Source(content))
    right = Source()
    cache.fetch(NAME, DIGEST, right)

    found = digest_of(content)
    assert str(caught.value) == (
        f"model.onnx: expected 1024 bytes, sha256 {DIGEST.sha256}; got {found.size} bytes, sha256 {found.sha256}"
    )
    assert right.offsets == [0]
    assert cache.read(NAME, DIGEST) == CONTENT


def test_no_more_bytes_are_written_than_the_manifest_lists(cache: Cache) -> None:
    """An endless source does not fill the disk."""

    def endless(offset: int) -> Iterator[bytes]:
        while True:
            yield b"x" * 1000

    with pytest.raises(WrongContent, match="got 1024 bytes"):
        cache.fetch(NAME, DIGEST, endless)


@pytest.mark.parametrize(
    ("leftover", "offset"), [(CONTENT[:10], 10), (CONTENT + b"more", 0)], ids=["a part", "more than the file has"]
)
def test_a_partial_file_of_a_dead_process_is_resumed(cache: Cache, leftover: bytes, offset: int) -> None:
    """Unless it is too long to be a part of the file."""
    partial(cache, leftover)
    source = Source()

    cache.fetch(NAME, DIGEST, source)

    assert source.offsets == [offset]
    assert cache.read(NAME, DIGEST) == CONTENT


def test_a_wrong_partial_file_of_a_dead_process_is_fetched_again(cache: Cache) -> None:
    """The digest does not match, and the next fetch starts from the beginning."""
    partial(cache, b"?" * 10)

    with pytest.raises(WrongContent):
        cache.fetch(NAME, DIGEST, Source())
    cache.fetch(NAME, DIGEST, Source())

    assert cache.read(NAME, DIGEST) == CONTENT


def test_a_cached_file_that_was_damaged_is_detected(cache: Cache) -> None:
    """When it is read; a wrong size is detected before."""
    cache.fetch(NAME, DIGEST, Source())
    blob(cache).write_bytes(CONTENT[:-1] + b"!")

    looks_right = cache.holds(DIGEST)
    with pytest.raises(BundleError, match=r"^model\.onnx: expected sha256"):
        cache.read(NAME, DIGEST)
    cache.discard(DIGEST)
    cache.fetch(NAME, DIGEST, Source())

    assert looks_right
    assert cache.read(NAME, DIGEST) == CONTENT


def test_concurrent_requests_for_a_file_fetch_it_once(cache: Cache) -> None:
    """The others wait and then find it."""
    go_on, all_there = threading.Event(), threading.Barrier(4)
    source = Source()

    def slow(offset: int) -> Iterator[bytes]:
        assert go_on.wait(60)
        yield from source(offset)

    def fetch() -> None:
        all_there.wait(60)
        Cache(cache.folder).fetch(NAME, DIGEST, slow)

    threads = [threading.Thread(target=fetch) for _ in range(3)]
    for thread in threads:
        thread.start()
    all_there.wait(60)
    go_on.set()
    for thread in threads:
        thread.join(60)

    assert source.offsets == [0]
    assert cache.holds(DIGEST)


@pytest.fixture
def somebody_elses(cache: Cache) -> Iterator[Path]:
    """A partial file that another process holds the lock of, and does nothing with."""
    path = partial(cache, b"")
    with path.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield path


def test_waiting_for_another_download_without_progress_times_out(cache: Cache, somebody_elses: Path) -> None:
    """The message says why nothing is fetched."""
    with pytest.raises(NotFetched, match=r"^model\.onnx: another process is fetching it and made no progress for 0 s$"):
        Cache(cache.folder, patience_s=0).fetch(NAME, DIGEST, Source())


def test_stopping_the_service_ends_the_wait_for_a_download(cache: Cache, somebody_elses: Path) -> None:
    """However patient it was."""
    patient = Cache(cache.folder, patience_s=3600)
    patient.close()

    with pytest.raises(NotFetched, match="the service is stopping"):
        patient.fetch(NAME, DIGEST, Source())


def test_without_disk_space_no_download_begins(cache: Cache) -> None:
    """The message says how much is missing, and where."""
    source = Source()
    small = Cache(cache.folder, free_bytes=lambda folder: 1000)

    with pytest.raises(NotFetched) as caught:
        small.fetch(NAME, DIGEST, source)

    assert str(caught.value) == f"model.onnx needs 1024 more bytes, the cache {cache.folder} has 1000 free"
    assert source.offsets == []


WRITES: dict[str, Callable[[Cache], object]] = {
    "fetch": lambda cache: cache.fetch(NAME, DIGEST, Source()),
    "add": lambda cache: cache.add(b"{}"),
    "remember": lambda cache: cache.remember("path", "etag", DIGEST),
    "place": lambda cache: cache.place("m/predict/1/manifest.json", b"{}"),
}


@pytest.mark.parametrize("write", WRITES)
def test_the_error_for_an_unwritable_cache_names_the_way_out(tmp_path: Path, write: str) -> None:
    """Here a file is where the folder should be."""
    (tmp_path / "cache").write_bytes(b"")

    with pytest.raises(NotFetched, match=r"cannot be written: .*; set MODEL_CACHE to a writable folder"):
        WRITES[write](Cache(tmp_path / "cache"))


def test_a_full_disk_is_reported(cache: Cache) -> None:
    """Independent of what was written before."""

    def download(offset: int) -> Iterator[bytes]:
        yield CONTENT[:10]
        raise OSError(28, "No space left on device")

    with pytest.raises(NotFetched, match=r"^no space left in the cache .*: No space left on device$"):
        cache.fetch(NAME, DIGEST, download)


def test_a_cached_path_is_valid_while_its_validator_is_unchanged(cache: Cache) -> None:
    """A change, or a note that cannot be read, means that nothing is known."""
    digest = cache.add(b"{}")
    cache.remember("s3://bucket/m/route.json", "etag 1", digest)

    again = Cache(cache.folder)

    assert again.read("route.json", digest) == b"{}"
    assert again.recall("s3://bucket/m/route.json", "etag 1") == digest
    assert again.recall("s3://bucket/m/route.json", "etag 2") is None
    assert again.recall("s3://bucket/n/route.json", "etag 1") is None
    next((cache.folder / "seen").iterdir()).write_bytes(b"?")
    assert again.recall("s3://bucket/m/route.json", "etag 1") is None


def test_placed_files_are_the_most_recent_ones(cache: Cache) -> None:
    """Without files to place there are none."""
    first = cache.place("m/predict/1/model.sig", b"one")
    cache.place("m/predict/1/model.sig", b"two")
    held = first.read_bytes()
    cache.place("m/predict/1/model.sig", None)
    cache.place("m/predict/1/model.sig", None)

    assert held == b"two"
    assert not first.exists()


def test_old_unused_leftovers_are_removed(cache: Cache) -> None:
    """Those that may be resumed are kept."""
    old = partial(cache, b"old")
    new, held = old.with_name("new"), old.with_name("held")
    new.write_bytes(b"new")
    held.write_bytes(b"held")
    for path in (old, held):
        os.utime(path, (0, path.stat().st_mtime - LEFTOVER_S - 60))

    with held.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        cache.sweep()

    assert files_below(cache.folder) == ["partial/held", "partial/new"]


def test_sweeping_an_empty_cache_succeeds(cache: Cache) -> None:
    """The folder may not exist yet."""
    cache.sweep()


def test_the_default_cache_is_the_users(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Below the cache folder of the account, or where that cannot be written, a folder in the one for temporary files."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    own = default_folder()
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    temporary = default_folder()
    temporary.chmod(0o777)

    assert own == tmp_path / "caches" / "splitserve"
    assert temporary == tmp_path / f"splitserve-{os.geteuid()}"
    with pytest.raises(NotFetched, match="set MODEL_CACHE to a writable folder"):
        default_folder()


def test_the_bytes_of_a_cache_are_those_of_all_its_files(cache: Cache) -> None:
    """Partial downloads included."""
    assert cache.count_bytes() == 0

    partial(cache, b"part")
    cache.add(b"whole")

    assert cache.count_bytes() == len(b"part" + b"whole")
