"""Reading the files of a repository that may hold anything: only regular files, within size limits, checked as they are read.

Folders may be symbolic links, as in mounted volumes. A file is opened once, without following a link, except for the one that
Kubernetes makes of each file at the top of a volume (``FILE -> ..data/FILE``); its type, its size and its digest are those of the
bytes that are returned.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import stat
from collections.abc import Callable, Mapping
from pathlib import Path

from splitserve.repository.manifest import MANIFEST_FILE, BundleError, FileDigest, NotFetched

MAX_SMALL_FILE_BYTES = 16 * 1024**2
"""Largest manifest, route, signature or index that is read. A manifest with ten thousand columns has about 2 MiB."""

_SHA256 = re.compile(r"[0-9a-f]{64}")

_OPEN_FLAGS = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0)
"""No link is followed, and opening a pipe does not wait for its writer."""

_KUBERNETES_DATA = "..data"
"""Where a mounted volume's files are: a link to a folder that is replaced as a whole. Source: Kubernetes, ``AtomicWriter``."""

_FILE_TYPES = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a pipe",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
}


def read_small(path: Path) -> bytes:
    """The bytes of a manifest, a route, a signature or an index.

    Raises:
        NotFetched: the file does not exist.
        BundleError: it cannot be read, is not a regular file, or is larger than `MAX_SMALL_FILE_BYTES`.
    """

    def check_size(size: int) -> None:
        if size > MAX_SMALL_FILE_BYTES:
            raise BundleError(f"{path.name} has {size} bytes; the limit is {MAX_SMALL_FILE_BYTES}")

    return _read(path, path.name, check_size)


def read_checked(path: Path, name: str, expected: FileDigest) -> bytes:
    """The bytes of a file whose size and digest are known. If the size differs, nothing is read.

    Raises:
        NotFetched: the file does not exist.
        BundleError: it cannot be read, is not a regular file, or its size or digest is not the expected one.
    """

    def check_size(size: int) -> None:
        if size != expected.size:
            raise BundleError(f"{name}: expected {expected.size} bytes as in {MANIFEST_FILE}, got {size}")

    data = _read(path, name, check_size)
    if (found := hashlib.sha256(data).hexdigest()) != expected.sha256:
        raise BundleError(f"{name}: expected sha256 {expected.sha256} as in {MANIFEST_FILE}, got {found}")
    return data


def check_digest(digest: FileDigest, what: str) -> None:
    """Check that a digest is safe to use as a file name, which it becomes in caches.

    Raises:
        BundleError: not 64 hex digits, or the size is negative.
    """
    if not _SHA256.fullmatch(digest.sha256) or digest.size < 0:
        raise BundleError(f"{what}: expected a sha256 of 64 hex digits and a size, got {digest.sha256[:80]!r}, {digest.size}")


def check_file_list(
    files: Mapping[str, FileDigest], where: str, *, is_name: Callable[[str], bool], expected: str, max_bytes: int
) -> None:
    """Check the files that a manifest lists, before any of them is read.

    Args:
        files: by name.
        where: the manifest, for messages.
        is_name: whether a file may have this name.
        expected: what `is_name` accepts, for messages.
        max_bytes: most that all of them together may have.

    Raises:
        BundleError: a name is not expected, a digest is not safe, or they are too large.
    """
    for name, digest in files.items():
        if not is_name(name):
            raise BundleError(f"{where}: {name[:128]!r} cannot be the name of a file; expected {expected}")
        check_digest(digest, f"{where}: {name}")
    if (n_bytes := sum(digest.size for digest in files.values())) > max_bytes:
        raise BundleError(f"{where}: its files have {n_bytes} bytes; the limit is {max_bytes}")


def subfolders(parent: Path) -> list[str]:
    """Names of the folders in ``parent`` that do not start with a dot, sorted; none if ``parent`` does not exist.

    Of a folder that is no link, nothing but its name is read: there may be thousands, and services list them at every poll.

    Raises:
        BundleError: ``parent`` exists and cannot be read.
    """
    try:
        with os.scandir(parent) as entries:
            return sorted(entry.name for entry in entries if not entry.name.startswith(".") and entry.is_dir())
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise BundleError(f"{parent.name}: cannot be read: {error.strerror}") from error


def _read(path: Path, name: str, check_size: Callable[[int], None]) -> bytes:
    try:
        with open(path, "rb", opener=_open_without_following) as file:
            facts = os.fstat(file.fileno())
            if not stat.S_ISREG(facts.st_mode):
                what = _FILE_TYPES.get(stat.S_IFMT(facts.st_mode), "something else")
                raise BundleError(f"{name} is {what}; expected a regular file")
            check_size(facts.st_size)
            data = file.read(facts.st_size + 1)  # one more, to see whether it has grown
    except FileNotFoundError as error:  # a copy in progress may not have written it yet
        raise NotFetched(f"{name} cannot be read: {error.strerror}") from None
    except OSError as error:
        reason = "it is a symbolic link" if error.errno == errno.ELOOP else error.strerror
        raise BundleError(f"{name} cannot be read: {reason}") from None
    if len(data) != facts.st_size:
        raise BundleError(f"{name} changed while it was read")
    return data


def _open_without_following(path: str, _: int) -> int:
    try:
        return os.open(path, _OPEN_FLAGS)
    except OSError as error:
        link = Path(path)
        if error.errno == errno.ELOOP and link.readlink() == Path(_KUBERNETES_DATA, link.name):
            return os.open(link.parent / _KUBERNETES_DATA / link.name, _OPEN_FLAGS)
        raise
