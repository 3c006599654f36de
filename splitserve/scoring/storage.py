"""Where a run reads and writes: paths of this machine, and URLs through fsspec.

What is written appears whole or not at all. In a folder: under a temporary name beside it, flushed to disk, renamed, and the
folder flushed. In a bucket: by one upload, which is visible when it is complete; a rename there would be a copy.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, Protocol

import msgspec

from splitserve.durable import sync_folder
from splitserve.scoring.errors import ScoringError

SCRATCH_PREFIX = ".splitserve-"
"""Begins the names of temporary files, which a process that was killed leaves."""

_VALIDATORS = ("ETag", "etag", "generation", "LastModified", "last_modified", "mtime", "created")
"""Keys under which fsspec's packages report what changes with a file's content, most reliable first."""


class Identity(msgspec.Struct, frozen=True):
    """What changes with a file's content: its size, and its time of modification in nanoseconds or its ETag."""

    size: int
    stamp: str

    def __str__(self) -> str:
        return f"{self.size} bytes, {self.stamp}"


class Storage(Protocol):
    """A place of files. Paths are absolute, or URLs."""

    def open(self, path: str) -> IO[bytes]:
        """A file to read, seekable.

        Raises:
            OSError: it cannot be opened.
        """
        ...

    def identity(self, path: str) -> Identity:
        """Raises:
        OSError: there is no such file.
        """
        ...

    def is_folder(self, path: str) -> bool: ...

    def exists(self, path: str) -> bool: ...

    def files(self, folder: str) -> list[str]:
        """Paths of all files below a folder, at any depth, sorted by the bytes of their paths."""
        ...

    def glob(self, pattern: str) -> list[str]:
        """Paths of files that match, sorted likewise."""
        ...

    def writing(self, path: str, scratch: str = "") -> contextlib.AbstractContextManager[IO[bytes]]:
        """A file that gets its name at the end of the ``with`` block, and none if the block raises.

        Args:
            path: of the file; its folder is made.
            scratch: a folder of the same file system for the temporary file; that of the file by default.
        """
        ...

    def remove(self, path: str) -> None:
        """Remove a file or a folder with all that is below it; nothing if it does not exist."""
        ...


def is_url(path: str) -> bool:
    """Whether a path is read through fsspec."""
    return "://" in path and not path.startswith("file://")


def storage_of(path: str) -> Storage:
    """The storage that has a path.

    Raises:
        ScoringError: the packages for such a URL are not installed.
    """
    return RemoteStorage(path) if is_url(path) else LocalStorage()


def absolute(path: str) -> str:
    """A path as a run records it, so that a worker with another current folder finds it."""
    if is_url(path):
        return path
    return os.path.abspath(path.removeprefix("file://"))  # noqa: PTH100 - resolve() would follow links, whose names say what they are


def resolved(path: str) -> str:
    """A path without links, to tell whether two are one file."""
    return path if is_url(path) else os.path.realpath(path)


def parent(path: str) -> str:
    """The folder of a path."""
    return path.rpartition("/")[0]


class LocalStorage:
    """Paths of this machine, or of file systems that it has mounted."""

    def open(self, path: str) -> IO[bytes]:
        return Path(path).open("rb")

    def identity(self, path: str) -> Identity:
        facts = Path(path).stat()
        return Identity(facts.st_size, str(facts.st_mtime_ns))

    def is_folder(self, path: str) -> bool:
        return Path(path).is_dir()

    def exists(self, path: str) -> bool:
        return Path(path).exists()

    def files(self, folder: str) -> list[str]:
        found = [str(Path(base) / name) for base, _, names in os.walk(folder, onerror=_raise) for name in names]
        return sorted(found, key=os.fsencode)

    def glob(self, pattern: str) -> list[str]:
        import glob

        found = glob.iglob(pattern, recursive=True)  # noqa: PTH207 - Path.glob takes relative patterns only
        return sorted((path for path in found if Path(path).is_file()), key=os.fsencode)

    @contextlib.contextmanager
    def writing(self, path: str, scratch: str = "") -> Iterator[IO[bytes]]:
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=SCRATCH_PREFIX, dir=scratch or target.parent)
        temporary = Path(name)
        try:
            with os.fdopen(handle, "wb") as file:
                yield file
                file.flush()
                os.fchmod(file.fileno(), 0o666 & ~_umask())
                os.fsync(file.fileno())
            temporary.replace(target)
            sync_folder(target.parent)
        finally:
            temporary.unlink(missing_ok=True)

    def remove(self, path: str) -> None:
        import shutil

        if Path(path).is_dir():
            shutil.rmtree(path)
        else:
            Path(path).unlink(missing_ok=True)


class RemoteStorage:
    """URLs through fsspec, with the environment's credentials, an instance of its own, and no cache of listings.

    Raises:
        ScoringError: fsspec or the package for such URLs is not installed.
    """

    def __init__(self, url: str) -> None:
        try:
            import fsspec.core

            self._files: Any = fsspec.core.url_to_fs(url, skip_instance_cache=True, use_listings_cache=False)[0]
        except (ImportError, ValueError) as error:
            raise ScoringError(f"{url}: {error}") from error

    def open(self, path: str) -> IO[bytes]:
        opened: IO[bytes] = self._files.open(path, "rb")
        return opened

    def identity(self, path: str) -> Identity:
        facts = self._files.info(path)
        stamp = next((str(facts[key]) for key in _VALIDATORS if facts.get(key)), "")
        return Identity(int(facts.get("size") or 0), stamp)

    def is_folder(self, path: str) -> bool:
        return bool(self._files.isdir(path))

    def exists(self, path: str) -> bool:
        return bool(self._files.exists(path))

    def files(self, folder: str) -> list[str]:
        return sorted((self._files.unstrip_protocol(name) for name in self._files.find(folder)), key=str.encode)

    def glob(self, pattern: str) -> list[str]:
        return sorted((self._files.unstrip_protocol(name) for name in self._files.glob(pattern)), key=str.encode)

    @contextlib.contextmanager
    def writing(self, path: str, scratch: str = "") -> Iterator[IO[bytes]]:
        self._files.makedirs(parent(path), exist_ok=True)
        file = self._files.open(path, "wb")
        try:
            yield file
        except BaseException:
            if hasattr(file, "discard"):
                with contextlib.suppress(Exception):  # the first error is the one to tell
                    file.discard()
            file.closed = True  # else the end of the object would complete the upload
            raise
        file.close()

    def remove(self, path: str) -> None:
        if self._files.exists(path):
            self._files.rm(path, recursive=True)


def _raise(error: OSError) -> None:
    raise error


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
