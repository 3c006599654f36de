"""The cache of fetched files: each is fetched once, goes on where it broke off, and is there whole or not at all."""

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
    """What a file is downloaded from: gives so many bytes at a time, then breaks off, as often as it is told to."""

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
    """What a process that died has left of the file."""
    path = cache.folder / "partial" / DIGEST.sha256
    path.parent.mkdir(parents=True)
    path.write_bytes(data)
    return path


def test_a_file_is_fetched_once(cache: Cache) -> None:
    """Whoever asks again finds it, another process too."""
    source = Source()

    cache.fetch(NAME, DIGEST, source)
    cache.fetch(NAME, DIGEST, source)
    Cache(cache.folder).fetch(NAME, DIGEST, source)

    assert cache.read(NAME, DIGEST) == CONTENT
    assert source.offsets == [0]
    assert files_below(cache.folder) == [f"sha256/{DIGEST.sha256[:2]}/{DIGEST.sha256}"]


def test_an_empty_file_is_a_file(cache: Cache) -> None:
    """Nothing has to come for it."""
    cache.fetch(NAME, digest_of(b""), Source(b""))

    assert cache.read(NAME, digest_of(b"")) == b""


def test_a_download_that_breaks_off_goes_on_at_once(cache: Cache) -> None:
    """From the byte where it broke off, as long as each try brings something."""
    source = Source(breaks_after=[100, 200])

    cache.fetch(NAME, DIGEST, source)

    assert source.offsets == [0, 100, 300]
    assert cache.read(NAME, DIGEST) == CONTENT


def test_a_download_that_brings_nothing_is_not_tried_at_once(cache: Cache) -> None:
    """Whoever wants the file waits before the next try; what came is kept for it, and another process goes on with it."""
    source = Source(breaks_after=[100, 0])

    with pytest.raises(NotFetched, match="the connection broke"):
        cache.fetch(NAME, DIGEST, source)
    Cache(cache.folder).fetch(NAME, DIGEST, source)

    assert source.offsets == [0, 100, 100]
    assert cache.read(NAME, DIGEST) == CONTENT


def test_a_download_that_breaks_off_again_and_again_ends(cache: Cache) -> None:
    """It is tried a number of times in a row, and then by whoever wants the file."""
    source = Source(breaks_after=[1] * 100)

    with pytest.raises(NotFetched, match="the connection broke"):
        cache.fetch(NAME, DIGEST, source)

    assert len(source.offsets) == MAX_RESUMES + 1


@pytest.mark.parametrize(
    "content",
    [CONTENT[:-1] + b"!", CONTENT[:-1], b""],
    ids=["another byte", "truncated", "empty"],
)
def test_wrong_content_is_refused_by_name_and_thrown_away(cache: Cache, content: bytes) -> None:
    """The next fetch begins anew."""
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


def test_no_more_is_written_than_the_file_may_have(cache: Cache) -> None:
    """A source that never ends fills no disk."""

    def endless(offset: int) -> Iterator[bytes]:
        while True:
            yield b"x" * 1000

    with pytest.raises(WrongContent, match="got 1024 bytes"):
        cache.fetch(NAME, DIGEST, endless)


@pytest.mark.parametrize(
    ("leftover", "offset"), [(CONTENT[:10], 10), (CONTENT + b"more", 0)], ids=["a part", "more than the file has"]
)
def test_what_a_dead_process_left_is_gone_on_with(cache: Cache, leftover: bytes, offset: int) -> None:
    """Unless it is too long to be a part of the file."""
    partial(cache, leftover)
    source = Source()

    cache.fetch(NAME, DIGEST, source)

    assert source.offsets == [offset]
    assert cache.read(NAME, DIGEST) == CONTENT


def test_what_a_dead_process_left_may_be_wrong(cache: Cache) -> None:
    """Then the file is found to be wrong, and the next fetch begins anew."""
    partial(cache, b"?" * 10)

    with pytest.raises(WrongContent):
        cache.fetch(NAME, DIGEST, Source())
    cache.fetch(NAME, DIGEST, Source())

    assert cache.read(NAME, DIGEST) == CONTENT


def test_a_file_that_was_damaged_later_is_found_out(cache: Cache) -> None:
    """As it is read; of one whose size is wrong this is seen before."""
    cache.fetch(NAME, DIGEST, Source())
    blob(cache).write_bytes(CONTENT[:-1] + b"!")

    looks_right = cache.holds(DIGEST)
    with pytest.raises(BundleError, match=r"^model\.onnx: expected sha256"):
        cache.read(NAME, DIGEST)
    cache.discard(DIGEST)
    cache.fetch(NAME, DIGEST, Source())

    assert looks_right
    assert cache.read(NAME, DIGEST) == CONTENT


def test_of_many_who_want_a_file_one_fetches_it(cache: Cache) -> None:
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


def test_who_holds_a_file_and_makes_no_progress_is_waited_for_so_long(cache: Cache, somebody_elses: Path) -> None:
    """The message says why nothing is fetched."""
    with pytest.raises(NotFetched, match=r"^model\.onnx: another process is fetching it and made no progress for 0 s$"):
        Cache(cache.folder, patience_s=0).fetch(NAME, DIGEST, Source())


def test_nobody_is_waited_for_when_the_service_stops(cache: Cache, somebody_elses: Path) -> None:
    """However patient it was."""
    patient = Cache(cache.folder, patience_s=3600)
    patient.close()

    with pytest.raises(NotFetched, match="the service is stopping"):
        patient.fetch(NAME, DIGEST, Source())


def test_without_room_nothing_is_begun(cache: Cache) -> None:
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
def test_a_cache_that_can_not_be_written_says_what_to_do(tmp_path: Path, write: str) -> None:
    """Here a file is where the folder should be."""
    (tmp_path / "cache").write_bytes(b"")

    with pytest.raises(NotFetched, match=r"cannot be written: .*; set MODEL_CACHE to a writable folder"):
        WRITES[write](Cache(tmp_path / "cache"))


def test_a_disk_that_is_full_says_so(cache: Cache) -> None:
    """Whatever was written before."""

    def download(offset: int) -> Iterator[bytes]:
        yield CONTENT[:10]
        raise OSError(28, "No space left on device")

    with pytest.raises(NotFetched, match=r"^no space left in the cache .*: No space left on device$"):
        cache.fetch(NAME, DIGEST, download)


def test_what_came_from_a_path_is_known_while_its_validator_is_the_same(cache: Cache) -> None:
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


def test_placed_files_are_what_was_placed_last(cache: Cache) -> None:
    """And are gone when there is nothing to place."""
    first = cache.place("m/predict/1/model.sig", b"one")
    cache.place("m/predict/1/model.sig", b"two")
    held = first.read_bytes()
    cache.place("m/predict/1/model.sig", None)
    cache.place("m/predict/1/model.sig", None)

    assert held == b"two"
    assert not first.exists()


def test_leftovers_are_swept_once_they_are_old_and_nobody_has_them(cache: Cache) -> None:
    """Those that somebody may go on with stay."""
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


def test_a_sweep_of_nothing_is_fine(cache: Cache) -> None:
    """The folder need not be there yet."""
    cache.sweep()


def test_the_cache_is_the_users_own_unless_one_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
