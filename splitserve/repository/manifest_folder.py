"""A folder whose manifest lists every other file with its digest: a bundle, or the record of a release."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Generic, Protocol, Self, TypeVar

from splitserve.repository.files import read_checked, read_small
from splitserve.repository.manifest import MANIFEST_FILE, SIGNATURE_FILE, BundleError, FileDigest


class ListsFiles(Protocol):
    """The manifest of a folder."""

    @property
    def files(self) -> Mapping[str, FileDigest]:
        """Size and digest of each other file, by name."""
        ...


KeyT = TypeVar("KeyT")
ManifestT = TypeVar("ManifestT", bound=ListsFiles)


class RemoteFiles(Protocol):
    """The files of a folder that is not local."""

    def fetch(self, listed: Mapping[str, FileDigest]) -> None:
        """Make these files local.

        Raises:
            BundleError: a file cannot be fetched, or is not what the manifest says.
        """
        ...

    def read(self, name: str, digest: FileDigest) -> bytes:
        """The bytes of a file, checked.

        Raises:
            BundleError: it cannot be read, or its size or digest is another.
        """
        ...


class ManifestFolder(Generic[KeyT, ManifestT]):
    """A folder whose manifest has been read; each other file is checked against it when it is read.

    Args:
        key: names it.
        folder: where its manifest and its signature are, and, unless they are remote, its files.
        manifest: as decoded.
        manifest_sha256: of the bytes that the manifest was decoded from.
        remote: its files, where the folder does not have them.
    """

    def __init__(
        self, key: KeyT, folder: Path, manifest: ManifestT, manifest_sha256: str, remote: RemoteFiles | None = None
    ) -> None:
        self.key = key
        self.folder = folder
        self.manifest = manifest
        self.manifest_sha256 = manifest_sha256
        self._remote = remote

    def renamed(self, key: KeyT, manifest: ManifestT) -> Self:
        """The same files under another key. ``manifest``: as it was read, with the names of that key."""
        return type(self)(key, self.folder, manifest, self.manifest_sha256, self._remote)

    @property
    def listed(self) -> Mapping[str, FileDigest]:
        """What the manifest says of each file."""
        return self.manifest.files

    def fetch(self) -> None:
        """Make all files local, so that reading needs no network. Nothing to do for a folder.

        Raises:
            BundleError: a file cannot be fetched, or is not what the manifest says.
        """
        if self._remote is not None:
            self._remote.fetch(self.listed)

    def read(self, name: str) -> bytes:
        """The bytes of a file, checked.

        Raises:
            BundleError: the manifest does not list it, it is missing, or its size or digest is not the manifest's.
        """
        expected = self.expected(name)
        return self._remote.read(name, expected) if self._remote else read_checked(self.folder / name, name, expected)

    def expected(self, name: str) -> FileDigest:
        """Size and digest of a file in the manifest.

        Raises:
            BundleError: the manifest does not list it.
        """
        if name not in self.listed:
            raise BundleError(f"{MANIFEST_FILE} lists no {name}")
        return self.listed[name]

    def signature(self) -> bytes | None:
        """The bytes of its signature, unverified; None if it has none.

        Raises:
            BundleError: it cannot be read, is not a regular file, or is too large.
        """
        path = self.folder / SIGNATURE_FILE
        return read_small(path) if os.path.lexists(path) else None


def check_unlisted(folder: Path, listed: Mapping[str, FileDigest]) -> None:
    """Check that a folder has no file but its manifest, its signature and those that the manifest lists.

    Raises:
        BundleError: it has others, or cannot be read.
    """
    try:
        # Names with two dots are Kubernetes': a mounted volume has its data in "..2026_11_30…", linked as "..data".
        present = {path.name for path in folder.iterdir() if not path.name.startswith("..")} - {MANIFEST_FILE, SIGNATURE_FILE}
    except OSError as error:
        raise BundleError(f"the folder cannot be read: {error.strerror}") from None
    if unlisted := sorted(present - listed.keys()):
        raise BundleError(f"{MANIFEST_FILE} does not list {', '.join(unlisted)}")
