"""The cache of a remote model repository: files by digest, so that each is fetched once and a restart fetches nothing.

<cache>/sha256/ab/<digest>      complete files, renamed into place after their digest was checked
<cache>/partial/<digest>        a download in progress, or one that a dead process left: the next download resumes it
<cache>/seen/<digest of path>   the validator (ETag) and digest of a manifest or route when it was last fetched
<cache>/bundles/…               the manifests and signatures of bundles that were opened

Any number of processes may share a cache. A download holds a lock on its partial file, which ends with the process. The cache
only grows; its contents may be deleted at any time. POSIX only.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import shutil
import stat
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import BinaryIO

import msgspec

from splitserve.repository.files import read_checked, read_small
from splitserve.repository.manifest import BundleError, FileDigest, NotFetched

Download = Callable[[int], Iterable[bytes]]
"""A file's bytes from an offset on. Raises `NotFetched` when they cannot be fetched, also after some were."""

MAX_RESUMES = 4
"""How often an interrupted download is resumed at once, as long as each attempt makes progress."""

LEFTOVER_S = 24 * 3600.0
"""Age after which a dead process's partial download is removed, if it was not resumed."""

_POLL_S = 0.1
_BLOCK_BYTES = 1024**2


class WrongContent(BundleError):
    """A fetched file does not have the expected digest."""


class _Seen(msgspec.Struct):
    """What was last fetched from a path: the path, its validator, its digest."""

    path: str
    validator: str
    digest: FileDigest


_seen_decoder = msgspec.json.Decoder(_Seen)
"""Created at import for the reason in `splitserve.repository.manifest`."""


class Cache:
    """Files by digest, in a folder that need not exist yet.

    Args:
        folder: must not be writable by other users. `default_folder` if None.
        patience_s: how long to wait for another process that is fetching the same file without progress.
        free_bytes: free space of a folder's file system.
    """

    def __init__(
        self,
        folder: Path | None,
        *,
        patience_s: float = 60.0,
        free_bytes: Callable[[Path], int] = lambda folder: shutil.disk_usage(folder).free,
    ) -> None:
        self._given_folder = folder
        self._closed = threading.Event()
        self._patience_s = patience_s
        self._free_bytes = free_bytes

    @cached_property
    def folder(self) -> Path:
        """The cache's folder.

        Raises:
            NotFetched: none was given, and no default folder can be written.
        """
        return self._given_folder or default_folder()

    def count_bytes(self) -> int:
        """Bytes of all files in the folder, partial downloads included. Files that vanish meanwhile are not counted."""
        n_bytes = 0
        for folder, _, names in os.walk(self.folder):
            for name in names:
                with contextlib.suppress(OSError):
                    n_bytes += Path(folder, name).lstat().st_size
        return n_bytes

    def close(self) -> None:
        """Stop waiting for other processes."""
        self._closed.set()

    def holds(self, digest: FileDigest) -> bool:
        """Whether the cache has a file of this digest's name and size. `read` checks its content."""
        with contextlib.suppress(OSError):
            facts = self._blob(digest).lstat()
            return stat.S_ISREG(facts.st_mode) and facts.st_size == digest.size
        return False

    def read(self, name: str, digest: FileDigest) -> bytes:
        """A file's bytes, checked.

        Args:
            name: for error messages.
            digest: of the file.

        Raises:
            BundleError: missing or damaged.
        """
        return read_checked(self._blob(digest), name, digest)

    def discard(self, digest: FileDigest) -> None:
        """Remove a damaged file."""
        with self._writing():
            self._blob(digest).unlink(missing_ok=True)

    def fetch(self, name: str, digest: FileDigest, download: Download) -> None:
        """Fetch a file unless the cache has it: resume a partial download, check it, rename it into place.

        Args:
            name: for error messages.
            digest: the expected one; no more than its size is written.
            download: gives the bytes.

        Raises:
            NotFetched: the download failed, or there is no space left. The bytes so far are kept.
            WrongContent: the digest differs. The bytes are discarded.
        """
        with self._writing():
            while not self.holds(digest):
                with self._lock(name, digest) as file:
                    if file is None:
                        continue
                    if self.holds(digest):  # another process completed it before this one got the lock
                        (self._partials / digest.sha256).unlink()
                    else:
                        self._complete(name, digest, file, download)

    def add(self, data: bytes) -> FileDigest:
        """Add a small file.

        Raises:
            NotFetched: it cannot be written.
        """
        digest = FileDigest(hashlib.sha256(data).hexdigest(), len(data))
        self._write_whole(self._blob(digest), data)
        return digest

    def remember(self, path: str, validator: str, digest: FileDigest) -> None:
        """Record the digest of what was fetched from a path with this validator.

        Raises:
            NotFetched: it cannot be written.
        """
        self._write_whole(self._note(path), msgspec.json.encode(_Seen(path, validator, digest)))

    def recall(self, path: str, validator: str) -> FileDigest | None:
        """The digest recorded for a path with this validator; None if unknown."""
        try:
            seen = _seen_decoder.decode(read_small(self._note(path)))
        except (BundleError, msgspec.DecodeError):
            return None
        return seen.digest if (seen.path, seen.validator) == (path, validator) else None

    def place(self, path: str, data: bytes | None) -> Path:
        """Write a small file below ``bundles`` unless it is up to date; remove it if ``data`` is None.

        Raises:
            NotFetched: it cannot be written.
        """
        place = self.folder / "bundles" / path
        try:
            held = read_small(place)
        except BundleError:
            held = None
        if data is None:
            with self._writing():
                place.unlink(missing_ok=True)
        elif data != held:
            self._write_whole(place, data)
        return place

    def sweep(self) -> None:
        """Remove partial downloads of dead processes that are older than `LEFTOVER_S`."""
        with contextlib.suppress(OSError):
            for path in self._partials.iterdir():
                with contextlib.suppress(OSError), path.open("rb") as file:
                    if time.time() - os.fstat(file.fileno()).st_mtime > LEFTOVER_S and _is_locked(file):
                        path.unlink()

    @property
    def _partials(self) -> Path:
        return self.folder / "partial"

    def _blob(self, digest: FileDigest) -> Path:
        return self.folder / "sha256" / digest.sha256[:2] / digest.sha256

    def _note(self, path: str) -> Path:
        return self.folder / "seen" / hashlib.sha256(path.encode()).hexdigest()

    def _complete(self, name: str, digest: FileDigest, file: BinaryIO, download: Download) -> None:
        """Complete a locked partial file, check it, and rename it into place."""
        partial = _Partial(file, digest.size)
        if (free := self._free_bytes(self.folder)) < partial.n_missing:
            raise NotFetched(f"{name} needs {partial.n_missing} more bytes, the cache {self.folder} has {free} free")
        partial.fill(name, download)
        if (found := partial.describe()) != f"{digest.size} bytes, sha256 {digest.sha256}":
            partial.clear()
            raise WrongContent(f"{name}: expected {digest.size} bytes, sha256 {digest.sha256}; got {found}")
        self._blob(digest).parent.mkdir(parents=True, exist_ok=True)
        (self._partials / digest.sha256).replace(self._blob(digest))

    @contextlib.contextmanager
    def _lock(self, name: str, digest: FileDigest) -> Iterator[BinaryIO | None]:
        """The partial file, locked; None if it was renamed or removed meanwhile, then try again.

        Raises:
            NotFetched: another process holds the lock and makes no progress.
        """
        self._partials.mkdir(parents=True, exist_ok=True)
        path = self._partials / digest.sha256
        number = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
        with os.fdopen(number, "r+b", buffering=0) as file:
            self._wait_for_lock(name, file)
            # The previous holder may have renamed the file: then the open file is the complete one.
            yield file if _is_at(path, file) else None

    def _wait_for_lock(self, name: str, file: BinaryIO) -> None:
        size, end = -1, 0.0
        while not _is_locked(file):
            if (grown := os.fstat(file.fileno()).st_size) != size:
                size, end = grown, time.monotonic() + self._patience_s
            elif time.monotonic() > end:
                raise NotFetched(f"{name}: another process is fetching it and made no progress for {self._patience_s:g} s")
            if self._closed.wait(_POLL_S):
                raise NotFetched(f"{name}: the service is stopping")

    def _write_whole(self, path: Path, data: bytes) -> None:
        with self._writing():
            self._partials.mkdir(parents=True, exist_ok=True)
            path.parent.mkdir(parents=True, exist_ok=True)
            number, scratch = tempfile.mkstemp(dir=self._partials)
            try:
                with os.fdopen(number, "wb") as file:
                    os.fchmod(number, 0o644)
                    file.write(data)
                Path(scratch).replace(path)
            except BaseException:
                Path(scratch).unlink(missing_ok=True)
                raise

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Turn disk errors into `NotFetched`: an operator may free space or correct permissions."""
        try:
            yield
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise NotFetched(f"no space left in the cache {self.folder}: {error.strerror}") from error
            raise NotFetched(
                f"the cache {self.folder} cannot be written: {error.strerror}; set MODEL_CACHE to a writable folder"
            ) from error


class _Partial:
    """A locked partial file and the digest of its bytes so far."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self._file = file
        self._size = size
        self._n_bytes = 0
        self._hash = hashlib.sha256()
        while block := file.read(_BLOCK_BYTES):
            self._count(block)
        if self._n_bytes > size:
            self.clear()

    @property
    def n_missing(self) -> int:
        return self._size - self._n_bytes

    def fill(self, name: str, download: Download) -> None:
        """Append until the file has its size or the source has no more bytes."""
        problem: NotFetched | None = None
        for _ in range(MAX_RESUMES + 1):
            before, problem = self._n_bytes, None
            try:
                self._append(download(self._n_bytes))
            except NotFetched as error:
                problem = error
            if not self.n_missing or self._n_bytes == before:
                break
        if self.n_missing and problem is not None:
            raise problem

    def _append(self, blocks: Iterable[bytes]) -> None:
        for block in blocks:
            kept = block[: self.n_missing]
            self._file.write(kept)
            self._count(kept)
            if not self.n_missing:
                break

    def _count(self, block: bytes) -> None:
        self._hash.update(block)
        self._n_bytes += len(block)

    def describe(self) -> str:
        """Size and digest so far."""
        return f"{self._n_bytes} bytes, sha256 {self._hash.hexdigest()}"

    def clear(self) -> None:
        """Discard all bytes."""
        self._file.truncate(0)
        self._file.seek(0)
        self._hash, self._n_bytes = hashlib.sha256(), 0


def _is_locked(file: BinaryIO) -> bool:
    """Lock an open file without waiting, until it is closed; False if another process holds the lock."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_at(path: Path, file: BinaryIO) -> bool:
    """Whether a path still refers to an open file."""
    try:
        return os.path.samestat(path.lstat(), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False


def default_folder() -> Path:
    """The default: below the user's cache folder, else below the folder for temporary files.

    The latter is shared, so the folder below it must belong to this user and be writable by no other.

    Raises:
        NotFetched: neither can be written.
    """
    with contextlib.suppress(OSError, RuntimeError):
        home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        folder = Path(home) / "splitserve"
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK):
            return folder
    with contextlib.suppress(OSError):
        folder = Path(tempfile.gettempdir()) / f"splitserve-{os.geteuid()}"
        folder.mkdir(mode=0o700, exist_ok=True)
        facts = folder.lstat()
        if stat.S_ISDIR(facts.st_mode) and facts.st_uid == os.geteuid() and not facts.st_mode & 0o022:
            return folder
    raise NotFetched("no writable cache folder found; set MODEL_CACHE to a writable folder")
